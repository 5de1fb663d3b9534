"""Videos of several times the trained length: measuring a causal model window by window, and its report.

A long video is cut into windows of the trained length, each of which shares a frame with the one before, and
each is scored like a clip of the world. A model that drifts loses Total from window to window. Curves follow
the stills of each chunk. Half way, the prompt may change to another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reproduction.measure import FIRST_SEED, Clock, pack, still_quality, unpack, video_scores, videos
from reproduction.pictures import Curve, draw_curves
from reproduction.rows import ROWS, TABLES, Kind, LongSampled

from anyflow_cli.evaluate.bootstrap import DRAW_COUNT, Draws, Interval, draw_seeds, draw_totals, interval
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.suite import VideoPixels, summarize
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.sample.sampler import PromptSwitch, VideoSampler

TOGETHER = 16  # videos of a batch, which switch to the same prompt
CHUNK = 2  # latent frames of a chunk, after the first one


def measure_long(address: str, recipe: Recipe, sampled: LongSampled, prompts: int) -> dict[str, Any]:
    """Sample long videos of the shapes world, and score their windows."""
    suite, size = ShapesSuite(), recipe.model.frames
    step, names = size - 1, [dimension.name for dimension in suite.dimensions]
    longer = recipe.model.model_copy(update={"frames": sampled.length * step + 1})
    sampler = VideoSampler.load(address, recipe.model_copy(update={"model": longer}))
    texts = suite.prompts(2 * prompts)
    windows: list[list[Any]] = [[] for _ in range(sampled.length)]
    stills = []
    for start in range(0, prompts, TOGETHER):
        own = texts[start : min(start + TOGETHER, prompts)]
        after = texts[prompts + start]  # of all videos of a batch
        if sampled.switches:
            sampler.condition_on(switches=[PromptSwitch(sampled.length // 2 * step + 1, after)])
        seeds = range(FIRST_SEED + start, FIRST_SEED + start + len(own))
        for prompt, video in zip(own, videos(sampler, own, seeds, sampled.steps, Clock()), strict=True):
            pieces: list[dict[str, float]] = []
            for number, window in enumerate(windows_of(video, size)):
                changed = sampled.switches and number >= sampled.length // 2
                (score,) = suite.score([window], [after if changed else prompt])
                windows[number].append(score)
                pieces += score.pieces[number > 0 :]  # the first frame is the last window's
            stills.append([still_quality(piece) for piece in pieces])
    return {
        "length": sampled.length, "switches": sampled.switches, "steps": sampled.steps,
        "totals": [round(summarize(suite, scores).total or 0.0, 3) for scores in windows],
        "windows": [pack([[one.scores.get(name, np.nan) for name in names] for one in scores])
                    for scores in windows],
        "pieces": pack(stills),
    }  # fmt: skip


def windows_of(video: VideoPixels, size: int) -> Iterator[VideoPixels]:
    """Cut a video (T, H, W, 3) into windows of ``size`` frames that share their border frames."""
    for start in range(0, len(video) - 1, size - 1):
        yield video[start : start + size]


# --- the report

Records = Mapping[tuple[str, Kind], Sequence[Mapping[str, Any]]]


def long_section(records: Records, directory: Path) -> str:
    """The section of the report, and its pictures beside the records."""
    from reproduction.report import markdown

    rows, curves = [], dict[str, dict[str, Curve]]()
    for name in TABLES["Long videos"]:
        for sampled in ROWS[name].long:
            runs = _runs(records.get((name, "causal"), []), sampled)
            if not runs:
                continue
            title = f"{sampled.length} times the trained length" + ", another prompt half way" * (
                sampled.switches
            )
            first, last, change = _ends(runs)
            rows.append([ROWS[name].title, title, str(len(runs)), first, last, change])
            curves.setdefault(title, {})[ROWS[name].title] = along(runs)
    if not rows:
        return ""
    draw_curves(curves, directory / "long-videos.png", "chunk", "quality of stills (0 to 100)")
    head = ["row", "videos", "seeds", "Total, first window", "last window", "change"]
    return (
        "## Long videos\n\nCausal models at 4 steps per chunk, in windows of the trained length; bands are "
        "95 % intervals.\n\n"
        + markdown([head, *rows])
        + "\n\n![quality along long videos](paper/long-videos.png)"
    )


def _runs(records: Sequence[Mapping[str, Any]], sampled: LongSampled) -> list[Mapping[str, Any]]:
    """What the seeds of a row recorded of one way to sample long videos."""
    wanted = (sampled.length, sampled.switches, sampled.steps)
    entries = [entry for record in records for entry in record.get("long", [])]
    return [entry for entry in entries if (entry["length"], entry["switches"], entry["steps"]) == wanted]


def _ends(runs: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Total in the first and the last window, and the change, paired by prompt, with its interval."""
    suite = ShapesSuite()

    def draws(window: int) -> Draws:
        each = [video_scores(run["windows"][window], suite) for run in runs]
        found = [draw_totals(suite, scores, range(len(scores))) for scores in each]
        known = [one for one in found if one is not None]
        return draw_seeds(known) if len(known) == len(runs) else np.full(DRAW_COUNT, np.nan)

    first, last = (float(np.mean([run["totals"][window] for run in runs])) for window in (0, -1))
    bounds = interval(draws(-1) - draws(0)) or Interval(np.nan, np.nan)
    return (
        f"{first:.1f}",
        f"{last:.1f}",
        f"{last - first:+.1f} ({bounds.low:+.1f} to {bounds.high:+.1f})",
    )


def along(runs: Sequence[Mapping[str, Any]]) -> Curve:
    """Quality of the stills of each chunk over prompts and seeds, with its interval."""
    found = [_chunk_draws(100 * unpack(run["pieces"])) for run in runs]
    means = np.mean([mean for mean, _ in found], axis=0)
    bounds = [
        interval(draw_seeds([draws[:, chunk] for _, draws in found])) or Interval(np.nan, np.nan)
        for chunk in range(len(means))
    ]
    return Curve(range(len(means)), means, [one.low for one in bounds], [one.high for one in bounds])


def _chunk_draws(stills: NDArray[np.float64]) -> tuple[NDArray[np.float64], Draws]:
    """Mean quality of each chunk (C,), and of each draw of the prompts (R, C), from stills (V, F)."""
    edges = [0, *range(1, stills.shape[1], CHUNK)]
    known = np.add.reduceat(~np.isnan(stills), edges, axis=1)
    sums = np.add.reduceat(np.nan_to_num(stills), edges, axis=1)
    picked = np.random.default_rng(0).integers(len(stills), size=(DRAW_COUNT, len(stills)))
    counts = np.stack([np.bincount(row, minlength=len(stills)) for row in picked])
    return sums.sum(0) / known.sum(0), (counts @ sums) / np.maximum(counts @ known, 1)
