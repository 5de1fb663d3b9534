"""Pairs of the same network in diffusers and here, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer
from tests.tiny_pipeline import sizes, spread


@dataclass(frozen=True)
class Inputs:
    """Latents (B, F, C, H, W), times (B, F), text (B, L, D)."""

    z: Tensor
    t: Tensor
    r: Tensor
    text: Tensor


def inputs(
    batch: int = 2, frames: int = 3, height: int = 4, width: int = 6, text: int = 7, seed: int = 1
) -> Inputs:
    """Random inputs in the tiny pipeline's sizes; t and r differ from frame to frame."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.rand(batch, frames, generator=draw)
    return Inputs(
        z=torch.randn(batch, frames, 8, height, width, generator=draw),
        t=t,
        r=t * torch.rand(batch, frames, generator=draw),
        text=torch.randn(batch, text, 32, generator=draw),
    )


def theirs(class_name: str, **changes: Any) -> Any:
    """A diffusers network with random weights in which every parameter matters."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spread(getattr(diffusers, class_name)(**sizes(**changes)))


def ours(reference: Any) -> FlowMapTransformer:
    """The same network here."""
    config = NetworkConfig.from_diffusers(dict(reference.config) | {"_class_name": type(reference).__name__})
    network = FlowMapTransformer(config)
    network.load_state_dict(reference.state_dict())
    return network.requires_grad_(False)


def anyflow_velocity(network: Any, x: Inputs) -> Tensor:
    """Diffusers' AnyFlow network on our inputs."""
    u: Tensor = network(x.z, 1000 * x.t, 1000 * x.r, x.text, return_dict=False)[0]
    return u


def wan_velocity(network: Any, x: Inputs) -> Tensor:
    """Diffusers' Wan network on our inputs: channels first, one time a sample."""
    v: Tensor = network(x.z.transpose(1, 2), 1000 * x.t[:, 0], x.text, return_dict=False)[0]
    return v.transpose(1, 2)


def distance(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the reference's largest value."""
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max()).item()
