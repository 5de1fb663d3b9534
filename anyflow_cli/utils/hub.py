"""Names on the Hugging Face Hub, told apart from paths."""

from __future__ import annotations

from pathlib import Path


def is_hub_name(address: str) -> bool:
    """Whether an address can only be ORGANIZATION/NAME on the Hub: of that form, and no path that exists."""
    looks_like_one = address.count("/") == 1 and not address.startswith((".", "~", "/"))
    return looks_like_one and not Path(address).exists()


def cached_snapshot(name: str, file: str = "model_index.json") -> Path | None:
    """Find the folder of a Hub repository in the local cache, by one of its files; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found).parent if isinstance(found, str) else None
