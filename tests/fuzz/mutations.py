"""Mutations of files: damaged, mistyped and hostile content of every format that anyflow reads.

``mutate`` changes one file. The suffix decides which values of it can be changed under intact syntax; any
file can be cut, flipped, overwritten, or replaced by something that is not a file.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

Mutation = Callable[[bytes, random.Random], bytes]

CANARY = "canary.txt"  # beside the files that are mutated, in every directory above them, and in the home
CLIMBS = tuple("../" * steps + CANARY for steps in range(1, 5))
TEXT_VALUES: tuple[str, ...] = (
    "", " ", "x", "../../x", *CLIMBS, "/etc/passwd", "~", "~nosuchuser/x", "a\0b", "\x1b[31mred", "\u202e",
    "\ud800", "x" * 300, "x" * 5000, "9" * 5000, "1e400", "-1", "nan", "%s{0}", "NUL", "s3://bucket/x",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 0.5, 1.5, 10**9, -(10**9), 10**30, 2**63, 2**64, 1e308, -1e-308,
    float("nan"), float("inf"), *TEXT_VALUES, [], [1], ["a", None], {}, {"a": 1}, {"a": None}, [[[[1]]]],
    [10**9] * 3, [0, 0, 0], [1, 2], list(range(1000)),
)  # fmt: skip


class Payload:
    """An object whose pickle writes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('pickle-was-executed', 'w').close()",)


CONTENTS = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000,
    b'{"a":' * 100_000, b"{" + b'"a":1,' * 1000 + b'"a":1}', b"1" * 5000, bytes(range(256)), b"\0" * 4096,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"<!DOCTYPE html>", b"PK\x03\x04",
    b"ffconcat version 1.0\nfile ../canary.txt\n", b"#EXTM3U\n#EXTINF:1,\n../canary.txt\n", b"GIF89a",
    b"\x89PNG\r\n\x1a\n", b"\x93NUMPY\x01\x00", pickle.dumps(Payload()), b"x: &a [*a, *a]\n", b"%PDF-1.7",
)  # fmt: skip
YAML_SCALARS = (
    "!!python/object/apply:os.getcwd []", "!!bool maybe", "*x", "&a [*a]", "{", "0x", "1e400", "2024-13-45",
    ".inf", "\t- 1", "!!binary ====", "? [1]", "<<: *x", "'", "|\n  x", "99999999999999999999", "~", "yes",
)  # fmt: skip


def mutate(file: Path, draw: random.Random) -> str:
    """Change one file; gives what was done to it."""
    own = BY_SUFFIX.get(file.suffix, ())
    mutation = draw.choice([None, *ANYWHERE, *own, *own, *own])
    if mutation is None:
        return replace_by_special(file, draw)
    content = file.read_bytes()
    try:
        changed = mutation(content, draw)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error, tarfile.TarError):
        mutation = flip  # what is there has not the format of its suffix
        changed = flip(content, draw)
    file.write_bytes(changed)
    return mutation.__name__.replace("_", " ")


def replace_by_special(file: Path, draw: random.Random) -> str:
    """Put nothing, a directory, a pipe, a device or a broken link in place of a file."""
    file.unlink()
    kind = draw.choice(("nothing", "directory", "pipe", "loop", "dangling link", "device", "canary"))
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "nothing":
        target = {"loop": file.name, "dangling link": "nowhere", "device": "/dev/zero", "canary": CANARY}
        file.symlink_to(target[kind])
    return f"became a {kind}"


# --- bytes


def cut(content: bytes, draw: random.Random) -> bytes:
    """Keep the beginning."""
    return content[: draw.randrange(len(content) + 1)]


def flip(content: bytes, draw: random.Random) -> bytes:
    """Flip some bits."""
    changed = bytearray(content or b"\0")
    for _ in range(draw.choice((1, 4, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def repeat(content: bytes, draw: random.Random) -> bytes:
    """Repeat or overwrite a stretch."""
    at, length = draw.randrange(len(content) + 1), draw.randrange(1, 64)
    if draw.random() < 0.5:
        return content[:at] + content[at : at + length] + content[at:]
    return content[:at] + draw.randbytes(length) + content[at + length :]


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """Put something else in its place."""
    return draw.choice(CONTENTS)


ANYWHERE: tuple[Mutation, ...] = (cut, flip, repeat, overwrite)


# --- documents


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a document below its root; of long lists the first and the last ones."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))[:3] + list(enumerate(value))[-1:]
    else:
        children = []
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def edit(document: Any, draw: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """Replace, remove, rename or move one value of a document."""
    found = places(document)
    if not found:
        return draw.choice(values)
    path = draw.choice(found)
    target = document
    for key in path[:-1]:
        target = target[key]
    done = draw.choice(("replace", "replace", "replace", "remove", "rename", "move"))
    if done == "remove":
        del target[path[-1]]
    elif done == "rename" and isinstance(target, dict):
        target[draw.choice((f"{path[-1]}x", *TEXT_VALUES))] = target.pop(path[-1])
    elif done == "move":
        source: Any = document
        for key in draw.choice(found):
            source = source[key]
        target[path[-1]] = json.loads(json.dumps(source))
    else:
        target[path[-1]] = draw.choice(values)
    return document


def edit_json(content: bytes, draw: random.Random) -> bytes:
    """Edit a JSON document, or one line of JSON lines."""
    try:
        return json.dumps(edit(json.loads(content), draw), indent=1).encode() + b"\n"
    except ValueError:
        lines = content.decode().splitlines()
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(edit(json.loads(lines[number]), draw))
        return ("\n".join(lines) + "\n").encode()


def edit_yaml(content: bytes, draw: random.Random) -> bytes:
    """Edit a YAML document."""
    document = edit(yaml.safe_load(content), draw)
    return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")


def edit_yaml_line(content: bytes, draw: random.Random) -> bytes:
    """Replace the value of one line by YAML that is hard to read, or repeat the line."""
    lines = content.decode().splitlines()
    number = draw.randrange(len(lines))
    key = lines[number].partition(":")[0]
    lines[number] = draw.choice((f"{key}: {draw.choice(YAML_SCALARS)}", f"{lines[number]}\n{lines[number]}"))
    return "\n".join(lines).encode()


def edit_text(content: bytes, draw: random.Random) -> bytes:
    """Replace or repeat a line or a cell."""
    separator = draw.choice(("\n", ","))
    parts = content.decode().split(separator)
    number = draw.randrange(len(parts))
    value = str(draw.choice(VALUES))
    parts[number] = draw.choice((value, parts[number] + value, f'"{value}', parts[number] + separator * 3))
    return separator.join(parts).encode("utf-8", "surrogatepass")


def encode(content: bytes, draw: random.Random) -> bytes:
    """Write a text in another encoding, with letters that differ there."""
    text = content.decode().replace("a", "ä")
    return text.encode(draw.choice(("cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037")))


# --- containers


def edit_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Edit the header of a safetensors file: a value, a name, a type, bytes, or its length."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = draw.choice(sorted(header))
    done = draw.choice(("value", "value", "type", "name", "metadata", "bytes", "length"))
    if done == "type" and name != "__metadata__":
        header[name]["dtype"] = draw.choice(
            ("F64", "I64", "U8", "BOOL", "F8_E4M3", "BF16", "F16", "C64", "X", None)
        )
    elif done == "name":
        header[draw.choice((*TEXT_VALUES, name * 500, name[:-1], f"{name}.x"))] = header.pop(name)
    elif done == "metadata":
        key = draw.choice(("config", "head_dim", "gate", "delta", "format", "alpha", "ss_network_alpha"))
        stated = draw.choice((json.dumps(draw.choice(VALUES)), *TEXT_VALUES))
        header["__metadata__"] = {**header.get("__metadata__", {}), key: stated}
    elif done == "value":
        edit(header[name], draw)
    encoded = bytearray(json.dumps(header).encode())
    if done == "bytes":
        for _ in range(draw.choice((1, 8))):
            encoded[draw.randrange(len(encoded))] = draw.randrange(256)
    length = draw.choice((0, 10, 2**31, 2**63, 2**64 - 1)) if done == "length" else len(encoded)
    return length.to_bytes(8, "little") + bytes(encoded) + data


def edit_tar(content: bytes, draw: random.Random) -> bytes:
    """Write an archive again with one member renamed, doubled, turned into a link, or left out."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(member, (archive.extractfile(member) or io.BytesIO()).read()) for member in archive]
    chosen, written = draw.randrange(len(members)), io.BytesIO()
    done = draw.choice(("rename", "double", "link", "leave out", "edit"))
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (member, data) in enumerate(members):
            if number == chosen and done == "leave out":
                continue
            if number == chosen and done == "rename":
                member.name = draw.choice([text for text in TEXT_VALUES if 0 < len(text) < 90])
            if number == chosen and done == "link":
                member.type, member.linkname = tarfile.SYMTYPE, draw.choice(CLIMBS)
            if number == chosen and done == "edit":
                data = BY_SUFFIX[Path(member.name).suffix][0](data, draw)
                member.size = len(data)
            for _ in range(2 if number == chosen and done == "double" else 1):
                archive.addfile(member, io.BytesIO(data))
    return written.getvalue()


def edit_npy(content: bytes, draw: random.Random) -> bytes:
    """Change the shape, the type or the order that an array's header states."""
    size = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + size].decode("latin-1")
    field = draw.choice((r"\d+", r"'<?[fiuV|SU]\d+'", "False", "True"))
    number = draw.choice(("0", "-1", "1", "9" * 18, "'O'", "'<f8'", "__import__('os')", "True", "(1,)"))
    changed = re.sub(field, lambda found: number, header, count=1).ljust(size)
    return content[:8] + len(changed).to_bytes(2, "little") + changed.encode("latin-1") + content[10 + size :]


def put_pickle(content: bytes, draw: random.Random) -> bytes:
    """Put an object that runs code, a loop, or something besides tensors in place of a pickled state."""
    looped: dict[str, Any] = {}
    looped["ema"] = looped["model"] = looped
    objects: tuple[Any, ...] = (
        Payload(),
        looped,
        {"model": Payload()},
        {1: None},
        [[]] * 9,
        "x",
        {"ema": draw.choice(VALUES)},
    )
    value, written = draw.choice(objects), io.BytesIO()
    if draw.random() < 0.3:
        return pickle.dumps(value, protocol=draw.choice((0, 2, 4)))
    torch.save(value, written, _use_new_zipfile_serialization=draw.random() < 0.5)
    return written.getvalue()


def edit_png(content: bytes, draw: random.Random) -> bytes:
    """Edit the sizes and types in the header of a PNG, or insert a chunk that grows when it is read."""
    if content[12:16] != b"IHDR":
        return flip(content, draw)
    header = bytearray(content[16:29])
    if draw.random() < 0.7:
        number = draw.choice((0, 1, 65_535, 100_000, 2**31 - 1, 2**32 - 1))
        header[draw.choice((slice(0, 4), slice(4, 8)))] = number.to_bytes(4, "big")
    else:
        header[draw.randrange(8, 13)] = draw.choice((0, 1, 3, 4, 6, 8, 16, 255))
    bomb = b"zTXt" + b"k\0\0" + zlib.compress(b"x" * 50_000_000, 9) if draw.random() < 0.05 else b""
    chunk = struct.pack(">I", len(bomb) - 4) + bomb + struct.pack(">I", zlib.crc32(bomb)) if bomb else b""
    return (
        content[:16] + bytes(header) + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + chunk + content[33:]
    )


def edit_atoms(content: bytes, draw: random.Random) -> bytes:
    """Change the size or a number of one of an mp4's boxes."""
    found = [
        match.start()
        for match in re.finditer(rb"ftyp|moov|mvhd|trak|tkhd|mdia|stbl|stsd|stsz|stco|avc1|mdat", content)
    ]
    at = draw.choice(found) + draw.choice((-4, -4, 4, 8, 12, 16, 20, 28))
    number = draw.choice((0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1))
    return content[:at] + number.to_bytes(4, "big") + content[at + 4 :]


BY_SUFFIX: dict[str, tuple[Mutation, ...]] = {
    ".json": (edit_json,), ".jsonl": (edit_json, edit_text, encode),
    ".yaml": (edit_yaml, edit_yaml, edit_yaml_line, edit_text, encode), ".csv": (edit_text, encode),
    ".txt": (edit_text, encode), ".set": (edit_text,), ".safetensors": (edit_safetensors,),
    ".npy": (edit_npy,), ".tar": (edit_tar,), ".pt": (put_pickle,), ".pth": (put_pickle,),
    ".metadata": (put_pickle,), ".png": (edit_png,), ".mp4": (edit_atoms,),
}  # fmt: skip
