"""Peak memory of stage 2: roles as adapters on one base, against a network for each role.

    python benchmarks/memory.py                         both sizes of Wan, as their recipes train them
    python benchmarks/memory.py -r bidirectional1b --processes 1

One process that holds everything (neither sharded nor offloaded), at the recipe's precision, video size and
micro batch. Nothing is loaded: `anyflow plan` runs the networks on fake tensors and adds up what they would
hold; tests compare it with measured peaks of small models.

    one base     student, real and fake score are adapters on one frozen network (the recipe as it is)
    three bases  the same adapters, each on a frozen network of its own: two more bases, nothing else changes
    all weights  student and fake score train all weights, the real score is a third network
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from anyflow_cli.plan.estimate import StagePlan, plan_stage, target_of
from anyflow_cli.plan.hardware import parse_hardware
from anyflow_cli.plan.networks import BASE, role_sizes
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.utils.units import GIB

ALONE = ["launch.sharding=none", "launch.offload=false", "distill.preview_every=0"]
PARTS = ("weights", "gradients", "optimizer", "ema", "data", "activations")


def main() -> None:
    """Print one table per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-r", "--recipes", nargs="+", default=["bidirectional1b", "bidirectional14b"])
    parser.add_argument("--processes", type=int, default=8, help="each holds everything; they share a batch")
    options = parser.parse_args()
    for recipe in options.recipes:
        print(f"\n{recipe}, GiB of one of {options.processes} processes")
        print(f"{'':14}" + "".join(f"{part:>12}" for part in PARTS) + f"{'total':>12}{'ratio':>8}")
        first = 0
        for name, parts in ways(recipe, options.processes):
            total = sum(parts.values())
            first = first or total
            row = "".join(f"{parts[part] / GIB:12.1f}" for part in PARTS)
            print(f"{name:14}{row}{total / GIB:12.1f}{total / first:8.2f}", flush=True)


def ways(recipe: str, processes: int) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Bytes by part at the peak of an iteration, for each way to hold the roles."""
    shared = planned(recipe, processes)
    parts = shared.peak.parts
    yield "one base", parts
    yield "three bases", {**parts, "weights": parts["weights"] + 2 * role_sizes(shared.setup)[BASE]["bytes"]}
    yield "all weights", planned(recipe, processes, "model.lora=null").peak.parts


def planned(recipe: str, processes: int, *changes: str) -> StagePlan:
    """StagePlan 2 of a recipe, whether it fits or not."""
    resolved = load_recipe(recipe, [*ALONE, *changes])
    return plan_stage(target_of(resolved, parse_hardware(f"{processes}x80GB")), "distill")


if __name__ == "__main__":
    main()
