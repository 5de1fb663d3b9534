"""VBench as a suite: which questions, in which environment, and what cannot be asked here.

Videos are scored as files, once all are there; ``assess.py`` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anyflow_cli.data.video import ClipFormat, read_image
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.suite import Assessment, Dimension, Image, SuiteClip, VideoPixels, VideoScore
from anyflow_cli.evaluate.vbench import dimensions as table
from anyflow_cli.evaluate.vbench.assess import Assessor
from anyflow_cli.evaluate.vbench.dimensions import Benchmark
from anyflow_cli.evaluate.vbench.environment import Environment
from anyflow_cli.evaluate.vbench.prompts import Question
from anyflow_cli.evaluate.vbench.weights import NEEDS, lacking
from anyflow_cli.recipe.schema import ModelSection

NOT_ASKED = "not asked for"
PICTURED = ("i2v_subject", "i2v_background")  # compare a video with the picture it began with


@dataclass(frozen=True)
class VBenchSuite:
    """One of the two benchmarks, with all it takes to run it here."""

    name: Benchmark
    questions: tuple[Question, ...]
    environment: Environment
    weights: Path
    only: tuple[str, ...] | None = None  # dimensions to run; None: all
    seconds: float = 120.0  # that a dimension may take for a video
    variables: Mapping[str, str] = field(default_factory=dict)  # for the workers
    pictures: Path | None = None  # folder of VBench-I2V's pictures
    shape: ClipFormat | None = None  # of the videos that begin with them
    version: int = 1
    from_files: bool = True

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Those of the benchmark, whether they can run here or not."""
        return table.VBENCH_DIMENSIONS[self.name]

    @property
    def groups(self) -> Mapping[str, float]:
        """Quality and Semantic, or Quality and I2V."""
        return table.GROUPS[self.name]

    def check(self, model: ModelSection) -> None:
        """Any size and length will do, but VBench-I2V begins with pictures, which have to be there."""
        if self.name == "vbench":
            return
        if self.pictures is None:
            raise UsageError(
                "VBench-I2V begins each video with a picture.",
                "Crop its pictures to your shape with its crop_to_diff_ratio.py and name their folder with "
                "--set evaluate.vbench.images=DIR.",
            )
        missing = [q.image for q in self.questions if not (self.pictures / str(q.image)).is_file()]
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(self.questions)} pictures are not in {self.pictures}: "
                f"{missing[0]}, for one.",
                "Give the folder with all pictures of VBench-I2V.",
            )

    def prompts(self, count: int) -> list[str]:
        """What the first questions are sampled with."""
        return [question.text for question in self.questions[:count]]

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """The picture of each prompt, fitted to the videos."""
        if self.pictures is None or self.shape is None:
            return None
        names = {question.text: str(question.image) for question in self.questions}
        return [read_image(self.pictures / names[prompt], self.shape).pixels[0] for prompt in prompts]

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Nothing yet: VBench reads the finished files."""
        return [VideoScore({}) for _ in videos]

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """It has none."""
        return None

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Run what can run here and has not been run on these files."""
        return Assessor(self, directory, clips).run()

    def unavailable(self) -> dict[str, str]:
        """The dimensions that cannot run here, and why."""
        reasons: dict[str, str] = {}
        for name in (dimension.name for dimension in self.dimensions):
            if self.only is not None and name not in self.only:
                reasons[name] = NOT_ASKED
            elif name in PICTURED and self.pictures is None:
                reasons[name] = "it needs the pictures, evaluate.vbench.images"
            elif lacking := self.lacking(name):
                reasons[name] = f"it needs {', '.join(lacking)}"
        return reasons

    def lacking(self, name: str) -> dict[str, str]:
        """What a dimension, or the static filter, needs and does not find; and how to get it."""
        return lacking(NEEDS[name], self.weights, self.environment.modules, self.environment.devices > 0)
