"""VBench and VBench-I2V as suites: which dimensions can run here, and running them on a variant's videos.

Videos are scored as files once all of them are there, one job per dimension. Answers are kept beside the
videos and used again as long as videos, prompts, weights and versions are the same, so an interrupted
evaluation continues with the remaining dimensions. A dimension that fails is missing, with its reason, and
its whole error is beside the answers.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anyflow_cli.data.video import ClipFormat, read_image
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.store import ANSWERS
from anyflow_cli.evaluate.suite import (
    Assessment,
    Dimension,
    Image,
    RawScore,
    ScoringNotes,
    SuiteClip,
    VideoPixels,
    VideoScore,
)
from anyflow_cli.evaluate.vbench.dimensions import FLICKERING, GROUPS, SAMPLES, VBENCH_DIMENSIONS, Benchmark
from anyflow_cli.evaluate.vbench.environment import Environment
from anyflow_cli.evaluate.vbench.prompts import BenchmarkPrompt
from anyflow_cli.evaluate.vbench.weights import REQUIREMENTS, missing_requirements
from anyflow_cli.evaluate.vbench.worker_pool import DimensionAnswer, JobFailure, WorkerJob, run_jobs
from anyflow_cli.recipe.schema import ModelSection
from anyflow_cli.utils.files import atomic_write, json_sha256, write_json
from anyflow_cli.utils.records import read_record

NOT_REQUESTED = "not requested"
NEEDS_IMAGES = ("i2v_subject", "i2v_background")  # compare a video with its conditioning image
STATIC_FILTER = "static_filter"
WORK = "work"  # below ANSWERS: requests, logs, links
START_SECONDS = 600.0  # to import VBench and load a model
PERCENT = {"imaging_quality": 0.01}  # scale of single videos, where VBench gives the mean as a fraction
PICKLED = {  # AMT's file is not a plain state dict
    "motion_smoothness": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
}

Entries = list[dict[str, Any]]  # entries of a full-info file, each with its video_list
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VBenchSuite:
    """One of the two benchmarks and everything needed to run it here.

    Attributes:
        name: Which benchmark.
        benchmark_prompts: Prompts of the evaluation.
        environment: VBench's environment.
        weights: Directory of weights.
        only: Dimensions to run; None: all.
        seconds: Time limit of a dimension per video.
        variables: Environment variables of the workers.
        images_directory: VBench-I2V's conditioning images.
        image_format: Size of the videos, to which the images are fitted.
        version: Version of the scores.
        from_files: Videos are scored as files.
    """

    name: Benchmark
    benchmark_prompts: tuple[BenchmarkPrompt, ...]
    environment: Environment
    weights: Path
    only: tuple[str, ...] | None = None
    seconds: float = 120.0
    variables: Mapping[str, str] = field(default_factory=dict)
    images_directory: Path | None = None
    image_format: ClipFormat | None = None
    version: int = 1
    from_files: bool = True

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Dimensions of the benchmark, whether or not they can run here."""
        return VBENCH_DIMENSIONS[self.name]

    @property
    def groups(self) -> Mapping[str, float]:
        """Weights of Quality and Semantic, or of Quality and I2V."""
        return GROUPS[self.name]

    @property
    def figures(self) -> tuple[str, ...]:
        """None beside the scores."""
        return ()

    def check(self, model: ModelSection) -> None:
        """Accept any size and length, but require the conditioning images of VBench-I2V."""
        if self.name == "vbench":
            return
        if self.images_directory is None:
            raise UsageError(
                "VBench-I2V conditions each video on an image.",
                "Crop its images to your aspect ratio with its crop_to_diff_ratio.py, and set "
                "evaluate.vbench.images=DIR.",
            )
        missing = [
            p.image for p in self.benchmark_prompts if not (self.images_directory / str(p.image)).is_file()
        ]
        if missing:
            raise UsageError(
                f"{len(missing)} of {len(self.benchmark_prompts)} images are not in {self.images_directory}, "
                f"{missing[0]} among them.",
                "Set evaluate.vbench.images to the directory with all images of VBench-I2V.",
            )

    def prompts(self, count: int) -> list[str]:
        """Text that videos of the first ``count`` prompts are sampled with."""
        return [prompt.text for prompt in self.benchmark_prompts[:count]]

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """The conditioning image of each prompt, fitted to the videos."""
        if self.images_directory is None or self.image_format is None:
            return None
        names = {prompt.text: str(prompt.image) for prompt in self.benchmark_prompts}
        return [
            read_image(self.images_directory / names[prompt], self.image_format).pixels[0]
            for prompt in prompts
        ]

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Return no scores, because VBench reads the finished files."""
        return [VideoScore({}) for _ in videos]

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Return None: the benchmark has no reference set."""
        return None

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Run every dimension that can run here and has no answer for these files yet."""
        return _Assessor(self, directory, clips).run()

    def unavailable(self) -> dict[str, str]:
        """Dimensions that cannot run here, and why."""
        reasons: dict[str, str] = {}
        for name in (dimension.name for dimension in self.dimensions):
            if self.only is not None and name not in self.only:
                reasons[name] = NOT_REQUESTED
            elif name in NEEDS_IMAGES and self.images_directory is None:
                reasons[name] = "needs the images of VBench-I2V (evaluate.vbench.images)"
            elif missing := self.missing_for(name):
                reasons[name] = f"needs {', '.join(missing)}"
        return reasons

    def missing_for(self, name: str) -> dict[str, str]:
        """Requirements that a dimension, or the static filter, lacks here, and how to get them."""
        return missing_requirements(
            REQUIREMENTS[name], self.weights, self.environment.modules, self.environment.devices > 0
        )


@dataclass(frozen=True)
class _KeptAnswer:
    """A file of ANSWERS: a ``DimensionAnswer``, with videos in the order of the request.

    ``asked`` is a hash of everything the answer depends on.
    """

    asked: str
    score: RawScore | None
    videos: list[RawScore | None]
    versions: dict[str, str]
    weights: dict[str, str]


@dataclass
class _Assessor:
    """Scores one variant; ``missing`` and ``answers`` are filled by ``run``."""

    suite: VBenchSuite
    directory: Path  # of the variant
    clips: Sequence[SuiteClip]
    missing: dict[str, str] = field(default_factory=dict)
    answers: dict[str, DimensionAnswer] = field(default_factory=dict)

    def run(self) -> Assessment:
        """Score all dimensions, after selecting the static videos of temporal flickering."""
        self.missing |= self.suite.unavailable()
        files: dict[int, list[Path]] = defaultdict(list)
        for clip in self.clips:
            files[clip.number].append(clip.path.absolute())
        wanted = [d.name for d in self.suite.dimensions if d.name not in self.missing]
        first = {number: paths[:SAMPLES] for number, paths in files.items()}
        entries = {name: self._entries(name, first) for name in wanted}
        if FLICKERING in wanted and any(len(paths) > SAMPLES for paths in files.values()):
            entries[FLICKERING] = self._static(self._entries(FLICKERING, files))
        self._ask(entries)
        raw = {
            name: score for name in wanted
            if name in self.answers and (score := self.answers[name].score) is not None
        }  # fmt: skip
        notes = self._notes()
        return Assessment(self._scores(raw), raw, dict(self.missing), notes, self._deviations(notes))

    def _entries(self, dimension: str, files: Mapping[int, list[Path]]) -> Entries:
        """The benchmark's entries for a dimension, with our files."""
        return [
            entry | self._image(entry) | {"video_list": [str(path) for path in files[prompt.number]]}
            for prompt in self.suite.benchmark_prompts
            for entry in prompt.entries
            if dimension in entry["dimension"] and files.get(prompt.number)
        ]

    def _image(self, entry: Mapping[str, Any]) -> dict[str, str]:
        """The path of an entry's image, which VBench would look for in its own checkout."""
        if self.suite.images_directory is None or "image_name" not in entry:
            return {}
        return {"image_name": str((self.suite.images_directory / entry["image_name"]).absolute())}

    def _static(self, entries: Entries) -> Entries:
        """The first five static videos of each prompt; none if the filter cannot run."""
        if missing := self.suite.missing_for(STATIC_FILTER):
            self.missing[FLICKERING] = f"its static filter needs {', '.join(missing)}"
            return []
        self._ask({STATIC_FILTER: entries})
        if STATIC_FILTER not in self.answers:
            self.missing[FLICKERING] = f"its static filter failed: {self.missing.pop(STATIC_FILTER)}"
            return []
        static = self.answers[STATIC_FILTER].videos
        kept = [[path for path in entry["video_list"] if static[path]][:SAMPLES] for entry in entries]
        few = sum(len(paths) < SAMPLES for paths in kept)
        if few:
            log.warning("%d of %d prompts have fewer than %d static videos.", few, len(kept), SAMPLES)
        return [entry | {"video_list": paths} for entry, paths in zip(entries, kept, strict=True) if paths]

    def _ask(self, entries: Mapping[str, Entries]) -> None:
        """Find or compute the answers for some dimensions."""
        jobs = []
        for name, lines in entries.items():
            if not lines:
                self.missing.setdefault(name, "there is no video of its prompts")
            elif (known := self._known(name, lines)) is not None:
                self.answers[name] = known
            else:
                jobs.append(self._job(name, lines))
        devices = [f"cuda:{number}" for number in range(self.suite.environment.devices)] or ["cpu"]
        scratch = self.directory / ANSWERS / WORK
        run_jobs(self.suite.environment.python, jobs, scratch, devices, self._done)

    def _job(self, name: str, entries: Entries) -> WorkerJob:
        videos = len(_paths(entries))
        log.info("VBench: scoring %s of %d videos.", name, videos)
        request = {
            "job": "score", "dimension": name, "entries": entries, "weights": str(self.suite.weights),
            "files": [file.path.rstrip("/") for file in REQUIREMENTS[name].files],
        }  # fmt: skip
        variables = {**PICKLED.get(name, {}), **self.suite.variables}
        return WorkerJob(name, request, START_SECONDS + self.suite.seconds * videos, variables)

    def _done(self, job: WorkerJob, outcome: DimensionAnswer | JobFailure) -> None:
        place = self.directory / ANSWERS / job.name
        if isinstance(outcome, JobFailure):
            with atomic_write(place.with_suffix(".error.txt")) as temporary:
                temporary.write_text(f"{outcome.reason}\n\n{outcome.detail}\n", encoding="utf-8")
            self.missing[job.name] = outcome.reason
            log.warning("VBench: %s failed: %s (%s.error.txt)", job.name, outcome.reason, place)
            return
        self.answers[job.name] = outcome
        entries = job.request["entries"]
        values = [outcome.videos.get(path) for path in _paths(entries)]
        asked = self._question_hash(job.name, entries)
        write_json(place.with_suffix(".json"), asdict(outcome) | {"asked": asked, "videos": values})
        place.with_suffix(".error.txt").unlink(missing_ok=True)
        work = self.directory / ANSWERS / WORK / job.name  # of a failed job it is kept, for its log
        if work.resolve().is_relative_to(self.directory.resolve()):
            shutil.rmtree(work, ignore_errors=True)
        log.info("VBench: %s is %s.", job.name, "done" if outcome.score is None else outcome.score)

    def _known(self, name: str, entries: Entries) -> DimensionAnswer | None:
        """An earlier answer to the same question."""
        place, paths = self.directory / ANSWERS / f"{name}.json", _paths(entries)
        if not place.exists():
            return None
        kept = read_record(place, _KeptAnswer, f"Delete {place}; {name} is scored again.")
        if kept.asked != self._question_hash(name, entries) or len(kept.videos) != len(paths):
            return None
        videos = {path: value for path, value in zip(paths, kept.videos, strict=True) if value is not None}
        return DimensionAnswer(kept.score, videos, kept.versions, kept.weights)

    def _question_hash(self, name: str, entries: Entries) -> str:
        """Hash of everything an answer depends on."""
        videos = [[_file_state(Path(path)) for path in entry["video_list"]] for entry in entries]
        files = [_file_state(self.suite.weights / file.path) for file in REQUIREMENTS[name].files]
        plain = [entry | {"video_list": None, "image_name": entry.get("image_name")} for entry in entries]
        return json_sha256([plain, videos, files, self.suite.environment.versions])

    def _scores(self, raw: Mapping[str, float]) -> list[VideoScore]:
        by_path: dict[str, dict[str, float]] = defaultdict(dict)
        for name in raw:
            for path, value in self.answers[name].videos.items():
                by_path[path][name] = value * PERCENT.get(name, 1.0)
        return [VideoScore(by_path[str(clip.path.absolute())]) for clip in self.clips]

    def _notes(self) -> ScoringNotes:
        return ScoringNotes(
            dimensions_run=tuple(name for name in self.answers if name != STATIC_FILTER),
            static_filter=STATIC_FILTER in self.answers,
            vbench=self.suite.environment.versions,
            vbench_weights={
                name: sha for answer in self.answers.values() for name, sha in answer.weights.items()
            },
        )

    def _deviations(self, notes: ScoringNotes) -> tuple[str, ...]:
        """Weights that differ from the published ones."""
        published = {
            file.path: file.sha256
            for name in self.answers
            for file in REQUIREMENTS[name].files
            if file.sha256
        }
        other = [
            name for name, sha in published.items() if not notes.vbench_weights.get(name, "").startswith(sha)
        ]
        return tuple(f"{name} is not the published file" for name in other)


def _paths(entries: Entries) -> list[str]:
    return [path for entry in entries for path in entry["video_list"]]


def _file_state(path: Path) -> list[Any]:
    """Name, size and time of a file, which change with its content."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]
