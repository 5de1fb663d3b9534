"""Rules for texts and paths that users type: what cannot be a path or be printed, in words."""

from __future__ import annotations

import re
from pathlib import Path

MAX_NAME = 255  # bytes of a file's name, on every common file system
MAX_PATH = 4096  # bytes of a path
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # and surrogates; not tab and newline


def text_problem(text: str) -> str | None:
    """Complete "X must ..." for a text with characters that cannot be shown or stored; None without any."""
    found = CONTROL.search(text)
    return f"not contain the character {escaped(found[0])}" if found else None


def path_problem(text: str) -> str | None:
    """Complete "X must ..." for a text that cannot be a path or an address; None if it can."""
    if problem := text_problem(text):
        return problem
    if "\n" in text or "\t" in text:
        return "be one line without tabs"
    if len(text.encode()) > MAX_PATH:
        return f"be at most {MAX_PATH} bytes long"
    if any(len(part.encode()) > MAX_NAME for part in text.split("/")):
        return f"have names of at most {MAX_NAME} bytes"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return f"name a user that exists, not {text.split('/')[0]}"
    return None


def escaped(text: str) -> str:
    r"""Write control characters and surrogates as Python does (``\x1b``), so that they are visible."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str, length: int = 60) -> str:
    """Cut a text so that it fits into a sentence."""
    return text if len(text) <= length else f"{text[: length - 3]}..."
