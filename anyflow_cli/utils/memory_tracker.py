"""Bytes and FLOPs of what runs, on real or fake tensors.

torch's own ``MemTracker`` refuses a network that is called more than once per step, as every objective does,
and ``FlopCounterMode`` keeps tensors alive, so its formulas are applied here (tests compare with both).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operators allocate, while they live, and FLOPs.

    ``known`` tensors are not counted. With ``gpu``, the backward pass of attention takes what FlashAttention
    does: the gradient of the queries in fp32.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu, self._alive = gpu, dict[int, weakref.ref[Any]]()
        self.held = self.peak = self.linear = self.attention = 0
        for tensor in known:
            self._add(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, then count it."""
        out, operator = func(*args, **(kwargs or {})), func._overloadpacket
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if operator is ATTENTION:
            self.attention += sdpa_flop_count(*(x.shape for x in args[:3]))  # type: ignore[no-untyped-call]
        elif operator is ATTENTION_BACKWARD:
            shapes = [x.shape for x in args[:4]]
            self.attention += sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
            self.peak = max(self.peak, self.held + self.gpu * 4 * args[1].numel())
        elif operator in flop_registry:
            self.linear += flop_registry[operator](*args, **(kwargs or {}), out_val=out)
        return out

    def restart(self) -> int:
        """Start to count anew; what is held stays so, and is returned."""
        self.peak, self.linear, self.attention = self.held, 0, 0
        return self.held

    def _add(self, tensor: Tensor, *, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * counted
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.held += size
            self.peak = max(self.peak, self.held)

    def _free(self, key: int, size: int) -> None:
        del self._alive[key]
        self.held -= size
