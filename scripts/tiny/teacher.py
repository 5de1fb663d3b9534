"""Step 4 of 4 of the tiny assets: the teacher, a Wan transformer of 1.8 million weights.

    python scripts/tiny/teacher.py --pipeline build/untrained --data build/world --out build/teacher

Flow matching on the data set of step 3. The optimizer is Muon for matrices and Adam for the rest, because
training time matters here and the paper does not cover training a teacher from nothing. ``--out`` becomes a
Wan pipeline folder with the EMA weights. A later round starts from the folder of an earlier one, at a lower
``--peak``. The last round was averaged half and half with its initial weights (``--keep 0.5``), which is
better than either.

Legend: B clips, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.losses import flow_matching_loss
from anyflow_cli.flow.times import sample_logit_normal
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import load_network, write_transformer
from anyflow_cli.model.weights_io import LazyWeight

SHIFT = 3.0  # of the training times
TEXT_TOKENS = 32
LONG_TEXT = (0.05, 512)  # share of steps padded to the default length of pipelines, so that both lengths work
TEXT_DROPOUT = 0.12
# Share of steps on the first latent frames of more clips: Wan learns from images and videos, and a causal
# model begins with a single frame.
SHORTER = 0.4
FRAMES = (1, 1, 1, 3, 5, 7)
EMA = 0.998


def optimizers(network: FlowMapTransformer) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of the blocks, AdamW for the rest, each with its peak learning rate."""
    matrices = [p for p in network.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0, momentum=0.95)
    return [(muon, 0.02), (torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0), 1e-3)]


def pad(text: Tensor, tokens: int) -> Tensor:
    """Zero-pad (B, L, D) to ``tokens`` tokens."""
    return torch.nn.functional.pad(text, (0, 0, 0, tokens - text.shape[1]))


def main() -> None:
    """Train, print progress, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--peak", type=float, default=1.0, help="scale of the learning rates; lower it to continue"
    )
    parser.add_argument("--minutes", type=float, default=30, help="length of the schedule")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=float, default=0.0, help="share of the initial weights in the result")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    network = load_network(args.pipeline)
    network.requires_grad_(True).train()
    data = LatentData(args.data, TEXT_TOKENS)
    everything = data.batch(range(len(data)))
    length = everything.latents.shape[1]
    first = {name: value.clone() for name, value in network.state_dict().items()}
    average = {name: value.clone() for name, value in first.items()}
    generator = torch.Generator().manual_seed(args.seed)
    groups = optimizers(network)
    begun, total = time.monotonic(), 0.0
    for step in itertools.count():
        done = (time.monotonic() - begun) / (60 * args.minutes)
        if done >= 1:
            break
        frames, batch = length, args.batch
        if torch.rand((), generator=generator) < SHORTER:
            frames = FRAMES[int(torch.randint(len(FRAMES), (), generator=generator))]
            batch = min(batch * length // frames, 4 * batch)
        index = torch.randint(len(data), (batch,), generator=generator)
        x, text = everything.latents[index, :frames], everything.text[index]
        dropped = torch.rand(batch, generator=generator) < TEXT_DROPOUT
        text = torch.where(dropped[:, None, None], data.negative, text)
        if torch.rand((), generator=generator) < LONG_TEXT[0]:
            text = pad(text, LONG_TEXT[1])
        eps = torch.randn(x.shape, generator=generator)
        t = sample_logit_normal(batch, SHIFT, generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(Conditioned(network, Condition(text)), x, eps, t)
        network.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, peak in groups:
            for group in optimizer.param_groups:
                group["lr"] = args.peak * peak * min(1.0, (step + 1) / 100, 1.4 * (1 - done))
            optimizer.step()
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 - min(EMA, (step + 1) / (step + 10)))
        total += loss.item()
        if step % 50 == 49:
            print(f"step {step + 1} ({done:.0%}) loss {total / 50:.4f}", flush=True)
            total = 0.0
        if step % 500 == 499:
            save(args.pipeline, args.out, network, average)
    mixed = {name: value.lerp(first[name], args.keep) for name, value in average.items()}
    save(args.pipeline, args.out, network, mixed)


def save(pipeline: Path, target: Path, network: FlowMapTransformer, weights: dict[str, Tensor]) -> None:
    """Write the pipeline folder with these weights, over what an earlier call wrote."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(pipeline, target, ignore=shutil.ignore_patterns("transformer"))
    lazy = {name: LazyWeight.of(value) for name, value in weights.items()}
    write_transformer(target / "transformer", network.config, lazy)


if __name__ == "__main__":
    main()
