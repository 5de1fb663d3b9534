"""Directories of a recipe's results, ``<runs>/<recipe name>/...``. Only names; nothing is created here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# in the directory of a training run: its finished pipeline folder and adapter, recipe and record of inputs
MODEL, ADAPTER_FOLDER, RECIPE, LINEAGE = "model", "adapter", "recipe.yaml", "lineage.json"
CACHE = "cache"  # beside the runs: indices of published data sets, and the embeddings they lack
STAGE_1 = {"flow-map": "train-flowmap", "flow-matching": "teacher", "consistency-ode": "consistency-ode"}
STAGE_2 = {
    "flow-map": "distill", "consistency": "distill-consistency", "fixed-steps": "distill-fixed-steps"
}  # fmt: skip


@dataclass(frozen=True)
class RunPaths:
    """Directories of one recipe under the directory of all runs."""

    root: Path
    recipe: str

    @property
    def home(self) -> Path:
        """All results of this recipe."""
        return self.root / self.recipe

    @property
    def data(self) -> Path:
        """Data set of ``synthesize``."""
        return self.home / "data"

    def stage_1(self, objective: str = "flow-map") -> Path:
        """Run of ``train-flowmap`` with this ``train_flowmap.objective``."""
        return self.home / STAGE_1[objective]

    def stage_2(self, simulation: str = "flow-map") -> Path:
        """Run of ``distill`` with this ``distill.simulation``."""
        return self.home / STAGE_2[simulation]

    @property
    def finetune(self) -> Path:
        """Run of ``finetune``."""
        return self.home / "finetune"

    @property
    def finetune_clips(self) -> Path:
        """Clips that ``finetune`` draws without --data."""
        return self.home / "finetune-clips"

    @property
    def finetune_data(self) -> Path:
        """Data set of the videos that ``finetune`` encoded."""
        return self.home / "finetune-data"

    @property
    def samples(self) -> Path:
        """Videos and contact sheets of ``sample``."""
        return self.home / "samples"

    @property
    def evaluate(self) -> Path:
        """Scores, plots and the report of ``evaluate``."""
        return self.home / "evaluate"

    @property
    def bench(self) -> Path:
        """Measurements of ``bench``."""
        return self.home / "bench.json"
