"""From prompts and seeds to videos, with any model of this family at any number of steps.

``VideoSampler`` is the one way to sample outside training. An any-step model (two times) is solved by Euler
over its flow map, one evaluation per step; a plain Wan model is a teacher and is solved by guided Euler, two
evaluations per step. A causal model is sampled chunk by chunk, from conditioning frames where there are any,
and can yield each chunk as soon as it is finished (``stream``). A video depends on its prompt, seed and step
count, not on what it was batched with. ``runs/open.py`` finds and opens models; files are in ``output.py``.

Legend: B batch, F latent frames, C channels, H W latent height and width; a video is uint8 (T, height,
width, 3).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from anyflow_cli.data.video import Pixels, from_pixels, to_pixels
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.noise import batch_noise, noise
from anyflow_cli.flow.samplers import SAMPLERS
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.causal import causal_of, partition_for, remembered_for
from anyflow_cli.model.chunk_sampling import sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.precision import autocast, resolve_precision
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.open import open_model

Method = Literal["flow-map", "euler", "consistency"]
Steps = int | tuple[int, ...]  # of each chunk that is sampled, in order; the last for all that follow

log = logging.getLogger(__name__)


class Latency(NamedTuple):
    """Seconds a video took, on average: in the network, and in the VAE's decoder."""

    network: float
    decode: float


class PromptSwitch(NamedTuple):
    """A prompt that takes over from a frame of the video on."""

    frame: int
    prompt: str


class VideoSampler:
    """A network with its text encoder and VAE, at the shapes and the shift of a recipe."""

    def __init__(
        self,
        network: FlowMapTransformer,
        encoder: TextEncoder,
        vae: VideoVAE,
        recipe: Recipe,
        *,
        method: Method | None = None,
        lineage: dict[str, Any] | None = None,
    ) -> None:
        check_fit(network, encoder, vae)
        two_time = network.config.two_time
        if method == "flow-map" and not two_time:
            raise UsageError(
                "The flow-map sampler needs an any-step model, and this one takes a single time.",
                "Leave --sampler out: a plain Wan model is sampled as the teacher it is.",
            )
        self.method: Method = method or ("flow-map" if two_time else "euler")
        self.is_teacher = self.method == "euler" and not two_time
        self.lineage = lineage or {}
        self.model, self.guidance = recipe.model, recipe.sample.teacher_guidance if self.is_teacher else None
        self.shape = vae.latent_shape(recipe.model.frames, recipe.model.height, recipe.model.width)
        self.device = network.device
        self.precision = resolve_precision(recipe.model.precision, self.device)
        self._network, self._encoder, self._vae = network.eval().requires_grad_(False), encoder, vae
        self._null: Tensor | None = None
        self._given: Tensor | None = None
        self.then: Sequence[PromptSwitch] = ()
        self._start_clock()

    @classmethod
    def load(
        cls,
        address: str,
        recipe: Recipe,
        *,
        teacher: bool = False,
        method: Method | None = None,
        device: torch.device | str | None = None,
    ) -> VideoSampler:
        """Open a model wherever it is (see ``addresses.open_model``), on the GPU where there is one."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        opened = open_model(address, recipe)
        if teacher and opened.network.config.two_time:
            raise UsageError(
                f"{address} is an any-step model, not a teacher.",
                "Leave --teacher out, or name a plain Wan model.",
            )
        if opened.network.config.two_time and opened.shift != recipe.model.shift:
            log.warning(
                "%s was made for shift %g and is sampled at the recipe's %g (model.shift).",
                address, opened.shift, recipe.model.shift,
            )  # fmt: skip
        large = torch.bfloat16 if place.type == "cuda" else torch.float32  # UMT5-XXL is 22 GB in fp32
        if place.type == "cuda" and resolve_precision(recipe.model.precision, place) == "bf16":
            opened.network.store_as(torch.bfloat16)
        encoder = TextEncoder.load(opened.pipeline, large, place)
        vae = VideoVAE.load(opened.pipeline, place)
        return cls(opened.network.to(place), encoder, vae, recipe, method=method, lineage=opened.lineage)

    def begin(self, frames: Pixels | None = None, then: Sequence[PromptSwitch] = ()) -> None:
        """Let every video begin with ``frames`` (T, height, width, 3), as many as the VAE takes together.

        Frames of shape (B, T, height, width, 3) are those of the B videos of each batch that follows.
        ``then``: prompts that take over from the first one, each from its frame on. Both need a causal model.
        """
        if frames is None and not then:
            return
        self.require_causal()
        self.then = then
        if frames is not None:
            each = frames if frames.ndim == 5 else frames[None]
            self._given = self._vae.encode(from_pixels(each)).to(self.device)
            if self._given.shape[1] >= self.shape[0]:
                raise UsageError(
                    f"The {each.shape[1]} given frames leave nothing to sample of {self.model.frames}.",
                    "Give fewer frames, or make more of them: --frames.",
                )

    def require_causal(self) -> None:
        """Refuse what only a causal model can do."""
        if not self.is_causal:
            raise UsageError(
                "The model is bidirectional: it makes all frames at once, from noise.",
                "A causal (FAR) model can go on from frames, stream, and change prompt or steps on the way.",
            )

    @property
    def is_causal(self) -> bool:
        """Whether videos are made chunk after chunk."""
        return self._network.config.causal is not None

    def videos(
        self, prompts: Sequence[str], seeds: Sequence[int], nfe: Steps, batch: int = 1
    ) -> Iterator[Pixels]:
        """The video (T, height, width, 3) of each prompt and its seed, in order, at ``nfe`` steps."""
        for latents in self.latents(prompts, seeds, nfe, batch):
            yield from self.decode(latents)

    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], nfe: Steps, batch: int = 1
    ) -> Iterator[Tensor]:
        """As ``videos``, still encoded: (B, F, C, H, W) for each batch in turn."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; one seed a prompt is needed")
        self._start_clock()
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            yield self._batch(prompts[part], seeds[part], nfe)

    @torch.no_grad()
    def stream(self, prompt: str, seed: int, nfe: Steps) -> Iterator[Pixels]:
        """A causal model's video in parts (T', height, width, 3), each as its chunk is finished.

        The pixels are those of ``videos``.
        """
        self.require_causal()
        self._start_clock()
        decoding = self._vae.decoding()
        for chunk in self._chunks([prompt], [seed], nfe):
            with self._timed("decode"):
                pixels = to_pixels(decoding(chunk))[0]
            yield pixels
        self._count += 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pixels:
        """Latents (B, F, C, H, W) to videos (B, T, height, width, 3)."""
        with self._timed("decode"):
            return to_pixels(self._vae.decode(latents))

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are longer than the recipe's ``max_text_tokens`` and are read to there only."""
        lengths = self._encoder.tokens(prompts)
        return [p for p, n in zip(prompts, lengths, strict=True) if n > self.model.max_text_tokens]

    @property
    def latency(self) -> Latency:
        """Of the sampling that ran last."""
        count = max(self._count, 1)
        return Latency(self._spent["network"] / count, self._spent["decode"] / count)

    def noise_mark(self, seed: int) -> str:
        """A mark of the noise that a seed's video starts from; equal marks, equal noise."""
        return hashlib.sha256(noise(seed, self.shape).numpy().tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], nfe: Steps) -> Tensor:
        if self.is_causal:
            latents = torch.cat(list(self._chunks(prompts, seeds, nfe)), dim=1)
        else:
            start, streams = self._noise(seeds)
            with autocast(self.precision, self.device):
                velocity = self._velocity(prompts)
                with self._timed("network"):
                    (times,) = self._grids(nfe)
                    latents = SAMPLERS[self.method](velocity, start, times, generator=streams)
        self._count += len(prompts)
        return latents

    def _chunks(self, prompts: Sequence[str], seeds: Sequence[int], nfe: Steps) -> Iterator[Tensor]:
        """A causal model's videos, chunk after chunk: (B, F', C, H, W)."""
        start, streams = self._noise(seeds)
        causal, frames = causal_of(self._network.config), self.shape[0]
        with autocast(self.precision, self.device):
            model = Conditioned(self._network, self._text(prompts))
            then = {
                self._vae.latent_of(later.frame): Conditioned(
                    self._network, self._text([later.prompt] * len(prompts))
                )
                for later in self.then
            }
        chunks = sample_chunks(
            model,
            start,
            partition_for(causal, frames),
            SAMPLERS[self.method],
            self._grids(nfe),
            given=None if self._given is None else self._given.expand(len(start), -1, -1, -1, -1),
            remember=remembered_for(causal, frames),
            then=then,
            generator=streams,
        )
        while True:  # what a chunk's receiver does must not run under this autocast
            with autocast(self.precision, self.device), self._timed("network"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _noise(self, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
        """Starting noise (B, F, C, H, W), and where the noise of later steps comes from."""
        return batch_noise(seeds, self.shape).to(self.device), [self._stream(seed) for seed in seeds]

    def _grids(self, nfe: Steps) -> list[Tensor]:
        counts = (nfe,) if isinstance(nfe, int) else nfe
        if min(counts) < 1:
            raise UsageError(f"{min(counts)} steps cannot be sampled.", "Give a number of steps from 1 on.")
        if len(counts) > 1:
            self.require_causal()
        return [grid(count, self.model.shift) for count in counts]

    def _velocity(self, prompts: Sequence[str]) -> Velocity:
        conditioned = Conditioned(self._network, self._text(prompts))
        if self.guidance is None:
            return conditioned
        if self._null is None:
            self._null = self._text([self.model.negative_prompt])
        null = Conditioned(self._network, self._null.expand(len(prompts), -1, -1))
        return guided(conditioned, null, self.guidance)

    def _text(self, prompts: Sequence[str]) -> Tensor:
        return self._encoder.encode(prompts, self.model.max_text_tokens).to(self.device)

    def _stream(self, seed: int) -> torch.Generator:
        """Noise for the steps of one video: what follows its starting noise in its seed's stream."""
        generator = torch.Generator().manual_seed(seed)
        torch.randn(self.shape, generator=generator)
        return generator

    def _start_clock(self) -> None:
        self._count, self._spent = 0, {"network": 0.0, "decode": 0.0}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the block's time to a part; without waiting for the device it would be booked elsewhere."""
        start = self._now()
        yield
        self._spent[part] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def check_fit(network: FlowMapTransformer, encoder: TextEncoder, vae: VideoVAE) -> None:
    """Refuse a network that was made for other latents or another text encoder."""
    config = network.config
    hint = "Use the pipeline folder that this model was trained with."
    if config.in_channels != vae.channels:
        raise UsageError(
            f"The model works on latents of {config.in_channels} channels, the VAE makes {vae.channels}.",
            hint,
        )
    if config.text_dim != encoder.dim:
        raise UsageError(
            f"The model reads text of width {config.text_dim}, the encoder writes {encoder.dim}.", hint
        )
