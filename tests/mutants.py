"""Mutants of files: every one is read or refused in a sentence with a hint, none ends in a traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import AnyflowError

COUNTS = (12, pytest.param(400, marks=pytest.mark.slow))  # mutants of each kind of file
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 1e308, "", "x", "../../x", "/etc/passwd", "\x1b[31m", "\ud800",
    [], {}, [[]], "a" * 5000,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a JSON document."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def mutant(content: bytes, rng: random.Random) -> bytes:
    """Change one value, remove or rename one key, or damage some bytes."""
    kind = rng.randrange(6)
    if kind < 2:
        data = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data))] if kind else data)
    try:
        lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
        number = rng.randrange(len(lines))
        document = copy.deepcopy(json.loads(lines[number]))
    except ValueError:  # not JSON
        return mutant(content, rng)
    path = rng.choice(places(document)[1:] or [()])
    target = document
    for key in path[:-1]:
        target = target[key]
    if kind == 2 and isinstance(target, dict):
        target[f"{path[-1]}x"] = target.pop(path[-1])
    elif kind == 3 and path:
        del target[path[-1]]
    elif path:
        target[path[-1]] = rng.choice(VALUES)
    lines[number] = json.dumps(document)
    return ("\n".join(lines) + "\n").encode()


def mutate_json(content: Any, rng: random.Random, values: Sequence[Any]) -> Any:
    """Remove one value of a JSON document, or replace it by one of ``values``."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = rng.choice(spots)
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = rng.choice(values)
    return content


def check(file: Path, use: Callable[[], object], cases: int, seed: int, *, refused: float = 0.25) -> None:
    """Use a file and its mutants: each use succeeds or is refused, at least a share ``refused`` of them."""
    whole, rng = file.read_bytes(), random.Random(seed)
    errors: list[AnyflowError] = []
    for _ in range(cases):
        file.write_bytes(mutant(whole, rng))
        try:
            use()
        except AnyflowError as error:
            errors.append(error)
    assert len(errors) > int(cases * refused)
    assert all(error.hint for error in errors)
    file.write_bytes(whole)
    use()
