"""A VAE's decoder on several processes: each has a part of the picture's rows, and exchanges its border rows.

Wan's decoder is convolutions of 3x3 pixels at most, whatever is local to a pixel, and one attention over all
tokens of a latent frame. So a row from each neighbor before every such convolution, and all rows before the
attention, make the picture what one process decodes, up to the order of sums. The causal convolutions' caches
are of a process's own rows. Hooks around the decoder split its input and gather its output, whoever calls it:
for a whole video, for the chunks of a stream, and for each of diffusers' tiles. No gradient is exchanged.

Legend: B batch, C channels, T frames, H rows of this process, W columns; N processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, distributed, nn

from anyflow_cli.model.context_parallel import ContextGroup

ROWS = -2  # axis


class DecoderRows:
    """The rows of each process of a context group while a decoder runs; installs itself as hooks."""

    def __init__(self, decoder: nn.Module, group: ContextGroup) -> None:
        self._group = group
        self._rows: list[int] = []  # latent rows by process; none where there are too few
        decoder.register_forward_pre_hook(self._take, with_kwargs=True)
        decoder.register_forward_hook(lambda _, inputs, output: self._gathered(output))
        for module in decoder.modules():
            if type(module).__name__ == "WanAttentionBlock":
                module.register_forward_pre_hook(lambda _, inputs: self._gathered(inputs[0]))
                module.register_forward_hook(lambda _, inputs, output: self._own(output))
            elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.kernel_size[ROWS] == 3:
                module.register_forward_pre_hook(lambda _, inputs: self._with_borders(*inputs))
                module.register_forward_hook(lambda _, inputs, output: self._without_borders(output))

    def _take(self, _: nn.Module, inputs: tuple[Tensor], options: dict[str, Any]) -> Any:
        """This process's rows of the latents (B, C, T, h, w)."""
        size, rows = self._group.size, inputs[0].shape[ROWS]
        ends = [rows * number // size for number in range(size + 1)]
        self._rows = [ends[i + 1] - ends[i] for i in range(size)] if rows >= size else []
        return (self._own(inputs[0]), *inputs[1:]), options

    def _own(self, x: Tensor) -> Tensor:
        """This process's rows of all."""
        if not self._rows:
            return x
        scale, rank = x.shape[ROWS] // sum(self._rows), self._group.rank
        return x.narrow(ROWS, scale * sum(self._rows[:rank]), scale * self._rows[rank]).contiguous()

    def _gathered(self, x: Tensor) -> Tensor:
        """All processes' rows."""
        if not self._rows:
            return x
        scale, group = x.shape[ROWS] // self._rows[self._group.rank], self._group.everyone
        padded = nnf.pad(x, (0, 0, 0, scale * max(self._rows) - x.shape[ROWS])).contiguous()
        parts = padded.new_empty(len(self._rows), *padded.shape)
        if group is not None:
            distributed.all_gather(list(parts), padded, group)
        pairs = zip(parts, self._rows, strict=True)
        return torch.cat([part.narrow(ROWS, 0, scale * rows) for part, rows in pairs], ROWS)

    def _with_borders(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, ...]:
        """Frames (..., H, W), and those kept of the past, with a row of each neighbor: (..., H + 2, W).

        Beyond the picture it is zeros, which are what the convolution pads with.
        """
        if not self._rows:
            return (x,) if past is None else (x, past)
        kept = 0 if past is None else past.shape[2]
        frames = x if past is None else torch.cat([past, x], dim=2)
        rank, size = self._group.rank, self._group.size
        row, zeros = [frames.select(ROWS, at) for at in (0, -1)], torch.zeros_like(frames.select(ROWS, 0))
        neighbors = [rank > 0, rank < size - 1]
        sent = torch.stack([one for one, there in zip(row, neighbors, strict=True) if there])
        received = torch.empty_like(sent)
        if self._group.everyone is not None:
            counts = [int(abs(other - rank) == 1) for other in range(size)]
            distributed.all_to_all_single(received, sent, counts, counts, self._group.everyone)
        found = iter(received)
        above, below = (next(found) if there else zeros for there in neighbors)
        bordered = torch.cat([above.unsqueeze(ROWS), frames, below.unsqueeze(ROWS)], ROWS)
        return (bordered,) if past is None else (bordered[:, :, kept:], bordered[:, :, :kept])

    def _without_borders(self, x: Tensor) -> Tensor:
        """What a convolution makes of its own rows."""
        return x[..., 1:-1, :] if self._rows else x
