"""docs/baselines.md has a command for every row of the paper's Tables 3 and 4, and every preset as it is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from anyflow_cli.cli.app import app
from anyflow_cli.evaluate import vbench
from anyflow_cli.evaluate.diffusers_pipeline import PUBLISHED_SHAPES
from anyflow_cli.evaluate.vbench.published import published
from anyflow_cli.sample.presets import PRESETS

PAGE = (Path(__file__).parents[1] / "docs" / "baselines.md").read_text(encoding="utf-8")
PUBLISHED = Path(vbench.__file__).with_name("published.json")
SUITES = {"vbench": "Table 3", "vbench-i2v": "Table 4"}
VARIABLES = dict(re.findall(r'^(T2V|I2V)="(.*)"$', PAGE, flags=re.MULTILINE))


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its head."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return lines[2:]


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_the_paper_has_a_command(suite: str) -> None:
    models = dict.fromkeys(row.model for row in published(suite))
    assert [row[0] for row in rows(SUITES[suite])] == [*models]


@pytest.mark.parametrize("row", [*rows("Table 3"), *rows("Table 4")], ids=lambda row: row[0])
def test_every_command_is_one(row: list[str]) -> None:
    text = row[2].strip("`")
    for name, value in VARIABLES.items():
        text = text.replace(f"${name}", value)
    program, verb, *arguments = shlex.split(text)
    group = typer.main.get_command(app)
    found = group.get_command(None, verb)  # type: ignore[attr-defined]
    context = found.make_context(verb, arguments)
    assert program == "anyflow"
    preset = context.params["sampler_preset"]
    assert preset is None or preset in PRESETS


def test_the_presets_of_the_page_are_those_of_the_code() -> None:
    assert [[cell.strip("`") for cell in row] for row in rows("Presets")] == [
        [
            one.name,
            one.system,
            one.in_words.partition(": ")[2],
            f"{one.shape.frames} x {one.shape.height} x {one.shape.width}, {one.shape.fps}",
            one.weights,
        ]
        for one in PRESETS.values()
    ]


CLASSES = {
    "LTX-Video": "LTXPipeline",
    "CogVideoX-2B": "CogVideoXPipeline",
    "HunyuanVideo": "HunyuanVideoPipeline",
    "CogVideoX-5B-I2V": "CogVideoXImageToVideoPipeline",
    "HunyuanVideo-I2V": "HunyuanVideoImageToVideoPipeline",
    "Wan2.1-I2V-14B": "WanImageToVideoPipeline",
}


@pytest.mark.parametrize("model", CLASSES)
def test_a_pipeline_has_the_size_and_steps_of_the_papers_row(model: str) -> None:
    tables = json.loads(PUBLISHED.read_text())["tables"].values()
    row = next(row for table in tables for row in table["rows"] if row["model"] == model)
    _, height, width, _, steps = PUBLISHED_SHAPES[CLASSES[model]]
    assert (height, width, f"{steps}x2") == (row["height"], row["width"], row["nfe"])
