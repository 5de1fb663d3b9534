"""Memory of a causal rollout of stage 2, with all chunks' graphs or one recomputed (``recompute_rollout``).

python -m benchmarks.rollout

Bytes of tensors beyond weights and data, and processor time, of the matching term of ``tiny-causal`` on eight
samples, forward and backward, on one thread.
"""

from __future__ import annotations

import time

import torch

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.simulation import draw_segment
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline
from anyflow_cli.model.precision import autocast, resolve_precision
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import Recipe, latent_frames
from anyflow_cli.train.on_policy import OnPolicyTerms
from anyflow_cli.train.rng import StepRng
from tests.plan.small import Live

SAMPLES = 8
MIB = 2**20


def main() -> None:
    """Print both ways for five and nine chunks."""
    torch.set_num_threads(1)
    for chunks in (5, 9):
        for recomputes in (False, True):
            partition = [1] + [2] * (chunks - 1)
            recipe = load_recipe(
                "tiny-causal",
                [
                    f"model.frames={4 * sum(partition) - 3}",
                    f"model.causal.partition={partition}",
                    f"distill.recompute_rollout={str(recomputes).lower()}",
                ],
            )
            held, peak, seconds = measure(recipe)
            way = "recomputed" if recomputes else "all held"
            print(f"{chunks} chunks, {way}: {held:.0f} MiB held, peak {peak:.0f} MiB, {seconds:.1f} s")


def measure(recipe: Recipe) -> tuple[float, float, float]:
    """MiB between forward and backward, MiB at the peak, and CPU seconds."""
    causal, frames = recipe.model.causal, latent_frames(recipe.model.frames)
    assert causal is not None
    teacher, own = (load_network(resolve_pipeline("tiny"), torch.float32) for _ in range(2))
    student = causal_from(two_time_from(own), CausalConfig.from_recipe(causal))
    backbone = Backbone(student, ("student", "real", "fake"), teacher=teacher)
    batch = Batch(
        torch.randn(SAMPLES, frames, 8, 8, 8), torch.randn(SAMPLES, 32, 64), [""] * SAMPLES, range(SAMPLES)
    )
    terms = OnPolicyTerms(backbone, torch.randn(32, 64), recipe.distill, recipe.model.shift, causal)
    live = Live([*backbone.parameters(), batch.latents, batch.text])
    before, since = live.now, time.process_time()
    with live:
        with autocast(resolve_precision(recipe.model.precision, "cpu"), "cpu"):
            loss, _ = terms.matching(batch, three_jumps(recipe))
        held = live.now - before
        torch.autograd.backward(loss)
    return held / MIB, (live.peak - before) / MIB, time.process_time() - since


def three_jumps(recipe: Recipe) -> StepRng:
    """Random numbers of the first step whose rollout has no jump of zero length."""
    step = 0
    while True:
        step += 1
        rng = StepRng(0, step, SAMPLES, tuple(range(SAMPLES)))
        steps, k = draw_segment(recipe.distill.step_budgets, rng.generator("rollout"))
        if 0 < k < steps - 1:
            return rng


if __name__ == "__main__":
    main()
