"""Named tensors in files, described by their headers and read one at a time.

safetensors files are read tensor by tensor. Pickled files (``.pt``, ``.pth``) are opened with
``weights_only`` and mapped into memory, so that nothing in them is executed and only used tensors are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.weights_io import FETCH, FLOAT_TYPES, TensorInfo, opened, read_header, shown

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# Entries of a pickled training state that hold the weights, the preferred one first.
WRAPPERS = ("generator_ema", "ema", "generator", "state_dict", "model", "module", "generator_lora")
MAPPED_BYTES = 64 << 20  # read from a mapped file before its pages are given back
QUANTIZED_TYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8}
INTEGER_TYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPES = FLOAT_TYPES | QUANTIZED_TYPES | INTEGER_TYPES


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one or more files, by name.

    Attributes:
        files: The files.
        tensors: Description of each tensor.
        metadata: Strings in the headers of safetensors files.
        wrapper: Entry of the pickled files that holds the tensors; None if they are at the top.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    wrapper: str | None = None
    _mapped: dict[Path, _Mapped] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, files: Sequence[Path]) -> TensorFiles:
        """Read the headers of ``files``.

        Raises:
            UsageError: A file is missing, damaged, or pickled with anything besides tensors.
        """
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        wrapper = None
        for file in files:
            if file.suffix in PICKLE_SUFFIXES:
                found, wrapper = _unwrapped(_load_mapped(file), file)
                header = {name: _described(file, tensor) for name, tensor in found.items()}
            else:
                header = read_header(file)
                with opened(file) as handle:
                    metadata |= handle.metadata() or {}
            for name, info in header.items():
                _check_type(name, info)
            tensors |= header
        return cls(tuple(files), tensors, metadata, wrapper)

    def read(self, name: str) -> Tensor:
        """Load one tensor onto the CPU, as stored.

        It is a view of the mapped file. One of a pickled file keeps all pages resident that were read.
        """
        file = self.tensors[name].file
        if file.suffix not in PICKLE_SUFFIXES:
            with opened(file) as handle:
                tensor: Tensor = handle.get_tensor(name)
                return tensor
        mapped = self._mapped.get(file)
        if mapped is None or mapped.used > MAPPED_BYTES:
            mapped = self._mapped[file] = _Mapped(_unwrapped(_load_mapped(file), file)[0])
        tensor = mapped.tensors[name]
        mapped.used += tensor.nbytes
        return tensor


@dataclass
class _Mapped:
    """An open pickled file; its pages stay resident until it is dropped."""

    tensors: Mapping[str, Tensor]
    used: int = 0


def _described(file: Path, tensor: Tensor) -> TensorInfo:
    names = {dtype: name for name, dtype in TYPES.items()}
    return TensorInfo(file, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def _check_type(name: str, info: TensorInfo) -> None:
    if info.dtype not in TYPES:
        raise UsageError(
            f"{info.file} stores {shown(name)} as {info.dtype}, a type that anyflow does not read.",
            "Use the file in bf16, fp16 or fp8.",
        )


def _load_mapped(file: Path) -> Any:
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is not a regular file.", FETCH)
    try:
        # torch can map zip files, which it writes since version 1.6
        with file.open("rb") as start:
            mmap = start.read(4) == b"PK\x03\x04"
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UsageError(f"{file} is missing.", FETCH) from None
    except UnpicklingError as error:
        raise UsageError(
            f"{file} holds Python objects besides tensors, which could run code when read.",
            "Save its tensors as safetensors, on a machine where you trust the file.",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles make torch raise almost anything
        reason = (str(error).strip().splitlines() or ["it is empty"])[0]
        raise UsageError(f"{file} is damaged ({reason}).", FETCH) from error


def _unwrapped(content: Any, file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors in a pickled object, and the entry that holds them."""
    wrapper = None
    for _ in WRAPPERS:  # each at most once: a pickled dictionary may hold itself
        if not isinstance(content, Mapping):
            break
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors, wrapper
        wrapper = next((name for name in WRAPPERS if name in content), None)
        content = content.get(wrapper)
    raise UsageError(f"{file} holds no tensors by name.", "Use a file of model weights.")
