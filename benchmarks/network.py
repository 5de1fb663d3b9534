"""Time and peak memory of our network against diffusers' ``AnyFlowTransformer3DModel``, in one process.

    python benchmarks/network.py                       the tiny model's sizes, one thread
    python benchmarks/network.py --preset wan1b --layers 2 --frames 5 --device cuda

Both hold the same weights; ``measure.py`` compares them.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import Row, autocast, parser, print_head, report, sizes
from torch import Tensor

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer


def main() -> None:
    """Print the table."""
    args = _arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ours, theirs = _networks(args)
    print_head(args, f"F={args.frames}")
    for row in _rows(args, ours, theirs):
        report(row, args)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__.split("\n")[0], batch=8, repeats=15)
    options.add_argument("--frames", type=int, default=9, help="latent frames")
    return options.parse_args()


def _networks(args: argparse.Namespace) -> tuple[FlowMapTransformer, Any]:
    from diffusers import AnyFlowTransformer3DModel

    with torch.device(args.device):
        theirs = AnyFlowTransformer3DModel(**sizes(args))
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


def _rows(args: argparse.Namespace, ours: FlowMapTransformer, theirs: Any) -> list[Row]:
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    like = {"device": args.device, "dtype": kind}
    z = torch.randn(args.batch, args.frames, ours.config.in_channels, args.height, args.width, **like)
    text = torch.randn(args.batch, args.text, ours.config.text_dim, **like)
    t = torch.rand(args.batch, device=args.device)
    r = t / 2
    t_frames, r_frames = (x.unsqueeze(1).repeat(1, args.frames) for x in (t, r))
    with torch.no_grad(), autocast(args):
        keys = ours.condition_keys(text)

    def reference() -> Tensor:
        u: Tensor = theirs(z, 1000 * t_frames, 1000 * r_frames, text, return_dict=False)[0]
        return u

    return [
        Row("forward", lambda: ours(z, t, r, text), reference),
        Row("forward, times per frame", lambda: ours(z, t_frames, r_frames, text), reference),
        Row("forward, text keys shared", lambda: ours(z, t, r, keys), reference),
        Row("and backward", lambda: ours(z, t, r, text), reference, backward=True),
        Row(
            "and backward, per frame",
            lambda: ours(z, t_frames, r_frames, text),
            reference,
            backward=True,
        ),
    ]


if __name__ == "__main__":
    main()
