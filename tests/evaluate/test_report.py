"""Page, figures and tables: complete, self-contained, and safe with any prompt."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from anyflow_cli.evaluate.report import page as page_module
from anyflow_cli.evaluate.report.figures import DARK_FIGURE, scores_png
from anyflow_cli.evaluate.report.page import render_page, write_results
from anyflow_cli.evaluate.report.tables import latex, markdown, score_table
from anyflow_cli.evaluate.results import Evaluation
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from tests.evaluate.drawn import Drawn, make_job

SUITE = ShapesSuite()
HOSTILE = '<script>alert("red")</script> & [bold]a red circle[/bold] \'"'


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run_evaluation(make_job(tmp_path_factory.mktemp("report"), prompts=5), Drawn().open)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    job = make_job(tmp_path_factory.mktemp("hostile"), nfe=(2,), teacher=False)
    own = replace(job.protocol, prompts=(HOSTILE, "a red circle"), deviations=("own prompts",))
    return run_evaluation(replace(job, protocol=own), Drawn().open)


class Page(HTMLParser):
    """Collects the tags and the text that a browser would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            assert self.open, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def shown(evaluation: Evaluation, width: int = 200) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, markup=False)
    with console.capture() as captured:
        console.print(score_table(evaluation))
    return captured.get()


def test_the_page_is_complete_and_loads_nothing(found: Evaluation) -> None:
    text = render_page(found, SUITE)
    parsed = Page(text)
    sources = [attrs[key] for _, attrs in parsed.tags for key in ("src", "srcset", "href") if key in attrs]
    assert sources
    assert all(source and source.startswith("data:") for source in sources)
    assert sum(tag == "video" for tag, _ in parsed.tags) == 15
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    for name in (d.name for d in SUITE.dimensions):
        assert name in parsed.text
    for prompt in found.prompts:
        assert prompt in parsed.text


def test_a_prompt_is_never_markup(hostile: Evaluation) -> None:
    parsed = Page(render_page(hostile, SUITE))
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1  # the page's own
    assert HOSTILE in parsed.text
    labels = [attrs["aria-label"] for tag, attrs in parsed.tags if tag == "video"]
    assert labels[0] == f"2 steps: {HOSTILE}"


def test_a_result_that_is_not_comparable_is_marked_everywhere(hostile: Evaluation, found: Evaluation) -> None:
    assert "Not comparable" in render_page(hostile, SUITE)
    assert "not comparable (own prompts)" in shown(hostile)
    assert hostile.as_json()["card"]["comparable"] is False
    assert "ot comparable" not in render_page(found, SUITE) + shown(found)


def test_no_file_has_control_characters(hostile: Evaluation) -> None:
    card = hostile.card.model_copy(update={"deviations": ("own prompts from \x1b]0;x\x07.txt",)})
    evaluation = replace(hostile, card=card)
    for text in (markdown(evaluation), latex(evaluation)):
        assert "\x1b" not in text
        assert r"own prompts from \x1b]0;x\x07.txt" in text


def test_a_missing_dimension_leaves_no_total(hostile: Evaluation) -> None:
    summary = hostile.as_json()["scores"][0]
    assert summary["total"] is None
    assert "direction" in summary["missing"]
    assert "There is no Total, because some dimensions are missing: " in shown(hostile)
    assert summary["quality"] is not None


def test_the_table_shows_every_number(found: Evaluation) -> None:
    text = shown(found)
    for one in found.columns:
        assert one.title in text
        assert f"{one.result.total:.1f}" in text
        for value in one.result.dimensions.values():
            assert f"{value:.1f}" in text
    assert "From 1 to 2 steps Total changes by +" in text
    assert "improves" in text


def test_the_files_are_complete_and_replaced(found: Evaluation, tmp_path: Path) -> None:
    paths = write_results(found, SUITE, tmp_path)
    write_results(found, SUITE, tmp_path)
    content = json.loads(paths["results.json"].read_text())
    assert [entry["evaluations"] for entry in content["scores"]] == [1, 2, 10]
    assert content["scores"][0]["share_of_teacher"] == pytest.approx(
        content["scores"][0]["total"] / content["scores"][2]["total"]
    )
    assert content["scores"][2]["share_of_teacher"] is None
    assert content["trend"]["verdict"] == "improves"
    assert paths["scores.png"].read_bytes().startswith(b"\x89PNG")
    names = [
        ".anyflow-evaluation.json",
        "report.html",
        "results.json",
        "scores.md",
        "scores.png",
        "scores.tex",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_page_embeds_videos_up_to_a_size(found: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "VIDEO_BYTES", 1)
    text = render_page(found, SUITE)
    assert sum(tag == "video" for tag, _ in Page(text).tags) == 3
    assert "1 of 5 shown." in text


def test_the_figure_is_drawn_without_teacher_or_total(hostile: Evaluation) -> None:
    assert scores_png(hostile, DARK_FIGURE).startswith(b"\x89PNG")


def test_the_tables_have_every_number(found: Evaluation) -> None:
    plain, paper = markdown(found), latex(found)
    rows = [line for line in plain.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {len(found.columns) + 2}
    for one in found.columns:
        for value in (one.result.total, *one.result.dimensions.values()):
            assert f" {value:.1f} " in plain
            assert f" {value:.1f} " in paper
    body = [line for line in paper.splitlines() if line.endswith("\\\\")]
    assert {line.count("&") for line in body} == {len(found.columns)}
    assert "all attributes correct, \\%" in paper
    assert "improves" in plain


def test_a_causal_model_is_scored_along_its_chunks(tmp_path: Path, found: Evaluation) -> None:
    causal = run_evaluation(make_job(tmp_path, nfe=(2,), prompts=1, kind="AnyFlowFAR"), Drawn().open)
    assert {title: one.partition for title, one in causal.curves.items()} == {
        "2 steps": (1, 3, 3, 2),
        "teacher 5x2": (1, 3, 3, 2),
    }
    text = render_page(causal, SUITE)
    assert "Scores along the video" in text
    assert "Scores along the video" not in render_page(found, SUITE)
    assert write_results(causal, SUITE, tmp_path)["chunks.png"].read_bytes().startswith(b"\x89PNG")
    chunks = causal.as_json()["scores"][0]["chunks"]
    assert len(chunks["groups"]["quality"]) == 4
    assert causal.as_json()["partition"] == (1, 3, 3, 2)


def test_published_results_are_shown_beside_a_result_on_the_same_benchmark(found: Evaluation) -> None:
    assert found.as_json()["published"] == []
    beside = replace(found, card=found.card.model_copy(update={"suite": "vbench-i2v"}))
    rows = beside.as_json()["published"]
    assert len(rows) == 7
    assert rows[-1] == {
        "model": "AnyFlow-FAR-Wan2.1-14B", "nfe": "4", "total": 87.87, "quality": 80.39, "i2v": 95.35,
        "re_evaluated": True,
    }  # fmt: skip
    assert "| AnyFlow-FAR-Wan2.1-14B, 4 | 87.87 | 80.39 | 95.35 |" in markdown(beside)
    assert "MAGI-1, 32x2, as reported by its authors" in shown(beside)
    assert "87.87" in Page(render_page(beside, SUITE)).text
    doubtful = shown(replace(found, card=found.card.model_copy(update={"suite": "vbench"})))
    assert "HunyuanVideo, 50x2, as reported by its authors, does not add up in print" in doubtful
