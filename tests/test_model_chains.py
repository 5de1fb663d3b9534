"""Every command on a small random checkpoint of every kind of model: the table in docs/models.md.

A cell of the table is one test here, of that model and that command. Commands that need what another leaves
run that one first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from anyflow_cli.cli.app import main
from tests.evaluate.vbench.stand_in import install
from tests.model.layouts import written
from tests.model.layouts.test_components import write_both
from tests.model.layouts.test_image_encoder import make_folders
from tests.sample.test_skyreels import skyreels
from tests.tiny_pipeline import (
    CHANNELS,
    WAN21_SIZES,
    make_expert_folder,
    make_i2v_folder,
    make_ti2v_folder,
    make_wan21_folder,
    make_wan_folder,
    wan_transformer,
)

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COMMANDS = ("inspect", "sample", "synthesize", "train-flowmap", "distill", "finetune", "evaluate", "export")
TEACHER = COMMANDS
STUDENT = ("inspect", "sample", "evaluate", "export")
STARTS = tuple(verb for verb in COMMANDS if verb != "synthesize")
NEEDS = {"train-flowmap": "synthesize", "distill": "train-flowmap", "finetune": "distill"}
SHORT = [
    f"--set={stage}.{key}"
    for stage in ("train_flowmap", "distill", "finetune")
    for key in ("steps=1", "global_batch=2", "checkpoint_every=1", "preview_every=0", "tensorboard=false")
]
ONE_STEP = ["--set=sample.nfe=[1]", "--set=evaluate.nfe=[1]"]
SMALL = [
    "--set=model.precision=fp32", "--set=synthesize.count=4", "--set=synthesize.steps=1",
    "--set=synthesize.batch_size=2", "--set=synthesize.guidance=1.5", "--set=sample.teacher_steps=1",
    "--set=evaluate.teacher=false", "--set=evaluate.prompts=1",
]  # fmt: skip


def single_file(target: Path) -> Path:
    """A transformer under Wan's own names, with its components in a folder beside it."""
    make_wan21_folder(target.with_name("components"))
    weights = wan_transformer(**WAN21_SIZES).state_dict()
    save_file(written.as_original(weights), target.with_suffix(".safetensors"))
    return target.with_suffix(".safetensors")


def student_file(name: str, write: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    def make(target: Path) -> Path:
        make_wan21_folder(target.with_name("components"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            weights = wan_transformer(**WAN21_SIZES).state_dict()
        torch.save(write(weights), target.with_name(name))
        return target.with_name(name)

    return make


def skyreels_folder(target: Path) -> Path:
    make_wan21_folder(target)
    skyreels().save_pretrained(target / "transformer")
    return target


class Model(NamedTuple):
    """A kind of model: how its checkpoint is made, its settings, the commands that take it, and its suite."""

    make: Callable[[Path], Path]
    commands: tuple[str, ...] = TEACHER
    settings: tuple[str, ...] = ()
    recipe: str = "tiny"
    preset: str | None = None
    suite: str = "shapes"


# A student is trained on as a start; its data and its real score are of the model it was distilled from.
START_KEYS = ("model.components", "synthesize.teacher", "distill.real_score")
START = tuple(f"{key}={{components}}" for key in START_KEYS)
FIRST = ("model.vae_scale=16", "model.pictures=optional-first")
MODELS = {
    "Wan 2.1 T2V, a diffusers folder": Model(make_wan_folder),
    "Wan 2.1 T2V, one file of Wan's names": Model(single_file, settings=("model.components={components}",)),
    "Wan 2.1 T2V, a folder of Wan's own": Model(lambda target: write_both(target).original),
    "Wan 2.2 TI2V-5B": Model(make_ti2v_folder, settings=FIRST),
    "Wan 2.2 A14B T2V, two experts": Model(make_expert_folder),
    "Wan 2.1 T2V, made causal": Model(make_wan_folder, recipe="tiny-causal"),
    "Wan 2.2 TI2V-5B, made causal": Model(
        make_ti2v_folder, settings=("model.vae_scale=16",), recipe="tiny-causal"
    ),
    "Wan 2.1 I2V": Model(make_i2v_folder, settings=("model.pictures=first", "evaluate.task=i2v")),
    "Wan 2.1 I2V, an original folder": Model(
        lambda target: make_folders(target).original, settings=("model.pictures=first", "evaluate.task=i2v")
    ),
    "Wan 2.1 FLF2V": Model(
        partial(make_i2v_folder, kind="2.1 FLF2V"),
        tuple(verb for verb in COMMANDS if verb != "evaluate"),  # no suite has last frames
        ("model.pictures=first-last",),
    ),
    "Wan 2.2 I2V, one expert": Model(
        partial(make_i2v_folder, kind="2.2 I2V"), settings=("model.pictures=first", "evaluate.task=i2v")
    ),
    "Wan 2.2 I2V A14B, two experts": Model(
        partial(make_expert_folder, boundary=0.9, in_channels=2 * CHANNELS + 4),
        settings=("model.pictures=first", "evaluate.task=i2v"),
    ),
    "SkyReels-V2 DF": Model(skyreels_folder, preset="skyreels-v2"),
    "Self-Forcing": Model(
        student_file("self_forcing_dmd.pt", written.self_forcing), STARTS, START, "tiny-causal",
        preset="self-forcing",
    ),
    "FastVideo CausalWan2.2 A14B": Model(
        partial(make_wan21_folder, make=make_expert_folder), STUDENT, ("model.frames=37",),
        preset="causalwan2.2", suite="vbench",  # its chunks do not make up the clips of shapes
    ),
    "rCM": Model(
        student_file("rCM_Wan2.1_T2V_1.3B_480p.pt", written.rcm), STARTS, START, preset="rcm"
    ),
}  # fmt: skip


class Chain:
    """The commands of one model, each run once."""

    def __init__(self, name: str, place: Path) -> None:
        self.model, self.place, self.done = MODELS[name], place, set[str]()
        self.benchmark: list[str] = []  # options of an installed VBench
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.checkpoint = self.model.make(place / "model")

    def run(self, verb: str) -> None:
        if verb in NEEDS and NEEDS[verb] not in self.done:
            self.run(NEEDS[verb])
        if verb not in self.done:
            assert main(self.arguments(verb)) == 0
            self.done.add(verb)

    def arguments(self, verb: str) -> list[str]:
        place, checkpoint = self.place, str(self.checkpoint)
        if verb == "inspect":
            return ["inspect", checkpoint]
        settings = [value.format(components=place / "components") for value in self.model.settings]
        common = ["-r", self.model.recipe, "--runs", str(place / "runs"), *SMALL, *SHORT]
        common += [f"--set=model.teacher={checkpoint}", *(f"--set={value}" for value in settings)]
        preset = [] if self.model.preset is None else ["--sampler-preset", self.model.preset, *SAME_SIZE]
        common += [] if preset else ONE_STEP
        if verb == "sample":
            out = ["--out", str(place / "sample"), *self.pictures()]
            return [verb, "-p", "a red circle", "--model", checkpoint, *preset, *out, *common]
        if verb == "evaluate":
            trained = place / "runs" / self.model.recipe / "distill"
            if preset or not trained.exists():
                suite = ["--suite", self.model.suite, "--set=evaluate.samples=1", *self.benchmark]
                return [verb, "--model", checkpoint, "--limit", "1", *preset, *common, *suite]
            return [verb, "--model", str(trained), "--limit", "1", *common]
        if verb == "export":
            return [verb, "--model", checkpoint, "--out", str(place / "exported"), *common]
        if verb == "finetune":
            return [verb, "--data", str(place / "runs" / self.model.recipe / "data"), *common]
        return [verb, *common]

    def pictures(self) -> list[str]:
        """Options with the pictures that the model needs."""
        kinds = [value.partition("=")[2] for value in self.model.settings if "pictures=first" in value]
        names = {"first": ["--image"], "first-last": ["--image", "--last-image"]}
        picture = self.place / "picture.png"
        Image.new("RGB", (64, 64), "red").save(picture)
        return [part for kind in kinds for option in names[kind] for part in (option, str(picture))]


SAME_SIZE = ["--set=model.height=64", "--set=model.width=64", "--set=model.frames=33", "--set=model.fps=16"]
CELLS = [(name, verb) for name, model in MODELS.items() for verb in model.commands]


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "verb"), CELLS, ids=[f"{name}-{verb}" for name, verb in CELLS])
def test_a_command_runs(
    name: str,
    verb: str,
    chains: dict[str, Chain],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name not in chains:
        chains[name] = Chain(name, tmp_path_factory.mktemp("chain"))
    _, chains[name].benchmark = install(monkeypatch, chains[name].place / "vbench")
    chains[name].run(verb)


def test_the_table_of_the_page_has_these_cells() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Models and commands")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == ["model", *COMMANDS]
    assert lines[2:] == [
        [name, *("yes" if verb in model.commands else "-" for verb in COMMANDS)]
        for name, model in MODELS.items()
    ]
