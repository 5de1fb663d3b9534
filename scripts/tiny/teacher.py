r"""Step 4 of 4 of the tiny assets: the teacher, a Wan transformer of 1.8 million weights.

    python scripts/tiny/teacher.py --pipeline build/untrained --data build/world --out build/teacher
    python scripts/tiny/teacher.py --pipeline anyflow_cli/assets/tiny --data build/world --out build/longer \
        --peak 0.4 --batch 256 --minutes 1.2

Flow matching on the data set of step 3. The optimizer is Muon for matrices and Adam for the rest, because
training time matters here and the paper does not cover training a teacher from nothing. ``--out`` becomes a
Wan pipeline folder with the EMA weights. A later round starts from the folder of an earlier one, at a lower
``--peak``. The last round was averaged half and half with its initial weights (``--keep 0.5``), which is
better than either. The loop waits for the device every 50 steps only.

Legend: N matrices of M rows and K columns, L text tokens, D text width; B clips.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from vae import orthogonal

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.flow.losses import flow_matching_loss
from anyflow_cli.flow.times import sample_logit_normal
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


class Muon:
    """Muon (Jordan et al. 2024) like ``torch.optim.Muon``, in fp32, with matrices of one shape together."""

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        self.lr, self.momentum = lr, momentum
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        self.groups = [(group, torch.zeros_like(torch.stack(group))) for group in by_shape.values()]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at ``scale`` times the learning rate."""
        for matrices, average in self.groups:  # average: (N, M, K)
            gradient = torch.stack([matrix.grad for matrix in matrices])
            average.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(average, self.momentum))
            torch._foreach_add_(matrices, update.unbind(), alpha=-scale * self.lr)


class Trainer:
    """Optimizers and EMA: Muon for the matrices of the blocks, AdamW for the rest."""

    def __init__(self, network: FlowMapTransformer) -> None:
        self.weights = list(network.parameters())
        self.average = [weight.detach().clone() for weight in self.weights]
        matrices = [p for p in network.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices, lr=0.02)
        self.adam_lr = 1e-3
        others = [p for p in self.weights if id(p) not in chosen]
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, loss: Tensor, scale: float, decay: float) -> None:
        """Update the weights at ``scale`` times the learning rates, and their average."""
        for weight in self.weights:
            weight.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.muon.step(scale)
        self.adam.param_groups[0]["lr"] = scale * self.adam_lr
        self.adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)


class Draws:
    """Random batches of a data set on a device."""

    def __init__(self, data: LatentData, clips: int, seed: int, device: torch.device) -> None:
        everything = data.batch(range(len(data)))
        self.latents, self.text = everything.latents.to(device), everything.condition.text.to(device)
        self.negative, self.clips = data.negative.to(device), clips
        self.choices, self.generator = random.Random(seed), torch.Generator(device).manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and noise (B, F, C, H, W), times (B,), text (B, L, D)."""
        frames, clips = self.latents.shape[1], self.clips
        if self.choices.random() < SHORTER:
            length, frames = frames, self.choices.choice(FRAMES)
            clips = min(clips * length // frames, 4 * clips)
        on_device = {"generator": self.generator, "device": self.generator.device}
        index = torch.randint(len(self.latents), (clips,), **on_device)
        x, text = self.latents[index, :frames], self.text[index]
        dropped = torch.rand(clips, **on_device) < TEXT_DROPOUT
        text = torch.where(dropped[:, None, None], self.negative, text)
        if self.choices.random() < LONG_TEXT[0]:
            text = torch.nn.functional.pad(text, (0, 0, 0, LONG_TEXT[1] - TEXT_TOKENS))
        return x, torch.randn(x.shape, **on_device), sample_logit_normal(clips, SHIFT, self.generator), text


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=float, default=0.0, help="share of the initial weights in the result")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already")
    device = torch.device(args.device)
    network = load_network(args.pipeline, device=device)
    network.requires_grad_(True).train()
    first = {name: value.clone() for name, value in network.state_dict().items()}
    draws = Draws(LatentData(args.data, TEXT_TOKENS), args.batch, args.seed, device)
    trainer = Trainer(network)
    begun, total = time.monotonic(), torch.zeros((), device=device)
    for step in itertools.count():
        done = (time.monotonic() - begun) / (60 * args.minutes)
        if done >= 1:
            break
        x, eps, t, text = draws.batch()
        with torch.autocast(device.type, torch.bfloat16):
            loss = flow_matching_loss(partial(network, text=text), x, eps, t)
        scale = args.peak * min(1.0, (step + 1) / 100, 1.4 * (1 - done))
        trainer.step(loss, scale, decay=min(EMA, (step + 1) / (step + 10)))
        total += loss.detach()
        if step % 50 == 49:
            print(f"step {step + 1} ({done:.0%}) loss {total.item() / 50:.4f}", flush=True)
            total.zero_()
    names = [name for name, _ in network.named_parameters()]
    mixed = {
        name: value.lerp(first[name], args.keep).cpu()
        for name, value in zip(names, trainer.average, strict=True)
    }
    save(args.pipeline, args.out, network, mixed)


def save(pipeline: Path, target: Path, network: FlowMapTransformer, weights: dict[str, Tensor]) -> None:
    """Write the pipeline folder with these weights."""
    shutil.copytree(pipeline, target, ignore=shutil.ignore_patterns("transformer"))
    lazy = {name: LazyWeight.of(value) for name, value in weights.items()}
    write_transformer(target / "transformer", network.config, lazy)


if __name__ == "__main__":
    main()
