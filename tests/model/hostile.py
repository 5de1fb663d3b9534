"""Mutants of a model folder: damaged, mistyped and hostile files, each from a seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "../../x", "/etc/passwd", "\u0000", "\x1b[31m", "x" * 5000, 0, -1, 1, 3,
    10**9, -(10**9), 10**30, 0.5, 1e308, -1e-308, float("nan"), float("inf"), [], [1], ["a", None],
    {}, {"a": 1}, [[[[1]]]], [10**9] * 3, [0, 0, 0], [1, 2],
)  # fmt: skip
HOSTILE_TEXTS = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000,
    b'{"a":' * 100_000, b"{" + b'"a":1,' * 1000 + b'"a":1}', b"1" * 5000,
    LFS_POINTER.encode(), bytes(range(256)), b"<!DOCTYPE html>",
)  # fmt: skip

Mutation = Callable[[Path, random.Random], str]


def mutate(folder: Path, seed: int) -> tuple[Path, str]:
    """Damage one file of a folder; gives the file and what was done to it."""
    draw = random.Random(seed)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = draw.choice(files)
    kinds: list[Mutation] = [_replace_by_special, _cut, _flip, _overwrite]
    if file.suffix == ".json":
        kinds = [_change_value] * 6 + [_drop_key] * 2 + kinds
    if file.suffix == ".safetensors":
        kinds = [_change_header] * 6 + [_flip_header] * 2 + kinds
    return file, draw.choice(kinds)(file, draw)


def _replace_by_special(file: Path, draw: random.Random) -> str:
    file.unlink()
    kind = draw.choice(("nothing", "directory", "fifo", "loop", "dangling link", "device"))
    if kind == "directory":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling link":
        file.symlink_to("nowhere")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    return f"is a {kind}"


def _cut(file: Path, draw: random.Random) -> str:
    size = draw.randrange(file.stat().st_size + 1)
    os.truncate(file, size)
    return f"is cut to {size} bytes"


def _flip(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    places = [draw.randrange(len(content)) for _ in range(draw.choice((1, 4, 64)))]
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"has {len(places)} flipped bits"


def _overwrite(file: Path, draw: random.Random) -> str:
    content = draw.choice(HOSTILE_TEXTS)
    file.write_bytes(content)
    return f"holds {content[:20]!r}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value in a JSON document, down to the third level; of long lists the first three."""
    found = [path] if path else []
    if len(path) < 3:
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value[:3])
            if isinstance(value, list)
            else ()
        )
        for key, inner in items:
            found += _places(inner, (*path, key))
    return found


def _edit(document: Any, path: tuple[Any, ...], draw: random.Random, drop: bool) -> str:
    for key in path[:-1]:
        document = document[key]
    if drop:
        del document[path[-1]]
        return f"lacks {path}"
    document[path[-1]] = draw.choice(HOSTILE_VALUES)
    return f"has {path} = {str(document[path[-1]])[:30]}"


def _change_value(file: Path, draw: random.Random, drop: bool = False) -> str:
    document = json.loads(file.read_text())
    if not _places(document):
        return _overwrite(file, draw)
    done = _edit(document, draw.choice(_places(document)), draw, drop)
    file.write_text(json.dumps(document))
    return done


def _drop_key(file: Path, draw: random.Random) -> str:
    return _change_value(file, draw, drop=True)


def _header(file: Path) -> tuple[Any, bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _change_header(file: Path, draw: random.Random) -> str:
    header, data = _header(file)
    name = draw.choice(sorted(header))
    done = draw.choice(("type", "value", "name", "drop", "length"))
    if done == "type" and name != "__metadata__":
        header[name]["dtype"] = draw.choice(
            ("F64", "I64", "U8", "BOOL", "F8_E4M3", "BF16", "F16", "C64", "X", None)
        )
    elif done == "name":
        header[draw.choice(("", "x", "\u0000", "\x1b[31m", name * 500))] = header.pop(name)
    elif done == "drop":
        del header[name]
    else:
        done = _edit(header, (name, draw.choice(_places(header[name]) or [("x",)])[0]), draw, drop=False)
    encoded = json.dumps(header).encode()
    size = draw.choice((0, 10, 2**31, 2**63, 2**64 - 1)) if done == "length" else len(encoded)
    file.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return f"header: {name[:40]}: {done}"


def _flip_header(file: Path, draw: random.Random) -> str:
    header, data = _header(file)
    encoded = bytearray(json.dumps(header).encode())
    for _ in range(draw.choice((1, 8))):
        encoded[draw.randrange(len(encoded))] = draw.randrange(256)
    file.write_bytes(len(encoded).to_bytes(8, "little") + bytes(encoded) + data)
    return "has other bytes in its header"


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a folder in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
