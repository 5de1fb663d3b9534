"""Exactness: flow maps learned on a Gaussian mixture, against the flow map of its ODE, over the (t, r) plane.

The data are a ring of Gaussians in the plane, whose velocity has a closed form; its flow map is integrated by
Runge-Kutta steps. A small network learns it with the package's ``flow_map_loss``, and each variant changes
one choice. The error at (t, r) is the root mean square of ``f - f_exact`` over states of the exact path,
divided by that of the jump's length ``z_t - z_r``.

Legend: B batch, K modes, G times along an axis of the plane.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from reproduction.cells import device, provenance
from torch import Tensor, nn

from anyflow_cli.flow.losses import flow_map_loss
from anyflow_cli.flow.times import TimeRatios, loss_weight, sample_times
from anyflow_cli.flow.velocity import Velocity, batch_time, flow_map, from_function
from anyflow_cli.utils.files import write_json

RECORD, IMAGE = "exactness.json", "exactness.png"
MODES, RADIUS, STD = 8, 1.4, 0.15
SHIFT = 1.0
WIDTH, FREQUENCIES = 128, 8
BATCH, LR = 256, 2e-3
GRID = tuple(i / 8 for i in range(9))
ALG_1 = TimeRatios()
SHAPE = (1, 2, 1, 1)  # F, C, H, W of a point in the plane


@dataclass(frozen=True)
class Variant:
    """One choice that differs from Alg. 1: options of the loss, of the times, and of w(t)."""

    options: Mapping[str, Any] = field(default_factory=dict)
    ratios: TimeRatios = ALG_1
    weight: Any = "beta"
    teacher: bool = False
    composes: bool = False


VARIANTS: Mapping[str, Variant] = {
    "Alg. 1": Variant(),
    "no Eq. 7": Variant({"adaptive": "off"}),
    "Eq. 7 by one factor": Variant({"adaptive": "group"}),
    "uniform w(t)": Variant(weight="uniform"),
    "no samples with r = 0": Variant(ratios=TimeRatios(0.5, 0.0)),
    "one boundary sample in ten": Variant(ratios=TimeRatios(0.1, 0.45)),
    "d = 0.05": Variant({"delta": 0.05}),
    "composition": Variant({"adaptive": "off"}, composes=True),
    "teacher's velocity": Variant({"adaptive": "off"}, teacher=True),
    "composition, teacher's velocity": Variant({"adaptive": "off"}, teacher=True, composes=True),
}


def modes() -> Tensor:
    """Centers of the ring, (K, 2)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """Velocity of the mixture's probability flow at z (B, 2) and t (B,): the posterior mean of eps - x."""
    t = t[:, None]
    means, variance = (1 - t)[..., None] * modes(), (1 - t) ** 2 * STD**2 + t**2  # (B, K, 2), (B, 1)
    offset = z[:, None] - means
    share = (-offset.square().sum(-1) / (2 * variance)).softmax(1)  # (B, K)
    gain = (t - (1 - t) * STD**2) / variance  # of eps - x on the offset from a mode
    return (share[..., None] * (gain[..., None] * offset - modes())).sum(1)


def exact_flow(z: Tensor, t: float, r: float, steps: int = 24) -> Tensor:
    """The flow map of the ODE from t to r, by Runge-Kutta steps."""
    h = (r - t) / steps
    for number in range(steps):
        at = t + number * h

        def slope(z: Tensor, shift: float, at: float = at) -> Tensor:
            return velocity(z, batch_time(at + shift, z))

        k1 = slope(z, 0)
        k2 = slope(z + h / 2 * k1, h / 2)
        k3 = slope(z + h / 2 * k2, h / 2)
        k4 = slope(z + h * k3, h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return z


class PlaneNetwork(nn.Module):
    """u(z, t, r) of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 4 * FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
            nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2),
        )  # fmt: skip

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict u (B, 1, 2, 1, 1); times are seen through cosines of low frequencies."""
        frequencies = torch.arange(FREQUENCIES) * (math.pi / 2)
        angles = torch.cat([t[:, None] * frequencies, r[:, None] * frequencies], 1)
        features = torch.cat([z.flatten(1), angles.cos(), angles.sin()], 1)
        u: Tensor = self.layers(features)
        return u.reshape(-1, *SHAPE)


def plane(function: Callable[[Tensor, Tensor], Tensor]) -> Velocity:
    """An instantaneous velocity of points as a velocity model."""
    return from_function(lambda z, t, r: function(z.flatten(1), t).reshape(-1, *SHAPE))


def learn(variant: Variant, steps: int, seed: int = 0) -> Velocity:
    """Train a network; its learning rate falls to 0 along a cosine."""
    torch.manual_seed(seed)
    network, generator = PlaneNetwork(), torch.Generator().manual_seed(seed)
    model, weight = from_function(network), loss_weight(variant.weight, SHIFT)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        mode = torch.randint(MODES, (BATCH,), generator=generator)
        x = modes()[mode] + STD * torch.randn(BATCH, 2, generator=generator)
        eps = torch.randn(BATCH, 2, generator=generator)
        t, r = sample_times(BATCH, SHIFT, variant.ratios, generator)
        share = torch.rand(BATCH, generator=generator)
        result = flow_map_loss(
            model, model, x.reshape(-1, *SHAPE), eps.reshape(-1, *SHAPE), t, r, guidance=1.0, weight=weight,
            teacher=plane(velocity) if variant.teacher else None,
            s=r + share * (t - r) if variant.composes else None, **variant.options,
        )  # fmt: skip
        optimizer.zero_grad()
        result.loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def errors(model: Velocity, count: int = 1024) -> list[list[float | None]]:
    """Relative error at (t, r) of the grid, row by row of t; None where r >= t."""
    noise = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    path = {1.0: noise}
    for t, r in zip(GRID[:0:-1], GRID[-2::-1], strict=True):
        path[r] = exact_flow(path[t], t, r)
    rows: list[list[float | None]] = []
    for t in GRID:
        row: list[float | None] = []
        for r in GRID:
            if r >= t:
                row.append(None)
                continue
            z = path[t].reshape(-1, *SHAPE)
            found = flow_map(model, z, batch_time(t, z), batch_time(r, z)).flatten(1)
            length = (path[t] - path[r]).square().mean().sqrt()
            row.append(round(float((found - path[r]).square().mean().sqrt() / length), 4))
        rows.append(row)
    return rows


def measure_exactness(directory: Path, steps: int) -> None:
    """Train and measure each variant that the record lacks."""
    path = directory / RECORD
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"variants": {}}
    for name, variant in VARIANTS.items():
        if name not in content["variants"]:
            begun = time.process_time()
            found = errors(learn(variant, steps))
            seconds = round(time.process_time() - begun, 1)
            content["variants"][name] = {"errors": found, "seconds": seconds}
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, content | {"steps": steps, "grid": GRID, "made": provenance([device()])})


def exactness_section(directory: Path) -> str:
    """The section of the report, and its image beside the records."""
    from reproduction.report import markdown

    path = directory / RECORD
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
    draw(content["variants"], directory / IMAGE)
    last = len(GRID) - 1
    lines = []
    for name, found in content["variants"].items():
        grid = found["errors"]
        known = [value for row in grid for value in row if value is not None]
        steps = [grid[i + 1][i] for i in range(last)]
        means = (sum(known) / len(known), grid[last][0], sum(steps) / last)
        lines.append([name, *(f"{value:.3f}" for value in means), f"{found['seconds']:.0f}"])
    head = ["variant", "mean over (t, r)", "one jump 1 -> 0", "jumps of 1/8", "seconds"]
    return (
        "## Exactness on a Gaussian mixture\n\n"
        f"Error of the learned flow map relative to the length of the jump; {content['steps']} steps of "
        f"{BATCH} points, one seed.\nA variant changes one choice of Alg. 1 (g = 1).\n\n"
        + markdown([head, *lines]) + f"\n\n![errors over the (t, r) plane](paper/{IMAGE})"
    )  # fmt: skip


def draw(variants: Mapping[str, Any], path: Path) -> None:
    """One square per variant: t to the right, r upwards, brighter is worse."""
    columns = 5
    rows = -(-len(variants) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(variants) :]:
        axis.set_axis_off()
    image = None
    for axis, (name, found) in zip(axes, variants.items(), strict=False):
        values = [[math.nan if value is None else value for value in row] for row in found["errors"]]
        turned = list(zip(*values, strict=True))
        image = axis.imshow(turned, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=0.5, cmap="magma")
        axis.set_title(name, fontsize=8)
        axis.set_xlabel("t", fontsize=7)
        axis.set_ylabel("r", fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6, label="relative error")
    figure.savefig(path, dpi=80)
