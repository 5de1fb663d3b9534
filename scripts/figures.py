"""Draw the figures of the README and the log from the output of commands.

python scripts/figures.py chain  --recipe tiny-best --out docs/images/chain.png
python scripts/figures.py given  --recipe tiny-causal-best --frames 9 --out docs/images/v2v.png
python scripts/figures.py along  "stage 2=runs/tiny-causal/evaluate/distill" ... --out docs/images/along.png
python scripts/figures.py stream runs/tiny-causal/stream --out docs/images/stream.png

chain: the teacher, stage 1 and stage 2 on the same prompts and seeds. given: videos that continue an image
(``--frames 1``) or the first frames of a clip. along: scores over the chunks, from finished evaluations.
stream: frames written over time, from the record of ``sample --stream``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.evaluate.per_chunk import ChunkCurves
from anyflow_cli.evaluate.report.figures import LIGHT_FIGURE, chunks_png
from anyflow_cli.evaluate.shapes.suite import PROMPT_SEED, ShapesSuite
from anyflow_cli.evaluate.store import RESULTS
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.paths import MODEL, RunPaths
from anyflow_cli.sample.output import BORDER_NOTE, SAMPLES_JSON
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet

PROMPTS = 5
STEPS = (1, 4, 32)


def main() -> None:
    """Draw the requested figure."""
    args = _arguments()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.draw(args)


def chain(args: argparse.Namespace) -> None:
    """Sample the teacher and both stages."""
    recipe = load_recipe(args.recipe)
    paths = RunPaths(args.runs, recipe.name)
    stage_1 = paths.stage_1(recipe.train_flowmap.objective) / MODEL
    stage_2 = paths.stage_2(recipe.distill.simulation) / MODEL
    columns = {
        "teacher, 50 x 2 evaluations": (recipe.model.teacher, 50),
        "stage 1, 4 evaluations": (str(stage_1), 4),
        "stage 2, 4 evaluations": (str(stage_2), 4),
        "stage 2, 32 evaluations": (str(stage_2), 32),
    }
    prompts = ShapesSuite().prompts(PROMPTS)
    videos = [
        list(VideoSampler.load(address, recipe).videos(prompts, _seeds(recipe), steps, PROMPTS))
        for address, steps in columns.values()
    ]
    rows = [SheetRow(prompt, [column[i] for column in videos]) for i, prompt in enumerate(prompts)]
    contact_sheet(rows, list(columns), frames=3).save(args.out, optimize=True)


def given(args: argparse.Namespace) -> None:
    """Continue the first frames of clips outside the training data with the run's model."""
    recipe = load_recipe(args.recipe)
    scenes = [WORLDS[recipe.data.world].scene(PROMPT_SEED + i) for i in range(PROMPTS)]
    stage_2 = RunPaths(args.runs, recipe.name).stage_2(recipe.distill.simulation)
    sampler = VideoSampler.load(str(stage_2 / MODEL), recipe)
    sampler.condition_on(np.stack([render(scene, args.frames) for scene in scenes]))
    prompts = [scene.caption for scene in scenes]
    videos = [list(sampler.videos(prompts, _seeds(recipe), steps, PROMPTS)) for steps in STEPS]
    rows = [SheetRow(prompt, [column[i] for column in videos]) for i, prompt in enumerate(prompts)]
    headings = [f"{steps} step{'s' * (steps > 1)}" for steps in STEPS]
    contact_sheet(rows, headings, frames=5, bordered=args.frames, note=BORDER_NOTE).save(
        args.out, optimize=True
    )


def along(args: argparse.Namespace) -> None:
    """Curves with the same step count share a style, those of the same evaluation a color."""
    found = {
        label: json.loads((Path(folder) / RESULTS).read_text())["scores"]
        for label, _, folder in (word.partition("=") for word in args.evaluations)
    }
    curves = {
        f"{label}, {steps} step{'s' * (steps > 1)}": _along(entry)
        for steps in args.steps
        for label, entries in found.items()
        for entry in entries
        if entry["steps"] == steps and not entry["teacher"]
    }
    teachers = [entry for entries in found.values() for entry in entries if entry["teacher"]]
    if teachers:
        curves["teacher"] = _along(teachers[0])
    args.out.write_bytes(chunks_png(curves, colors=len(found)))


def stream(args: argparse.Namespace) -> None:
    """One line per step count; the dot at its start is the first frame."""
    record = json.loads((args.sampling / SAMPLES_JSON).read_text())
    fps = record["settings"]["fps"]
    figure = Figure(figsize=(7, 3.8), dpi=150, facecolor=LIGHT_FIGURE.paper, layout="constrained")
    axes = figure.subplots()
    for color, entry in zip(LIGHT_FIGURE.lines, record["samples"], strict=False):
        seconds, frames = np.array(entry["parts"]).T
        first, last = seconds[0], seconds[-1]
        label = f"{entry['nfe']} steps per chunk: first frame after {first:.2f} s, all after {last:.2f} s"
        axes.step([*seconds, last], [*frames, frames[-1]], where="post", color=color, label=label)
        axes.plot(first, frames[0], "o", color=color, ms=6)
        axes.axvline(last, color=color, ls=":", lw=1.2)
    axes.set_xlabel("seconds since the prompt was read (dotted: a video that is written as a whole)")
    axes.set_ylabel("frames written")
    axes.set_title(f"a streamed video of {record['settings']['frames']} frames at {fps} frames per second")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color=LIGHT_FIGURE.faint, lw=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(args.out, format="png")


def _along(entry: dict[str, Any]) -> ChunkCurves:
    return replace(ChunkCurves(**entry["chunks"]), partition=tuple(entry["chunks"]["partition"]))


def _seeds(recipe: Recipe) -> list[int]:
    return list(range(recipe.evaluate.seed, recipe.evaluate.seed + PROMPTS))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    figures = parser.add_subparsers(required=True, metavar="FIGURE")
    drawn = {each.__name__: figures.add_parser(each.__name__) for each in (chain, given, along, stream)}
    for name, options in drawn.items():
        options.set_defaults(draw=globals()[name])
        options.add_argument("--out", type=Path, required=True)
    for name, recipe in (("chain", "tiny-best"), ("given", "tiny-causal-best")):
        drawn[name].add_argument("--runs", type=Path, default=Path("runs"))
        drawn[name].add_argument("--recipe", default=recipe)
    drawn["given"].add_argument("--frames", type=int, default=1, help="conditioning frames: 1, 5, 9, ...")
    drawn["along"].add_argument("evaluations", nargs="+", metavar="LABEL=DIRECTORY")
    drawn["along"].add_argument("--steps", type=int, nargs="+", default=[4])
    drawn["stream"].add_argument("sampling", type=Path, help="directory of a `sample --stream`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
