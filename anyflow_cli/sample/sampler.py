"""From prompts, or their embeddings, and seeds to latents or pixels, with any model at any number of steps.

``VideoSampler`` is the only code that samples: for ``sample``, ``evaluate``, ``synthesize`` and previews. An
any-step model (two times) is solved by Euler over its flow map, one evaluation per step; a plain Wan model is
a teacher and is solved by guided Euler, two evaluations per step. A causal model is sampled chunk by chunk,
optionally after conditioning frames, and can be streamed. A video depends on its prompt, seed and step count,
not on the batch it was sampled in. ``runs/open.py`` finds and opens models; ``output.py`` writes files.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width; a
video is uint8 (T, height, width, 3).
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.distributed import ProcessGroup

from anyflow_cli.data.video import Pixels, from_pixels, to_pixels
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import Generators, noise, noise_stream
from anyflow_cli.flow.samplers import SAMPLERS
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.causal import causal_of, partition_for, remembered_for
from anyflow_cli.model.chunk_sampling import sample_chunks, sample_rollouts
from anyflow_cli.model.encoders import PictureEncoder, TextEncoder, VideoVAE, check_channels, check_scale
from anyflow_cli.model.experts import bind as bind_network
from anyflow_cli.model.experts import guidance_of, networks_of
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import apply_attention, apply_compile, apply_context
from anyflow_cli.model.pictures import PictureConditioner, check_pictures
from anyflow_cli.model.placement import PlacedNetwork, storage_of
from anyflow_cli.model.precision import DTYPES_OF_PRECISION, autocast, resolve_precision
from anyflow_cli.recipe.schema import ExpertGuidance, MemorySection, ModelSection, Recipe
from anyflow_cli.runs.open import open_model
from anyflow_cli.runs.resources import TEACHER_METHODS
from anyflow_cli.sample.presets import SamplerPreset, presets_of
from anyflow_cli.sample.unipc import sample_unipc
from anyflow_cli.utils.distributed import default_device

Computed = TypeVar("Computed")
Method = Literal["flow-map", "euler", "unipc", "consistency"]
Steps = int | tuple[int, ...]  # per sampled chunk, in order; the last count serves all remaining chunks
Prompts = Sequence[str] | Condition  # texts, or their embeddings, zero-padded

log = logging.getLogger(__name__)


class Latency(NamedTuple):
    """Mean seconds per video: in the network, and in the VAE's decoder."""

    network: float
    decode: float


class PromptSwitch(NamedTuple):
    """A prompt that replaces the previous one from a frame of the video onwards."""

    frame: int
    prompt: str


class VideoSampler:
    """A network with the shape, shift and guidance to sample it at.

    Args:
        network: The network to evaluate, on the device to sample on.
        model: Shift, precision, text limit and negative prompt.
        latent_shape: (F, C, H, W) of each video.
        method: How to solve from noise to video; by default what the network was trained for.
        preset: Sample as a published system does; says how to solve, too.
        guidance: Scale of classifier-free guidance, which doubles the evaluations; None samples without.
        encoder: Needed to sample prompts; not for embeddings.
        vae: Needed for pixels and for given frames; not for latents.
        clip: Needed for the pictures of a network that takes CLIP's tokens.
        negative: Embedding (L, D) of the negative prompt, where it is already known.
        bind: Binds a condition to the network, for one that several roles share.
        streams: Starting noise, and the generator for later noise, of a seed and shape.
        placed: Brings the network to the device and away, where it is not there all the time.
        lineage: Where the network comes from, for records.
    """

    def __init__(
        self,
        network: FlowMapTransformer,
        model: ModelSection,
        latent_shape: tuple[int, ...],
        *,
        method: Method | None = None,
        preset: SamplerPreset | None = None,
        guidance: float | ExpertGuidance | None = None,
        encoder: TextEncoder | None = None,
        vae: VideoVAE | None = None,
        clip: PictureEncoder | None = None,
        negative: Tensor | None = None,
        bind: Callable[[Condition], Velocity] | None = None,
        streams: Callable[[int, Sequence[int]], tuple[Tensor, torch.Generator]] = noise_stream,
        placed: PlacedNetwork | None = None,
        lineage: dict[str, Any] | None = None,
    ) -> None:
        if preset is not None and preset.times:
            method = preset.method
        self.method: Method = method or ("flow-map" if network.config.two_time else "euler")
        if self.method == "flow-map" and not network.config.two_time:
            raise UsageError(
                "The flow-map sampler needs an any-step model, and this one takes a single time.",
                "Omit --sampler: a plain Wan model is sampled as a teacher.",
            )
        chunks = preset is None and network.config.causal is not None
        if self.method == "unipc" and (network.config.two_time or chunks):
            raise UsageError(
                "The sampler unipc is for teachers, and this is an any-step model.", "Omit --sampler."
            )
        self.model, self.shape, self.guidance = model, latent_shape, guidance
        self._scale = None if guidance is None else guidance_of(network, guidance)
        self.lineage, self.preset, self._placed = lineage or {}, preset, placed
        self.device = network.device
        self.precision = resolve_precision(model.precision, self.device)
        self.prompt_switches: Sequence[PromptSwitch] = ()
        self._network, self._bind = network, bind or partial(bind_network, network)
        self._encoder, self._vae, self._streams = encoder, vae, streams
        self._negative = None if negative is None else negative[None].to(self.device)
        self._embeddings: dict[str, Tensor] = {}  # (L, D) of each prompt so far, without padding
        self._clip = clip
        self._first_latents: Tensor | None = None
        self._pictures: dict[str, Tensor] = {}  # parts of conditions
        # processes that share videos exchange rows of the decoder and tokens of the network in one order
        alone = self.context_group is None
        self.overlaps = alone and self.device.type == "cuda" and not self.memory.opens_on_host
        self._reset_clock()

    @classmethod
    def load(
        cls,
        address: str,
        recipe: Recipe,
        *,
        teacher: bool = False,
        method: Method | None = None,
        preset: SamplerPreset | None = None,
        device: torch.device | str | None = None,
        context: int = 1,
    ) -> VideoSampler:
        """Open a model by its address (see ``runs/open.py``), on this process's GPU if there is one.

        ``context`` processes share each video: all of them call the sampler with the same prompts and seeds.
        """
        target = torch.device(device or default_device())
        precision = resolve_precision(recipe.model.precision, target)
        memory, dtype = recipe.memory, DTYPES_OF_PRECISION[precision]
        place = "cpu" if memory.opens_on_host else target
        opened = open_model(address, recipe, dtype, place, storage_of(memory))
        if preset is not None:
            preset.check(address, opened.network.config)
            for network in {opened.network, *networks_of(opened.network)}:
                network.config = replace(network.config, causal=preset.causal)
        two_time = opened.network.config.two_time
        if teacher and two_time:
            raise UsageError(
                f"{address} is an any-step model, not a teacher.",
                "Omit --teacher, or name a plain Wan model.",
            )
        if two_time and opened.shift != recipe.model.shift:
            log.warning(
                "%s was trained at shift %g and is sampled at the recipe's %g (model.shift).",
                address, opened.shift, recipe.model.shift,
            )  # fmt: skip
        # UMT5-XXL takes 22 GB in fp32
        text_dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
        encoder = TextEncoder.load(opened.pipeline, text_dtype, target, memory.text_encoder)
        vae = VideoVAE.load(opened.pipeline, target, memory.vae)
        check_fit(opened.network, encoder, vae)
        check_scale(vae.spatial_factor, recipe.model.vae_scale)
        check_pictures(opened.network.config, recipe.model, address)
        takes_clip = opened.network.config.image_dim is not None
        stays = not memory.frees_text_encoder
        clip = PictureEncoder.load(opened.pipeline, text_dtype, target, stays=stays) if takes_clip else None
        is_student = preset is not None and preset.steps is not None
        is_teacher = not two_time and not is_student and method in TEACHER_METHODS
        own = [one.name for one in presets_of(address) if one.steps is not None]
        if is_teacher and own:
            text = "%s is a model of few steps; without --sampler-preset %s it is sampled as a teacher."
            log.warning(text, address, " or ".join(own))
        network = opened.network.eval()
        placed = PlacedNetwork(network, memory, dtype, target)
        shape = vae.latent_shape(recipe.model.frames, recipe.model.height, recipe.model.width)
        apply_context([network], context, target)
        if network.context is not None:
            vae.share(network.context)
        apply_attention([network], recipe.model.attention, shape, precision, target)
        if recipe.sample.compile:
            if memory.opens_on_host:
                raise UsageError(
                    "Compiled blocks need the whole network on the device.",
                    "Set sample.compile=false, or leave out --memory.",
                )
            for each in networks_of(network):  # CUDA graphs, where there are any
                apply_compile(each, "reduce-overhead" if target.type == "cuda" else None)
        return cls(
            network,
            recipe.model,
            shape,
            method=method or (recipe.sample.teacher_sampler if is_teacher else None),
            preset=preset,
            guidance=recipe.sample.teacher_guidance if is_teacher else None,
            encoder=encoder,
            vae=vae,
            clip=clip,
            placed=placed,
            lineage=opened.lineage,
        )

    @property
    def is_causal(self) -> bool:
        """Whether videos are sampled chunk by chunk."""
        return self._network.config.causal is not None

    @property
    def context_group(self) -> ProcessGroup | None:
        """The processes that share each video; None for one."""
        return None if self._network.context is None else self._network.context.everyone

    def require_causal(self) -> None:
        """Refuse what only a causal model can do."""
        if not self.is_causal:
            raise UsageError(
                "The model is bidirectional: it samples all frames at once.",
                "Use a causal (FAR) model to continue a video, to stream, or to change prompt or steps on "
                "the way.",
            )

    def condition_on(
        self,
        frames: Pixels | None = None,
        switches: Sequence[PromptSwitch] = (),
        last: Pixels | None = None,
    ) -> None:
        """Start the videos sampled from now on with given frames, and switch prompts on the way.

        Args:
            frames: First frames (T, height, width, 3) of every video, or (B, T, height, width, 3) of each
                video of a batch; T is a number of frames that the VAE takes. A bidirectional model takes one.
            switches: Prompts that replace the first one.
            last: Last frame (height, width, 3) of every video, for a model that takes it.

        Raises:
            UsageError: The model does not take these frames, or no frame is left to sample.
        """
        if frames is None and not switches:
            return
        self.make_room("vae")
        batch = None if frames is None else frames if frames.ndim == 5 else frames[None]
        if batch is not None and batch.shape[1] == 1 and not self.is_causal and not switches:
            conditioner = PictureConditioner(self.model.pictures, self.model.frames, self.vae, self._clip)
            first = from_pixels(batch)[:, 0]
            end = None if last is None else from_pixels(last[None]).expand_as(first)
            self._pictures = conditioner(first, end)
            return
        self.require_causal()
        self.prompt_switches = switches
        if batch is not None:
            self._first_latents = self.vae.encode(from_pixels(batch)).to(self.device)
            if self._first_latents.shape[1] >= self.shape[0]:
                raise UsageError(
                    f"{batch.shape[1]} conditioning frames leave nothing to sample of {self.model.frames}.",
                    "Condition on fewer frames, or sample more with --frames.",
                )

    def videos(self, prompts: Prompts, seeds: Sequence[int], nfe: Steps, batch: int = 1) -> Iterator[Pixels]:
        """Sample one video (T, height, width, 3) per prompt and seed, in order, at ``nfe`` steps."""
        for latents in self.latents(prompts, seeds, nfe, batch):
            yield from self.decode(latents)

    def latents(self, prompts: Prompts, seeds: Sequence[int], nfe: Steps, batch: int = 1) -> Iterator[Tensor]:
        """Sample latents (B, F, C, H, W), batch after batch."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; each prompt needs one seed")
        self.encode_prompts(prompts)
        self._reset_clock()
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            yield self._sample_batch(prompts[part], seeds[part], nfe)

    @torch.no_grad()
    def stream(self, prompt: str | Condition, seed: int, nfe: Steps) -> Iterator[Pixels]:
        """Sample a video with a causal model and yield each chunk's frames (T', height, width, 3).

        The prompt is a text, or the condition of a batch of one.

        A chunk is yielded as soon as it is decoded. Together they have the pixels of ``videos``. With decoder
        and network on a GPU, the next chunk is sampled while a chunk is decoded.
        """
        self.require_causal()
        self._reset_clock()
        prompts = [prompt] if isinstance(prompt, str) else prompt
        with self.vae.at_work():
            decoding, chunks = self.vae.decoding(), self._sample_chunks(prompts, [seed], nfe)
            for chunk in one_ahead(chunks) if self.overlaps else chunks:
                with self._own_stream(), self._timed("decode"):
                    pixels = to_pixels(decoding(chunk))[0]
                yield pixels
        self._count += 1

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Pixels:
        """Decode latents (B, F, C, H, W) to videos (B, T, height, width, 3)."""
        with self._timed("decode"):
            self.make_room("vae")
            return to_pixels(self.vae.decode(latents))

    def encode_prompts(self, prompts: Prompts) -> None:
        """Encode prompts before they are sampled: all together, so that the text encoder is loaded once."""
        if not isinstance(prompts, Condition):
            switched = [switch.prompt for switch in self.prompt_switches]
            is_guided = self.guidance is not None and self._negative is None
            self._embed([*prompts, *switched, *[self.model.negative_prompt] * is_guided])

    def make_room(self, part: Literal["text encoder", "vae"]) -> None:
        """Move the network off the device where it makes way for another part."""
        if self._placed is not None:
            self._placed.make_room(part)

    def truncated_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts with more tokens than ``model.max_text_tokens``, whose end is not read."""
        counts = self.encoder.tokens(prompts)
        return [p for p, n in zip(prompts, counts, strict=True) if n > self.model.max_text_tokens]

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder."""
        assert self._encoder is not None, "this sampler takes embeddings"
        return self._encoder

    @property
    def vae(self) -> VideoVAE:
        """The VAE."""
        assert self._vae is not None, "this sampler makes latents"
        return self._vae

    @property
    def memory(self) -> MemorySection:
        """Where the parts of the model are."""
        return MemorySection() if self._placed is None else self._placed.memory

    @property
    def latency(self) -> Latency:
        """Mean latency of the last call, per video."""
        count = max(self._count, 1)
        return Latency(self._spent["network"] / count, self._spent["decode"] / count)

    def noise_fingerprint(self, seed: int) -> str:
        """A short hash of a seed's starting noise, to recognize it on another machine or torch."""
        return hashlib.sha256(noise(seed, self.shape).numpy().tobytes()).hexdigest()[:16]

    @torch.no_grad()
    def _sample_batch(self, prompts: Prompts, seeds: Sequence[int], nfe: Steps) -> Tensor:
        if self.is_causal:
            latents = torch.cat(list(self._sample_chunks(prompts, seeds, nfe)), dim=1)
        else:
            start, generators = self._noise(seeds)
            with autocast(self.precision, self.device):
                condition = self._condition(prompts)
                velocity = self._bind(condition)
                if self._scale is not None:
                    velocity = guided(velocity, self._null_condition(condition), self._scale)
                with self._timed("network"):
                    (times,) = self._grids(nfe)
                    if self.method == "unipc":
                        overwrites = self.preset is not None and self.preset.overwrites
                        latents = sample_unipc(
                            velocity, start, len(times) - 1, self.model.shift, overwrites=overwrites
                        )
                    else:
                        latents = self._solve(velocity, start, times, generators)
            latents = condition.put_back(latents)
        self._count += len(prompts)
        return latents

    def _sample_chunks(self, prompts: Prompts, seeds: Sequence[int], nfe: Steps) -> Iterator[Tensor]:
        """Sample a causal model's videos chunk by chunk: (B, F', C, H, W)."""
        start, generators = self._noise(seeds)
        causal, grids, given = causal_of(self._network.config), self._grids(nfe), self._first_latents
        with autocast(self.precision, self.device):
            conditions = {0: self._bound(prompts)}
            for switch in self.prompt_switches:
                same = [switch.prompt] * len(prompts)
                conditions[self.vae.latent_of(switch.frame)] = self._bound(same)

        def sample(noise: Tensor, first: int, given: Tensor | None) -> Iterator[Tensor]:
            frames = noise.shape[1]
            then = {max(at - first, 0): one for at, one in conditions.items() if at < first + frames}
            return sample_chunks(
                then[0],
                noise,
                partition_for(causal, frames),
                self._solve,
                grids if first == 0 else grids[-1:],
                given=given,
                remember=remembered_for(causal, frames),
                then=then,
                generator=generators,
            )

        given = given if given is None else given.expand(len(start), -1, -1, -1, -1)
        chunks = sample(start, 0, given)
        preset = self.preset
        if preset is not None and preset.rollout is not None and preset.rollout < self.shape[0]:
            continued = self._continuation(preset.overlap)
            chunks = sample_rollouts(sample, start, preset.rollout, continued, given)
        while True:  # the caller's work on a chunk must not run under this autocast
            with autocast(self.precision, self.device), self._timed("network"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _continuation(self, overlap: int) -> Callable[[Tensor], Tensor]:
        """From a rollout's new latents to the last ``overlap`` ones, as the start of a video.

        The first latent of a video holds one frame, so the first of them is encoded again, from its pixels.
        """
        decoding, shown = self.vae.decoding(), (overlap - 1) * self.vae.temporal_factor + 1

        def continued(latents: Tensor) -> Tensor:
            with torch.autocast(self.device.type, enabled=False):
                first = self.vae.encode(decoding(latents)[:, -shown:][:, :1]).to(latents)
            return torch.cat((first, latents[:, -overlap:][:, 1:]), dim=1)

        return continued

    def _solve(self, model: Velocity, z: Tensor, grid: Tensor, generator: Generators = None) -> Tensor:
        """Sample from noise z (B, F, C, H, W); a grid that starts below time 1 starts from less of it."""
        sampler = SAMPLERS[self.method] if self.preset is None else self.preset.sampler
        return sampler(model, grid[0].item() * z, grid, generator=generator)

    def _noise(self, seeds: Sequence[int]) -> tuple[Tensor, list[torch.Generator]]:
        """Return starting noise (B, F, C, H, W), and per video the generator of noise for later steps."""
        starts, generators = zip(*(self._streams(seed, self.shape) for seed in seeds), strict=True)
        return torch.stack(starts).to(self.device), list(generators)

    def _grids(self, nfe: Steps) -> list[Tensor]:
        if self.preset is not None and self.preset.times:
            return self.preset.grids
        counts = (nfe,) if isinstance(nfe, int) else nfe
        if min(counts) < 1:
            raise UsageError(f"{min(counts)} steps cannot be sampled.", "Give a number of steps from 1 on.")
        if len(counts) > 1:
            self.require_causal()
        return [grid(count, self.model.shift) for count in counts]

    def _condition(self, prompts: Prompts) -> Condition:
        if not isinstance(prompts, Condition):
            prompts = Condition(self._embed(prompts)).with_pictures(**self._pictures)
        config = self._network.config
        if config.in_channels != config.out_channels and prompts.channels is None:
            raise UsageError("The model makes videos from pictures.", "Give one with --image.")
        if self._placed is not None:
            self._placed.bring()
        return prompts.to(self.device)

    def _bound(self, prompts: Prompts) -> Velocity:
        return self._bind(self._condition(prompts))

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, L, D) of prompts; each text is encoded once in the life of the sampler."""
        limit = self.model.max_text_tokens
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if new:
            self.make_room("text encoder")
            encoded, lengths = self.encoder.encode(new, limit).cpu(), self.encoder.tokens(new)
            for prompt, text, length in zip(new, encoded, lengths, strict=True):
                self._embeddings[prompt] = text[:length].clone()
        texts = [self._embeddings[prompt] for prompt in prompts]
        return torch.stack([nnf.pad(text, (0, 0, 0, limit - len(text))) for text in texts])

    def _null_condition(self, condition: Condition) -> Velocity:
        if self._negative is None:
            self._negative = self._embed([self.model.negative_prompt]).to(self.device)
        return self._bind(condition.with_text(self._negative))

    def _reset_clock(self) -> None:
        self._count, self._spent = 0, {"network": 0.0, "decode": 0.0}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part; waits for the device, whose work would count elsewhere."""
        start = self._now()
        yield
        self._spent[part] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":  # not for the device: the decoder has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    def _own_stream(self) -> AbstractContextManager[Any]:
        """A stream beside the network's, whose work on the chunk is finished."""
        if self.device.type != "cuda" or not self.overlaps:
            return nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]


def one_ahead(items: Iterator[Computed]) -> Iterator[Computed]:
    """Yield what an iterator yields; a thread computes the next item while the caller has the last."""
    nothing = object()
    with ThreadPoolExecutor(1) as thread:
        following: Future[Any] = thread.submit(next, items, nothing)
        while (item := following.result()) is not nothing:
            following = thread.submit(next, items, nothing)
            yield item


def check_fit(network: FlowMapTransformer, encoder: TextEncoder, vae: VideoVAE) -> None:
    """Refuse a network trained on other latents or with another text encoder."""
    config = network.config
    check_channels(config.out_channels, vae.channels)
    if config.text_dim != encoder.dim:
        raise UsageError(
            f"The model takes text of width {config.text_dim}; the encoder has width {encoder.dim}.",
            "Use the pipeline folder that this model was trained with.",
        )
