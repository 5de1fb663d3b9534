"""One variant's videos through VBench: a job a dimension, answers kept beside the videos.

An answer is used again as long as the videos, the prompts and the weights are the same, so that a killed
evaluation goes on with the dimensions that are left. A dimension that fails is missing, with its reason, and
its whole error lies beside the answers.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.evaluate.suite import Assessment, SuiteClip, VideoScore
from anyflow_cli.evaluate.vbench.prompts import SAMPLES
from anyflow_cli.evaluate.vbench.weights import NEEDS
from anyflow_cli.evaluate.vbench.worker_pool import JobFailure, Outcome, WorkerJob, run_jobs
from anyflow_cli.utils.files import atomic_write, json_sha256, write_json

if TYPE_CHECKING:
    from anyflow_cli.evaluate.vbench.suite import VBenchSuite

ANSWERS = "vbench"  # folder of the answers, in the variant's
WORK = "work"  # in it: requests, logs, links
FLICKERING, FILTER = "temporal_flickering", "static_filter"
START_SECONDS = 600.0  # to import VBench and load a model
PERCENT = {"imaging_quality": 0.01}  # of a single video, where VBench gives the mean as a fraction
PICKLED = {
    "motion_smoothness": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
}  # AMT's file is no plain state dict

Entries = list[dict[str, Any]]  # lines of a full-info file, each with its video_list
log = logging.getLogger(__name__)


@dataclass
class Assessor:
    """Runs once; ``missing`` and ``answers`` fill up on the way."""

    suite: VBenchSuite
    directory: Path  # of the variant
    clips: Sequence[SuiteClip]
    missing: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> Assessment:
        """All dimensions, with flickering's filter before them."""
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
        raw = {name: self.answers[name]["score"] for name in wanted if name in self.answers}
        return Assessment(self._scores(raw), raw, dict(self.missing), self._notes(), self._deviations())

    def _entries(self, dimension: str, files: Mapping[int, list[Path]]) -> Entries:
        """The benchmark's lines about a dimension, with our files."""
        return [
            line | self._picture(line) | {"video_list": [str(path) for path in files[question.number]]}
            for question in self.suite.questions
            for line in question.lines
            if dimension in line["dimension"] and files.get(question.number)
        ]

    def _picture(self, line: Mapping[str, Any]) -> dict[str, str]:
        """Where the picture of a line is, which VBench would look for in its own checkout."""
        if self.suite.pictures is None or "image_name" not in line:
            return {}
        return {"image_name": str((self.suite.pictures / line["image_name"]).absolute())}

    def _static(self, entries: Entries) -> Entries:
        """Of each prompt the first five videos in which nothing moves; none where the filter cannot run."""
        if lacking := self.suite.lacking(FILTER):
            self.missing[FLICKERING] = f"its static filter needs {', '.join(lacking)}"
            return []
        self._ask({FILTER: entries})
        if FILTER not in self.answers:
            self.missing[FLICKERING] = f"its static filter failed: {self.missing.pop(FILTER)}"
            return []
        still = self.answers[FILTER]["videos"]
        kept = [[path for path in line["video_list"] if still[path]][:SAMPLES] for line in entries]
        few = sum(len(paths) < SAMPLES for paths in kept)
        if few:
            log.warning("%d of %d prompts have fewer than %d static videos.", few, len(kept), SAMPLES)
        return [line | {"video_list": paths} for line, paths in zip(entries, kept, strict=True) if paths]

    def _ask(self, entries: Mapping[str, Entries]) -> None:
        """Answers to these dimensions, kept or new."""
        jobs = []
        for name, lines in entries.items():
            if not lines:
                self.missing.setdefault(name, "there is no video of its prompts")
            elif (known := self._known(name, lines)) is not None:
                self.answers[name] = known
            else:
                jobs.append(self._job(name, lines))
        scratch = self.directory / ANSWERS / WORK
        run_jobs(self.suite.environment.python, jobs, scratch, self._devices(), self._done)

    def _job(self, name: str, lines: Entries) -> WorkerJob:
        videos = sum(len(line["video_list"]) for line in lines)
        log.info("VBench: %s, %d videos.", name, videos)
        request = {
            "job": "score", "dimension": name, "entries": lines, "weights": str(self.suite.weights),
            "files": [file.path.rstrip("/") for file in NEEDS[name].files],
        }  # fmt: skip
        variables = {**PICKLED.get(name, {}), **self.suite.variables}
        return WorkerJob(name, request, START_SECONDS + self.suite.seconds * videos, variables)

    def _devices(self) -> list[str]:
        return [f"cuda:{number}" for number in range(self.suite.environment.devices)] or ["cpu"]

    def _done(self, job: WorkerJob, outcome: Outcome) -> None:
        place = self.directory / ANSWERS / job.name
        if isinstance(outcome, JobFailure):
            with atomic_write(place.with_suffix(".error.txt")) as temporary:
                temporary.write_text(f"{outcome.reason}\n\n{outcome.detail}\n", encoding="utf-8")
            self.missing[job.name] = outcome.reason
            log.warning("VBench: %s failed: %s (%s.error.txt)", job.name, outcome.reason, place)
            return
        self.answers[job.name] = outcome
        asked = self._asked(job.name, job.request["entries"])
        paths = [path for line in job.request["entries"] for path in line["video_list"]]
        values = [outcome["videos"].get(path) for path in paths]
        write_json(place.with_suffix(".json"), outcome | {"asked": asked, "videos": values})
        place.with_suffix(".error.txt").unlink(missing_ok=True)
        shutil.rmtree(
            self.directory / ANSWERS / WORK / job.name, ignore_errors=True
        )  # a failed one's log stays
        log.info("VBench: %s is %s.", job.name, "done" if outcome["score"] is None else outcome["score"])

    def _known(self, name: str, lines: Entries) -> dict[str, Any] | None:
        """An earlier answer to the very same question."""
        place = self.directory / ANSWERS / f"{name}.json"
        if not place.is_file():
            return None
        answer: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if answer.pop("asked") != self._asked(name, lines):
            return None
        paths = [path for line in lines for path in line["video_list"]]
        videos = zip(paths, answer["videos"], strict=True)
        return answer | {"videos": {path: value for path, value in videos if value is not None}}

    def _asked(self, name: str, lines: Entries) -> str:
        """What an answer depends on."""
        videos = [[_state(Path(path)) for path in line["video_list"]] for line in lines]
        files = [_state(self.suite.weights / file.path) for file in NEEDS[name].files]
        plain = [line | {"video_list": None, "image_name": line.get("image_name")} for line in lines]
        return json_sha256([plain, videos, files, self.suite.environment.versions])

    def _scores(self, raw: Mapping[str, float]) -> list[VideoScore]:
        by_path: dict[str, dict[str, float]] = defaultdict(dict)
        for name in raw:
            for path, value in self.answers[name]["videos"].items():
                by_path[path][name] = value * PERCENT.get(name, 1.0)
        return [VideoScore(by_path[str(clip.path.absolute())]) for clip in self.clips]

    def _notes(self) -> dict[str, Any]:
        """For the protocol card."""
        weights = {name: sha for answer in self.answers.values() for name, sha in answer["weights"].items()}
        return {
            "dimensions run": [name for name in self.answers if name != FILTER],
            "static filter": FILTER in self.answers,
            "vbench": self.suite.environment.versions,
            "weights": weights,
        }

    def _deviations(self) -> tuple[str, ...]:
        """Weights that are not those which their publisher names."""
        known = {file.path: file.sha256 for name in self.answers for file in NEEDS[name].files if file.sha256}
        found = self._notes()["weights"]
        other = [name for name, sha in known.items() if not found[name].startswith(sha)]
        return tuple(f"{name} is not the published file" for name in other)


def _state(path: Path) -> list[Any]:
    """Tells a file from what was there before, without reading it."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]
