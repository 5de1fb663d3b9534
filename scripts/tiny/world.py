"""Step 3 of 4 of the tiny assets: an untrained Wan pipeline folder and a data set of encoded scenes.

    python scripts/tiny/world.py --parts build/tiny --pipeline build/untrained --data build/world
    python scripts/tiny/world.py --pipeline anyflow_cli/assets/tiny --data build/world

``--parts`` is the output of steps 1 and 2; without it, the pipeline folder exists already. The data set has
the format of ``anyflow synthesize``. Processes draw the scenes, this one encodes them. On a GPU convolutions
take TF32 inputs, torch's default: as precise as the stored weights, which are in half precision.

Legend: N clips, T frames, H W pixels, F latent frames, C channels, L text tokens, D text width.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor
from vae import pass_all_frames_at_once

from anyflow_cli.data.shapes_world import FPS, FRAMES, HEIGHT, WIDTH, WORLDS, RgbPixels, render
from anyflow_cli.data.shards import (
    LatentSample,
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
SHARD = 128
TOGETHER = {"cuda": 64, "cpu": 1}  # clips encoded at once
CANVAS: list[RgbPixels] = []  # all clips (N, T, H, W, 3), in memory that the drawing processes share
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


def draw(indices: range) -> None:
    """Render scenes of the default world onto the canvas."""
    for index in indices:
        CANVAS[0][index] = render(WORLDS["shapes"].scene(index))


def embeddings(text: TextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """Embed each distinct caption once, (L, D) without padding, those of equal length together."""
    distinct, by_length = sorted(set(captions)), defaultdict(list)
    for caption, length in zip(distinct, text.tokens(distinct), strict=True):
        by_length[length].append(caption)
    return {
        caption: embedding
        for length, group in by_length.items()
        for caption, embedding in zip(group, text.encode(group, length).cpu(), strict=True)
    }


def samples(
    indices: range, captions: Sequence[str], latents: Tensor, texts: dict[str, Tensor]
) -> Iterator[LatentSample]:
    """Samples of scenes of the default world from their latents (N, F, C, H, W)."""
    for index, own in zip(indices, latents, strict=True):
        facts = {"seed": index, "fps": FPS, "frames": FRAMES, "source": "world shapes"}
        yield LatentSample(index, captions[index], own, texts[captions[index]], facts)


def write_data(pipeline: Path, target: Path, count: int, jobs: int, device: torch.device) -> None:
    """Encode ``count`` clips, which ``jobs`` processes draw, and write the shards and the manifest."""
    target.mkdir(parents=True, exist_ok=True)
    shards = shard_ranges(count, SHARD)
    shape = (count, FRAMES, HEIGHT, WIDTH, 3)
    CANVAS.append(np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape))
    # Forked before CUDA starts, these processes share the canvas, and need not import torch.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        drawn = pool.map(draw, shards)
        begun = time.monotonic()
        captions = [WORLDS["shapes"].scene(index).caption for index in range(count)]
        pass_all_frames_at_once()
        vae, text = VideoVAE.load(pipeline, device), TextEncoder.load(pipeline, device=device)
        texts = embeddings(text, ["", *captions])
        write_negative(target, texts[""])
        records = []
        for number, (indices, _) in enumerate(zip(shards, drawn, strict=True)):
            pixels = torch.from_numpy(CANVAS[0][indices.start : indices.stop])
            video = pixels.to(device).permute(0, 1, 4, 2, 3) / 255  # (N, T, 3, H, W)
            latents = vae.encode(video, TOGETHER[device.type]).cpu()
            made = samples(indices, captions, latents, texts)
            records.append(write_shard(shard_path(target, number), made))
            print(f"shard {number} after {time.monotonic() - begun:.1f} s", flush=True)
    write_manifest(target, records, {"source": "world shapes"})


def main() -> None:
    """Write the pipeline folder, if parts are given, and the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=Path, help="write --pipeline from these, with an untrained network")
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=5120)
    parser.add_argument("--jobs", type=int, default=4, help="processes that draw scenes")
    parser.add_argument("--device", choices=TOGETHER, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.parts:
        write_pipeline(args.parts, args.pipeline)
    write_data(args.pipeline, args.data, args.count, args.jobs, torch.device(args.device))


if __name__ == "__main__":
    main()
