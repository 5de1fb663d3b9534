"""The two policies of the key cache on one causal model: what ``incremental`` saves, how far its videos move.

    python -m benchmarks.policies --model runs/tiny-causal/distill --prompts 32
    python -m benchmarks.policies --model runs/tiny-causal/distill --prompts 1 --set model.height=480 ...

``exact`` encodes what stays in the window again when a chunk leaves it, ``incremental`` does not
(``model/cache.py``). Both sample the same prompts from the same noise; seconds are the processor's, a video,
without the decoder. Moved: the root mean square difference of the latents of each chunk, relative to those of
``exact``. Totals are of the suite shapes, where the videos have its size.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from anyflow_cli import sample
from anyflow_cli.data.world import FRAMES, HEIGHT, WIDTH
from anyflow_cli.evaluate.shapes import ShapesSuite, score_videos
from anyflow_cli.model.cache import Policy
from anyflow_cli.model.causal import causal_of, chunks_of, partition_for
from anyflow_cli.model.rollout import rollout
from anyflow_cli.recipe.load import load_recipe

POLICIES: tuple[Policy, Policy] = ("exact", "incremental")


class Sampled(NamedTuple):
    """Latents (B, F, C, H, W) of all prompts, seconds a video, and their Total."""

    latents: Tensor
    seconds: float
    total: float | None


def main() -> None:
    """Print one line a number of steps."""
    args = _arguments()
    recipe = load_recipe(args.recipe, args.set)
    sampler = sample.Sampler.load(args.model, recipe)
    causal = causal_of(sampler._network.config)
    chunks = chunks_of(partition_for(causal, sampler.shape[0]))
    prompts = ShapesSuite(recipe.data.world).prompts(args.prompts)
    sizes = [chunk.frames for chunk in chunks]
    print(f"{args.model}: chunks {sizes}, {causal.full_chunks} in full, {len(prompts)} prompts")
    for steps in args.steps:
        exact, incremental = (_sampled(sampler, prompts, steps, args.batch, policy) for policy in POLICIES)
        moved = [
            float((incremental.latents - exact.latents)[:, c.slice].square().mean().sqrt())
            / float(exact.latents[:, c.slice].square().mean().sqrt())
            for c in chunks
        ]
        print(
            f"{steps} steps: {exact.seconds:.3f} and {incremental.seconds:.3f} s"
            f" ({1 - incremental.seconds / exact.seconds:.0%} saved), moved {_words(moved)},"
            f" Total {_words([exact.total])} and {_words([incremental.total])}"
        )


def _sampled(sampler: sample.Sampler, prompts: list[str], steps: int, batch: int, policy: Policy) -> Sampled:
    """The fastest of two passes counts: what else runs on a machine only ever adds."""
    seeds, seconds = list(range(1000, 1000 + len(prompts))), []
    with patch.object(sample, "rollout", partial(rollout, policy=policy)):
        for _ in range(2):
            start = time.process_time()
            latents = torch.cat(list(sampler.latents(prompts, seeds, steps, batch)))
            seconds.append((time.process_time() - start) / len(prompts))
    if (sampler.model.frames, sampler.model.height, sampler.model.width) != (FRAMES, HEIGHT, WIDTH):
        return Sampled(latents, min(seconds), None)
    videos = [video for part in latents.split(batch) for video in sampler.decode(part)]
    return Sampled(latents, min(seconds), score_videos(videos, prompts).total)


def _words(values: list[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3g}" for value in values)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a causal model's folder or run")
    parser.add_argument("--recipe", default="tiny-causal")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 32])
    return parser.parse_args()


if __name__ == "__main__":
    main()
