"""Text encoder and video VAE of a pipeline folder, with this package's axis order.

Both compute what diffusers' Wan pipelines compute: prompts are cleaned, encoded and zero-padded in the same
way (Wan attends to the zeros, without a mask), and latents are normalized by the VAE's statistics. Both are
frozen.

Legend: B batch, L text tokens, D text width, T video frames, F latent frames, C latent channels, H W pixels,
h w latent height and width.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import Size
from anyflow_cli.model.context_parallel import ContextGroup
from anyflow_cli.model.layouts.components import ComponentFiles, open_component, open_component_folder
from anyflow_cli.model.pipeline_io import component
from anyflow_cli.model.placement import free_cached, stream_weights
from anyflow_cli.model.vae_parallel import DecoderRows
from anyflow_cli.model.weights_io import FETCH
from anyflow_cli.utils.records import read_record

WAN_21_CHANNELS = 16
TOGETHER = {"kept": 32, "freed": 4, "streamed": 4}  # prompts encoded at once, by placement
Config = TypeVar("Config", bound=BaseModel)


def clean_prompt(prompt: str) -> str:
    """Repair encoding errors, unescape HTML and collapse spaces, as the pipelines do before tokenization."""
    from diffusers.utils import is_ftfy_available

    if is_ftfy_available():
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


class TextEncoderConfig(BaseModel):
    """``config.json`` of a UMT5 encoder."""

    vocab_size: Size = 250112
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 1024
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 8
    num_heads: Size = 6
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1 << 20)] = 32
    relative_attention_max_distance: Size = 128

    @model_validator(mode="after")
    def _distances_beyond_the_exact_ones(self) -> TextEncoderConfig:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ValueError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}, not above a "
                f"quarter of the {self.relative_attention_num_buckets} buckets"
            )
        return self


class VaeConfig(BaseModel):
    """``config.json`` of a Wan VAE; fields that are not named here go to diffusers' class unchecked."""

    model_config = ConfigDict(extra="allow")

    class_name: Literal["AutoencoderKLWan"] = Field("AutoencoderKLWan", alias="_class_name")
    base_dim: Size = 96
    decoder_base_dim: Size | None = None
    z_dim: Size = 16
    dim_mult: list[Annotated[int, Field(ge=1, le=64)]] = [1, 2, 4, 4]
    num_res_blocks: Annotated[int, Field(ge=1, le=100)] = 2
    attn_scales: list[FiniteFloat] = []
    temperal_downsample: list[bool] = [False, True, True]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    is_residual: bool = False
    in_channels: Size = 3
    out_channels: Size = 3
    patch_size: Annotated[int, Field(ge=1, le=16)] | None = None
    scale_factor_spatial: Annotated[int, Field(ge=1, le=64)] = 8
    scale_factor_temporal: Annotated[int, Field(ge=1, le=64)] = 4
    latents_mean: list[FiniteFloat] | None = None
    latents_std: list[Annotated[float, Field(gt=0, lt=1e6)]] | None = None

    @model_validator(mode="after")
    def _one_statistic_per_channel(self) -> VaeConfig:
        for name in ("latents_mean", "latents_std"):
            count = len(
                getattr(self, name) or range(WAN_21_CHANNELS)
            )  # diffusers' default is that of Wan 2.1
            if count != self.z_dim:
                raise ValueError(f"{name} has {count} values for {self.z_dim} channels")
        return self


def check_channels(network: int, vae: int) -> None:
    """Refuse a network that makes latents of other channels than the VAE's."""
    if network != vae:
        raise UsageError(
            f"The model makes latents of {network} channels; the VAE has {vae}.",
            "Use the pipeline folder that this model was trained with; of a file, model.components names it.",
        )


def check_scale(vae: int, recipe: int) -> None:
    """Refuse a recipe that states another factor (pixels per latent) than the VAE's."""
    if vae != recipe:
        raise UsageError(
            f"The VAE has {vae} pixels per latent, and the recipe's model.vae_scale is {recipe}.",
            f"Set model.vae_scale to {vae}, or name the model's own recipe.",
        )


class TextEncoder:
    """UMT5 encoder and its tokenizer.

    Args:
        tokenizer: Tokenizer of transformers.
        config: Sizes of the encoder.
        load_model: Loads the encoder onto a device.
        device: Device that encodes.
        placement: Whether the encoder is kept, or loaded to encode and then freed, or also streamed.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: TextEncoderConfig,
        load_model: Callable[[torch.device], Any],
        device: torch.device,
        placement: str = "kept",
    ) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._load_model, self._device, self._placement = load_model, device, placement
        self._kept = None if placement in ("freed", "streamed") else load_model(device)

    @classmethod
    def load(
        cls,
        pipeline: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        placement: str = "kept",
    ) -> TextEncoder:
        """Open the text encoder of a pipeline folder, see ``MemorySection.text_encoder`` for placements.

        Raises:
            UsageError: Tokenizer or weights are damaged, incomplete, or of different models.
        """
        from transformers import AutoTokenizer

        folder = component(pipeline, "tokenizer")
        tokenizer = _load(AutoTokenizer, folder, trust_remote_code=False)
        if tokenizer.pad_token is None:
            raise UsageError(f"The tokenizer in {folder} has no padding token.", FETCH)
        with _library_errors(folder):
            tokenizer(["", "a"], padding="max_length", max_length=2, truncation=True)
        files, config = _open(pipeline, "text_encoder", TextEncoderConfig)
        return cls(tokenizer, config, partial(_load_weights, files, dtype), torch.device(device), placement)

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return self._config.d_model

    @contextmanager
    def _at_work(self) -> Iterator[Any]:
        """The encoder, loaded for the block where it is not kept."""
        if self._kept is not None:
            yield self._kept
            return
        streams = self._placement == "streamed"
        model = self._load_model(torch.device("cpu") if streams else self._device)
        if streams:
            stream_weights(model, self._device, prefetch=True, whole_blocks=False)
        yield model
        del model
        free_cached(self._device)

    def tokens(self, prompts: Sequence[str]) -> list[int]:
        """Number of tokens of each prompt without truncation, end token included."""
        return [len(ids) for ids in self._tokenizer([clean_prompt(p) for p in prompts]).input_ids]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_tokens: int) -> Tensor:
        """Encode prompts as (B, max_tokens, D) fp32, zero after their end; longer prompts are truncated."""
        batch = TOGETHER.get(self._placement, TOGETHER["kept"])
        starts = range(0, len(prompts), batch)
        with self._at_work() as model:
            return torch.cat([self._encode(model, prompts[i : i + batch], max_tokens) for i in starts])

    def _encode(self, model: Any, prompts: Sequence[str], max_tokens: int) -> Tensor:
        inputs = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        largest, size = int(inputs.input_ids.max()), self._config.vocab_size
        if largest >= size:
            raise UsageError(
                f"The tokenizer has a token {largest}, but the text encoder has {size} embeddings.",
                FETCH,
            )
        mask = inputs.attention_mask.to(self._device)
        hidden: Tensor = model(inputs.input_ids.to(self._device), mask).last_hidden_state
        return hidden.float().masked_fill(mask.unsqueeze(-1) == 0, 0.0)


class PictureEncoder:
    """CLIP's vision tower: the tokens of its last layer but one, which Wan 2.1 I2V takes.

    Args:
        processor: Image processor of transformers.
        model: On its device, or on the CPU where it is on its device only while it works.
        device: Device that encodes; None: where the weights are.
    """

    def __init__(self, processor: Any, model: Any, device: torch.device | None = None) -> None:
        self._processor, self._model = processor, model.eval().requires_grad_(False)
        self._device, self._place = device or model.device, model.device

    @classmethod
    def load(
        cls,
        pipeline: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        stays: bool = True,
    ) -> PictureEncoder:
        """Load the image encoder of a pipeline folder, or of an original folder or file."""
        import transformers

        processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        place = component(pipeline, "image_encoder")
        if place.is_file():
            files = open_component(place)
            weights = _load_weights(files, dtype, torch.device(device if stays else "cpu"))
            return cls(processor_class(**files.processor), weights, torch.device(device))
        processor = _load(processor_class, component(pipeline, "image_processor"))
        model, info = _load(transformers.CLIPVisionModel, place, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise UsageError(f"The weights of {place} do not fit config.json: {missing} missing.", FETCH)
        return cls(processor, model.to(device) if stays else model, torch.device(device))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [0, 1] as tokens (B, P, 1280), fp32."""
        images = [(255 * picture).round().byte().permute(1, 2, 0).numpy() for picture in pictures.cpu()]
        pixels = self._processor(images=images, return_tensors="pt").pixel_values
        inputs = pixels.to(self._device, self._model.dtype)
        model = self._model.to(self._device)
        hidden: Tensor = model(pixel_values=inputs, output_hidden_states=True).hidden_states[-2]
        if self._place != self._device:
            model.to(self._place)
            free_cached(self._device)
        return hidden.float()


class VideoVAE:
    """Wan VAE in fp32; latents are normalized, videos are in [0, 1].

    Args:
        model: VAE of diffusers.
        device: Device that it works on; None: where its weights are.
        placement: Whether it is kept there, or there only while it works, or also works in tiles.
    """

    def __init__(self, model: Any, device: torch.device | None = None, placement: str = "kept") -> None:
        self._model = model.eval().requires_grad_(False)
        config = model.config
        self.spatial_factor = int(config.scale_factor_spatial)
        self.temporal_factor = int(config.scale_factor_temporal)
        self.channels = int(config.z_dim)
        self._device, self._stays = device or model.device, placement not in ("on-demand", "tiled")
        self._works = 0  # blocks of ``at_work`` that are open
        if placement == "tiled":
            model.enable_tiling()
        self._mean = torch.tensor(config.latents_mean, device=self._device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std, device=self._device).view(1, -1, 1, 1, 1)

    @classmethod
    def load(cls, pipeline: Path, device: torch.device | str = "cpu", placement: str = "kept") -> VideoVAE:
        """Load the VAE of a pipeline folder, see ``MemorySection.vae`` for placements."""
        files, _ = _open(pipeline, "vae", VaeConfig)
        place = torch.device(device if placement in ("auto", "kept") else "cpu")
        return cls(_load_weights(files, torch.float32, place), torch.device(device), placement)

    def share(self, group: ContextGroup) -> None:
        """Decode each video with the processes of a group, which all decode the same videos from now on."""
        DecoderRows(self._model.decoder, group)

    @contextmanager
    def at_work(self) -> Iterator[Any]:
        """The VAE on its device, which it leaves after the block where it is not kept there."""
        self._works += 1
        try:
            yield self._model if self._stays else self._model.to(self._device)
        finally:
            self._works -= 1
            if not (self._stays or self._works):
                self._model.to("cpu")
                free_cached(self._device)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape (F, C, h, w) of the latents of a video; refuses sizes that the factors do not divide."""
        space, time = self.spatial_factor, self.temporal_factor
        if height % space or width % space:
            raise UsageError(
                f"A video of {height}x{width} cannot be encoded: the VAE needs multiples of {space}.",
                f"Use {max(height // space, 1) * space}x{max(width // space, 1) * space}.",
            )
        if frames < 1 or (frames - 1) % time:
            shorter = max(frames - 1, 0) // time * time + 1
            raise UsageError(
                f"{frames} frames cannot be encoded: the VAE needs one more than a multiple of {time}.",
                f"Use {shorter} or {shorter + time} frames.",
            )
        return (frames - 1) // time + 1, self.channels, height // space, width // space

    def latent_of(self, frame: int) -> int:
        """Latent frame that holds a frame of the video; the first holds one frame, each other a group."""
        return -(-frame // self.temporal_factor)

    @torch.no_grad()
    def encode(self, video: Tensor, batch: int = 1) -> Tensor:
        """Encode video (B, T, 3, H, W) in [0, 1] as normalized latents (B, F, C, h, w), the mode."""
        self.latent_shape(video.shape[1], video.shape[3], video.shape[4])
        with self.at_work() as model:
            return torch.cat([self._encode(model, part) for part in torch.split(video, batch)])

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 1) -> Tensor:
        """Decode normalized latents (B, F, C, h, w) as video (B, T, 3, H, W) in [0, 1]."""
        with self.at_work() as model:
            if model.use_tiling:
                return torch.cat([self._decode_tiled(model, part) for part in torch.split(latents, batch)])
            return torch.cat([self.decoding()(part) for part in torch.split(latents, batch)])

    def _decode_tiled(self, model: Any, latents: Tensor) -> Tensor:
        z = latents.to(self._device, torch.float32).transpose(1, 2) * self._std + self._mean
        video: Tensor = model.decode(z).sample
        return (video.transpose(1, 2) / 2 + 0.5).clamp(0, 1)

    def _encode(self, model: Any, video: Tensor) -> Tensor:
        pixels = video.to(self._device, torch.float32).transpose(1, 2) * 2 - 1
        mode: Tensor = model.encode(pixels).latent_dist.mode()
        return ((mode - self._mean) / self._std).transpose(1, 2)

    def decoding(self) -> ChunkDecoder:
        """Start decoding a video in parts, as it is sampled, inside ``at_work``; never in tiles."""
        return ChunkDecoder(self._model, self._mean, self._std)


class ChunkDecoder:
    """Decoder of one batch of videos in parts, latent frame after latent frame.

    The decoder's causal convolutions depend on earlier frames, which are kept here instead of in the model:
    the pixels do not depend on how the video is split into parts.
    """

    def __init__(self, model: Any, mean: Tensor, std: Tensor) -> None:
        self._model, self._mean, self._std = model, mean, std
        self._past: list[Any] = [None] * model._cached_conv_counts["decoder"]
        self._has_first = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode the next latents (B, F, C, h, w) as video (B, T, 3, H, W) in [0, 1]."""
        return torch.cat([self._frame(frame) for frame in torch.split(latents, 1, dim=1)], dim=1)

    def _frame(self, latents: Tensor) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        z = latents.to(self._model.device, torch.float32).transpose(1, 2) * self._std + self._mean
        x = self._model.post_quant_conv(z)
        options = {"feat_cache": self._past, "feat_idx": [0], "first_chunk": not self._has_first}
        video: Tensor = self._model.decoder(x, **options)
        self._has_first = True
        if self._model.config.patch_size is not None:
            video = unpatchify(video, patch_size=self._model.config.patch_size)
        return (video.transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def _open(pipeline: Path, name: str, config: type[Config]) -> tuple[ComponentFiles, Config]:
    """The files and the checked configuration of a component."""
    place = component(pipeline, name)
    if place.is_file():
        files = open_component(place)
        return files, config.model_validate(files.config)
    sizes = read_record(place / "config.json", config, FETCH)
    return open_component_folder(place, name), sizes


def _load_weights(files: ComponentFiles, dtype: torch.dtype, device: torch.device) -> Any:
    with _library_errors(files.path):
        return files.load(dtype, device).requires_grad_(False)


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    """Load a component by its library, without progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _library_errors(folder):
        return kind.from_pretrained(folder, local_files_only=True, **options)


@contextmanager
def _library_errors(folder: Path) -> Iterator[None]:
    """Refuse a component whose damage shows in its library, whatever it raises."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UsageError):
        raise
    except BaseException as error:  # panics of libraries in Rust are not of the class Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{folder} cannot be loaded: {reason}", FETCH) from error
