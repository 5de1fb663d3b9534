"""What a benchmark measured, and its file, which ``anyflow plan --calibrate`` reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from anyflow_cli.bench.machine import MachineSpeed
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import write_json
from anyflow_cli.utils.records import read_record

VIDEO_STEPS = 4  # of the videos that are sampled
DECODING, WHOLE_VIDEO, FIRST_FRAME = "decoding", "whole video", "first frame"
SAMPLING_STEP, STAGE_1_ITERATION, STAGE_2_ITERATION = (
    "sampling step",
    "stage 1 iteration",
    "stage 2 iteration",
)
ITERATIONS = {STAGE_1_ITERATION: "train-flowmap", STAGE_2_ITERATION: "distill"}  # as in PLANNED_STAGES
RATES = {  # the row that states the speed of a stage of a plan
    **dict.fromkeys(("synthesize", "sample", "stream"), SAMPLING_STEP),
    **dict.fromkeys(("tune", "train-flowmap"), STAGE_1_ITERATION),
    "distill": STAGE_2_ITERATION,
}
NOT_A_BENCH = "Name a file that `anyflow bench` wrote."


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        seconds: Median time.
        floor: Least time for the same FLOPs and bytes at the speeds that the machine reaches.
        flops: FLOPs that must be spent, recomputation included.
        diffusers: Median time of diffusers' class for the same, with the same weights, in turn with ours.
        peak: Peak of the GPU's memory in bytes; None on a CPU.
        planned: The peak that ``anyflow plan`` predicts.
    """

    seconds: float
    floor: float | None = None
    flops: float | None = None
    diffusers: float | None = None
    peak: int | None = None
    planned: int | None = None


@dataclass(frozen=True)
class Bench:
    """All measurements of a recipe on a machine; the content of ``bench.json``."""

    recipe: str
    machine: MachineSpeed
    precision: str
    versions: dict[str, str]
    batches: dict[str, int]  # samples per training iteration
    frames: int  # of a video
    rows: dict[str, Row]

    @property
    def rates(self) -> dict[str, float]:
        """FLOPs per second that each stage of a plan reaches, where its work was measured."""
        found = {stage: self.rows[name] for stage, name in RATES.items() if name in self.rows}
        return {stage: row.flops / row.seconds for stage, row in found.items() if row.flops}


def save_bench(file: Path, bench: Bench) -> None:
    """Write ``bench.json``; an older one is replaced, any other file refused."""
    if file.exists():
        load_bench(file, "Choose another file with --out.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(bench))


def load_bench(file: Path, hint: str = NOT_A_BENCH) -> Bench:
    """Read ``bench.json``.

    Raises:
        UsageError: It is missing, damaged, or another file.
    """
    bench = read_record(file, Bench, hint)
    if not bench.rows or bench.machine.flops <= 0 or any(row.seconds <= 0 for row in bench.rows.values()):
        raise UsageError(f"{file} holds no measurements.", hint)
    return bench
