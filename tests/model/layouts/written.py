"""A small Wan transformer, written as other projects write theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny_pipeline import wan_transformer

Weights = dict[str, Tensor]
SIZES = {"num_attention_heads": 2, "attention_head_dim": 128}
ORIGINAL_CONFIG = {
    "_class_name": "WanModel", "dim": 256, "ffn_dim": 64, "freq_dim": 32, "in_dim": 8, "out_dim": 8,
    "num_heads": 2,
    "num_layers": 2, "model_type": "t2v", "text_len": 512, "text_dim": 32, "eps": 1e-6,
}  # fmt: skip
FP8_MARKER = torch.zeros(2).to(torch.float8_e4m3fn)
SINGLE = "diffusion_pytorch_model.safetensors"


def reference(seed: int = 0) -> Any:
    """Diffusers' network, with heads as wide as Wan's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wan_transformer(**SIZES)


def originals(layers: int = 2) -> dict[str, str]:
    """Wan's own module names beside those of diffusers, written out from ``wan/modules/model.py``."""
    names = {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    }
    for n in range(layers):
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            for letter, module in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
                names[f"blocks.{n}.{theirs}.{letter}"] = f"blocks.{n}.{ours}.{module}"
            for norm in ("norm_q", "norm_k"):
                names[f"blocks.{n}.{theirs}.{norm}"] = f"blocks.{n}.{ours}.{norm}"
        for theirs, ours in (
            ("k_img", "add_k_proj"),
            ("v_img", "add_v_proj"),
            ("norm_k_img", "norm_added_k"),
        ):
            names[f"blocks.{n}.cross_attn.{theirs}"] = f"blocks.{n}.attn2.{ours}"
        names[f"blocks.{n}.norm3"] = f"blocks.{n}.norm2"
        names[f"blocks.{n}.ffn.0"] = f"blocks.{n}.ffn.net.0.proj"
        names[f"blocks.{n}.ffn.2"] = f"blocks.{n}.ffn.net.2"
    return names


def as_original(weights: Mapping[str, Tensor]) -> Weights:
    """Weights of diffusers under Wan's own names."""
    modules = {ours: theirs for theirs, ours in originals().items()}
    tables = {
        "scale_shift_table": "head.modulation",
        "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    } | {f"blocks.{n}.scale_shift_table": f"blocks.{n}.modulation" for n in range(2)}
    renamed = {}
    for name, tensor in weights.items():
        module, _, last = name.rpartition(".")
        renamed[tables.get(name) or f"{modules[module]}.{last}"] = tensor.detach().clone()
    return renamed


def prefixed(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def is_linear(name: str, tensor: Tensor) -> bool:
    """Whether projects quantize this tensor: the linear layers of the blocks."""
    return tensor.dim() == 2 and name.startswith("blocks.") and name.endswith(".weight")


def fp8_plain(weights: Mapping[str, Tensor]) -> Weights:
    return {
        name: tensor.to(torch.float8_e4m3fn) if is_linear(name, tensor) else tensor
        for name, tensor in weights.items()
    }


def fp8_scaled(weights: Mapping[str, Tensor], suffix: str = "scale_weight", rows: bool = False) -> Weights:
    stored: Weights = {}
    for name, tensor in weights.items():
        if not is_linear(name, tensor):
            stored[name] = tensor
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
        scale = largest / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", f".{suffix}")] = scale
    return stored


def int8_rows(weights: Mapping[str, Tensor]) -> Weights:
    stored: Weights = {}
    for name, tensor in weights.items():
        stored[name] = tensor
        if is_linear(name, tensor):
            scale = tensor.abs().amax(dim=1, keepdim=True) / 127
            stored[name] = (tensor / scale).round().to(torch.int8)
            stored[name.replace(".weight", ".weight_scale")] = scale
    return stored


def comfy_quantized(weights: Mapping[str, Tensor], form: str = "float8_e4m3fn") -> Weights:
    stored = fp8_scaled(weights, "weight_scale")
    conf = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        stored[name.replace(".weight_scale", ".comfy_quant")] = conf.clone()
        stored[name.replace(".weight_scale", ".input_scale")] = torch.ones(())
    return stored


def rcm(weights: Mapping[str, Tensor]) -> Weights:
    """rCM's files: a prefix, a linear patch embedding, a counter."""
    stored = prefixed(as_original(weights), "net.")
    stored["net.patch_embedding.weight"] = stored["net.patch_embedding.weight"].flatten(1)
    return stored | {"net.accum_iteration": torch.zeros(1)}


def self_forcing(weights: Mapping[str, Tensor], inner: str = "model.", fsdp: bool = False) -> dict[str, Any]:
    """A training state of the Self-Forcing family: both copies of the generator, and heads of its critic."""
    own = as_original(weights)
    if fsdp:  # each block is wrapped, too
        own = {re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module.", name): t for name, t in own.items()}
    named = prefixed(own, inner)
    extra = {f"{inner}_cls_pred_branch.0.weight": torch.zeros(3), f"{inner}_register_tokens": torch.zeros(2)}
    old = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    return {"generator": old, "generator_ema": named | extra, "step": 7}


def folder(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Path:
    path.mkdir()
    save_file(dict(weights), path / SINGLE)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def sharded(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """An original folder whose weights are in two files with an index."""
    path.mkdir()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: weights[name] for name in chosen}, path / file)
    index = {name: file for file, chosen in parts.items() for name in chosen}
    (path / f"{SINGLE}.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    return path


def _file(content: Callable[[Weights], Mapping[str, Tensor]]) -> Callable[[Path, Weights], Path]:
    def write(path: Path, weights: Weights) -> Path:
        save_file({name: t.contiguous() for name, t in content(weights).items()}, path / "model.safetensors")
        return path / "model.safetensors"

    return write


def _pickle(
    content: Callable[[Weights], Any], name: str = "model.pt", **settings: Any
) -> Callable[[Path, Weights], Path]:
    def write(path: Path, weights: Weights) -> Path:
        torch.save(content(weights), path / name, **settings)
        return path / name

    return write


def _alone(path: Path, weights: Weights) -> Path:
    """A directory with one file of weights, as CausVid's are."""
    (path / "causvid").mkdir()
    return _pickle(lambda w: {"generator": prefixed(as_original(w), "model.")})(
        path / "causvid", weights
    ).parent


# Layouts that keep the weights as they are.
EXACT: dict[str, Callable[[Path, Weights], Path]] = {
    "original folder": lambda p, w: folder(p / "wan", as_original(w), ORIGINAL_CONFIG),
    "original folder, sharded": lambda p, w: sharded(p / "wan", as_original(w)),
    "original file": _file(as_original),
    "ComfyUI checkpoint": _file(
        lambda w: prefixed(as_original(w), "model.diffusion_model.") | {"vae.x": torch.zeros(1)}
    ),
    "ComfyUI": _file(lambda w: prefixed(as_original(w), "diffusion_model.")),
    "diffusers file": _file(lambda w: w),
    "original .pth": _pickle(as_original, "model.pth"),
    "original .pth of old torch": _pickle(as_original, "model.pth", _use_new_zipfile_serialization=False),
    "Self-Forcing": _pickle(self_forcing),
    "Self-Forcing, FSDP": _pickle(lambda w: self_forcing(w, "model._fsdp_wrapped_module.", fsdp=True)),
    "CausVid directory": _alone,
    "rCM": _pickle(rcm, "rcm.pt"),
    "AnyFlow training state": _pickle(lambda w: {"ema": w, "step": 3}),
    "FastWan, sparse attention": _file(lambda w: w | {"blocks.0.to_gate_compress.weight": torch.zeros(1)}),
}

# Layouts with fp8 or int8 weights.
QUANTIZED: dict[str, Callable[[Path, Weights], Path]] = {
    "fp8": _file(lambda w: fp8_plain(as_original(w))),
    "fp8 scaled": _file(lambda w: fp8_scaled(as_original(w)) | {"scaled_fp8": FP8_MARKER}),
    "fp8 scaled, ComfyUI checkpoint": _file(
        lambda w: prefixed(
            fp8_scaled(as_original(w)) | {"scaled_fp8": FP8_MARKER}, "model.diffusion_model."
        )
    ),
    "fp8 per row": _file(lambda w: fp8_scaled(as_original(w), "weight_scale", rows=True)),
    "int8 per row": _file(lambda w: int8_rows(as_original(w))),
    "comfy_quant": _file(lambda w: comfy_quantized(as_original(w))),
}  # fmt: skip
