"""The check of the repository's files finds each kind of problem and passes what is in order."""

from __future__ import annotations

import pytest

from tests.scripts.script import load

check_files = load("check_files.py")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.py", b"x = 1 \n", "a.py:1: trailing whitespace"),
        ("a.py", b"x = 1\ny = 2\t\n", "a.py:2: trailing whitespace"),
        ("a.md", b"text", "a.md: must end with one newline"),
        ("a.md", b"text\n\n", "a.md: must end with one newline"),
        ("a.py", b"<<<<<<< HEAD\n", "a.py:1: merge conflict marker"),
        ("a.yaml", b"a: [1\n", "a.yaml: does not parse: while parsing a flow sequence"),
        ("a.json", b"{\n", "a.json: does not parse: Expecting property name"),
        ("a.png", b"\0" * 500_001, "a.png: 500,001 bytes; at most 500,000 belong in git"),
    ],
)
def test_a_problem_is_reported_with_its_place(name: str, content: bytes, problem: str) -> None:
    (found,) = check_files.problems(name, content)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.py", b"x = 1\n"), ("py.typed", b""), ("a.png", b"\0 \n\n"), ("a.yaml", b"a: 1\n")],
)
def test_a_file_in_order_passes(name: str, content: bytes) -> None:
    assert list(check_files.problems(name, content)) == []


def test_every_tracked_file_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_files.main([]) == 0, capsys.readouterr().out
