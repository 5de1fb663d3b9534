"""What videos are conditioned on: text, and where a model takes them, pictures.

Wan takes pictures in two ways. An image-to-video network has more input channels than output channels: a mask
of the given frames and the latents of a video that holds only them. Wan 2.1 also attends to CLIP's tokens of
the pictures. Wan 2.2 TI2V-5B has neither: the first latent frame is the picture's, clean at time 0.

Only a ``Conditioned`` network looks inside a condition; to everything else it is one value that is selected,
concatenated and bound. The negative prompt keeps the pictures (``with_text``), as in Wan's guidance.

Legend: B batch, F latent frames, F' given latent frames, C channels, C' more input channels, H W latent
height and width, L text tokens, D text width, P picture tokens, N selected samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The condition of a batch of videos; a part that a batch lacks is None.

    Attributes:
        text: Text embeddings (B, L, D).
        channels: Mask and latents of the given frames (B, F, C', H, W), appended to the network's input.
        picture: CLIP's tokens of the given frames (B, P, 1280).
        frames: Latents of the given first frames (B, F', C, H, W), which take the place of the video's own.
    """

    text: Tensor
    channels: Tensor | None = None
    picture: Tensor | None = None
    frames: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.text)

    def __getitem__(self, index: Tensor | slice) -> Condition:
        """Keep the samples ``index``, (N,) or a range; it may repeat and reorder."""
        return self._map(lambda part: part[index])

    def to(self, target: torch.device | Tensor) -> Condition:
        """Move to a device, or to the device and type of a tensor."""
        return self._map(lambda part: part.to(target))

    def with_text(self, text: Tensor) -> Condition:
        """The same pictures under other text (B, L, D), or (L, D) for all samples."""
        return replace(self, text=text.to(self.text).expand(len(self), *text.shape[-2:]))

    def with_pictures(self, **parts: Tensor) -> Condition:
        """The same text with other parts, each of this batch or of one sample for all."""
        size = len(self)
        return replace(self, **{name: part.expand(size, *part.shape[1:]) for name, part in parts.items()})

    def with_frames(self, frames: Tensor) -> Condition:
        """The same condition with first frames (B, F', C, H, W) given in place of the video's own."""
        return replace(self, frames=frames) if frames.shape[1] else self

    def concat(self, *others: Condition) -> Condition:
        """Concatenate along the batch; all must have the same parts."""
        parts = [self, *others]
        assert len({part.present for part in parts}) == 1, "the conditions differ in their parts"
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in self.present}
        return Condition(**joined)

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the parts that are there."""
        return tuple(part.name for part in fields(self) if getattr(self, part.name) is not None)

    @property
    def given(self) -> int:
        """F': how many first latent frames are given in place of the video's own."""
        return 0 if self.frames is None else self.frames.shape[1]

    def put_back(self, z: Tensor) -> Tensor:
        """Return z (B, F, C, H, W) with the given frames in their place."""
        return z if self.frames is None else torch.cat((self.frames.to(z), z[:, self.given :]), dim=1)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(**{name: change(getattr(self, name)) for name in self.present})
