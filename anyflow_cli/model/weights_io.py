"""Safetensors files of one component: headers without weights, weights read and written tensor by tensor.

A component's weights are in one file or in the shards of an index. Everything is checked while it is read:
the file is regular and complete, each tensor has a floating type, and every value is finite. On the CPU
tensors are views of the mapped file, so that reading a network takes no memory until it is cast or changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import safe_child
from anyflow_cli.utils.records import read_record

if TYPE_CHECKING:
    from anyflow_cli.model.config import NetworkConfig

TRANSFORMER_STEM, TEXT_ENCODER_STEM = "diffusion_pytorch_model", "model"
FETCH = "Fetch or save the model again."
LFS_POINTER = b"version https://git-lfs"
# safetensors' name of a type -> torch's; its writer orders tensors by type, in the reverse of this order
FLOAT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WRITTEN_TYPES = {"F8_E4M3": torch.float8_e4m3fn, **FLOAT_TYPES}


class TensorInfo(NamedTuple):
    """What a header says of a tensor: the file that holds it, its type as safetensors names it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class WeightIndex(BaseModel):
    """``*.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, str]


def component_files(folder: Path, stem: str = TRANSFORMER_STEM) -> list[Path]:
    """Files with the weights of a component: one, or the shards that its index names.

    Raises:
        UsageError: There is neither, or the index is damaged or names files outside of the folder.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_record(index, WeightIndex, FETCH).weight_map.values()))
        return [safe_child(folder, name) for name in names]
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    raise UsageError(
        f"{folder} holds no {stem}.safetensors.",
        "Name the file of its weights, or convert them to safetensors.",
    )


def read_headers(folder: Path, stem: str = TRANSFORMER_STEM) -> dict[str, TensorInfo]:
    """Every tensor of a component by name, from the headers of its files.

    Raises:
        UsageError: A file is missing or damaged, a tensor is in two files or is not of a floating type.
    """
    found: dict[str, TensorInfo] = {}
    for file in component_files(folder, stem):
        for name, info in read_header(file).items():
            if name in found:
                raise UsageError(f"{shown(name)} is in both {found[name].file} and {file}.", FETCH)
            if info.dtype not in FLOAT_TYPES:
                raise UsageError(
                    f"{file} stores {shown(name)} as {info.dtype}; anyflow reads {', '.join(FLOAT_TYPES)}.",
                    "Convert the weights to one of these types.",
                )
            found[name] = info
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name, of any type."""
    with opened(file) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dictionary)
        return {
            name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
        }


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU and as stored; a value that is not finite is refused."""
    with opened(file) as handle:
        weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dictionary)
    check_finite(weights, str(file))
    return weights


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights with a NaN or an infinity; ``source`` names where they are from.

    One sum per tensor finds them; only where it overflows are the values looked at. It is a sum in the
    tensor's own type: a CPU copies the whole tensor to sum it in another.
    """
    for name, tensor in weights.items():
        summed = tensor if tensor.itemsize > 1 else tensor.float()  # fp8 has no sum
        if tensor.is_floating_point() and not summed.sum().isfinite():
            bad = int(tensor.isfinite().logical_not().sum())
            if bad:
                raise UsageError(
                    f"{source} holds {bad} values of {shown(name)} that are NaN or infinite.",
                    f"The weights are damaged. {FETCH}",
                )


def check_names_and_shapes(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    place: Path,
    reference: str = "config.json",
) -> None:
    """Refuse tensors that are missing, of another shape or not part of the architecture.

    Args:
        expected: Shape of every tensor of the architecture, by name.
        found: Shape of every tensor in the files, by name.
        place: Folder or file, for the message.
        reference: What states the sizes, for the message.
    """
    for problem in differences(expected, found):
        raise UsageError(
            f"The weights of {place} do not fit {reference}: {problem}.",
            "They belong to different models, or were saved in part. " + FETCH,
        )


def differences(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """In words, how tensors differ from those of an architecture: missing, unexpected, of another shape."""
    missing = [name for name in expected if name not in found]
    if missing:
        yield f"{listed(missing)} missing"
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        yield f"{listed(unexpected)} unexpected"
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            yield f"{shown(name)} has shape {tuple(found[name])} instead of {tuple(shape)}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names from a file for a message: the first ones, and how many more there are."""
    rest = f" and {len(names) - most} more are" if len(names) > most else " is" if len(names) == 1 else " are"
    return ", ".join(map(shown, names[:most])) + rest


def shown(name: str) -> str:
    """A name from a file for a message: on one line and not too long."""
    return name.encode("unicode_escape").decode()[:120]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, opened by its library and checked against its header.

    Raises:
        UsageError: It is missing, not a regular file, a Git LFS pointer, truncated or otherwise damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        raise UsageError(f"{file} is missing.", FETCH)
    if not file.is_file():
        raise UsageError(f"{file} is not a regular file.", FETCH)
    try:
        with file.open("rb") as start:
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UsageError(
                    f"{file} is a Git LFS pointer, not the weights themselves.",
                    "Run `git lfs pull` in the clone, or fetch the model with `hf download`.",
                )
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged ({error}).", FETCH) from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.", FETCH) from error


@dataclass(frozen=True)
class LazyWeight:
    """A tensor that is computed when it is used, of a shape known before.

    Attributes:
        shape: Its shape.
        dtype: Type to store it as; ``load`` may return a more precise one.
        load: Computes it.
        is_view: Whether ``load`` may return a view of a mapped file, which would keep the pages of other
            tensors in memory; who keeps the tensor copies it then.
    """

    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]
    is_view: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> LazyWeight:
        """A tensor that exists already."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    def to(self, dtype: torch.dtype) -> LazyWeight:
        """The same, cast when it is loaded."""
        return replace(self, dtype=dtype, load=lambda: self.load().to(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.shape.numel() * self.dtype.itemsize


class WeightSource(Protocol):
    """A network to save: its configuration, and its weights one at a time."""

    @property
    def config(self) -> NetworkConfig:
        """Sizes of the network."""

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name, loaded when they are used."""


def fill_module(
    module: nn.Module,
    weights: Mapping[str, LazyWeight],
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device | str = "cpu",
) -> None:
    """Replace the parameters of a module, frozen, one tensor after another.

    Args:
        module: A module, usually on the meta device.
        weights: Weights by the names of its parameters.
        dtype_of: Type of each parameter, by name.
        device: Device of the parameters; nothing but the tensor at hand is in the host's memory.
    """
    for name in [name for name, _ in module.named_parameters()]:
        path, _, last = name.rpartition(".")
        weight = weights[name]
        value = weight.load().detach().to(device, dtype_of(name), copy=weight.is_view)
        setattr(module.get_submodule(path), last, nn.Parameter(value, requires_grad=False))


def write_weights(file: Path, weights: Mapping[str, LazyWeight], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, holding one tensor in memory at a time.

    The bytes are those of ``safetensors.torch.save_file``: larger types first, then by name.
    """
    order = list(WRITTEN_TYPES.values())
    names = sorted(weights, key=lambda name: (-order.index(weights[name].dtype), name))
    types = {dtype: name for name, dtype in WRITTEN_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        weight, begin = weights[name], offset
        offset += weight.nbytes
        header[name] = {
            "dtype": types[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [begin, offset],
        }
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = weights[name].load().detach().to("cpu", weights[name].dtype).contiguous()
            assert tensor.shape == weights[name].shape, name
            out.write(tensor.flatten().view(torch.uint8).numpy().data)
            del tensor
