"""Which published model a set of weights belongs to, by sizes and by the tensors that only it has.

Sizes: the conversion script of diffusers for Wan (``get_transformer_config``). Tensors of other models:
ComfyUI's model detection and the models' own code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from anyflow_cli.errors import UsageError

if TYPE_CHECKING:
    from anyflow_cli.model.config import NetworkConfig

SAME_TEXT_MODEL = "Use the text-to-video model of the same family."
PLAIN_WAN = "Use a plain Wan 2.1 or 2.2 text-to-video model."

# name, width, layers, feed-forward width, input and output channels
FAMILIES = (
    ("Wan 2.1 T2V 1.3B",                                 1536, 30,  8960, 16, 16),
    ("Wan 2.1 T2V 14B or one expert of Wan 2.2 T2V A14B", 5120, 40, 13824, 16, 16),
    ("Wan 2.2 TI2V 5B",                                  3072, 30, 14336, 48, 48),
    ("Wan I2V 14B or one expert of Wan 2.2 I2V A14B",    5120, 40, 13824, 36, 16),
    ("Wan 2.1 Fun InP 1.3B",                             1536, 30,  8960, 36, 16),
)  # fmt: skip


class Foreign(NamedTuple):
    """A model that resembles Wan but is another architecture: what gives it away, and what to use instead."""

    tensors: str  # regular expression that one of its tensor names matches
    name: str
    instead: str


FOREIGN = (
    Foreign(r"(^|\.)vace_(blocks|patch_embedding)\.", "a Wan VACE model", SAME_TEXT_MODEL),
    Foreign(
        r"(^|\.)(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.",
        "a Wan Animate model",
        PLAIN_WAN,
    ),
    Foreign(r"(^|\.)casual_audio_encoder\.", "a Wan S2V (speech-to-video) model", PLAIN_WAN),
    Foreign(r"(^|\.)audio_proj\.", "a HuMo model", PLAIN_WAN),
    Foreign(r"(^|\.)(ref_conv|control_adapter)\.", "a Wan Fun control model", SAME_TEXT_MODEL),
    Foreign(
        r"(^|\.)time_embedding_r\.",
        "a LightX2V MeanFlow model",
        "Use an AnyFlow model, or LightX2V's 4-step model.",
    ),
    Foreign(
        r"\.attn_op\.local_attn\.proj_l\.",
        "a TurboWan model (sparse-linear attention)",
        "Use the rCM model of the same size.",
    ),
    Foreign(r"(^|\.)videodit_blocks\.layers\.", "a MAGI-1 model", PLAIN_WAN),
)

# model_type in the config.json of an original folder, and classes of diffusers
FOREIGN_TYPES = {
    "vace": "a Wan VACE model", "animate": "a Wan Animate model", "s2v": "a Wan S2V (speech-to-video) model",
    "WanVACETransformer3DModel": "a Wan VACE model", "WanAnimateTransformer3DModel": "a Wan Animate model",
}  # fmt: skip


def family_of(config: NetworkConfig) -> str:
    """Name of the published model with these sizes."""
    sizes = (config.dim, config.layers, config.ffn_dim, config.in_channels, config.out_channels)
    name = next((name for name, *known in FAMILIES if tuple(known) == sizes), "Wan architecture, other sizes")
    return name if config.boundary is None else name.rpartition("one expert of ")[2]


def refuse_foreign(names: Iterable[str], place: object) -> None:
    """Raise a UsageError that names the model if a tensor shows that it is not a plain Wan."""
    joined = "\n".join(names)
    for model in FOREIGN:
        if re.search(model.tensors, joined, re.MULTILINE):
            raise UsageError(f"{place} is {model.name}, which anyflow does not run.", model.instead)


def refuse_type(model_type: object, place: object) -> None:
    """Raise a UsageError that names the model if the type or class of a ``config.json`` is no plain Wan's."""
    name = FOREIGN_TYPES.get(str(model_type))
    if name is not None:
        raise UsageError(f"{place} is {name}, which anyflow does not run.", SAME_TEXT_MODEL)
