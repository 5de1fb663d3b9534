"""Parameter names of the original projects beside those of diffusers and transformers, which are ours too.

Sources: the projects' own code (Wan-Video/Wan2.1 and Wan2.2, ``wan/modules``) and the single-file loader of
diffusers. Rows are modules, whose ``.weight`` and ``.bias`` follow, or parameters without such a module.
"""

from __future__ import annotations

import re
from typing import NamedTuple

Pairs = tuple[tuple[str, str], ...]  # (ours, original)


class NameTable(NamedTuple):
    """Names outside the blocks, names inside each block, and what the list of blocks is called."""

    blocks: tuple[str, str]
    outside: Pairs
    inside: Pairs

    def to_original(self, name: str) -> str:
        """Original name of one of our modules or parameters; a name that is not in the table is unchanged."""
        return self._translated(name, 0)

    def from_original(self, name: str) -> str:
        """Our name of an original module or parameter; a name that is not in the table is unchanged."""
        return self._translated(name, 1)

    def _translated(self, name: str, source: int) -> str:
        target = 1 - source
        block = re.match(rf"{re.escape(self.blocks[source])}\.(\d+)\.(.+)", name)
        if block is None:
            return _looked_up(name, {pair[source]: pair[target] for pair in self.outside})
        inner = _looked_up(block[2], {pair[source]: pair[target] for pair in self.inside})
        return f"{self.blocks[target]}.{block[1]}.{inner}"


def _looked_up(name: str, table: dict[str, str]) -> str:
    """Translate the longest leading part that the table has."""
    path, rest = name, ""
    while path:
        if path in table:
            return table[path] + rest
        path, dot, last = path.rpartition(".")
        rest = f"{dot}{last}{rest}"
    return name


_ATTENTION = (
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "o"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)
_IMAGE_ATTENTION = (("add_k_proj", "k_img"), ("add_v_proj", "v_img"), ("norm_added_k", "norm_k_img"))

TRANSFORMER_NAMES = NameTable(
    blocks=("blocks", "blocks"),
    outside=(
        ("condition_embedder.text_embedder.linear_1",     "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2",     "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1",     "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2",     "time_embedding.2"),
        ("condition_embedder.delta_embedder.linear_1",    "delta_embedding.0"),  # a name of this project
        ("condition_embedder.delta_embedder.linear_2",    "delta_embedding.2"),  # a name of this project
        ("condition_embedder.time_proj",                  "time_projection.1"),
        ("fps_projection.net.0.proj",                     "fps_projection.0"),  # of SkyReels-V2
        ("fps_projection.net.2",                          "fps_projection.2"),
        ("condition_embedder.image_embedder.norm1",       "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2",    "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2",       "img_emb.proj.4"),
        ("condition_embedder.image_embedder.pos_embed",   "img_emb.emb_pos"),
        ("proj_out",                                      "head.head"),
        ("scale_shift_table",                             "head.modulation"),
    ),
    inside=(
        *((f"attn1.{ours}", f"self_attn.{theirs}") for ours, theirs in _ATTENTION),
        *((f"attn2.{ours}", f"cross_attn.{theirs}") for ours, theirs in _ATTENTION + _IMAGE_ATTENTION),
        ("norm2",          "norm3"),  # the affine one, before cross-attention; the others have no weights
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2",      "ffn.2"),
        ("scale_shift_table", "modulation"),
    ),
)  # fmt: skip

TEXT_ENCODER_NAMES = NameTable(
    blocks=("encoder.block", "blocks"),
    outside=(("shared", "token_embedding"), ("encoder.final_layer_norm", "norm")),
    inside=(
        ("layer.0.layer_norm",                            "norm1"),
        *((f"layer.0.SelfAttention.{name}", f"attn.{name}") for name in "qkvo"),
        ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
        ("layer.1.layer_norm",                            "norm2"),
        ("layer.1.DenseReluDense.wi_0",                   "ffn.gate.0"),
        ("layer.1.DenseReluDense.wi_1",                   "ffn.fc1"),
        ("layer.1.DenseReluDense.wo",                     "ffn.fc2"),
    ),
)  # fmt: skip

IMAGE_ENCODER_NAMES = NameTable(
    blocks=("encoder.layers", "visual.transformer"),
    outside=(
        ("embeddings.class_embedding",           "visual.cls_embedding"),
        ("embeddings.patch_embedding",           "visual.patch_embedding"),
        ("embeddings.position_embedding.weight", "visual.pos_embedding"),
        ("pre_layrnorm",                         "visual.pre_norm"),  # spelled so in transformers
        ("post_layernorm",                       "visual.post_norm"),
    ),
    inside=(
        ("layer_norm1",        "norm1"),
        ("self_attn.to_qkv",   "attn.to_qkv"),  # three matrices in one, which transformers has as q, k and v
        ("self_attn.out_proj", "attn.proj"),
        ("layer_norm2",        "norm2"),
        ("mlp.fc1",            "mlp.0"),
        ("mlp.fc2",            "mlp.2"),
    ),
)  # fmt: skip

# Original VAE names to ours, as regular expressions applied in order. Both VAEs share the first rows.
_VAE_COMMON = (
    (r"^conv1\.",                            "quant_conv."),
    (r"^conv2\.",                            "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.",         r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.",       r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.",       r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.",     r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.",     r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.",     r"\1.mid_block.resnets.1."),
    (r"\.residual\.0\.",                     ".norm1."),
    (r"\.residual\.2\.",                     ".conv1."),
    (r"\.residual\.3\.",                     ".norm2."),
    (r"\.residual\.6\.",                     ".conv2."),
    (r"\.shortcut\.",                        ".conv_shortcut."),
)  # fmt: skip
VAE_21_NAMES = (
    *_VAE_COMMON,
    (r"^encoder\.downsamples\.(\d+)\.", r"encoder.down_blocks.\1."),
    # The decoder's flat list has four entries per level: three residual blocks, then an upsampler.
    *(
        (rf"^decoder\.upsamples\.{4 * level + i}\.", f"decoder.up_blocks.{level}.resnets.{i}.")
        for level in range(4)
        for i in range(3)
    ),
    *(
        (rf"^decoder\.upsamples\.{4 * level + 3}\.", f"decoder.up_blocks.{level}.upsamplers.0.")
        for level in range(3)
    ),
)
_DOWN, _UP = r"^encoder\.downsamples\.(\d+)\.downsamples\.", r"^decoder\.upsamples\.(\d+)\.upsamples\."
VAE_22_NAMES = (
    *_VAE_COMMON,
    (_DOWN + r"\d+\.(resample|time_conv)\.", r"encoder.down_blocks.\1.downsampler.\2."),
    (_DOWN + r"(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (_UP + r"\d+\.(resample|time_conv)\.", r"decoder.up_blocks.\1.upsampler.\2."),
    (_UP + r"(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
)


def substituted(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """Apply regular expressions to a name, in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name
