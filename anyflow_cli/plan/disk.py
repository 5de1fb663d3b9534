"""What a recipe's results take on disk: the data set, the checkpoints of each stage, the finished models.

Mirrors ``data/shards.py`` (tar archives of safetensors) and ``train/checkpoint.py``. Text embeddings are
stored without padding, so their size depends on the captions: what is given is the most they can take.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Mapping

from anyflow_cli.model.network import on_meta
from anyflow_cli.plan.setup import Setup
from anyflow_cli.plan.stages import Target
from anyflow_cli.plan.steps import RoleSize
from anyflow_cli.recipe import schema

RECORD = 1024  # of a sample: the header of its safetensors file, its caption and facts
FP32, BF16 = 4, 2


def dataset(target: Target) -> dict[str, int]:
    """Bytes of the synthetic data set: latents, and text and archives at most."""
    model, count = target.recipe.model, target.recipe.synthesize.count or 0
    each = BF16 if target.precision == "bf16" else FP32
    latents = each * math.prod(target.latent)
    text = each * model.max_text_tokens * target.pipeline.text.dim
    archive = _in_archive(latents + text + RECORD // 2) + _in_archive(RECORD // 2) - latents - text
    return {"latents": count * latents, "text, at most": count * text, "archives": count * archive}


def _in_archive(size: int) -> int:
    """A member of a tar archive: its header, and whole blocks."""
    block = tarfile.BLOCKSIZE
    return block + -(-size // block) * block


def checkpoints(roles: Mapping[str, RoleSize], settings: schema.TrainingSection) -> int:
    """Bytes of a run's checkpoints: those kept, and one being written.

    Each holds the weights of every phase, both moments of its optimizer, and the student's average.
    """
    trained = {role: size.trainable_bytes for role, size in roles.items()}
    return (settings.keep_checkpoints + 1) * (3 * sum(trained.values()) + trained["student"])


def finished(setup: Setup, roles: Mapping[str, RoleSize]) -> int:
    """Bytes of the finished model's network, always fp32, and of its adapter where one was trained."""
    network = sum(parameter.numel() for parameter in on_meta(setup.config).parameters())
    return FP32 * network + (roles["student"].bytes if setup.lora else 0)
