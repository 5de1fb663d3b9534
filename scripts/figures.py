"""Make the README's picture of the chain: the teacher, stage 1 and stage 2 on the same prompts and seeds.

python scripts/figures.py --runs runs --recipe tiny-long --out docs/images/chain.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anyflow_cli.evaluate.shapes import ShapesSuite
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.paths import RunPaths
from anyflow_cli.sample import Sampler
from anyflow_cli.sheets import Row, contact_sheet

PROMPTS = 5


def main() -> None:
    """Sample and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--recipe", default="tiny-long")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    paths = RunPaths(args.runs, recipe.name)
    columns = {
        "teacher, 50 x 2 evaluations": (recipe.model.teacher, 50),
        "stage 1, 4 evaluations": (str(paths.stage_1() / "model"), 4),
        "stage 2, 4 evaluations": (str(paths.stage_2("flow-map") / "model"), 4),
        "stage 2, 32 evaluations": (str(paths.stage_2("flow-map") / "model"), 32),
    }
    prompts = ShapesSuite().prompts(PROMPTS)
    seeds = list(range(recipe.evaluate.seed, recipe.evaluate.seed + PROMPTS))
    videos = [
        list(Sampler.load(address, recipe).videos(prompts, seeds, steps, PROMPTS))
        for address, steps in columns.values()
    ]
    rows = [Row(prompt, [column[i] for column in videos]) for i, prompt in enumerate(prompts)]
    contact_sheet(rows, list(columns), frames=3).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
