"""Step 1 of 4 of the tiny assets: the video autoencoder, an ordinary diffusers ``AutoencoderKLWan``.

    python scripts/tiny/vae.py --out build/tiny/vae

Spatial factor 8, temporal factor 4, 8 latent channels: a clip of 33x64x64 becomes 9x8x8. As in Wan 2.2, the
first factor of two moves pixels to channels, which makes the network several times cheaper. The loss is a
weighted L1 on clips of both shapes worlds, in which shapes, dots and above all edges weigh more than the
plain background, plus a small KL term. Training goes from single frames to crops of full length (the caches
of the causal convolutions reach far back) to whole clips. Prints the PSNR on clips outside the training set.

Legend: B clips, T frames, H W pixels, C channels.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor

from anyflow_cli.data.shapes_world import BACKGROUNDS, FRAMES, HEIGHT, WORLDS, Scene, render

LATENT_CHANNELS = 8
PATCH = 2
CONFIG = {
    "base_dim": 32, "z_dim": LATENT_CHANNELS, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
    "temperal_downsample": [True, True], "patch_size": PATCH, "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "latents_mean": [0.0] * LATENT_CHANNELS, "latents_std": [1.0] * LATENT_CHANNELS,
}  # fmt: skip
KL_WEIGHT = 1e-4
FOREGROUND_WEIGHT = 3.0
EDGE_WEIGHT = 6.0
FIRST_FRAME_WEIGHT = 6.0  # one of 33 frames, but a whole latent frame


@dataclass(frozen=True)
class Pool:
    """A fixed set of rendered scenes, three in four from the default world: (N, T, H, W, 3) uint8."""

    scenes: list[Scene]
    pixels: Tensor

    @classmethod
    def draw(cls, first: int, count: int) -> Pool:
        """Render ``count`` scenes, with seeds from ``first`` on."""
        scenes = [
            WORLDS["shapes-shifted" if i % 4 == 3 else "shapes"].scene(i) for i in range(first, first + count)
        ]
        return cls(scenes, torch.stack([torch.from_numpy(render(scene)) for scene in scenes]))

    def batch(self, rng: np.random.Generator, count: int, frames: int, size: int) -> tuple[Tensor, Tensor]:
        """Random clips (B, 3, T, H, W) in [-1, 1] and pixel weights; crops are placed on a shape or dot."""
        videos, weights = [], []
        for index in rng.integers(len(self.scenes), size=count):
            scene, begin = self.scenes[index], int(rng.integers(FRAMES - frames + 1))
            left, top = corner(scene, begin + frames // 2, size, rng) if size < HEIGHT else (0, 0)
            video = self.pixels[index, begin : begin + frames, top : top + size, left : left + size].float()
            far = (video - torch.tensor(BACKGROUNDS[scene.background])).abs().sum(-1) > 12
            video = video.permute(3, 0, 1, 2) / 127.5 - 1
            weights.append(1 + FOREGROUND_WEIGHT * far + EDGE_WEIGHT * edges(video))
            weights[-1][0] *= FIRST_FRAME_WEIGHT
            videos.append(video)
        return torch.stack(videos), torch.stack(weights)[:, None]


def edges(video: Tensor) -> Tensor:
    """Edge strength (T, H, W) from 0 to 1 of a video (3, T, H, W)."""
    frames = video.transpose(0, 1)
    highest, lowest = (sign * F.max_pool2d(sign * frames, 3, stride=1, padding=1) for sign in (1, -1))
    return (3 * (highest - lowest).amax(1)).clamp(max=1)


def corner(scene: Scene, frame: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a crop that contains the center of the shape in this frame, or a dot (half each)."""
    shape = tuple(a + frame * b for a, b in zip(scene.start, scene.step, strict=True))
    points = shape if rng.random() < 0.5 else scene.dots[int(rng.integers(len(scene.dots)))]
    left, top = (int(np.clip(p - rng.uniform(3, size - 3), 0, HEIGHT - size)) for p in points)
    return left, top


def planar_convolution(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Causal 3D convolution as one 2D convolution, with the temporal taps stacked as channels.

    Equals diffusers' version up to rounding and is two to three times as fast on a CPU at these widths.
    """
    taps, missing = list(range(self.kernel_size[0])), self._padding[4]
    if missing == 2 and x.shape[2] == 1:
        taps, missing = [2], 0  # the two older taps would multiply zeros
    frames = F.pad(x, (0, 0, 0, 0, missing, 0)).transpose(1, 2)  # (B, T, C, H, W)
    stride = self.stride[0]
    length = (frames.shape[1] - len(taps)) // stride + 1
    stacked = torch.cat(
        [frames[:, i : i + (length - 1) * stride + 1 : stride] for i in range(len(taps))], dim=2
    )
    weight = self.weight[:, :, taps].transpose(1, 2).flatten(1, 2)
    planes = stacked.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    out = F.conv2d(planes, weight, self.bias, self.stride[1:], (self._padding[2], self._padding[0]))
    return out.unflatten(0, (len(x), length)).transpose(1, 2)


def whole_resampling(self: WanResample, x: Tensor, *_: object) -> Tensor:
    """Resample all frames at once; the first is a latent frame of its own and is not resampled in time."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))  # (B, 2, C, T - 1, H, W)
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x


def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Encode all frames in one pass to the mean and log variance of the latents, (B, 2C, F, h, w)."""
    out: Tensor = vae.quant_conv(vae.encoder(patchify(video, PATCH)))
    return out


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode all frames in one pass to pixels (B, 3, T, H, W), equal to decoding through caches."""
    out: Tensor = unpatchify(vae.decoder(vae.post_quant_conv(latents)), PATCH)
    return out


def pass_all_frames_at_once() -> None:
    """Patch the Wan autoencoder to encode without caches: same result, several times faster."""
    WanCausalConv3d.forward, WanResample.forward = planar_convolution, whole_resampling
    AutoencoderKLWan._encode = encode


def reconstruct(vae: AutoencoderKLWan, video: Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """Encode and decode clips, with or without posterior noise; returns the pixels and the KL term."""
    mean, log_variance = encode(vae, video).chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if noisy else mean
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return decode(vae, latents), kl


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, pool: Pool, frames: int) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB over all pixels, and over the pixels of shapes and dots."""
    video, weight = pool.batch(np.random.default_rng(0), 6, frames, HEIGHT)
    error = (reconstruct(vae, video, noisy=False)[0].clamp(-1, 1) - video) ** 2
    weight[:, :, 0] /= FIRST_FRAME_WEIGHT
    shapes = (weight >= 1 + FOREGROUND_WEIGHT).expand_as(error)
    return 10 * math.log10(4 / error.mean().item()), 10 * math.log10(4 / error[shapes].mean().item())


@torch.no_grad()
def normalize(vae: AutoencoderKLWan, pool: Pool) -> None:
    """Store the mean and standard deviation of the latents in the configuration, as pipelines expect."""
    latents = torch.cat(
        [
            encode(vae, video.permute(3, 0, 1, 2)[None] / 127.5 - 1).chunk(2, dim=1)[0]
            for video in pool.pixels.float()
        ]
    )
    flat = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=flat.mean(1).tolist(), latents_std=flat.std(1).tolist())


def untrained() -> AutoencoderKLWan:
    """Initialize residual branches at zero and with little noise, which is stable at this width."""
    vae = AutoencoderKLWan(**CONFIG)
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = -5.0
    for block in vae.modules():
        if isinstance(block, WanResidualBlock):
            torch.nn.init.zeros_(block.conv2.weight)
    return vae


def disable_attention(vae: AutoencoderKLWan) -> None:
    """Zero the attention in the middle, so that training on crops carries over to whole frames."""
    for block in vae.modules():
        if isinstance(block, WanAttentionBlock):
            torch.nn.init.zeros_(block.proj.weight)
            torch.nn.init.zeros_(block.proj.bias)
            block.requires_grad_(False)


class Muon:
    """Muon (Jordan et al. 2024), orthogonalized momentum, for the kernels; Adam for biases and gains.

    In a first comparison on single frames, 146 steps got further than several hundred steps of Adam.
    """

    def __init__(self, vae: AutoencoderKLWan, lr: float, adam_lr: float) -> None:
        trained = [p for p in vae.parameters() if p.requires_grad]
        self.kernels = [p for p in trained if p.ndim >= 4 and min(p.flatten(1).shape) > 8]
        self.momenta = [torch.zeros_like(p) for p in self.kernels]
        others = {id(p) for p in self.kernels}
        self.adam = torch.optim.Adam(
            [p for p in trained if id(p) not in others], lr=adam_lr, betas=(0.9, 0.99)
        )
        self.lr, self.adam_lr = lr, adam_lr

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at ``scale`` times the learning rates."""
        for kernel, momentum in zip(self.kernels, self.momenta, strict=True):
            if kernel.grad is None:  # temporal kernels have no gradient on single frames
                continue
            momentum.lerp_(kernel.grad, 0.05)
            update = orthogonal(kernel.grad.lerp(momentum, 0.95).flatten(1))
            kernel.sub_(update.view_as(kernel), alpha=scale * self.lr)
        for group in self.adam.param_groups:
            group["lr"] = scale * self.adam_lr
        self.adam.step()


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximate the closest (..., M, N) with orthonormal rows or columns: five Newton-Schulz iterations."""
    rows, columns = matrices.shape[-2:]
    x = matrices.mT if rows > columns else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x * max(1.0, rows / columns) ** 0.5
    return x.mT if rows > columns else x


@dataclass(frozen=True)
class Phase:
    """One part of the training; ``scale`` multiplies the learning rate at its start and end."""

    share: float
    clips: int
    frames: int
    size: int
    scale: tuple[float, float]


PHASES = (
    Phase(0.11, clips=48, frames=1, size=32, scale=(1.0, 0.8)),
    Phase(0.32, clips=5, frames=FRAMES, size=32, scale=(0.8, 0.5)),
    Phase(0.28, clips=2, frames=FRAMES, size=HEIGHT, scale=(0.5, 0.01)),
    Phase(0.17, clips=8, frames=FRAMES, size=32, scale=(0.3, 0.15)),  # crops around shapes and dots again
    Phase(0.12, clips=2, frames=FRAMES, size=HEIGHT, scale=(0.15, 0.01)),
)


def train(
    vae: AutoencoderKLWan, optimizer: Muon, phase: Phase, pool: Pool, fresh: Pool, minutes: float
) -> None:
    """Train one phase of a training that takes ``minutes`` in total."""
    rng, begun = np.random.default_rng(phase.clips), time.monotonic()
    for step in itertools.count():
        done = (time.monotonic() - begun) / (60 * minutes * phase.share)
        if done >= 1:
            break
        video, weight = pool.batch(rng, phase.clips, phase.frames, phase.size)
        with torch.autocast("cpu", torch.bfloat16):
            pixels, kl = reconstruct(vae, video, noisy=True)
        loss = (weight * (pixels - video).abs()).mean() / weight.mean()
        vae.zero_grad(set_to_none=True)
        (loss + KL_WEIGHT * kl).backward()
        optimizer.step(
            min(1.0, (step + 1) / 20) * (phase.scale[0] + done * (phase.scale[1] - phase.scale[0]))
        )
        if step % 50 == 0:
            print(f"step {step} ({done:.0%}) loss {loss:.4f} kl {kl:.3f}", flush=True)
        if step % 250 == 249:
            print("psnr all {:.1f} dB, shapes {:.1f} dB".format(*psnr(vae, fresh, phase.frames)), flush=True)
    print("psnr all {:.1f} dB, shapes {:.1f} dB".format(*psnr(vae, fresh, phase.frames)), flush=True)


def main() -> None:
    """Train, print progress, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="continue with an autoencoder that this script made")
    parser.add_argument("--skip", type=int, default=0, help="number of phases that --start has finished")
    parser.add_argument(
        "--peak", type=float, default=1.0, help="scale of the learning rates; lower it to continue"
    )
    parser.add_argument("--minutes", type=float, default=20, help="length of the schedule, on three threads")
    args = parser.parse_args()
    pass_all_frames_at_once()
    torch.manual_seed(0)
    vae = AutoencoderKLWan.from_pretrained(args.start) if args.start else untrained()
    disable_attention(vae)
    optimizer = Muon(vae, lr=0.02 * args.peak, adam_lr=2e-3 * args.peak)
    pool, fresh = Pool.draw(0, 2000), Pool.draw(10**7, 24)
    for phase in PHASES[args.skip :]:
        train(vae, optimizer, phase, pool, fresh, args.minutes)
        normalize(vae, fresh)
        vae.save_pretrained(args.out)


if __name__ == "__main__":
    main()
