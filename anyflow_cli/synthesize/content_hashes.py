"""Hashes of the files that a data set is made from: clips and model weights, by content.

Hashing a large teacher takes a minute, so hashes are kept in a hidden file of the data set, by what the file
system knows of a file: inode, size, and when content and metadata last changed. A file that was swapped,
touched or restored is hashed again. Large files in the Hub's cache are named by their hash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import file_sha256, json_sha256, write_json
from anyflow_cli.utils.records import read_record

HASHES_FILE = ".hashes.json"
HUB_BLOB = re.compile(r"[0-9a-f]{64}")


class ContentHashes:
    """SHA-256 of files, remembered in a directory."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / HASHES_FILE
        try:
            self._known = read_record(self._path, dict[str, str])
        except UsageError:  # missing or damaged; it only saves time
            self._known = {}

    def combined(self, files: Mapping[str, Path]) -> str:
        """One hash of the names and contents of files."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return json_sha256(dict(zip(files, pool.map(self._hash, files.values()), strict=True)))

    def save(self) -> None:
        """Remember the hashes for the next start."""
        write_json(self._path, self._known)

    def _hash(self, path: Path) -> str:
        real = path.resolve()
        if real.parent.name == "blobs" and HUB_BLOB.fullmatch(real.name):
            return real.name
        found = real.stat()
        identity = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        key = ":".join(map(str, identity))
        if key not in self._known:
            self._known[key] = file_sha256(real)
        return self._known[key]
