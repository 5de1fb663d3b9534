"""From given pictures to what each family of Wan is conditioned on, in one place for all commands.

``optional-first``   Wan 2.2 TI2V-5B: the picture's latents are the video's first frame
``first``            Wan 2.1 and 2.2 I2V: channels beside the noise, and in 2.1 CLIP's tokens
``first-last``       Wan 2.1 FLF2V: the same of two pictures

The channels are a mask, 1 for given frames, and the latents of a video of the given frames and mid-grey ones.
The mask has as many channels as a latent frame holds video frames; the first latent frame, which holds one,
has it in all of them.

Legend: B batch, T video frames, F latent frames, C latent channels, M frames per latent frame, H W pixels, h
w latent height and width, P picture tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.encoders import PictureEncoder, VideoVAE
from anyflow_cli.recipe.schema import ModelSection, Pictures

GREY = 0.5  # of a pixel that is not given


@dataclass(frozen=True)
class PictureConditioner:
    """Turns given pictures into the parts of a ``Condition``, by a family's rule.

    Attributes:
        rule: The recipe's ``model.pictures``.
        frames: Video frames of a sample.
        vae: Encodes the pictures.
        clip: Encodes them for networks that take CLIP's tokens.
    """

    rule: Pictures
    frames: int
    vae: VideoVAE
    clip: PictureEncoder | None = None

    def __call__(self, first: Tensor, last: Tensor | None = None) -> dict[str, Tensor]:
        """Encode pictures (B, 3, H, W) in [0, 1] as the parts of conditions, by name.

        Raises:
            UsageError: The rule takes other pictures.
        """
        if self.rule == "none":
            raise UsageError(
                "The model makes videos from text alone.",
                "Use an image-to-video or causal model; for Wan 2.2 TI2V-5B set model.pictures to "
                "optional-first.",
            )
        if last is not None and self.rule == "optional-first":
            raise UsageError("The model takes a first frame, not a last one.", "Omit --last-image.")
        if last is None and self.rule == "first-last":
            raise UsageError("The model makes videos between two pictures.", "Give a last one, --last-image.")
        if self.rule == "optional-first":
            return {"frames": self.vae.encode(first[:, None])}
        parts = {"channels": self._channels(first, last)}
        if self.clip is not None:
            tokens = [self.clip.encode(picture) for picture in (first, last) if picture is not None]
            parts["picture"] = torch.cat(tokens, dim=1)
        return parts

    def _channels(self, first: Tensor, last: Tensor | None) -> Tensor:
        """Mask and latents of the given frames, (B, F, M + C, h, w)."""
        video = torch.full((len(first), self.frames, *first.shape[1:]), GREY).to(first)
        video[:, 0] = first
        if last is not None:
            video[:, -1] = last
        latents = self.vae.encode(video)
        mask = given_mask(self.frames, self.vae.temporal_factor, last=last is not None).to(latents)
        return torch.cat((mask.expand(len(first), -1, -1, *latents.shape[-2:]), latents), dim=2)


def given_mask(frames: int, factor: int, *, last: bool) -> Tensor:
    """Mask of the given frames, 1 for the first and maybe the last of a video, (1, F, M, 1, 1)."""
    given = torch.zeros(frames)
    given[0] = 1
    given[-1] = max(float(last), float(given[-1]))
    rows = nnf.pad(given, (factor - 1, 0), value=1)  # the first frame fills a latent frame of its own
    return rows.view(1, -1, factor, 1, 1)


def check_pictures(config: NetworkConfig, model: ModelSection, source: object) -> None:
    """Refuse a network that takes other pictures than the recipe says."""
    takes, says = config.in_channels != config.out_channels, model.needs_pictures
    if takes and not says:
        raise UsageError(
            f"{source} makes videos from pictures, and the recipe's model.pictures is {model.pictures}.",
            f"Set model.pictures to {'first-last' if config.image_tokens else 'first'}.",
        )
    if says and not takes:
        raise UsageError(
            f"{source} takes no pictures, and the recipe's model.pictures is {model.pictures}.",
            "Set model.pictures to none, or name an image-to-video model.",
        )
