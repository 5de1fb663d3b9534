"""The files of one sampling: mp4s, a contact sheet, and ``samples.json`` with all it takes to repeat it.

A sampling has a directory of its own, numbered where the user names none; nothing in it is ever written
over. File names are made from a counter, letters of the prompt and a hash of it: a prompt is data and can
name no path.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyflow_cli
from anyflow_cli.data.video import Pixels, write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.recipe.compare import digest
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.open import ModelChoice
from anyflow_cli.sample.fragmented_mp4 import growing, part_of
from anyflow_cli.sample.sampler import Steps, VideoSampler
from anyflow_cli.sample.streaming import Shown, stream_video
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet, pick_frames, picked
from anyflow_cli.utils.files import atomic_write, write_json

SAMPLES_JSON = "samples.json"
SHEET_ROWS = 8  # videos of one step count that the sheet shows; all are in the mp4s
SHEET_FRAMES = 5
GIVEN = "frames with a border were given"

log = logging.getLogger(__name__)


class ConditioningFrames(NamedTuple):
    """The frames that every video begins with, (T, height, width, 3), and the file they were read from."""

    pixels: Pixels
    kind: Literal["image", "video"]
    file: Path

    @property
    def facts(self) -> dict[str, Any]:
        """What it takes to read the same frames again, and to know them."""
        mark = hashlib.sha256(self.pixels.tobytes()).hexdigest()[:16]
        return {
            "kind": self.kind, "file": str(self.file.resolve()), "frames": len(self.pixels), "mark": mark
        }  # fmt: skip


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: every prompt from every seed at every number of steps."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    nfe: Sequence[Steps]
    given: ConditioningFrames | None = None

    @property
    def pairs(self) -> list[tuple[int, str, int]]:
        """Number and text of the prompt, and the seed, of each video of one step count."""
        return [(n, prompt, seed) for n, prompt in enumerate(self.prompts) for seed in self.seeds]


def write_samples(
    sampler: VideoSampler,
    request: SampleRequest,
    out: Path,
    recipe: Recipe,
    choice: ModelChoice,
    advance: Callable[[int], None] = lambda done: None,
    *,
    stream: bool = False,
) -> dict[str, Any]:
    """Sample and write everything into ``out``; gives what ``samples.json`` says.

    ``advance`` hears how many videos are written so far. ``stream``: let each video grow as it is made.
    """
    for prompt in sampler.truncated_prompts(request.prompts):
        log.warning("Only the first %d tokens are read of: %s", recipe.model.max_text_tokens, prompt)
    make = _streamed if stream else _written
    columns: list[list[Pixels]] = []
    entries: list[dict[str, Any]] = []
    for nfe in request.nfe:
        shown: list[Pixels] = []
        for entry, frames in make(sampler, request, nfe, out, recipe):
            entries.append(entry)
            if len(shown) < SHEET_ROWS:
                shown.append(frames)
            advance(len(entries))
        columns.append(shown)
    labels = [steps_label(nfe, sampler) for nfe in request.nfe]
    _write_sheet(out / "sheet.png", request, columns, labels, choice, recipe.model.frames)
    given = {"given": request.given and request.given.facts}
    record = _record(sampler, recipe, choice) | given | {"sheet": "sheet.png", "samples": entries}
    write_json(out / SAMPLES_JSON, record)
    return record


Made = Iterator[tuple[dict[str, Any], Pixels]]  # what the record says of a video, and some of its frames


def _written(sampler: VideoSampler, request: SampleRequest, nfe: Steps, out: Path, recipe: Recipe) -> Made:
    entries = _entries(sampler, request, nfe)
    prompts, seeds = ([entry[key] for entry in entries] for key in ("prompt", "seed"))
    videos = sampler.videos(prompts, seeds, nfe, recipe.sample.batch_size)
    for entry, video in zip(entries, videos, strict=True):
        write_mp4(out / entry["file"], video, recipe.model.fps)
        yield entry, pick_frames(video, min(SHEET_FRAMES, len(video)))
    for entry in entries:  # a mean: single videos of a batch have no time of their own
        entry |= _latency(sampler)


def _streamed(sampler: VideoSampler, request: SampleRequest, nfe: Steps, out: Path, recipe: Recipe) -> Made:
    for entry in _entries(sampler, request, nfe):
        shown = Shown(recipe.model.frames, SHEET_FRAMES)
        with growing(out / entry["file"], recipe.model.fps) as write:
            log.info("%s can be played while it grows.", part_of(out / entry["file"]))
            pace = stream_video(sampler, entry["prompt"], entry["seed"], nfe, write, shown.pass_by)
        log.info("%s: %s.", entry["file"], pace.said(recipe.model.fps))
        entry |= _latency(sampler)
        entry |= {"first_frame_seconds": round(pace.first, 4), "frames_per_second": round(pace.rate, 2)}
        entry |= {"parts": [[round(s, 4), frames] for s, frames in zip(*pace, strict=True)]}
        yield entry, shown.frames


def _entries(sampler: VideoSampler, request: SampleRequest, nfe: Steps) -> list[dict[str, Any]]:
    """What the record says of each video of one step count."""
    count = nfe if isinstance(nfe, int) else list(nfe)
    label = steps_label(nfe, sampler)
    marks = {seed: sampler.noise_fingerprint(seed) for seed in request.seeds}
    return [
        {"file": file_name(number, prompt, seed, label), "prompt": prompt, "seed": seed, "nfe": count}
        | {"noise": marks[seed]}
        for number, prompt, seed in request.pairs
    ]


def _latency(sampler: VideoSampler) -> dict[str, float]:
    """Seconds a video."""
    network, decode = (round(seconds, 4) for seconds in sampler.latency)
    return {"network_seconds": network, "decode_seconds": decode}


def steps_label(nfe: Steps, sampler: VideoSampler) -> str:
    """A number of steps as the literature writes it, ``4``, or ``50x2`` where guidance doubles each step.

    ``8:2`` for 8 steps in the first chunk and 2 in those after it.
    """
    label = ":".join(str(count) for count in ((nfe,) if isinstance(nfe, int) else nfe))
    return f"{label}x2" if sampler.guidance is not None else label


def file_name(number: int, prompt: str, seed: int, steps: str) -> str:
    """A name that any file system takes and that tells prompts apart which share their first letters."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "prompt"
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{number:03d}-{slug}-{mark}-seed{seed}-steps{steps.replace(':', '-')}.mp4"


def check_directory(out: Path | None) -> None:
    """A directory that the user names must be new or empty."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} holds files already.", "Choose a new directory with --out.")


def make_directory(out: Path | None, samples: Path) -> Path:
    """The user's directory, or the next number under ``samples``."""
    check_directory(out)
    try:
        if out is None:
            return _numbered(samples)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnyflowError(
            f"{out or samples} cannot be made: {error.strerror}.", "Choose another place with --out."
        ) from error
    return out


def _numbered(samples: Path) -> Path:
    samples.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in samples.iterdir() if path.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:  # another sampling may take the number between looking and making
        path = samples / f"{number:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _write_sheet(
    path: Path,
    request: SampleRequest,
    columns: list[list[Pixels]],
    labels: list[str],
    choice: ModelChoice,
    frames: int,
) -> None:
    pairs = request.pairs[:SHEET_ROWS]
    many = len(request.seeds) > 1
    rows = [
        SheetRow(prompt + (f" (seed {seed})" if many else ""), [column[i] for column in columns])
        for i, (_, prompt, seed) in enumerate(pairs)
    ]
    more = len(request.pairs) - len(pairs)
    known = 0 if request.given is None else len(request.given.pixels)
    given = sum(number < known for number in picked(frames, min(SHEET_FRAMES, frames)))
    notes = [choice.address, f"{more} more beside this sheet" * bool(more), GIVEN * bool(given)]
    note = "; ".join(filter(None, notes))
    headings = [f"{label} step{'' if label == '1' else 's'}" for label in labels]
    with atomic_write(path) as temporary:
        contact_sheet(rows, headings, note=note, given=given).save(temporary, format="PNG", optimize=True)


def _record(sampler: VideoSampler, recipe: Recipe, choice: ModelChoice) -> dict[str, Any]:
    """What made these videos, apart from prompts and seeds."""
    return {
        "anyflow": anyflow_cli.__version__,
        "model": {"address": choice.address, "why": choice.why, "lineage": sampler.lineage},
        "sampler": sampler.method,
        "guidance": sampler.guidance,
        "then": [list(later) for later in sampler.prompt_switches],
        "precision": sampler.precision,
        "device": str(sampler.device),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "recipe": {"name": recipe.name, "digest": digest(recipe)},
        "settings": recipe.model.model_dump(mode="json"),
    }
