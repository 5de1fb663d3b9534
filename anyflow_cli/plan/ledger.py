"""Counting what a program holds and computes, tensor by tensor, while it runs.

A ``Ledger`` is the account, ``Watch`` the dispatch mode that books each tensor an operator makes until its
storage is freed, and the operations of its matrix products and attention. Tensors without storage (hollow
ones) are booked as real ones would be. Not seen: what a kernel allocates inside itself, but for the one whose
working memory is large (``_workspace``).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from anyflow_cli.model.layout import Layout
from anyflow_cli.plan.hollow import Hollow

Part = Literal["activations", "latents", "gradients", "cache"]


class Weight(NamedTuple):
    """Bytes of a tensor, and what they are part of."""

    part: Part
    size: int


Weigh = Callable[[Tensor], Weight | None]

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Label(NamedTuple):
    """What runs in a segment: a role's network over so many samples, or what lies between such calls."""

    role: str
    direction: Literal["forward", "backward", "between"]
    samples: int
    with_gradient: bool
    layout: Layout | None = None  # None: all frames at once, bidirectionally
    by_frame: bool = False  # whether frames have times of their own

    @property
    def tokens(self) -> int:
        """Of a sample, those that pass through the network; only a layout knows."""
        return sum(self.layout.tokens_of(segment) for segment in self.layout.inputs) if self.layout else 0

    @property
    def fills(self) -> bool:
        """Whether it gives no velocity, and only keeps the keys of what is finished."""
        return self.layout is not None and not any(segment.is_output for segment in self.layout.inputs)


BETWEEN = Label("", "between", 0, False)


@dataclass
class Segment:
    """A stretch of a program: bytes held as it began, and at its peak by part; operations within it."""

    label: Label
    start: int
    parts: Counter[str] = field(default_factory=Counter)
    operations: int = 0

    @property
    def peak(self) -> int:
        """The most that was held at once."""
        return self.parts.total()


class _Entry(NamedTuple):
    storage: weakref.ref[Any]
    size: int
    part: str


class Ledger:
    """Bytes held now by part, and the segments so far."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self._held: dict[int, _Entry] = {}
        self._now: Counter[str] = Counter()
        self.begin(BETWEEN)

    def begin(self, label: Label) -> None:
        """Start a segment."""
        self.segments.append(Segment(label, self._now.total(), self._now.copy()))

    def book(self, tensor: Tensor, weight: Weight) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage, (part, size) = storage_of(tensor), weight
        key = id(storage)
        if key in self._held:
            return
        reference = weakref.ref(storage, lambda _: self._free(key))
        self._held[key] = _Entry(reference, size, part)
        self._now[part] += size
        self.note()

    def ignore(self, tensor: Tensor) -> None:
        """Never count this tensor's storage: it is accounted for elsewhere."""
        self.book(tensor, Weight("activations", 0))

    def move(self, tensor: Tensor, part: Part) -> None:
        """Count a tensor under another part."""
        key = id(storage_of(tensor))
        reference, size, before = self._held[key]
        self._held[key] = _Entry(reference, size, part)
        self._now[before] -= size
        self._now[part] += size

    def note(self, passing: int = 0) -> None:
        """Remember the present state if it is the segment's peak; ``passing`` are bytes freed at once."""
        segment = self.segments[-1]
        if self._now.total() + passing > segment.peak:
            segment.parts = self._now.copy()
            segment.parts["activations"] += passing

    def repeat(self, before: Segment) -> None:
        """Let the present segment be another like one that left nothing behind."""
        self.note(before.peak - before.start)
        self.segments[-1].operations = before.operations

    def _free(self, key: int) -> None:
        entry = self._held.pop(key)
        self._now[entry.part] -= entry.size


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books what operators make; ``weigh`` gives a tensor's bytes, None for those to leave out."""

    def __init__(
        self, ledger: Ledger, weigh: Weigh, *, counts_operations: bool = False, gpu: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self.weigh = ledger, weigh
        self.counts_operations, self.gpu = counts_operations, gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then book its outputs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor) and (weight := self.weigh(tensor)):
                self.ledger.book(tensor, weight)
        if self.counts_operations:
            self.ledger.segments[-1].operations += operations_of(packet, args, kwargs, out)
            if self.gpu and packet is ATTENTION_BACKWARD:
                self.ledger.note(_workspace(args[1]))
        return out


def operations_of(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of one operator: 2 a multiply-add, as ``torch.utils.flop_counter`` has it."""
    if packet is ATTENTION:
        return int(sdpa_flop_count(*(x.shape for x in args[:3])))  # type: ignore[no-untyped-call]
    if packet is ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(x.shape for x in args[:4])))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _workspace(query: Tensor) -> int:
    """FlashAttention on a GPU adds up the queries' gradient in fp32."""
    return 4 * query.numel()


def storage_of(tensor: Tensor) -> Any:
    """What a tensor and its views share, and is freed with the last of them."""
    return (tensor.meta if isinstance(tensor, Hollow) else tensor).untyped_storage()


def storage_bytes(tensor: Tensor) -> Weight:
    """All that a tensor's storage takes, as activations."""
    return Weight("activations", storage_of(tensor).nbytes())
