"""Environment variables of launchers and libraries: refused by name, or without effect on the weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.distributed import is_main_process, rank, world_size
from anyflow_cli.utils.environment import check_environment
from tests.train.small import same_run


def run_in(runs: Path) -> Path:
    return runs / "test" / "train-flowmap"


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("undisturbed")
    assert main(["train-flowmap", "-r", str(recipe), "--runs", str(runs)]) == 0
    return run_in(runs)


@pytest.mark.parametrize(
    ("name", "value", "warns"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", True),
        ("ACCELERATE_MIXED_PRECISION", "bf16", True),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", True),
        ("ACCELERATE_GRADIENT_CLIPPING", "1e-9", True),
        ("FSDP_SHARDING_STRATEGY", "FULL_SHARD", False),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", False),
    ],
)
def test_what_the_recipe_decides_has_no_effect(
    recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str, value: str, warns: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    assert main(["train-flowmap", "-r", str(recipe), "--runs", str(tmp_path)]) == 0
    assert (f"{name}={value} is ignored" in capsys.readouterr().err) is warns
    same_run(run_in(tmp_path), undisturbed)
    assert name not in os.environ


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1 on"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": "x"}, "RANK is 'x', not a number from 0 on"),
        ({"RANK": "²", "WORLD_SIZE": "3"}, "RANK is '²'"),
        ({"RANK": "3"}, "RANK is 3, and WORLD_SIZE is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true has no effect"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "ACCELERATE_USE_DEEPSPEED=1 has no effect"),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, "NVIDIA_TF32_OVERRIDE=1 changes the precision"),
        ({"ONEDNN_DEFAULT_FPMATH_MODE": "BF16"}, "ONEDNN_DEFAULT_FPMATH_MODE=BF16 changes the precision"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    variables: dict[str, str], words: str,
) -> None:  # fmt: skip
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train-flowmap", "-r", str(recipe), "--runs", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("value", ["0", "no", "False", ""])
def test_a_switch_that_is_off_is_accepted(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    check_environment()


def test_a_message_has_a_process_to_print_it_even_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    with pytest.raises(UsageError):
        check_environment()
