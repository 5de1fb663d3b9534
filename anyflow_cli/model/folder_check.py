"""Checks of model folders and adapters from their headers: names, shapes and sizes, without loading a weight.

For ``anyflow doctor`` and ``--dry-run``, which say what is wrong before a command starts. Whatever loads a
folder refuses the same problems by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.encoders import TextEncoderConfig, VaeConfig
from anyflow_cli.model.layouts.components import STEMS, component_config, open_component
from anyflow_cli.model.layouts.expert_files import open_network
from anyflow_cli.model.lora import adapter_problems
from anyflow_cli.model.network import on_meta
from anyflow_cli.model.pipeline_io import (
    ADAPTER_CONFIG,
    ADAPTER_PREFIX,
    ADAPTER_WEIGHTS,
    AdapterConfig,
    component,
    has_components,
    read_shift,
    shapes_of,
)
from anyflow_cli.model.weights_io import (
    FETCH,
    TEXT_ENCODER_STEM,
    TRANSFORMER_STEM,
    differences,
    read_header,
    read_headers,
)
from anyflow_cli.utils.records import read_record

ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
Shapes = dict[str, tuple[int, ...]]
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


def check_folder(path: Path) -> list[str]:
    """Problems of a pipeline folder, transformer folder or LoRA adapter, in words; empty if it is sound.

    Opens the header of every weight file and compares names, types and shapes with the configurations. Values
    are not read, and nothing is fetched.
    """
    if (path / ADAPTER_CONFIG).is_file():
        return _problems([lambda: _check_adapter(path)])
    checks: list[Callable[[], Iterator[str]]] = [lambda: _check_transformer(path)]
    if has_components(path):
        checks += [
            lambda: _check_scheduler(path),
            lambda: _check_text_encoder(path),
            lambda: _check_tokenizer(path),
            lambda: _check_vae(path),
            lambda: _check_image_encoder(path),
        ]
    return _problems(checks)


def _problems(checks: list[Callable[[], Iterator[str]]]) -> list[str]:
    """All problems; one that ends a check early does not end the others."""
    found: list[str] = []
    for check in checks:
        try:
            found.extend(check())
        except AnyflowError as error:
            found.append(error.message)
    return list(dict.fromkeys(found))


def _check_transformer(path: Path) -> Iterator[str]:
    opened = open_network(path)
    expected = shapes_of(on_meta(replace(opened.config, boundary=None)).state_dict())
    for transformer in opened.transformers:
        for problem in differences(expected, transformer.tensors.shapes):
            yield f"The weights of {transformer.path} do not fit {transformer.reference}: {problem}"


def _check_scheduler(path: Path) -> Iterator[str]:
    read_shift(path)
    yield from ()


def _check_text_encoder(path: Path) -> Iterator[str]:
    folder = component(path, "text_encoder")
    if folder.is_file():
        open_component(folder)  # refuses one that is incomplete
        return
    config = read_record(folder / "config.json", TextEncoderConfig, FETCH)
    yield from _compare(folder, TEXT_ENCODER_STEM, umt5_shapes(config))


def _check_tokenizer(path: Path) -> Iterator[str]:
    folder = component(path, "tokenizer")
    if not any((folder / name).is_file() and (folder / name).stat().st_size for name in TOKENIZER_FILES):
        yield f"{folder} holds none of {' and '.join(TOKENIZER_FILES)}"


def _check_vae(path: Path) -> Iterator[str]:
    import torch
    from diffusers import AutoencoderKLWan

    folder = component(path, "vae")
    if folder.is_file():
        open_component(folder)
        return
    config = read_record(folder / "config.json", VaeConfig, FETCH).model_dump(exclude={"class_name"})
    config = {name: value for name, value in config.items() if value is not None}
    try:
        with torch.device("meta"):
            expected = shapes_of(AutoencoderKLWan.from_config(config).state_dict())
    except Exception as error:  # whatever a wrong value leads to in diffusers' constructor
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{folder / 'config.json'} does not describe a VAE ({reason}).", FETCH) from error
    yield from _compare(folder, TRANSFORMER_STEM, expected)


def _check_image_encoder(path: Path) -> Iterator[str]:
    """CLIP's vision tower, where the network takes its tokens."""
    width = open_network(path).config.image_dim
    if width is None:
        return
    place, _ = component(path, "image_encoder"), component(path, "image_processor")
    if place.is_dir():
        read_headers(place, STEMS["image_encoder"])
    found = component_config(place).get("hidden_size")
    if found != width:
        yield f"The image encoder {place} has the width {found}, and the network takes tokens of {width}"


def _check_adapter(path: Path) -> Iterator[str]:
    config = read_record(path / ADAPTER_CONFIG, AdapterConfig, FETCH)
    header = read_header(path / ADAPTER_WEIGHTS)
    shapes = {name.removeprefix(ADAPTER_PREFIX): info.shape for name, info in header.items()}
    for problem in adapter_problems(shapes, config.r):
        yield f"{path / ADAPTER_WEIGHTS} is not an adapter of rank {config.r}: {problem}"


def _compare(folder: Path, stem: str, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    headers = read_headers(folder, stem)
    found = {ALIASES.get(name, name): info.shape for name, info in headers.items()}
    for problem in differences(expected, found):
        yield f"The weights of {folder} do not fit config.json: {problem}"


def umt5_shapes(config: TextEncoderConfig) -> Shapes:
    """Shapes of a UMT5 encoder's weights, by name; ``encoder.embed_tokens`` is another name of ``shared``."""
    dim, inner = config.d_model, config.num_heads * config.d_kv
    shapes: Shapes = {"shared.weight": (config.vocab_size, dim), "encoder.final_layer_norm.weight": (dim,)}
    for i in range(config.num_layers):
        attention, feed_forward = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        shapes |= {
            f"{attention}.SelfAttention.o.weight": (dim, inner),
            f"{attention}.SelfAttention.relative_attention_bias.weight": (
                config.relative_attention_num_buckets,
                config.num_heads,
            ),
            f"{attention}.layer_norm.weight": (dim,),
            f"{feed_forward}.DenseReluDense.wi_0.weight": (config.d_ff, dim),
            f"{feed_forward}.DenseReluDense.wi_1.weight": (config.d_ff, dim),
            f"{feed_forward}.DenseReluDense.wo.weight": (dim, config.d_ff),
            f"{feed_forward}.layer_norm.weight": (dim,),
        }
    return shapes
