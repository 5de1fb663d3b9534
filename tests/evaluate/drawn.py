"""A generator that renders instead of denoising, with less blur at more steps; and model folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from anyflow_cli.data.shapes_world import WORLDS
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import EvaluatedModel, Protocol
from anyflow_cli.evaluate.run import prepare_evaluation
from anyflow_cli.evaluate.shapes.suite import PROMPT_SEED, ShapesSuite
from anyflow_cli.evaluate.suite import VideoPixels
from anyflow_cli.recipe.schema import EvaluateSection, ModelSection, Recipe, SampleSection, Task
from anyflow_cli.runs.open import ModelChoice
from tests.evaluate import damage
from tests.tiny_pipeline import sizes

COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
BLUR = {1: 1.0, 2: 0.7, 4: 0.4}  # sigma by steps; none at other numbers
CAPTIONED = {WORLDS["shapes"].scene(PROMPT_SEED + n).caption: n for n in range(64)}


class KilledError(Exception):
    """A stand-in for SIGKILL in the middle of a job."""


@dataclass
class Drawn:
    """Renders the scene of a caption, records the requests, and dies after ``lives`` videos."""

    lives: int = 1000
    requests: list[tuple[str, int, int]] = field(default_factory=list)
    conditions: list[VideoPixels] = field(default_factory=list)
    latency: tuple[float, float] = (0.5, 0.25)

    def videos(
        self, prompts: Sequence[str], seeds: Sequence[int], nfe: int, batch: int
    ) -> Iterator[VideoPixels]:
        for prompt, seed in zip(prompts, seeds, strict=True):
            if len(self.requests) == self.lives:
                raise KilledError
            self.requests.append((prompt, seed, nfe))
            yield drawn(CAPTIONED.get(prompt, 0), nfe)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        pass

    def condition_on(self, frames: VideoPixels) -> None:
        self.conditions += [frame[0] for frame in frames]

    def open(self, of: EvaluatedModel, recipe: Recipe) -> Drawn:
        return self


@lru_cache(maxsize=64)
def drawn(number: int, nfe: int) -> VideoPixels:
    """The scene of the suite's prompt of this number, blurred depending on the steps."""
    draw = damage.levels(partial(damage.blurred_by, BLUR.get(nfe, 0.05)))
    return draw(WORLDS["shapes"].scene(PROMPT_SEED + number))


def make_folder(path: Path, weights: bytes, kind: str = "Wan") -> Path:
    """A model folder that can be described but not loaded."""
    (path / "transformer").mkdir(parents=True)
    index = {"_class_name": f"{kind}Pipeline", **{key: ["diffusers", "Some"] for key in COMPONENTS}}
    (path / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": f"{kind}Transformer3DModel", **sizes()}
    if kind == "AnyFlowFAR":
        config |= {"chunk_partition": [1, 3, 3, 2], "full_chunk_limit": 3, "compressed_patch_size": [1, 4, 4]}
    (path / "transformer" / "config.json").write_text(json.dumps(config))
    (path / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    return path


def make_job(
    root: Path,
    nfe: tuple[int, ...] = (1, 2),
    prompts: int = 4,
    *,
    samples: int = 1,
    teacher: bool = True,
    task: Task = "t2v",
    kind: str = "AnyFlow",
) -> EvaluationJob:
    """A job below ``root`` with a model and a teacher."""
    for name, weights, made in (("teacher", b"old", "Wan"), ("model", b"new", kind)):
        if not (root / name).exists():
            make_folder(root / name, weights, made)
    recipe = Recipe(
        name="test",
        model=ModelSection(
            teacher=str(root / "teacher"), height=64, width=64, frames=33, fps=16, precision="fp32"
        ),
        sample=SampleSection(teacher_steps=5),
        evaluate=EvaluateSection(nfe=nfe, samples=samples, batch_size=2, seed=7, teacher=teacher, task=task),
    )
    suite = ShapesSuite(task=task)
    protocol = Protocol(suite, tuple(suite.prompts(prompts)), samples, 7)
    return prepare_evaluation(
        recipe, protocol, ModelChoice(str(root / "model"), "for the test"), root / "out"
    )
