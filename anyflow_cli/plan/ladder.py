"""The ladder of sampling: where the parts of a model are, mildest first, and what each rung holds and moves.

A rung is a ``MemorySection`` without "auto". The first that fits is taken; then it is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

from anyflow_cli.model.encoders import TOGETHER
from anyflow_cli.model.network import weight_dtype
from anyflow_cli.model.pipeline_sizes import PipelineSizes
from anyflow_cli.model.placement import FP8
from anyflow_cli.model.precision import DTYPES_OF_PRECISION
from anyflow_cli.plan.hardware import PAGEABLE_LINK, PINNED_LINK, Hardware
from anyflow_cli.plan.networks import Setup, decoding_cost, encoding_cost, fake_backbone, tiled_cost
from anyflow_cli.plan.steps import Moment, SamplingCost
from anyflow_cli.recipe.schema import MemorySection

# Mildest first; of types of weights all ways to place a network in one come before the next type.
WEIGHT_TYPES = ("full", "fp8")
VAES = ("kept", "on-demand", "tiled")
TEXT_ENCODERS = ("kept", "freed", "streamed")
ON_A_CPU = {"kept", "full", "freed", "tiled", "fp8"}  # the device's memory is the host's
EVERYTHING_KEPT = MemorySection(text_encoder="kept", vae="kept", network="kept", weights="full")
RUNG_WORDS = {
    "text_encoder": {
        "freed": "the text encoder is freed once the prompts are encoded",
        "streamed": "the text encoder is streamed layer by layer and freed once the prompts are encoded",
    },
    "vae": {
        "on-demand": "the VAE is on the device while it works",
        "tiled": "the VAE is on the device while it works, in blended tiles",
    },
    "network": {
        "alternating": "the network leaves the device while the VAE works (of two experts, the idle one)",
        "streamed": "the network is streamed block by block, the next one copied ahead",
        "blocks": "the network is streamed block by block, without copying ahead",
    },
    "weights": {"fp8": "weights are stored in fp8", "int8": "weights are stored in int8"},
}


def pinned_bytes(size: int) -> int:
    """What torch takes from the host for a pinned tensor: the next power of two."""
    return 1 << max(size - 1, 0).bit_length()


class NetworkBytes(NamedTuple):
    """Bytes of a network's weights."""

    outside: int  # of the blocks
    block: int  # one
    blocks: int  # how many there are
    matrix: int  # the largest, as the products take it
    pinned: int  # all of them in pinned memory of the host
    experts: int = 1  # of which one works at a time; the other figures are of all

    @property
    def whole(self) -> int:
        """All weights."""
        return self.outside + self.blocks * self.block

    def on_device(self, memory: MemorySection) -> int:
        """Bytes on the device while it runs."""
        if memory.network == "alternating":
            return self.whole // self.experts
        held = {"streamed": 2, "blocks": 1}.get(memory.network, self.blocks)
        return self.outside + min(held, self.blocks) * self.block


class SampledParts(NamedTuple):
    """What sampling needs, by part."""

    setup: Setup
    pipeline: PipelineSizes
    cost: SamplingCost
    decoded: int  # latent frames that are decoded at once
    streams: bool  # whether chunks are decoded while later ones are sampled

    def moments(self, memory: MemorySection) -> Iterator[Moment]:
        """The moments of sampling on a rung, and the bytes on the device by part.

        Encoding a video takes no more than decoding it (two thirds, of Wan 2.1).
        """
        network, text = network_bytes(self.setup, memory.weights), self._text(memory)
        vae, decoding = self._decoding(memory)
        there = network.on_device(memory)
        # of two experts, the one that worked last does not make way for the VAE
        stays = (
            there if memory.network == "kept" or (network.experts > 1 and not memory.streams_network) else 0
        )
        kept_text = text["text encoder"] if memory.text_encoder == "kept" else 0
        kept_vae = vae if memory.vae == "kept" or self.streams else 0
        before = 0 if memory.opens_on_host else there
        clip = self.pipeline.image_parameters * self._element
        kept_clip = 0 if memory.frees_text_encoder else clip
        others = {"image encoder": kept_clip, "network": before, "VAE": vae * (memory.vae == "kept")}
        yield Moment("encoding prompts", {**text, **others})
        if self.setup.model.needs_pictures:
            parts = {"text encoder": kept_text, **others, "image encoder": clip, "VAE": vae}
            yield Moment("encoding pictures", {**parts, "activations": decoding})
        working = self.cost.activations + (network.matrix if memory.weights != "full" else 0)
        encoders = {"text encoder": kept_text, "image encoder": kept_clip}
        sampling = {**encoders, "network": there, "VAE": kept_vae}
        yield Moment("network", {**sampling, "cache": self.cost.cache, "activations": working})
        pixels = {**encoders, "network": there if self.streams else stays, "VAE": vae}
        yield Moment("decoding", {**pixels, "cache": self.cost.cache * self.streams, "activations": decoding})

    def host(self, memory: MemorySection) -> int:
        """Bytes of weights in the host's memory at most; pinned ones take more than others."""
        if not self.setup.gpu:
            return 0
        network, (vae, _) = network_bytes(self.setup, memory.weights), self._decoding(memory)
        whole = network.pinned if memory.network == "streamed" else network.whole
        waiting_vae = 0 if memory.vae == "kept" else vae
        waiting_clip = self.pipeline.image_parameters * self._element * memory.frees_text_encoder
        text = self._pinned_text() * (memory.text_encoder == "streamed")
        return whole * memory.opens_on_host + waiting_vae + waiting_clip + text

    @property
    def _element(self) -> int:
        """Bytes of a weight of the text and the image encoder."""
        return 2 if self.setup.gpu else 4

    def _pinned_text(self) -> int:
        sizes = self.pipeline.text_sizes
        attention, inner = sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
        embedding, projection, feed_forward = (
            pinned_bytes(self._element * sizes["d_model"] * one)
            for one in (sizes["vocab_size"], attention, inner)
        )
        return embedding + sizes["num_layers"] * (4 * projection + 3 * feed_forward)

    def moved(self, memory: MemorySection, steps: int, hardware: Hardware) -> float:
        """Seconds in which one video's copies between host and device take the link; 0 on a CPU."""
        if not hardware.is_gpu or memory.network == "kept":
            return 0.0
        whole = network_bytes(self.setup, memory.weights).whole
        if memory.network == "alternating":
            return 2 * whole / PAGEABLE_LINK
        return steps * whole / (PINNED_LINK if memory.network == "streamed" else PAGEABLE_LINK)

    def _text(self, memory: MemorySection) -> dict[str, int]:
        sizes = {**self.pipeline.text_sizes}
        layer = max(sizes["vocab_size"], 2 * sizes["d_ff"]) * sizes["d_model"]
        held = layer if memory.text_encoder == "streamed" else self.pipeline.text_parameters
        together = TOGETHER.get(memory.text_encoder, TOGETHER["freed"])
        activations = encoding_cost(sizes, together, self.setup.text[0], gpu=self.setup.gpu)
        return {"text encoder": held * self._element, "activations": activations}

    def _decoding(self, memory: MemorySection) -> tuple[int, int]:
        latent = (self.decoded, *self.setup.latent[1:])
        cost = tiled_cost if memory.vae == "tiled" and not self.streams else decoding_cost
        return cost(self.pipeline.vae, latent, self.setup.context)


def network_bytes(setup: Setup, weights: str) -> NetworkBytes:
    """Sizes of the sampled network with its matrices stored as they are, in fp8 or in int8."""
    dtype, storage = DTYPES_OF_PRECISION[setup.precision], None if weights == "full" else FP8
    sizes = {
        name: parameter.numel() * weight_dtype(name, dtype, storage).itemsize
        for name, parameter in fake_backbone(setup, 1).network_of("student").named_parameters()
    }
    block = sum(size for name, size in sizes.items() if "blocks.0." in name)
    outside = sum(size for name, size in sizes.items() if "blocks." not in name)
    matrix = setup.network.dim * setup.network.ffn_dim * dtype.itemsize
    pinned = sum(
        pinned_bytes(size) * (setup.network.layers if "blocks." in name else 1)
        for name, size in sizes.items()
        if "blocks." not in name or "blocks.0." in name
    )
    experts = 1 if setup.network.boundary is None else 2
    return NetworkBytes(outside, block, setup.network.layers, matrix, pinned, experts)


def rungs(memory: MemorySection, *, is_gpu: bool, streams: bool) -> Iterator[MemorySection]:
    """All rungs with the recipe's choices, mildest first: of the network, then of the VAE, then of text."""

    def open_to(part: str, values: tuple[str, ...]) -> list[str]:
        if getattr(memory, part) != "auto":
            return [getattr(memory, part)]
        useless = {"tiled", "alternating"} if streams else set[str]()
        return [one for one in values if one not in useless and (is_gpu or one in ON_A_CPU)]

    ways, types = (
        open_to("network", ("kept", "alternating", "streamed", "blocks")),
        open_to("weights", WEIGHT_TYPES),
    )
    networks = [(way, weights) for weights in types for way in ways]
    vaes, texts = open_to("vae", VAES), open_to("text_encoder", TEXT_ENCODERS)
    for (network, weights), vae, text in product(networks, vaes, texts):
        values: dict[str, Any] = {"network": network, "weights": weights, "vae": vae, "text_encoder": text}
        yield memory.model_copy(update=values)


def rung_in_words(memory: MemorySection) -> str:
    """What a rung does."""
    said = [words.get(getattr(memory, part)) for part, words in RUNG_WORDS.items()]
    return "; ".join(filter(None, said)) or "everything stays on the device"


def settings_of(memory: MemorySection) -> Mapping[str, str]:
    """The rung as keys of a recipe."""
    return {f"memory.{part}": getattr(memory, part) for part in RUNG_WORDS}
