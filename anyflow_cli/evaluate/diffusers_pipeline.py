"""Any text-to-video pipeline of diffusers on a suite's prompts and seeds, beside our own models.

The pipeline runs as diffusers has it, with its own scheduler, guidance and negative prompt; prompts, seeds,
step counts, size and scores are the protocol's. A folder may name classes of diffusers and transformers only,
and safetensors: nothing in it is executed.

Legend: T frames, H W height and width of a video.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from anyflow_cli.data.video import Pixels
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import (
    EvaluatedModel,
    PipelineSettings,
    Protocol,
    Variant,
    content_hash,
)
from anyflow_cli.flow.noise import fold_seed
from anyflow_cli.model.pipeline_io import INDEX
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.recipe.load import Override
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.distributed import default_device
from anyflow_cli.utils.files import json_sha256
from anyflow_cli.utils.records import read_record

FETCH_PIPELINE = "Give a folder of diffusers: `hf download NAME --local-dir DIR`."
LIBRARIES = ("diffusers", "transformers")
NEEDED = ("prompt", "num_inference_steps", "num_frames", "generator")  # parameters of a call

# Frames, height, width, frame rate and steps: the paper's Table 3 for the size and steps, the pipelines' own
# documentation for the rest.
PUBLISHED_SHAPES = {
    "LTXPipeline": (161, 512, 768, 24, 40),
    "CogVideoXPipeline": (49, 480, 720, 8, 50),
    "CogVideoXImageToVideoPipeline": (49, 480, 720, 8, 50),
    "HunyuanVideoPipeline": (129, 720, 1280, 24, 50),
    "HunyuanVideoImageToVideoPipeline": (129, 720, 1280, 24, 50),
    "MochiPipeline": (85, 480, 848, 30, 64),
    "WanPipeline": (81, 480, 832, 16, 50),
    "WanImageToVideoPipeline": (81, 480, 832, 16, 50),
}


class _Index(BaseModel):
    """``model_index.json``: the class of the pipeline; its components are the other entries."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class FoundPipeline:
    """A pipeline folder whose classes are all known.

    Attributes:
        folder: The folder.
        name: Class of the pipeline in diffusers.
        parameters: Parameters of its call, with their defaults.
    """

    folder: Path
    name: str
    parameters: dict[str, Any]

    @property
    def takes_image(self) -> bool:
        """Whether a video starts with a picture."""
        return "image" in self.parameters

    @property
    def overrides(self) -> list[Override]:
        """Keys of the recipe that sampling as published sets; assignments of the user follow them."""
        keys: dict[str, Any] = {"evaluate.teacher": False}
        if self.name in PUBLISHED_SHAPES:
            frames, height, width, fps, steps = PUBLISHED_SHAPES[self.name]
            keys |= {"model.frames": frames, "model.height": height, "model.width": width, "model.fps": fps}
            keys |= {"evaluate.nfe": (steps,)}
        return [Override(key, value, f"--pipeline ({self.name})") for key, value in keys.items()]


def find_pipeline(folder: Path) -> FoundPipeline:
    """Read what a pipeline folder is, without loading it.

    Raises:
        UsageError: It is none, samples no videos from text, or names code of its own.
    """
    if not (folder / INDEX).is_file():
        raise UsageError(f"{folder} is not a pipeline folder: it has no {INDEX}.", FETCH_PIPELINE)
    import diffusers

    entries = read_record(folder / INDEX, _Index, FETCH_PIPELINE).model_extra or {}
    name = entries.get("_class_name")
    for component, entry in entries.items():
        is_class = isinstance(entry, list) and len(entry) == 2
        if not component.startswith("_") and is_class and entry[0] not in (*LIBRARIES, None):
            raise UsageError(
                f"The component {component} of {folder} is of {entry[0]!a}, which anyflow does not load.",
                f"Use a folder whose components are of {' and '.join(LIBRARIES)}.",
            )
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise UsageError(f"{folder} is a {name!a}, which this diffusers does not have.", FETCH_PIPELINE)
    signature = inspect.signature(kind.__call__).parameters
    missing = [needed for needed in NEEDED if needed not in signature]
    if missing:
        raise UsageError(
            f"{folder} is a {name}, which samples no videos from text: its call lacks {', '.join(missing)}.",
            "Use a text-to-video pipeline.",
        )
    assert isinstance(name, str)
    return FoundPipeline(folder, name, {key: one.default for key, one in signature.items()})


def prepare_pipeline(recipe: Recipe, protocol: Protocol, found: FoundPipeline, out: Path) -> EvaluationJob:
    """The evaluation of a pipeline at each of the recipe's step counts."""
    protocol.suite.check(recipe.model)
    conditioned = "i2v" in protocol.suite.groups
    if conditioned != found.takes_image:
        what = "takes no picture" if conditioned else "needs a picture"
        raise UsageError(
            f"{found.name} {what}.", "Add --task i2v." if found.takes_image else "Omit --task i2v."
        )
    weights = json_sha256([content_hash(found.folder)])
    of = EvaluatedModel(
        str(found.folder), "given with --pipeline", teacher=False, weights=weights, lineage={}, pipeline=found
    )
    guidance = found.parameters.get("guidance_scale")
    variants = [
        Variant(
            of,
            steps,
            PipelineSettings(
                suite=protocol.suite.name,
                suite_version=protocol.suite.version,
                weights=weights,
                pipeline=found.name,
                steps=steps,
                guidance=guidance if isinstance(guidance, int | float) else None,
                size=(recipe.model.frames, recipe.model.height, recipe.model.width),
                precision=resolve_precision(recipe.model.precision, default_device()),
            ),
        )
        for steps in dict.fromkeys(recipe.evaluate.nfe)
    ]
    return EvaluationJob(recipe, protocol, tuple(variants), out)


class PipelineVideos:
    """Videos of a loaded pipeline, one at a time, each from the generator of its seed."""

    def __init__(self, pipeline: Any, found: FoundPipeline, recipe: Recipe) -> None:
        self._pipeline, self._found, self._model = pipeline, found, recipe.model
        self._images: Pixels | None = None
        self._count, self._total, self._decode = 0, 0.0, 0.0
        pipeline.vae.decode = self._timed(pipeline.vae.decode)

    @classmethod
    def load(cls, found: FoundPipeline, recipe: Recipe) -> PipelineVideos:
        """Load the pipeline of a folder, onto the GPU if there is one."""
        import diffusers

        device = default_device()
        precision = resolve_precision(recipe.model.precision, device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer releases rename torch_dtype
                pipeline = getattr(diffusers, found.name).from_pretrained(
                    found.folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{found.folder} cannot be loaded: {reason}", FETCH_PIPELINE) from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), found, recipe)

    @property
    def latency(self) -> tuple[float, float]:
        """Mean seconds per video of the last call: all but decoding (with the text encoder), and decoding."""
        count = max(self._count, 1)
        return (self._total - self._decode) / count, self._decode / count

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Nothing: a pipeline encodes a prompt when it samples it."""

    def condition_on(self, frames: Pixels) -> None:
        """Start the next videos with given pictures (B, 1, H, W, 3), one for each video."""
        self._images = frames

    def videos(self, prompts: Sequence[str], seeds: Sequence[int], nfe: int, batch: int) -> Iterator[Pixels]:
        """Sample a video (T, H, W, 3) for each prompt, in order; ``batch`` is not used."""
        self._count, self._total, self._decode = 0, 0.0, 0.0
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            start = _now()
            frames = self._sample(prompt, seed, nfe, number)
            self._total += _now() - start
            self._count += 1
            yield np.round(np.asarray(frames, dtype=np.float32) * 255).astype(np.uint8)

    @torch.no_grad()
    def _sample(self, prompt: str, seed: int, steps: int, number: int) -> Any:
        model = self._model
        arguments = {
            "prompt": prompt,
            "num_inference_steps": steps,
            "num_frames": model.frames,
            "height": model.height,
            "width": model.width,
            "frame_rate": model.fps,
            "generator": torch.Generator().manual_seed(fold_seed(seed)),
            "output_type": "np",
        }
        if self._images is not None:
            from PIL import Image

            arguments["image"] = Image.fromarray(self._images[number, 0])
        known = {key: value for key, value in arguments.items() if key in self._found.parameters}
        return self._pipeline(**known).frames[0]

    def _timed(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = _now()
            decoded = decode(*args, **options)
            self._decode += _now() - start
            return decoded

        return timed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
