"""Check the text and the size of the repository's files.

    python scripts/check_files.py [FILE ...]

Without arguments it checks every tracked file. It reports trailing whitespace, a missing or doubled newline
at the end, merge conflict markers, YAML, TOML and JSON that do not parse, and files over 500 kB. The files
below ``anyflow_cli/assets`` and ``tests/fixtures`` are written by programs and are not checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
NOT_CHECKED = ("anyflow_cli/assets/", "tests/fixtures/")
LARGEST = 500_000  # bytes
CONFLICT = ("<<<<<<< ", ">>>>>>> ")
PARSERS: dict[str, Callable[[str], Any]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": json.loads,
}
if sys.version_info >= (3, 11):
    import tomllib

    PARSERS[".toml"] = tomllib.loads


def tracked_files() -> list[str]:
    """Names of all files that git tracks."""
    return subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]


def problems(name: str, content: bytes) -> Iterator[str]:
    """What is wrong with one file, as ``name:line: problem``."""
    if len(content) > LARGEST:
        yield f"{name}: {len(content):,} bytes; at most {LARGEST:,} belong in git"
    if b"\0" in content or not content:
        return
    text = content.decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if line != line.rstrip():
            yield f"{name}:{number}: trailing whitespace"
        if line.startswith(CONFLICT):
            yield f"{name}:{number}: merge conflict marker"
    if text != text.rstrip("\n") + "\n":
        yield f"{name}: must end with one newline"
    parse = PARSERS.get(Path(name).suffix)
    try:
        if parse is not None:
            parse(text)
    except (ValueError, yaml.YAMLError) as error:
        yield f"{name}: does not parse: {str(error).splitlines()[0]}"


def main(names: list[str]) -> int:
    """Print every problem; the exit code says whether there was one."""
    found = [
        problem
        for name in names or tracked_files()
        if not name.startswith(NOT_CHECKED) and (ROOT / name).is_file()
        for problem in problems(name, (ROOT / name).read_bytes())
    ]
    print("\n".join(found), end="\n" * bool(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
