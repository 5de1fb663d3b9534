"""Videos of several times the trained length: measuring a causal model window by window, and its report.

A long video is cut into windows of the trained length, each of which shares a frame with the one before, and
each is scored like a clip of the world. The world's shapes move in a straight line and reach the border in a
few windows, so later ones can keep neither direction nor speed, and Total falls for any model. What a model
that does not drift keeps is how the shape looks (``KEPT``). Other curves follow the stills of each chunk.
Half way, the prompt may change to another one.
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
KEPT = ("shape", "colour", "size")  # what a video of any length can show as its prompt says


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
Values = NDArray[np.float64]


def long_section(records: Records, directory: Path) -> str:
    """The section of the report, and its pictures beside the records."""
    from reproduction.report import markdown, wrapped

    rows, looks, stills = [], dict[str, dict[str, Curve]](), dict[str, dict[str, Curve]]()
    for name in TABLES["Long videos"]:
        for sampled in ROWS[name].long:
            runs = _runs(records.get((name, "causal"), []), sampled)
            if not runs:
                continue
            title = f"{sampled.length} times the trained length" + ", another prompt half way" * (
                sampled.switches
            )
            own = ROWS[name].title
            rows.append([own, title, str(len(runs)), *_totals(runs), *_looks(runs)])
            looks.setdefault(title, {})[own] = along([_kept(run) for run in runs])
            stills.setdefault(title, {})[own] = along([by_chunk(run["pieces"]) for run in runs])
    if not rows:
        return ""
    draw_curves(looks, directory / "long-videos.png", "window", "shape, colour and size (0 to 100)")
    draw_curves(stills, directory / "long-videos-stills.png", "chunk", "quality of stills (0 to 100)")
    head = ["row", "videos", "seeds", "Total, first window", "last window", "change",
            "looks, first window", "last window", "change"]  # fmt: skip
    text = (
        "Causal models at 4 steps per chunk, in windows of the trained length. The world's shapes move in a "
        "straight line and reach the border in a few windows, so Total, which counts direction and speed, "
        "falls for any model. *Looks* is the mean of shape, colour and size, which a video can keep. Changes "
        "and bands have 95 % intervals."
    )
    return (
        "## Long videos\n\n"
        + wrapped(text)
        + "\n\n"
        + markdown([head, *rows])
        + "\n\n![how the shape looks along long videos](paper/long-videos.png)"
        + "\n\n![quality of stills along long videos](paper/long-videos-stills.png)"
    )


def _runs(records: Sequence[Mapping[str, Any]], sampled: LongSampled) -> list[Mapping[str, Any]]:
    """What the seeds of a row recorded of one way to sample long videos."""
    wanted = (sampled.length, sampled.switches, sampled.steps)
    entries = [entry for record in records for entry in record.get("long", [])]
    return [entry for entry in entries if (entry["length"], entry["switches"], entry["steps"]) == wanted]


def _totals(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Total in the first and the last window, and the change, paired by prompt, with its interval."""
    suite = ShapesSuite()

    def draws(window: int) -> Draws:
        each = [video_scores(run["windows"][window], suite) for run in runs]
        found = [draw_totals(suite, scores, range(len(scores))) for scores in each]
        known = [one for one in found if one is not None]
        return draw_seeds(known) if len(known) == len(runs) else np.full(DRAW_COUNT, np.nan)

    first, last = (float(np.mean([run["totals"][window] for run in runs])) for window in (0, -1))
    return _change(first, last, draws(-1) - draws(0))


def _looks(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same of what a video can keep."""
    means, draws = zip(*(_draws(_kept(run)) for run in runs), strict=True)
    first, last = (float(np.mean([mean[window] for mean in means])) for window in (0, -1))
    return _change(first, last, draw_seeds([one[:, -1] - one[:, 0] for one in draws]))


def _change(first: float, last: float, draws: Draws) -> list[str]:
    bounds = interval(draws) or Interval(np.nan, np.nan)
    return [
        f"{first:.1f}",
        f"{last:.1f}",
        f"{last - first:+.1f} ({bounds.low:+.1f} to {bounds.high:+.1f})",
    ]


def _kept(run: Mapping[str, Any]) -> Values:
    """Mean of shape, colour and size in each window (V, W), in percent."""
    names = [dimension.name for dimension in ShapesSuite().dimensions]
    columns = [names.index(name) for name in KEPT]
    return 100 * np.stack([np.nanmean(unpack(window)[:, columns], 1) for window in run["windows"]], 1)


def by_chunk(pieces: str) -> Values:
    """Mean quality of the stills of each chunk (V, C), in percent, from those of latent frames, packed."""
    stills = 100 * unpack(pieces)
    edges = range(1, stills.shape[1], CHUNK)
    return np.stack([stills[:, 0], *(stills[:, edge : edge + CHUNK].mean(1) for edge in edges)], 1)


def along(each: Sequence[Values]) -> Curve:
    """Mean over prompts and seeds, with its interval, of the values (V, X) of each seed."""
    found = [_draws(values) for values in each]
    means = np.mean([mean for mean, _ in found], axis=0)
    bounds = [
        interval(draw_seeds([draws[:, x] for _, draws in found])) or Interval(np.nan, np.nan)
        for x in range(len(means))
    ]
    return Curve(range(len(means)), means, [one.low for one in bounds], [one.high for one in bounds])


def _draws(values: Values) -> tuple[Values, Draws]:
    """Mean of values (V, X) over their prompts (X,), and of each draw of the prompts (R, X)."""
    known, numbers = ~np.isnan(values), np.nan_to_num(values)
    picked = np.random.default_rng(0).integers(len(values), size=(DRAW_COUNT, len(values)))
    counts = np.stack([np.bincount(row, minlength=len(values)) for row in picked])
    return numbers.sum(0) / known.sum(0), (counts @ numbers) / np.maximum(counts @ known, 1)
