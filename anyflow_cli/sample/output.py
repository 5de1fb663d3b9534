"""Files of one call of ``sample``: mp4s, a contact sheet, and ``samples.json``, which suffices to repeat it.

Each call has a directory of its own, numbered where the user names none; nothing in it is ever overwritten.
File names are made from a counter, letters of the prompt and a hash of it, so a prompt cannot name a path.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anyflow_cli
from anyflow_cli.data.video import Pixels, write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.recipe.compare import digest
from anyflow_cli.recipe.schema import Recipe, guidance_record
from anyflow_cli.runs.open import ModelChoice
from anyflow_cli.sample.fragmented_mp4 import growing_mp4, partial_path
from anyflow_cli.sample.sampler import Steps, VideoSampler
from anyflow_cli.sample.shares import ALL_VIDEOS, VideoShare
from anyflow_cli.sample.streaming import FramePicker, stream_video
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet, pick_frames, spaced_frames
from anyflow_cli.utils.distributed import is_main_process
from anyflow_cli.utils.files import atomic_write, write_json
from anyflow_cli.utils.run_lock import RUN_LOCK

SAMPLES_JSON = "samples.json"
SHEET_ROWS = 8  # videos per step count on the sheet; the mp4s have all
SHEET_FRAMES = 5
BORDER_NOTE = "frames with a border are conditioning frames"

log = logging.getLogger(__name__)


class ConditioningFrames(NamedTuple):
    """First frames of every video, (T, height, width, 3), and maybe the last; the files they are from."""

    pixels: Pixels
    kind: Literal["image", "video"]
    file: Path
    last: Pixels | None = None  # (height, width, 3)
    last_file: Path | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What is needed to read the same frames again, and to recognize them."""
        pixels = self.pixels.tobytes() + (b"" if self.last is None else self.last.tobytes())
        record: dict[str, Any] = {
            "kind": self.kind, "file": str(self.file.resolve()), "frames": len(self.pixels),
            "mark": hashlib.sha256(pixels).hexdigest()[:16],
        }  # fmt: skip
        return record if self.last_file is None else record | {"last_file": str(self.last_file.resolve())}


@dataclass(frozen=True)
class SampleRequest:
    """What to sample: every prompt from every seed at every number of steps."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    nfe: Sequence[Steps]
    frames: ConditioningFrames | None = None

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
    on_video: Callable[[int], None] = lambda count: None,
    *,
    stream: bool = False,
    share: VideoShare = ALL_VIDEOS,
) -> dict[str, Any]:
    """Sample what is requested and write its files.

    With several processes all call this, and each returns the content of ``samples.json``.

    Args:
        sampler: The open model.
        request: Prompts, seeds, step counts and conditioning frames.
        out: An empty directory.
        recipe: Frame rate, batch size, and what the record says.
        choice: The model and why it is used, for the record.
        on_video: Called with the number of videos written so far.
        stream: Write each video chunk by chunk (causal models).
        share: The videos of this process.

    Returns:
        The content of ``samples.json``.
    """
    for prompt in sampler.truncated_prompts(request.prompts):
        log.warning("Only the first %d tokens are read of: %s", recipe.model.max_text_tokens, prompt)
    write = _write_streamed if stream else _write_batches
    columns: list[list[Pixels]] = []
    entries: list[dict[str, Any]] = []
    for nfe in request.nfe:
        every = _entries(sampler, request, nfe)
        made: list[tuple[dict[str, Any], Pixels | None]] = []
        for entry, frames in write(sampler, share.own(every), nfe, out, recipe, writes=share.writes):
            number = share.group + len(made) * share.groups
            made.append((entry, frames if number < SHEET_ROWS else None))
            on_video(min(len(entries) + len(made) * share.groups, len(entries) + len(every)))
        joined = share.joined(made, len(every))
        entries += [entry for entry, _ in joined]
        columns.append([frames for _, frames in joined if frames is not None])
    record = {
        **_sampling_record(sampler, recipe, choice),
        "given": request.frames and request.frames.record, "sheet": "sheet.png", "samples": entries,
    }  # fmt: skip
    if is_main_process():
        labels = [steps_label(nfe, sampler) for nfe in request.nfe]
        _write_sheet(out / "sheet.png", request, columns, labels, choice, recipe.model.frames)
        write_json(out / SAMPLES_JSON, record)
    return record


EntriesWithFrames = Iterator[tuple[dict[str, Any], Pixels]]  # a video's record, and its frames on the sheet


def _write_batches(
    sampler: VideoSampler,
    entries: list[dict[str, Any]],
    nfe: Steps,
    out: Path,
    recipe: Recipe,
    *,
    writes: bool,
) -> EntriesWithFrames:
    prompts, seeds = ([entry[key] for entry in entries] for key in ("prompt", "seed"))
    videos = sampler.videos(prompts, seeds, nfe, recipe.sample.batch_size)
    for entry, video in zip(entries, videos, strict=True):
        if writes:
            write_mp4(out / entry["file"], video, recipe.model.fps)
        yield entry, pick_frames(video, min(SHEET_FRAMES, len(video)))
    for entry in entries:  # a mean: the videos of a batch have no times of their own
        entry |= _latency_record(sampler)


def _write_streamed(
    sampler: VideoSampler,
    entries: list[dict[str, Any]],
    nfe: Steps,
    out: Path,
    recipe: Recipe,
    *,
    writes: bool,
) -> EntriesWithFrames:
    for entry in entries:
        picker = FramePicker(recipe.model.frames, SHEET_FRAMES)
        path = out / entry["file"]
        with growing_mp4(path, recipe.model.fps) if writes else nullcontext(_discard) as write:
            log.info("%s can be played while it grows.", partial_path(path))
            timing = stream_video(sampler, entry["prompt"], entry["seed"], nfe, write, picker.add)
        log.info("%s: %s.", entry["file"], timing.summary(recipe.model.fps))
        entry |= _latency_record(sampler)
        entry |= {"first_frame_seconds": round(timing.first, 4), "frames_per_second": round(timing.rate, 2)}
        entry |= {"parts": [[round(s, 4), frames] for s, frames in zip(*timing, strict=True)]}
        yield entry, picker.frames


def _discard(pixels: Pixels) -> None:
    """Write nothing, where another process that shares the video writes it."""


def _entries(sampler: VideoSampler, request: SampleRequest, nfe: Steps) -> list[dict[str, Any]]:
    """Records of the videos of one step count, before they are sampled."""
    count = nfe if isinstance(nfe, int) else list(nfe)
    label = steps_label(nfe, sampler)
    fingerprints = {seed: sampler.noise_fingerprint(seed) for seed in request.seeds}
    return [
        {"file": file_name(number, prompt, seed, label), "prompt": prompt, "seed": seed, "nfe": count}
        | {"noise": fingerprints[seed]}
        for number, prompt, seed in request.pairs
    ]


def _latency_record(sampler: VideoSampler) -> dict[str, float]:
    network, decode = (round(seconds, 4) for seconds in sampler.latency)
    return {"network_seconds": network, "decode_seconds": decode}


def steps_label(nfe: Steps, sampler: VideoSampler) -> str:
    """Write a number of steps as the literature does: ``4``, or ``50x2`` where guidance doubles each step.

    ``8:2`` means 8 steps in the first chunk and 2 in the following ones.
    """
    label = ":".join(str(count) for count in ((nfe,) if isinstance(nfe, int) else nfe))
    return f"{label}x2" if sampler.guidance is not None else label


def file_name(number: int, prompt: str, seed: int, steps: str) -> str:
    """Name a video; any file system accepts it, and prompts that start alike get different names."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "prompt"
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return f"{number:03d}-{slug}-{mark}-seed{seed}-steps{steps.replace(':', '-')}.mp4"


def check_directory(out: Path | None) -> None:
    """Refuse a directory that is not new, or empty but for a lock."""
    if out is None or not out.exists():
        return
    if not out.is_dir() or any(path.name != RUN_LOCK for path in out.iterdir()):
        raise UsageError(f"{out} already contains files.", "Choose a new directory with --out.")


def make_directory(out: Path | None, samples: Path) -> Path:
    """Create the user's directory, or the next numbered one in ``samples``."""
    check_directory(out)
    try:
        if out is None:
            return _make_numbered(samples)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnyflowError(
            f"Cannot create {out or samples}: {error.strerror}.", "Choose another directory with --out."
        ) from error
    return out


def _make_numbered(samples: Path) -> Path:
    samples.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in samples.iterdir() if path.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:  # another process may take the number first
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
    known = 0 if request.frames is None else len(request.frames.pixels)
    bordered = sum(number < known for number in spaced_frames(frames, min(SHEET_FRAMES, frames)))
    notes = [choice.address, f"{more} more beside this sheet" * bool(more), BORDER_NOTE * bool(bordered)]
    note = "; ".join(filter(None, notes))
    headings = [f"{label} step{'' if label == '1' else 's'}" for label in labels]
    with atomic_write(path) as temporary:
        sheet = contact_sheet(rows, headings, note=note, bordered=bordered)
        sheet.save(temporary, format="PNG", optimize=True)


def _sampling_record(sampler: VideoSampler, recipe: Recipe, choice: ModelChoice) -> dict[str, Any]:
    """What determines the videos, apart from prompts and seeds."""
    return {
        "anyflow": anyflow_cli.__version__,
        "model": {"address": choice.address, "why": choice.why, "lineage": sampler.lineage},
        "sampler": sampler.method,
        "guidance": guidance_record(sampler.guidance),
        "preset": sampler.preset and sampler.preset.name,
        "sampling": sampler.preset and sampler.preset.in_words,
        "then": [list(switch) for switch in sampler.prompt_switches],
        "precision": sampler.precision,
        "memory": sampler.memory.model_dump(mode="json"),
        "device": str(sampler.device),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "recipe": {"name": recipe.name, "digest": digest(recipe)},
        "settings": recipe.model.model_dump(mode="json"),
    }
