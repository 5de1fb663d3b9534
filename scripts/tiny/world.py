"""Step 3 of 4 of the tiny assets: an untrained Wan pipeline folder and a data set of encoded scenes.

    python scripts/tiny/world.py --parts build/tiny --pipeline build/untrained --data build/world

``--parts`` is the output of steps 1 and 2. The data set has the format of ``anyflow synthesize``.

Legend: T frames, H W pixels, F latent frames, C channels.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from vae import pass_all_frames_at_once

from anyflow_cli.data.shapes_world import FPS, FRAMES, WORLDS, render
from anyflow_cli.data.shards import (
    LatentSample,
    read_shard_record,
    shard_path,
    shard_ranges,
    write_manifest,
    write_negative,
    write_shard,
)
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.recipe.load import load_recipe

TRANSFORMER = {
    "patch_size": (1, 2, 2), "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 6,
    "ffn_dim": 512, "in_channels": 8, "out_channels": 8, "text_dim": 64, "freq_dim": 256,
    "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
}  # fmt: skip
SLOW_ENOUGH = 0.02  # radians per thousandth of t: the fastest time channel that starts at full strength


def untrained_transformer() -> WanTransformer3DModel:
    """A Wan transformer with small initial weights on the fast time channels, so that it is smooth in t.

    The difference quotient of stage 1 evaluates 0.005 to either side, where the fastest channels turn by 5
    radians.
    """
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**TRANSFORMER)
    half = TRANSFORMER["freq_dim"] // 2
    speed = 10000.0 ** (-torch.arange(half) / half)
    first = transformer.condition_embedder.time_embedder.linear_1
    first.weight.data *= (SLOW_ENOUGH / speed).clamp(max=1).repeat(2)
    return transformer


def write_pipeline(parts: Path, target: Path) -> None:
    """Write a Wan pipeline folder from the parts, an untrained transformer and a scheduler."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(parts / part, target / part)
    untrained_transformer().save_pretrained(target / "transformer")
    shift = load_recipe("tiny").model.shift
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(target / "scheduler")
    index = {
        "_class_name": "WanPipeline", "_diffusers_version": "0.35.0",
        "boundary_ratio": None, "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }  # fmt: skip
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def samples(indices: range, vae: VideoVAE, text: TextEncoder) -> Iterator[LatentSample]:
    """Encode scenes of the default world."""
    for index in indices:
        scene = WORLDS["shapes"].scene(index)
        video = torch.from_numpy(render(scene)).permute(0, 3, 1, 2)[None] / 255  # (1, T, 3, H, W)
        embedding = text.encode([scene.caption], text.tokens([scene.caption])[0])[0]
        facts = {"seed": index, "fps": FPS, "frames": FRAMES, "source": "world shapes"}
        yield LatentSample(index, scene.caption, vae.encode(video)[0], embedding, facts)


def write_part(pipeline: Path, target: Path, part: list[tuple[int, range]]) -> None:
    """Encode and write some of the shards, in a process with one thread."""
    torch.set_num_threads(1)
    pass_all_frames_at_once()
    vae, text = VideoVAE.load(pipeline), TextEncoder.load(pipeline)
    begun = time.monotonic()
    for number, indices in part:
        write_shard(shard_path(target, number), samples(indices, vae, text))
        print(f"shard {number} after {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)


def write_data(pipeline: Path, target: Path, count: int, jobs: int) -> None:
    """Encode ``count`` clips in ``jobs`` processes, shard by shard, and write the manifest."""
    target.mkdir(parents=True, exist_ok=True)
    shards = list(enumerate(shard_ranges(count, 128)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(
            pool.map(
                write_part, *zip(*((pipeline, target, shards[job::jobs]) for job in range(jobs)), strict=True)
            )
        )
    text = TextEncoder.load(pipeline)
    write_negative(target, text.encode([""], text.tokens([""])[0])[0])
    records = [read_shard_record(shard_path(target, number)) for number, _ in shards]
    write_manifest(target, [record for record in records if record], {"source": "world shapes"})


def main() -> None:
    """Write the pipeline folder and the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5120)
    parser.add_argument("--jobs", type=int, default=4)
    args = parser.parse_args()
    write_pipeline(args.parts, args.pipeline)
    write_data(args.pipeline, args.data, args.count, args.jobs)


if __name__ == "__main__":
    main()
