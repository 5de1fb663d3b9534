"""Several processes with the tokens of one video compute what one does: velocity, gradients, cached chunks.

Two processes in the fast tier, four in the slow one. Cases differ in whether heads divide, and in whether
tokens do: with 2x2 tokens per full frame and one per compressed frame, both paddings occur.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, distributed

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.samplers import flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.model.causal import TeacherForced, causal_from
from anyflow_cli.model.chunk_sampling import Guidance, sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.parallelize import apply_context, apply_fsdp, full_tensor
from anyflow_cli.recipe import schema
from tests.model.helpers import distance
from tests.train.ranks import start

TOLERANCE = 1e-5  # fp32, relative to the largest value
CONFIG = NetworkConfig(
    heads=4, head_dim=8, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
)
CAUSAL = CausalConfig(partition=(1, 1, 2), full_chunks=2)
FRAMES, SIZE = 4, (4, 6)  # 6 tokens per full frame
CPU = torch.device("cpu")


def network(heads: int, *, causal: bool) -> FlowMapTransformer:
    """Random weights of which all matter, equal in every process."""
    torch.manual_seed(0)
    made = two_time_from(FlowMapTransformer(replace(CONFIG, heads=heads)), 0.25)
    for parameter in made.parameters():
        parameter.data = torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.5)
    return causal_from(made, CAUSAL) if causal else made


def drawn(causal: bool) -> tuple[Tensor, ...]:
    """Latents, times and text of two samples; compressed patches need a height and width of 4."""
    generator = torch.Generator().manual_seed(1)
    height, width = (4, 4) if causal else SIZE
    z = torch.randn(2, FRAMES, 4, height, width, generator=generator)
    t = torch.rand(2, generator=generator)
    return z, t, t / 2, torch.randn(2, 5, 8, generator=generator)


def velocity(model: FlowMapTransformer, z: Tensor, causal: bool) -> Tensor:
    """A bidirectional evaluation, or teacher forcing: compressed context, noisy chunks, clean copies."""
    x, t, r, text = drawn(causal)
    condition = Conditioned(model, Condition(text))
    if not causal:
        return condition(z, t, r)
    forced = TeacherForced(condition, x, CAUSAL.partition)
    return forced(z[:, forced.window], t, r)


def gradients(model: FlowMapTransformer, causal: bool) -> dict[str, Tensor]:
    """Velocity, and gradients of the input and of all weights, averaged as DDP does."""
    model.requires_grad_(True).zero_grad()
    z = drawn(causal)[0].requires_grad_()
    u = velocity(model, z, causal)
    (u * torch.linspace(-1, 2, u.numel()).view_as(u)).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    found = {"velocity": u.detach(), "latents": z.grad}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        found[name] = full_tensor(gradient)
    if model.context is not None and not hasattr(model, "unshard"):
        for name in dict(model.named_parameters()):
            distributed.all_reduce(found[name])
            found[name] /= distributed.get_world_size()
    return {name: value.detach() for name, value in found.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    largest = max(value.abs().max().item() for name, value in wanted.items() if "." in name)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = max(value.abs().max().item(), 1e-2 * largest)
        error = (found[name] - value).abs().max().item() / scale
        assert error < TOLERANCE, (name, error)


def check_gradients(size: int, heads: int, causal: bool, checkpointing: bool, sharded: bool) -> None:
    model = network(heads, causal=causal)
    wanted = gradients(model, causal)
    shared = copy.deepcopy(model)
    shared.zero_grad()
    shared.gradient_checkpointing = checkpointing
    apply_context([shared], size, CPU)
    if sharded:
        apply_fsdp([shared], schema.LaunchSection(sharding="full"), CPU)
    same(gradients(shared, causal), wanted)


def check_chunks(size: int, heads: int, remember: int | None) -> None:
    """Guided sampling chunk by chunk; the cache holds this process's heads."""
    model = network(heads, causal=True)
    shared = copy.deepcopy(model)
    apply_context([shared], size, CPU)
    noise, _, _, text = drawn(True)

    def sampled(network: FlowMapTransformer) -> Tensor:
        guidance = Guidance(Conditioned(network, Condition(torch.zeros_like(text))), 2.0)
        chunks = sample_chunks(
            Conditioned(network, Condition(text)), noise, (1, 1, 1, 1), flow_map_euler, [grid(3, 5.0)],
            guidance=guidance, remember=remember,
        )  # fmt: skip
        return torch.cat(list(chunks), dim=1)

    assert distance(sampled(shared), sampled(model)) < TOLERANCE
    assert distance(sampled(shared)[:, :2], noise[:, :2]) > 0.1


def run_all(size: int, all_heads: tuple[int, ...]) -> None:
    distributed.init_process_group("gloo")
    groups = distributed.get_world_size() // size
    for heads in all_heads:
        for causal in (False, True):
            check_gradients(size, heads, causal, checkpointing=heads == all_heads[0], sharded=False)
            check_gradients(size, heads, causal, checkpointing=False, sharded=True)
        check_chunks(size, heads, remember=None)
        check_chunks(size, heads, remember=1)
    assert groups * size == distributed.get_world_size()


def test_two_processes_with_one_video_compute_what_one_does() -> None:
    """Heads are split (4 on 2 processes), or keys gathered (3 on 2)."""
    assert start(2, run_all, 2, (4, 3)) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 2])
def test_four_processes_with_one_or_two_videos_compute_what_one_does(size: int) -> None:
    """On 4: heads split (8), both exchanges (6: 2 parts of heads, 2 of keys), keys gathered (3)."""
    assert start(4, run_all, size, (8, 6, 3)) == [0] * 4
