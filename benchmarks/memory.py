"""Peak memory of stage 2: roles as adapters on one base, against a network for each role.

    python benchmarks/memory.py                         both sizes of Wan, as their recipes train them
    python benchmarks/memory.py -r bidirectional1b --processes 1

One process that holds everything (neither sharded nor offloaded), at the recipe's own precision, video and
micro batch. Nothing is loaded: `anyflow plan` rehearses the iteration on tensors without storage and books
what they would hold; tests hold that to measured peaks of small models, within 5 %.

    one base     student, real and fake score are adapters on one frozen network (the recipe as it is)
    three bases  the same adapters, each on a frozen network of its own: two bases more, all else alike
    all weights  student and fake score train whole, the real score is a third network
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from anyflow_cli.plan.hardware import parse_hardware
from anyflow_cli.plan.stages import Stage, stage_two, target_of
from anyflow_cli.plan.steps import BASE
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.utils.units import GIB

ALONE = ["launch.sharding=none", "launch.offload=false", "distill.preview_every=0"]
PARTS = ("weights", "gradients", "optimizer", "average", "data", "activations")


def main() -> None:
    """Print a table a recipe."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("-r", "--recipes", nargs="+", default=["bidirectional1b", "bidirectional14b"])
    made.add_argument("--processes", type=int, default=8, help="each with everything; they share the batch")
    given = made.parse_args()
    for recipe in given.recipes:
        print(f"\n{recipe}, GiB of one of {given.processes} processes")
        print(f"{'':14}" + "".join(f"{part:>12}" for part in PARTS) + f"{'in all':>12}{'times':>8}")
        first = 0
        for name, parts in ways(recipe, given.processes):
            total = sum(parts.values())
            first = first or total
            row = "".join(f"{parts[part] / GIB:12.1f}" for part in PARTS)
            print(f"{name:14}{row}{total / GIB:12.1f}{total / first:8.2f}", flush=True)


def ways(recipe: str, processes: int) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Bytes by part at the peak of an iteration, for each way to hold the roles."""
    shared = planned(recipe, processes)
    parts = shared.peak.parts
    yield "one base", parts
    yield "three bases", {**parts, "weights": parts["weights"] + 2 * shared.roles[BASE].bytes}
    yield "all weights", planned(recipe, processes, "model.lora=null").peak.parts


def planned(recipe: str, processes: int, *changes: str) -> Stage:
    """Stage 2 of a recipe on GPUs without bound."""
    resolved = load_recipe(recipe, [*ALONE, *changes])
    return stage_two(target_of(resolved, parse_hardware(f"{processes}x80GB")))


if __name__ == "__main__":
    main()
