"""Names on the Hugging Face Hub, told apart from paths."""

from __future__ import annotations

from pathlib import Path


def is_hub_name(address: str) -> bool:
    """Whether an address can only be ORGANIZATION/NAME on the Hub: of that form, and no path that exists."""
    looks_like_one = address.count("/") == 1 and not address.startswith((".", "~", "/"))
    return looks_like_one and not Path(address).exists()


def is_cached(name: str, file: str = "model_index.json") -> bool:
    """Whether a file of a Hub repository lies in the local cache; nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, file), str)
