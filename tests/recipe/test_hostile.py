"""Recipes that would fill the memory, or that cannot be read at all: refused in a moment, in words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.load import load_recipe

SECONDS = 1.5  # of the processor; a second on an idle machine


def refused(*overrides: str, text: str = "extends: tiny", address: str = "mine.yaml") -> str:
    """Load what must be refused quickly; return the message."""
    if address == "mine.yaml":
        Path(address).write_text(text, encoding="utf-8")
    before = time.process_time()
    with pytest.raises(UsageError) as caught:
        load_recipe(address, overrides)
    assert time.process_time() - before < SECONDS
    assert caught.value.hint
    assert len(caught.value.message) < 8000
    return caught.value.message


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def bomb(levels: int = 9) -> str:
    """A list whose aliases expand to 9 ** levels values."""
    parts = ["&l0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    parts += [f"&l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return f"[{', '.join(parts)}]"


def test_a_bomb_of_aliases() -> None:
    assert "a recipe has at most 10000 values" in refused(text=f"a: {bomb()}")


def test_an_override_that_is_a_bomb() -> None:
    assert "sample.nfe must be a list" in refused(f"sample.nfe={bomb()}")


def test_thousands_of_unknown_keys() -> None:
    message = refused(text="\n".join(f"k{number}: 1" for number in range(7000)))
    assert message.startswith("The recipe has 7000 mistakes.")
    assert message.endswith("and 6980 more")


def test_a_file_of_a_megabyte() -> None:
    assert "is not a text file of a recipe's size" in refused(text="x: 1\n" * 200_000)


@pytest.mark.parametrize(
    "setting",
    [
        "model.lora.rank=1000000000", "model.frames=1000000001", "model.max_text_tokens=1000000000",
        "model.height=1000000000", "sample.frames=1000000001", "sample.batch_size=1000000000",
        "sample.nfe=[1000000000]", "synthesize.count=1000000000", "synthesize.shard_size=1000000000",
        "train_flowmap.global_batch=1000000000", "distill.step_budgets=[1000000000]",
        "finetune.clips=1000000000", "evaluate.prompts=1000000000",
        "evaluate.samples=1000000000", "data.workers=1000000000",
        "launch.processes=99999999999", "train_flowmap.optimizer.lr=1e300", "model.shift=1e300",
        "distill.optimizer.weight_decay=1e300",
    ],
)  # fmt: skip
def test_numbers_beyond_what_a_run_can_mean(setting: str) -> None:
    assert f"{setting.partition('=')[0]}" in refused(setting)
    assert "must be a number of at most" in refused(setting)


@pytest.mark.parametrize(
    "section", ["synthesize", "train_flowmap", "distill", "finetune", "sample", "evaluate"]
)
def test_a_seed_is_from_0_to_2_to_the_63(section: str) -> None:
    for seed in (-1, 2**63, 2**64):
        assert refused(f"{section}.seed={seed}").startswith(
            f"--set {section}.seed={seed}: {section}.seed must be"
        )
    assert getattr(load_recipe("tiny", [f"{section}.seed={2**63 - 1}"]), section).seed == 2**63 - 1


def test_betas_that_no_optimizer_takes() -> None:
    message = refused("distill.optimizer.betas=[0, 1.0]")
    assert "distill.optimizer.betas[1] must be a number below 1, got 1.0" in message


def test_a_number_of_five_thousand_digits() -> None:
    assert "is too long" in refused(text=f"sample: {{seed: {'9' * 5000}}}")
    assert "sample.seed must be" in refused(f"sample.seed={'9' * 5000}")


def test_deep_nesting() -> None:
    assert "at most 32 levels" in refused(text="\n".join(f"{' ' * level}a:" for level in range(100)))
    assert "must be written as --set KEY=VALUE" in refused(f"{'a.' * 5000}a=1")


def test_a_long_chain_of_recipes() -> None:
    for number in range(30):
        Path(f"r{number}.yaml").write_text(f"extends: ./r{number + 1}.yaml")
    assert "a chain of more than 20 recipes" in refused(address="./r0.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"extends: {'x' * 5000}", "must be at most 4096 bytes long"),
        (f"extends: {'x' * 300}.yaml", "must have names of at most 255 bytes"),
        ("extends: ~nosuchuser/mine.yaml", "name a user that exists, not ~nosuchuser"),
        (f"name: {'n' * 300}", "name must be text of at most 100 characters"),
        ('data: {prompts: "a\\0b"}', r"data.prompts must not contain the character \x00"),
        (f"model: {{teacher: {'t' * 300}}}", "model.teacher must have names of at most 255 bytes"),
        ("model: {teacher: ~nosuchuser/wan}", "model.teacher must name a user that exists"),
        ('model: {negative_prompt: "\\e[2J"}', r"must not contain the character \x1b"),
    ],
)
def test_texts_that_cannot_be_names_or_paths(text: str, words: str) -> None:
    assert words in refused(text=text)


def test_bytes_of_no_text_in_an_option() -> None:
    assert r"must not contain the character \udcff" in refused("model.teacher=\udcff")


def test_keys_are_shown_without_control_characters() -> None:
    assert "\x1b" not in refused(text='"\\e]0;gotcha\\a": 1')
    assert "\x1b" not in refused("\x1b[31mred=1")


def test_a_pipe_and_a_loop_are_not_recipes() -> None:
    os.mkfifo("pipe.yaml")
    assert "is not a regular file" in refused(address="./pipe.yaml")
    Path("loop.yaml").symlink_to("loop.yaml")
    assert "no recipe file ./loop.yaml" in refused(address="./loop.yaml")
