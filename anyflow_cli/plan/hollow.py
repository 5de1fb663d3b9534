"""Tensors that have shapes, types and a device, and no numbers.

torch's own ``FakeTensorMode`` does the same and more, and takes several times as long for it, of which a
rehearsal of tens of thousands of operators is made. Here an operator is run by the meta device, or remembered
from a call alike, and what comes out is said to be on the CPU, so that the network and autocast take the
paths that they take there.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")


class Hollow(Tensor):
    """A tensor on the CPU to all who ask. ``meta`` stands for it: views of one another share its storage."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> Hollow:
        """Wrap a tensor of the meta device."""
        made: Hollow = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        made.meta = meta
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator outside of ``Hollowing``."""
        return _Call(func).run(args, kwargs or {})


class Hollowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """All that is made inside is hollow."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator."""
        return _Call(func).run(args, kwargs or {})


class _Fresh(NamedTuple):
    """What an operator makes, with storage of its own."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


_EACH_TIME = object()
_remembered: dict[Hashable, Any] = {}  # call -> _Fresh, or None in its place, or several; or _EACH_TIME


class _Call:
    """One operator: its arguments without their covers, and what a call alike is known by."""

    def __init__(self, func: Any) -> None:
        self.func = func
        self.given: dict[int, Hollow] = {}  # an operator that works in place gives back what it was given
        self.makes = True  # out of nothing

    def run(self, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = self._bare(args), {key: self._bare(value) for key, value in kwargs.items()}
        if self.makes:
            kwargs["device"] = META
        key = (self.func, _known_by(args), _known_by(tuple(kwargs.items())))
        made = _remembered.get(key)
        if made is not None and made is not _EACH_TIME:
            return _again(made)
        out = self.func(*args, **kwargs)
        if made is None:
            _remembered[key] = self._fresh(out)
        return self._covered(out)

    def _bare(self, value: Any) -> Any:
        if isinstance(value, Hollow):
            self.given[id(value.meta)] = value
            self.makes = False
            return value.meta
        if isinstance(value, Tensor):
            self.makes = False
            return value.to(META)
        if isinstance(value, (list, tuple)):
            return [self._bare(each) for each in value]
        return META if isinstance(value, torch.device) else value

    def _covered(self, out: Any) -> Any:
        if isinstance(out, (list, tuple)):
            return type(out)(map(self._covered, out))
        if not isinstance(out, Tensor):
            return out
        return self.given[id(out)] if id(out) in self.given else Hollow(out)

    def _fresh(self, out: Any) -> Any:
        """What of a result can be made again; ``_EACH_TIME`` if it is no new tensor with its own storage."""
        if isinstance(out, (list, tuple)):
            parts = tuple(None if part is None else self._fresh(part) for part in out)
            return _EACH_TIME if _EACH_TIME in parts else parts
        if not isinstance(out, Tensor):
            return _EACH_TIME
        storages = {given.meta.untyped_storage()._cdata for given in self.given.values()}
        if out.untyped_storage()._cdata in storages or out.storage_offset():
            return _EACH_TIME
        return _Fresh(tuple(out.size()), out.stride(), out.dtype)


def _again(made: Any) -> Any:
    if made is None:
        return None
    if isinstance(made, _Fresh):
        return Hollow(torch.empty_strided(made.size, made.stride, dtype=made.dtype, device=META))
    return tuple(map(_again, made))


def _known_by(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device.type)
    if isinstance(value, (list, tuple)):
        return tuple(map(_known_by, value))
    return (type(value), value)


def hollow_out(module: nn.Module) -> None:
    """Turn a module's meta tensors into hollow ones."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(Hollow(parameter.data), parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = Hollow(buffer)
