"""What the options of ``anyflow sample`` mean: prompts, prompt switches, step counts, conditioning frames.

Every mistake in them is refused before a model is loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.user_text import shortened

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.sample.output import ConditioningFrames
    from anyflow_cli.sample.presets import SamplerPreset
    from anyflow_cli.sample.refine import PreviousSamples
    from anyflow_cli.sample.sampler import Method, PromptSwitch, Steps

MOST_STEPS = 10_000
FRAME_DIGITS = 9
DEFAULT_PROMPTS = 4  # sampled where none is given

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleOptions:
    """What to sample with which model: as given on the command line, or as an earlier record says."""

    recipe: Recipe
    prompts: list[str]
    seeds: list[int]
    steps: tuple[Steps, ...]
    switches: tuple[PromptSwitch, ...]
    frames: ConditioningFrames | None
    model: str | None
    method: Method | None
    preset: SamplerPreset | None = None
    previous: PreviousSamples | None = None


def options_of_refine(
    path: Path, settings: Recipe, others: Mapping[str, object], steps: tuple[Steps, ...] | None
) -> SampleOptions:
    """Read what ``--refine`` repeats; refuse ``others``, the options whose values are in its record."""
    from anyflow_cli.sample.presets import preset_of
    from anyflow_cli.sample.refine import REFINED_STEPS, read_previous_samples

    for option, value in others.items():
        if value is not None:
            raise UsageError(
                f"--refine takes the value of {option} from the record of {path}.", f"Omit {option}."
            )
    previous = read_previous_samples(path)
    recipe, given = previous.recipe(settings), previous.record.given
    frames = None
    if given is not None:
        image, video = (Path(given.file) if given.kind == kind else None for kind in ("image", "video"))
        last = None if given.last_file is None else Path(given.last_file)
        frames = read_conditioning_frames(recipe, image, video, given.frames if video else None, last)
    previous.check_frames(frames)
    preset = preset_of(previous.record.preset)
    if preset is not None and preset.steps is not None:
        raise UsageError(
            f"{path} was sampled with --sampler-preset {preset.name}, whose steps are fixed.",
            "Sample again, with other seeds or prompts.",
        )
    default = REFINED_STEPS if previous.record.guidance is None else recipe.sample.teacher_steps
    return SampleOptions(
        recipe, previous.prompts, previous.seeds, steps or (default,), previous.switches, frames,
        previous.record.model.address, previous.record.sampler, preset, previous,
    )  # fmt: skip


def refuse_together(options: Mapping[str, object], what: str) -> None:
    """Refuse two options that both say ``what``."""
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} both say {what}.", f"Omit {given[1]}.")


def read_steps(text: str | None, *, preview: bool = False) -> tuple[Steps, ...] | None:
    """Read ``--nfe 4,8:2``: what is compared, each a count, or counts chunk by chunk."""
    if preview:
        from anyflow_cli.sample.refine import PREVIEW_STEPS

        return (PREVIEW_STEPS,)
    if text is None:
        return None
    try:
        schedules = [tuple(int(count) for count in part.split(":")) for part in text.split(",")]
    except ValueError:
        schedules = [()]
    if not all(schedule and 0 < min(schedule) <= max(schedule) <= MOST_STEPS for schedule in schedules):
        raise UsageError(
            f"--nfe takes step counts from 1 to {MOST_STEPS} such as 1,4,32, not {shortened(repr(text))}.",
            "Write --nfe 1,4,32; for a causal model --nfe 8:2 gives the first chunk 8 steps, the others 2.",
        )
    return tuple(schedule[0] if len(schedule) == 1 else schedule for schedule in schedules)


def read_prompt_switches(texts: list[str] | None, frames: int) -> tuple[PromptSwitch, ...]:
    """Read ``--then "81: a blue square"``, sorted by frame."""
    if not texts:
        return ()
    from anyflow_cli.data.prompts import check_text
    from anyflow_cli.sample.sampler import PromptSwitch

    switches = []
    for text in texts:
        number, _, prompt = text.partition(":")
        prompt = check_text(prompt.strip(), "--then")
        if not number.strip().isdecimal() or len(number) > FRAME_DIGITS or not prompt:
            raise UsageError(
                f"--then takes a frame and a prompt, not {shortened(repr(text))}.",
                'Write --then "81: a blue square".',
            )
        if not 0 < int(number) < frames:
            raise UsageError(
                f"--then {int(number)}: the video has the frames 0 to {frames - 1}.",
                f"Give a frame from 1 to {frames - 1}, or sample more with --frames.",
            )
        switches.append(PromptSwitch(int(number), prompt))
    return tuple(sorted(switches))


def read_conditioning_frames(
    settings: Recipe,
    image: Path | None,
    video: Path | None,
    count: int | None,
    last: Path | None = None,
    *,
    allow_missing: bool = False,
) -> ConditioningFrames | None:
    """Read the first frames from a picture or a video, and maybe the last one, at the recipe's size and rate.

    Args:
        settings: Shape and frame rate to convert to.
        image: Value of ``--image``.
        video: Value of ``--video``.
        count: Frames to take from the video; by default at most half of what is sampled.
        last: Value of ``--last-image``.
        allow_missing: Whether a model that needs pictures may be without any, as in a dry run.

    Raises:
        UsageError: They do not go together or with the recipe's model, or a file cannot be read.
    """
    refuse_together({"--image": image, "--video": video}, "what a video starts with")
    if video is None and count is not None:
        raise UsageError("--video-frames needs --video.", "Add --video, or omit --video-frames.")
    path = image or video
    if not (allow_missing and path is None and last is None):
        _check_pictures(settings, image, last)
    if path is None:
        return None
    for file in filter(None, (path, last)):
        if not file.is_file():
            raise UsageError(
                f"{file} is not a file.", "Give a picture with --image, or a video with --video."
            )

    from anyflow_cli.data.video import ClipFormat, UnusableClipError, read_image, read_start
    from anyflow_cli.sample.output import ConditioningFrames

    shape = settings.model
    wanted = ClipFormat(count or max(shape.frames // 2, 1), shape.fps, shape.height, shape.width)
    try:
        clip = read_image(path, wanted) if video is None else read_start(path, wanted)
        end = None if last is None else read_image(last, wanted).pixels[0]
    except UnusableClipError as error:
        raise UsageError(f"{path}: {error.message}.", "Give a file that ffmpeg can read.") from error
    for change in clip.changes:
        log.info("%s: %s.", path.name, change)
    if count is not None and len(clip.pixels) < count:
        log.info("%s has %d frames, fewer than the %d requested.", path.name, len(clip.pixels), count)
    kept = (len(clip.pixels) - 1) // 4 * 4 + 1
    if kept < len(clip.pixels):
        log.info(
            "%s: first %d of %d frames used; the VAE takes 1, 5, 9, ...", path.name, kept, len(clip.pixels)
        )
    return ConditioningFrames(clip.pixels[:kept], "image" if video is None else "video", path, end, last)


def _check_pictures(settings: Recipe, image: Path | None, last: Path | None) -> None:
    """Refuse pictures that the recipe's model does not take, or the lack of those that it needs."""
    model = settings.model
    if image is None and model.needs_pictures:
        raise UsageError(f"The model of recipe {settings.name} makes videos from pictures.", "Give --image.")
    if last is None and model.pictures == "first-last":
        raise UsageError(
            f"The model of recipe {settings.name} makes videos between two pictures.", "Give --last-image."
        )
    if last is not None and not model.needs_pictures:
        raise UsageError(
            f"The model of recipe {settings.name} takes no last frame.",
            "Omit --last-image.",
        )


def read_all_prompts(
    settings: Recipe, texts: list[str] | None, file: Path | None, *, allow_missing: bool = False
) -> list[str]:
    """Read the prompts of the command line and of a file; without any, take a few of the recipe.

    With ``allow_missing``, a recipe's file that does not exist has no prompts.
    """
    from anyflow_cli.data.prompts import WorldCaptions, check_text, read_prompts

    prompts = [check_text(text.strip(), "--prompt") for text in texts or ()]
    if not all(prompts):
        raise UsageError("A prompt is empty.", 'Write e.g. --prompt "a small red circle moving left".')
    if file is not None:
        prompts += read_prompts(file)
    if prompts:
        return prompts
    log.info("No prompt was given; these are the first %d of recipe %s.", DEFAULT_PROMPTS, settings.name)
    if settings.data.prompts is not None:
        if allow_missing and not Path(settings.data.prompts).expanduser().is_file():
            return []
        return read_prompts(settings.data.prompts)[:DEFAULT_PROMPTS]
    return list(WorldCaptions(settings.data.world, DEFAULT_PROMPTS, settings.sample.seed))


def check_stdout(videos: int, *, stream: bool, as_json: bool) -> None:
    """Refuse to write anything but one growing video to standard output."""
    if not stream:
        raise UsageError(
            "--out - needs --stream, which writes a video while it is sampled.",
            "Add --stream, or name a directory.",
        )
    if videos > 1 or as_json:
        what = f"{videos} videos" if videos > 1 else "a video and JSON"
        raise UsageError(
            f"Standard output cannot take {what}.", "Give one --prompt, one --nfe, no --count and no --json."
        )
    if sys.stdout.isatty():
        raise UsageError(
            "A terminal cannot show a video.", "Pipe it to a player: `anyflow sample ... | mpv -`."
        )
