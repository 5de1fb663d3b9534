"""FSDP2: networks' weights, gradients and optimizer states divided among processes.

Blocks are the units that are gathered, used and let go; what is outside of blocks is one more. All roles of a
network are in the same units, so a gathered block has every adapter, and a role decides which one it uses.
Weights keep their own types (a bf16 base, fp32 adapters, fp32 times and norms); products run under autocast
as they do unsharded, and gradients are reduced in fp32.

torch's ``fully_shard`` is called here, not accelerate's ``prepare``, which wraps one model with one optimizer
and its parameters' single type, and does nothing on a CPU, where it could not be tested.

Every process must call the networks alike, since each call gathers: ``flow/`` sees to that but where guidance
is 1, which a recipe may not ask for together with sharding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe import schema


def apply_fsdp(
    networks: Iterable[FlowMapTransformer], launch: schema.LaunchSection, device: torch.device
) -> None:
    """Divide networks in place; their weights move to ``device`` block by block."""
    # A velocity may be a view; nobody writes into one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options: dict[str, Any] = {
        "mesh": _mesh(launch, device.type),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if launch.offload and device.type != "cpu" else OffloadPolicy(),
        # the outermost unit too: sampling alone has no backward pass that would let go of it
        "reshard_after_forward": True,
    }
    for network in networks:
        for module in (*network.blocks, network):
            fully_shard(module, **options)
            register_fsdp_forward_method(module, "text_keys")
        register_fsdp_forward_method(network, "embedding_norm")


def _mesh(launch: schema.LaunchSection, kind: str) -> DeviceMesh:
    """All processes in one group, or a group for each machine and replicas across machines."""
    if not distributed.is_initialized():  # alone, for the sake of offloading
        distributed.init_process_group(store=HashStore(), rank=0, world_size=1)
    ranks = distributed.get_world_size()
    if launch.sharding == "full":
        return init_device_mesh(kind, (ranks,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return init_device_mesh(kind, (ranks // local, local), mesh_dim_names=("replicate", "shard"))


def full_tensor(value: Tensor) -> Tensor:
    """A tensor as every process has it whole; one that is divided is gathered, by all processes together."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where ``like`` is divided."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
