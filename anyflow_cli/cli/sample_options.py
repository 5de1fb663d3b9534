"""What ``anyflow sample`` is given, read from its options: prompts, their order, step counts, first frames.

Everything a user can get wrong here is refused before a model is loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_cli.errors import UsageError

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.sample.output import ConditioningFrames
    from anyflow_cli.sample.refine import PreviousSample
    from anyflow_cli.sample.sampler import Method, PromptSwitch, Steps

WITHOUT_PROMPTS = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleSettings:
    """What is to be sampled, with which model: as given, or as an earlier sampling's record says."""

    settings: Recipe
    prompts: list[str]
    seeds: list[int]
    steps: tuple[Steps, ...]
    later: tuple[PromptSwitch, ...]
    given: ConditioningFrames | None
    model: str | None
    method: Method | None
    preview: PreviousSample | None = None


def settings_of_refine(
    path: Path, settings: Recipe, beside: Mapping[str, object], steps: tuple[Steps, ...] | None
) -> SampleSettings:
    """What ``--refine`` repeats; nothing of it can be given ``beside`` it."""
    from anyflow_cli.sample.refine import REFINED_STEPS, read_previous_sample

    for option, value in beside.items():
        if value is not None:
            raise UsageError(
                f"--refine takes what {option} would say from the record of {path}.", f"Leave {option} out."
            )
    preview = read_previous_sample(path)
    recipe, facts = preview.recipe(settings), preview.record["given"]
    given = None
    if facts is not None:
        files = {kind: Path(facts["file"]) if facts["kind"] == kind else None for kind in ("image", "video")}
        given = read_conditioning_frames(
            recipe, **files, count=facts["frames"] if facts["kind"] == "video" else None
        )
    preview.check_given(given)
    usual = recipe.sample.teacher_steps if preview.record["guidance"] is not None else REFINED_STEPS
    model, method = preview.record["model"]["address"], preview.record["sampler"]
    return SampleSettings(
        recipe, preview.prompts, preview.seeds, steps or (usual,), preview.then, given, model, method, preview
    )


def check_steps(options: Mapping[str, object]) -> None:
    """Refuse two options that both say how many steps are taken."""
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(
            f"{given[0]} and {given[1]} both say how many steps to take.", f"Leave {given[1]} out."
        )


def read_steps(text: str | None, *, preview: bool = False) -> tuple[Steps, ...] | None:
    """Read ``--nfe 4,8:2``: what is compared, each a count or counts chunk by chunk."""
    if preview:
        from anyflow_cli.sample.refine import PREVIEW_STEPS

        return (PREVIEW_STEPS,)
    if text is None:
        return None
    try:
        schedules = [tuple(int(count) for count in part.split(":")) for part in text.split(",")]
    except ValueError:
        schedules = [()]
    if not all(schedule and min(schedule) > 0 for schedule in schedules):
        raise UsageError(
            f"--nfe takes step counts from 1 on such as 1,4,32, not {text!r}.",
            "Write --nfe 1,4,32; of a causal model --nfe 8:2 gives the first chunk 8 steps, the others 2.",
        )
    return tuple(schedule[0] if len(schedule) == 1 else schedule for schedule in schedules)


def read_prompt_switches(given: list[str] | None, frames: int) -> tuple[PromptSwitch, ...]:
    """Read ``--then "81: a blue square"``, in the order of the frames."""
    if not given:
        return ()
    from anyflow_cli.data.prompts import checked_text
    from anyflow_cli.sample.sampler import PromptSwitch

    later = []
    for text in given:
        number, _, prompt = text.partition(":")
        prompt = checked_text("--then", prompt.strip())
        if not number.strip().isdecimal() or not prompt:
            raise UsageError(
                f"--then takes a frame and a prompt, not {text!r}.", 'Write --then "81: a blue square".'
            )
        if not 0 < int(number) < frames:
            raise UsageError(
                f"--then {int(number)}: the video has the frames 0 to {frames - 1}.",
                f"Give a frame from 1 to {frames - 1}, or make more of them: --frames.",
            )
        later.append(PromptSwitch(int(number), prompt))
    return tuple(sorted(later))


def read_conditioning_frames(
    settings: Recipe, image: Path | None, video: Path | None, count: int | None
) -> ConditioningFrames | None:
    """The first frames that a picture or a video gives, at the recipe's size and rate."""
    if image is not None and video is not None:
        raise UsageError("A video begins with --image or with --video, not with both.", "Leave one out.")
    if video is None and count is not None:
        raise UsageError("--video-frames says how much of --video is kept, and there is none.", "Give one.")
    path = image or video
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"{path} is no file.", "Give a picture with --image, or a video with --video.")

    from anyflow_cli.data.video import ClipFormat, UnusableClipError, read_image, read_start
    from anyflow_cli.sample.output import ConditioningFrames

    shape = settings.model
    wanted = ClipFormat(count or max(shape.frames // 2, 1), shape.fps, shape.height, shape.width)
    try:
        clip = read_image(path, wanted) if video is None else read_start(path, wanted)
    except UnusableClipError as error:
        raise UsageError(f"{path}: {error.message}.", "Give a file that ffmpeg can read.") from error
    for change in clip.changes:
        log.info("%s: %s.", path.name, change)
    if count is not None and len(clip.pixels) < count:
        log.info("%s: there are %d frames of the %d asked for.", path.name, len(clip.pixels), count)
    whole = (len(clip.pixels) - 1) // 4 * 4 + 1
    if whole < len(clip.pixels):
        log.info(
            "%s: %d of %d frames kept, from the start on; the VAE takes 1, 5, 9, ...",
            path.name, whole, len(clip.pixels),
        )  # fmt: skip
    return ConditioningFrames(clip.pixels[:whole], "image" if video is None else "video", path)


def read_prompts_of(
    settings: Recipe, given: list[str] | None, file: Path | None, *, allow_missing: bool = False
) -> list[str]:
    """Read the prompts of the command line and of a file; without any, take a few of the recipe.

    With ``allow_missing``, a recipe's file that does not exist has no prompts.
    """
    from anyflow_cli.data.prompts import checked_text, read_prompts, world_captions

    texts = [checked_text("--prompt", text.strip()) for text in given or ()]
    if not all(texts):
        raise UsageError("A prompt is empty.", 'Say what to show: --prompt "a small red circle moving left".')
    if file is not None:
        texts += read_prompts(file)
    if texts:
        return texts
    log.info("No prompt was given; these are the first %d of recipe %s.", WITHOUT_PROMPTS, settings.name)
    if settings.data.prompts is not None:
        if allow_missing and not Path(settings.data.prompts).expanduser().is_file():
            return []
        return read_prompts(settings.data.prompts)[:WITHOUT_PROMPTS]
    return world_captions(settings.data.world, WITHOUT_PROMPTS, settings.sample.seed)


def check_stdout(videos: int, *, stream: bool, as_json: bool) -> None:
    """Standard output takes one growing video and nothing else."""
    if not stream:
        raise UsageError("--out - takes a video as it is made.", "Add --stream, or name a directory.")
    if videos > 1 or as_json:
        what = f"{videos} videos" if videos > 1 else "a video and JSON"
        raise UsageError(
            f"Standard output cannot take {what}.", "Give one --prompt, one --nfe, no --count and no --json."
        )
    if sys.stdout.isatty():
        raise UsageError("A terminal shows no video.", "Send it to a player: `anyflow sample ... | mpv -`.")
