"""Configurations are read and written as by diffusers, and refused where the arithmetic would differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import CLASSES, CausalConfig, NetworkConfig
from tests.model.helpers import theirs


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip_through_diffusers(name: str) -> None:
    given = {"_class_name": name, "num_layers": 3, "in_channels": 8, "gate_value": 0.5, "full_chunk_limit": 2}
    config = NetworkConfig.from_diffusers(given)
    assert NetworkConfig.from_diffusers(config.to_diffusers()) == config
    assert config.class_name == name
    assert (config.gate == 0.5) == config.two_time
    assert config.causal is None or config.causal.full_chunks == 2


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_written_is_all_that_the_class_takes(name: str) -> None:
    """diffusers drops unknown keys with a warning and fills missing ones with defaults."""
    written = NetworkConfig.from_diffusers({"_class_name": name, "chunk_partition": [1, 3]}).to_diffusers()
    known = {key for key in theirs(name).config if not key.startswith("_")}
    assert set(written) - {"_class_name"} == known


@pytest.mark.parametrize("name", CLASSES)
def test_absent_keys_have_the_defaults_of_the_class(name: str) -> None:
    import inspect

    import diffusers

    defaults = inspect.signature(getattr(diffusers, name)).parameters
    written = NetworkConfig.from_diffusers({"_class_name": name}).to_diffusers()
    for key, value in written.items():
        if key != "_class_name":
            default = defaults[key].default
            assert value == (list(default) if isinstance(default, tuple) else default), key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "HunyuanVideoTransformer3DModel"),
        ({"image_dim": 1280}, "image"),
        ({"added_kv_proj_dim": 64}, "image"),
        ({"patch_size": [2, 2, 2]}, "2 latent frames"),
        ({"qk_norm": "rms_norm"}, "'rms_norm'"),
        ({"deltatime_type": "t+r", "_class_name": "AnyFlowTransformer3DModel"}, "'t\\+r'"),
    ],
)
def test_other_architectures_are_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        NetworkConfig.from_diffusers({"_class_name": "WanTransformer3DModel", **change})
    assert caught.value.hint


def test_a_sink_and_a_window_stay_with_the_model() -> None:
    causal = CausalConfig(sink_chunks=1, remember=4)
    written = NetworkConfig(heads=2, head_dim=16, layers=1, ffn_dim=32, two_time=True, causal=causal)
    assert NetworkConfig.from_diffusers(written.to_diffusers()).causal == causal
    plain = replace(written, causal=CausalConfig()).to_diffusers()
    assert not {"sink_chunks", "remembered_chunks"} & plain.keys()  # diffusers does not know them
