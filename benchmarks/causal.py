"""Causal sampling and training against diffusers' ``AnyFlowFARTransformer3DModel``, in one process.

    python benchmarks/causal.py                 the tiny model's sizes, one thread
    python benchmarks/causal.py --compile       theirs compiled: its flex attention as it is meant to run
    python benchmarks/causal.py --preset wan1b --layers 2 --height 60 --width 104 --device cuda

Both hold the same weights; ``measure.py`` compares them. The sampling step is that of the last chunk, over
the cache of all others. "Cache a finished chunk" follows it: they encode the whole past again, we only what
has changed, with the same result. Their backward pass does not run on a CPU, where flex attention has none,
and their compiled step pads to 128 tokens as the plain one does.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from typing import Any

import torch
from measure import Row, autocast, parser, print_head, report, sizes
from torch import Tensor

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.velocity import batch_time
from anyflow_cli.model.causal import TeacherForced, chunks_of
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.network import FlowMapTransformer

T, R = 0.7, 0.2


def main() -> None:
    """Print the table."""
    args = _arguments()
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ours, theirs = _networks(args)
    print_head(args, f"chunks {args.partition}, theirs {'compiled' if args.compile else 'as shipped'},")
    both = Both(args, ours, torch.compile(theirs) if args.compile else theirs)
    for row in both.rows():
        report(row, args)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__.split("\n")[0], batch=1, repeats=7)
    options.add_argument("--partition", default="1,3,3,3,3,3,3,2", help="latent frames of the chunks")
    options.add_argument("--compile", action="store_true", help="compile theirs")
    return options.parse_args()


def _networks(args: argparse.Namespace) -> tuple[FlowMapTransformer, Any]:
    from diffusers import AnyFlowFARTransformer3DModel

    with torch.device(args.device):
        theirs = AnyFlowFARTransformer3DModel(**sizes(args))
        config = NetworkConfig.from_diffusers(dict(theirs.config) | {"_class_name": type(theirs).__name__})
        ours = FlowMapTransformer(config)
    ours.load_state_dict(theirs.state_dict())
    if args.precision == "bf16":
        ours.store_as(torch.bfloat16)
        theirs.to(torch.bfloat16)
    if args.checkpointing:
        ours.gradient_checkpointing = True
        theirs.enable_gradient_checkpointing()
    return ours, theirs


class Both:
    """Both networks on the same video, text and times."""

    def __init__(self, args: argparse.Namespace, ours: FlowMapTransformer, theirs: Any) -> None:
        self.args, self.ours, self.theirs = args, ours, theirs
        self.partition = tuple(int(n) for n in args.partition.split(","))
        self.chunks = chunks_of(self.partition)
        kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.like = {"device": args.device, "dtype": kind}
        shape = (args.batch, sum(self.partition), ours.config.in_channels, args.height, args.width)
        self.x, self.noise = torch.randn(shape, **self.like), torch.randn(shape, **self.like)
        self.text = torch.randn(args.batch, args.text, ours.config.text_dim, **self.like)

    def rows(self) -> list[Row]:
        """Rows of the table."""
        cpu = self.args.device == "cpu"
        forced, reference = self._forced(), self._reference()
        step, keep = self._sampling()
        their_step, their_keep = self._their_sampling()
        return [
            Row("sampling step, last chunk", step, their_step),
            Row("cache a finished chunk", keep, their_keep),
            Row("teacher forcing, forward", forced, reference),
            Row("teacher forcing, and backward", forced, None if cpu else reference, backward=True),
        ]

    def _sampling(self) -> tuple[Any, Any]:
        with torch.no_grad(), autocast(self.args):
            model = Conditioned(self.ours, Condition(self.text), keys=self.ours.condition_keys(self.text))
            cache = KeyCache(self.ours, self.partition, (self.args.height, self.args.width), self.args.batch)
            for chunk in self.chunks[:-2]:
                cache.append(self.x[:, chunk.slice], model)
            before = copy.copy(cache)
            cache.append(self.x[:, self.chunks[-2].slice], model)
        z = self.noise[:, self.chunks[-1].slice]

        def step() -> Tensor:
            return cache.next_velocity(model)(z, batch_time(T, z), batch_time(R, z))

        def keep() -> Tensor:
            copy.copy(before).append(self.x[:, self.chunks[-2].slice], model)  # over the same memory
            return z

        return step, keep

    def _their_sampling(self) -> tuple[Any, Any]:
        config, last = self.theirs.config, self.chunks[-1]
        heads, dim = config.num_attention_heads, config.attention_head_dim
        frame = (self.args.height // 2) * (self.args.width // 2)

        def memory(tokens: int) -> Tensor:
            return torch.zeros(2, self.args.batch, heads, tokens, dim, **self.like)

        full = max(self.partition) * frame * config.full_chunk_limit
        small = max(self.partition) * frame // 4 * (len(self.partition) - config.full_chunk_limit + 1)
        capacity = {"full_cache": full, "compressed_cache": small}
        caches = {
            i: {name: memory(tokens) for name, tokens in capacity.items()} for i in range(config.num_layers)
        }
        past = self.x[:, : last.first]
        zero = past.new_zeros(past.shape[:2])
        mask = self.theirs.build_attention_mask(
            chunk_partition=list(self.partition[:-1]), height=self.args.height, width=self.args.width,
            device=self.args.device, mode="cache",
        )  # fmt: skip

        def keep() -> Tensor:
            flag = {"num_cached_chunks": len(self.partition) - 2, "is_cache_step": True}
            self.theirs(
                past, chunk_partition=list(self.partition[:-1]), timestep=zero, r_timestep=zero,
                encoder_hidden_states=self.text, attention_mask=mask, return_dict=False, kv_cache=caches,
                kv_cache_flag=flag,
            )  # fmt: skip
            return past

        z = self.noise[:, last.slice]
        t, r = (torch.full(z.shape[:2], 1000 * time, device=z.device) for time in (T, R))

        def step() -> Tensor:
            flag = {"num_cached_chunks": len(self.partition) - 1, "is_cache_step": False}
            u: Tensor = self.theirs(
                z, chunk_partition=list(self.partition), timestep=t, r_timestep=r,
                encoder_hidden_states=self.text, return_dict=False, kv_cache=caches, kv_cache_flag=flag,
            )[0]  # fmt: skip
            return u

        return step, keep

    def _forced(self) -> Any:
        z = self.noise[:, self._window :]

        def forward() -> Tensor:
            model = TeacherForced(Conditioned(self.ours, Condition(self.text)), self.x, self.partition)
            return model(z, batch_time(T, z), batch_time(R, z))

        return forward

    def _reference(self) -> Any:
        window = self._window
        z = torch.cat((self.x[:, :window], self.noise[:, window:]), dim=1)
        t, r = (torch.full(z.shape[:2], 1000 * time, device=z.device) for time in (T, R))
        t[:, :window] = r[:, :window] = 0
        clean = self.x[:, window:]
        mask = self.theirs.build_attention_mask(
            chunk_partition=list(self.partition), height=self.args.height, width=self.args.width,
            has_clean_context=True, device=self.args.device,
        )  # fmt: skip

        def forward() -> Tensor:
            u: Tensor = self.theirs(
                z, t, r, self.text, list(self.partition), return_dict=False, attention_mask=mask,
                clean_hidden_states=clean, clean_timestep=clean.new_zeros(clean.shape[:2]),
            )[0]  # fmt: skip
            return u

        return forward

    @property
    def _window(self) -> int:
        """First frame that is noisy in training."""
        causal = self.ours.config.causal
        assert causal is not None
        return sum(self.partition[: -causal.full_chunks])


if __name__ == "__main__":
    main()
