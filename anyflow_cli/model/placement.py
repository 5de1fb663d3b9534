"""Where the parts of a model are while it samples: kept on the device, moved there to work, or streamed.

The choices per part, mildest first, are those of ``recipe.schema.MemorySection``; ``plan.ladder`` chooses
among them. Streaming is diffusers' group offloading: a group of weights comes to the device for its forward
and leaves it again, on a GPU from pinned memory and one group ahead. Weights in fp8 are diffusers' layerwise
casting: each layer is cast to the type of the products for its own forward. int8 is torchao's.
"""

from __future__ import annotations

from itertools import chain
from typing import Literal

import torch
from torch import nn

from anyflow_cli.model.base_storage import require_package
from anyflow_cli.model.experts import ExpertPair, keep_idle_on_host, networks_of
from anyflow_cli.model.network import FlowMapTransformer, is_quantizable
from anyflow_cli.recipe.schema import MemorySection

HOST = torch.device("cpu")
FP8 = torch.float8_e4m3fn
UNCAST = ("^condition_embedder", "^proj_out", "^patch_embedding", "^far_patch_embedding")


def storage_of(memory: MemorySection) -> torch.dtype | None:
    """Type in which the blocks' matrices are read; None: that of the products."""
    return FP8 if memory.weights == "fp8" else None


class PlacedNetwork:
    """A frozen network, or two experts, that samples on a device, and its way there and back.

    Args:
        network: On the device, or on the CPU where it is moved or streamed; fp8 weights are fp8 already.
        memory: Where the parts are.
        dtype: Type of the products.
        device: Device that computes.
    """

    def __init__(
        self, network: FlowMapTransformer, memory: MemorySection, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._network, self.memory, self._device = network, memory, device
        network.computes_on = device
        for one in networks_of(network):
            one.computes_on = device
            if memory.weights == "fp8":
                cast_layers(one, dtype)
            elif memory.weights == "int8":
                quantize_int8(one)
            if memory.streams_network:
                one.streamed = True
                stream_weights(one, device, prefetch=memory.network == "streamed", whole_blocks=True)
        self._exchanges = False  # of two experts, the idle one is in the host's memory

    def bring(self) -> None:
        """Move it to the device, as far as it works there as a whole; of two experts maybe one."""
        if self.memory.streams_network or self._exchanges:
            return
        if isinstance(self._network, ExpertPair) and self.memory.network == "alternating":
            keep_idle_on_host(self._network, self._device)
            self._exchanges = True
        else:
            self._network.to(self._device)

    def make_room(self, part: Literal["text encoder", "vae"]) -> None:
        """Move it off the device where it makes way for another part."""
        memory = self.memory
        makes_way = memory.frees_text_encoder if part == "text encoder" else memory.network == "alternating"
        if makes_way and not (memory.streams_network or isinstance(self._network, ExpertPair)):
            self._network.to(HOST)
            free_cached(self._device)


def cast_layers(network: FlowMapTransformer, dtype: torch.dtype) -> None:
    """Store the matrices of the blocks as fp8 and cast each to ``dtype`` for its own forward."""
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(network, FP8, dtype, skip_modules_pattern=UNCAST)


def quantize_int8(network: FlowMapTransformer) -> None:
    """Store the matrices of the blocks as int8 with a scale per row, by torchao."""
    require_package("int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def is_matrix(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and is_quantizable(f"{name}.weight")

    quantize_(network, Int8WeightOnlyConfig(), is_matrix)


def stream_weights(module: nn.Module, device: torch.device, *, prefetch: bool, whole_blocks: bool) -> None:
    """Keep the weights of a module in the host's memory; each group comes to the device for its forward.

    Args:
        module: A module on the CPU.
        device: Device that computes.
        prefetch: Copy the next group while one computes, from pinned memory (on a GPU).
        whole_blocks: Groups are the blocks of the module's lists, and all that is outside of them; otherwise
            its layers.
    """
    from diffusers.hooks import apply_group_offloading

    pins = prefetch and device.type == "cuda"
    for tensor in chain(module.parameters(), module.buffers()) if pins else ():
        tensor.data = tensor.data.pin_memory()  # now, or the unpinned one would stay until the first forward
    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=HOST,
        offload_type="block_level" if whole_blocks else "leaf_level",
        num_blocks_per_group=1,
        use_stream=pins,
    )


def free_cached(device: torch.device) -> None:
    """Give memory of freed tensors back to the device, so that larger ones find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
