"""A Wan pipeline folder with small random weights, which any test can create in about a second.

It is not the trained model that ships with the package (``tiny``). Latents have 8 channels and the spatial
and temporal factors 8 and 4; text has 32 channels; the transformer has 2 layers with 2 heads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a small large red green blue circle square triangle moving left right up down on gray white background"
)
TEXT_DIM = 32
CHANNELS = 8
SHIFT = 5.0
WAN21_SIZES = {"in_channels": 16, "out_channels": 16, "attention_head_dim": 128}
CLIP_DIM, CLIP_TOKENS = 24, 5  # four patches and a class token
PICTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "2.1 I2V": {"image_dim": CLIP_DIM, "added_kv_proj_dim": 32},
    "2.1 FLF2V": {"image_dim": CLIP_DIM, "added_kv_proj_dim": 32, "pos_embed_seq_len": 2 * CLIP_TOKENS},
    "2.2 I2V": {},
}
I2V_A14B = "2.2 I2V A14B"  # two experts
TI2V_VAE = {
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16
}  # fmt: skip


def make_wan_folder(target: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the folder and return it; ``changes`` are settings of the transformer."""
    return _write(target, "WanPipeline", seed, changes)


def make_ti2v_folder(target: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a folder of the shape of Wan 2.2 TI2V-5B: a VAE with the factors 16 and 4, times per frame."""
    return _write(target, "WanPipeline", seed, changes, vae=TI2V_VAE, expand_timesteps=True)


def make_i2v_folder(target: Path, kind: str = "2.1 I2V", seed: int = 0, **changes: Any) -> Path:
    """Write a folder of an image-to-video Wan, one of ``PICTURE_SETTINGS`` or of two experts."""
    own = PICTURE_SETTINGS.get(kind, {})
    settings = {"in_channels": 2 * CHANNELS + 4, **own, **changes}
    clip = {"image_encoder": None, "image_processor": None}
    if own:
        clip = {"image_encoder": _image_encoder(), "image_processor": _image_processor()}
    boundary = 0.9 if kind == I2V_A14B else None
    return _write(target, "WanImageToVideoPipeline", seed, settings, boundary=boundary, **clip)


def _write(
    target: Path,
    pipeline: str,
    seed: int,
    changes: Any,
    vae: Any = None,
    boundary: float | None = None,
    **components: Any,
) -> Path:
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if boundary is not None:
            components |= {"transformer_2": wan_transformer(**changes), "boundary_ratio": boundary}
        getattr(diffusers, pipeline)(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(),
            transformer=wan_transformer(**changes),
            vae=_vae(**(vae or {})),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            **components,
        ).save_pretrained(target)
    return target


def make_expert_folder(target: Path, seed: int = 0, boundary: float = 0.875, **changes: Any) -> Path:
    """Write a Wan 2.2 folder with two experts, as diffusers does, and return it."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        WanPipeline(
            tokenizer=_tokenizer(),
            text_encoder=_text_encoder(),
            transformer=wan_transformer(**changes),
            transformer_2=wan_transformer(**changes),
            vae=_vae(),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
            ),
            boundary_ratio=boundary,
        ).save_pretrained(target)
    return target


def make_wan21_folder(target: Path, make: Callable[..., Path] = make_wan_folder) -> Path:
    """The same with the VAE of Wan 2.1 and A14B: latents of 16 channels."""
    from diffusers import AutoencoderKLWan

    make(target, **WAN21_SIZES)
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(target / "vae")
    return target


def wan_transformer(**changes: Any) -> Any:
    """The diffusers network of the folder, with weights large enough that every part matters."""
    from diffusers import WanTransformer3DModel

    network = spread(WanTransformer3DModel(**sizes(**changes)))
    embedder = network.condition_embedder.image_embedder
    if embedder is not None and embedder.pos_embed is not None:
        embedder.pos_embed.data.normal_()
    return network


def sizes(**changes: Any) -> dict[str, Any]:
    """Arguments for the diffusers transformer classes."""
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        **changes,
    }


def spread(network: Any) -> Any:
    """Move norms and biases away from one and zero, where an error in them would not show."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval()


def _vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    statistics = {
        "latents_mean": [0.1 * i for i in range(CHANNELS)],
        "latents_std": [1 + 0.1 * i for i in range(CHANNELS)],
    }
    return AutoencoderKLWan(base_dim=8, z_dim=CHANNELS, num_res_blocks=1, **statistics, **changes).eval()


def _text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(WORDS.split()) + 3, d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=2
    )
    return UMT5EncoderModel(config).eval()


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CLIP_DIM, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    return CLIPVisionModel(config).eval()


def _image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS.split()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
