"""What wraps a network, applied in this order: context parallelism, checkpointing, compilation, FSDP2.

Context parallelism: groups of consecutive processes share each video (``context_parallel``). The other axis
of the device mesh is data. Gradients are averaged over both, so DDP and FSDP2 work over all processes.

Compilation: each block's ``forward`` is compiled instead of the module, so that what surrounds a block stays
around it: FSDP2's hooks, which gather its weights, and checkpointing, which calls it again. Each combination
of role, number of samples and token layout is compiled at its first call. Sizes are never symbolic: a
recomputation must run the very code of its forward, and a later, more general version would also match.

FSDP2 shards weights, gradients and optimizer states over processes. A block is a unit that is gathered, used
and freed; what is outside of blocks is one more unit. All roles of a network share its units. Weights keep
their own types (a bf16 base, fp32 adapters, fp32 times and norms), products run under autocast as they do
unsharded, and gradients are reduced in fp32. torch's ``fully_shard`` is called instead of accelerate's
``prepare``, which wraps one model with one optimizer and one parameter type, and does nothing on a CPU, where
it could not be tested. Each call of a network gathers, so all processes must call it equally often: ``flow``
ensures that except with guidance 1, which a recipe may not combine with sharding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
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

from anyflow_cli.model.attention import AttentionShape, Kernel, choose_kernel
from anyflow_cli.model.base_storage import keep_base_on_host
from anyflow_cli.model.context_parallel import context_groups
from anyflow_cli.model.experts import networks_of
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.precision import Precision
from anyflow_cli.recipe import schema

COMPILED_VERSIONS = 128  # per block: roles, with and without gradient, times numbers of samples and layouts


def parallelize(
    networks: Sequence[FlowMapTransformer],
    model: schema.ModelSection,
    launch: schema.LaunchSection,
    device: torch.device,
) -> None:
    """Prepare networks for training in place, as the recipe says, and move them to ``device``."""
    apply_context(networks, launch.context_parallel or 1, device)
    for network in networks:
        apply_checkpointing(network, model)
        if model.compile:
            apply_compile(network)
    if launch.sharding != "none":
        apply_fsdp(networks, launch, device)
    else:
        for network in networks:
            if launch.offload:
                keep_base_on_host(network, device)
            else:
                network.to(device)


def apply_checkpointing(network: FlowMapTransformer, model: schema.ModelSection) -> None:
    """Recompute every n-th block in the backward pass, where the recipe asks for it."""
    network.gradient_checkpointing = bool(model.gradient_checkpointing)  # auto, where nothing chose: all
    network.checkpoint_every_n_blocks = model.checkpoint_every_n_blocks


def apply_compile(network: FlowMapTransformer, mode: str | None = None) -> None:
    """Compile each block at its first call, in a mode of torch.compile. Call it before sharding."""
    torch._dynamo.config.recompile_limit = COMPILED_VERSIONS
    for block in network.blocks:
        block.forward = torch.compile(block.forward, dynamic=False, mode=mode)


def apply_attention(
    networks: Iterable[FlowMapTransformer],
    setting: str,
    latent_shape: Sequence[int],
    precision: Precision,
    device: torch.device,
    *,
    trains: bool = False,
) -> None:
    """Choose the attention kernel of networks on a device, for latents (F, C, H, W) of a video."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    kernels: dict[AttentionShape, Kernel] = {}
    for network in (one for pair in networks for one in networks_of(pair)):
        shape = network.attention_shape(latent_shape)
        if shape not in kernels:
            kernels[shape] = choose_kernel(setting, shape, device, dtype, trains=trains)
        network.use_kernel(kernels[shape])


def apply_context(networks: Sequence[FlowMapTransformer], size: int, device: torch.device) -> None:
    """Let ``size`` consecutive processes share each video; all processes call this together."""
    if size > 1:
        each = [network for pair in networks for network in networks_of(pair)]
        groups = context_groups(size, [network.config.heads for network in each], device.type)
        for network in each:
            network.use_context(groups[network.config.heads])


def apply_fsdp(
    networks: Iterable[FlowMapTransformer], launch: schema.LaunchSection, device: torch.device
) -> None:
    """Shard networks in place; their weights move to ``device`` block by block."""
    # A velocity may be a view; it is never written to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options: dict[str, Any] = {
        "mesh": _mesh(launch, device.type),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if launch.offload and device.type != "cpu" else OffloadPolicy(),
        # the outermost unit too: sampling has no backward pass that would free it
        "reshard_after_forward": True,
    }
    for network in networks:
        for module in (*network.blocks, network):
            fully_shard(module, **options)
            register_fsdp_forward_method(module, "condition_keys")
        register_fsdp_forward_method(network, "embedding_norm")


def _mesh(launch: schema.LaunchSection, kind: str) -> DeviceMesh:
    """One group of all processes, or one group per machine with replicas across machines."""
    if not distributed.is_initialized():  # a single process, which shards only to offload
        distributed.init_process_group(store=HashStore(), rank=0, world_size=1)
    ranks = distributed.get_world_size()
    if launch.sharding == "full":
        return init_device_mesh(kind, (ranks,))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return init_device_mesh(kind, (ranks // local, local), mesh_dim_names=("replicate", "shard"))


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor; a sharded one is gathered, in which all processes must take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_tensor(value: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor as ``like`` is, if that is sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
