"""Measuring a model: sample the suite's prompts, decode, score; scores of single videos in a few bytes.

The VAE decodes all frames of a clip in one pass (``scripts/tiny/vae.py``) in bf16, on a CPU in 0.4 of the
time of the package's decoder; Total moves by hundredths (docs/log.md). Nothing is written as a video.
"""

from __future__ import annotations

import base64
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from numpy.typing import NDArray
from reproduction.rows import Method
from tiny.vae import decode, planar_convolution, whole_resampling

from anyflow_cli.data.video import to_pixels
from anyflow_cli.evaluate.bootstrap import draw_totals, interval
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.suite import VideoPixels, VideoScore, summarize
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.sample.sampler import VideoSampler

BATCH = {"cpu": 16, "cuda": 128}  # videos that are sampled together
DECODED_FRAMES = {"cpu": 1, "cuda": 288}  # latent frames that are decoded together; at least a video
FOLLOWED_SHARE = 4  # one in so many videos of a causal model is scored along its frames
FIRST_SEED = 1000  # of the noise of the first prompt; the same for every model
STEP = 20_000  # levels per unit of a packed score
UNKNOWN = 65_535


@dataclass(frozen=True)
class Point:
    """One model under one sampler at one step count.

    Attributes:
        method: Sampler.
        steps: Step count.
        evaluations: Network evaluations per video; twice the steps for a guided teacher.
        total: Total of the suite.
        low: Lower end of its interval over prompts, of this training run alone.
        high: Upper end.
        groups: Scores of the groups.
        correct: Share of videos that show everything their prompt names, in percent.
        distance: Fréchet distance to fresh clips of the world.
        scores: Raw scores of all videos by dimension, packed.
        pieces: Quality of the stills of each latent frame of the first videos, packed, of a causal model.
        seconds: Processor seconds in the network, in the decoder and for the scores.
    """

    method: Method
    steps: int
    evaluations: int
    total: float
    low: float | None
    high: float | None
    groups: dict[str, float | None]
    correct: float | None
    distance: float | None
    scores: str
    pieces: str | None
    seconds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(address: str, recipe: Recipe, method: Method, steps: int, prompts: int, world: str) -> Point:
    """Sample and score a model on the first ``prompts`` prompts of a world."""
    suite = ShapesSuite(world)
    teacher = method == "teacher"
    sampler = VideoSampler.load(
        address, recipe, teacher=teacher, method=None if method == "teacher" else method
    )
    texts, clock = suite.prompts(prompts), Clock()
    scores: list[VideoScore] = []
    seeds = range(FIRST_SEED, FIRST_SEED + prompts)
    followed = prompts // FOLLOWED_SHARE if sampler.is_causal else 0
    plain = replace(suite, pieces=False)
    for video in videos(sampler, texts, seeds, steps, clock):
        with clock.part("scores"):
            number = len(scores)
            own = suite if number < followed else plain
            scores += own.score([video], texts[number : number + 1])
    result, draws = summarize(suite, scores), draw_totals(suite, scores, range(prompts))
    bounds = None if draws is None else interval(draws)
    assert result.total is not None
    names = [dimension.name for dimension in suite.dimensions]
    stills = [[still_quality(piece) for piece in score.pieces] for score in scores[:followed]]
    return Point(
        method=method,
        steps=steps,
        evaluations=steps * (2 if teacher else 1),
        total=round(result.total, 3),
        low=None if bounds is None else round(bounds.low, 3),
        high=None if bounds is None else round(bounds.high, 3),
        groups={name: value and round(value, 3) for name, value in result.groups.items()},
        correct=result.correct and round(result.correct, 2),
        distance=result.distance and round(result.distance, 3),
        scores=pack([[score.scores.get(name, np.nan) for name in names] for score in scores]),
        pieces=pack(stills) if stills else None,
        seconds=clock.seconds,
    )


def still_quality(piece: dict[str, float]) -> float:
    """Mean over the quality dimensions that a still image shows."""
    return float(np.mean([piece[name] for name in ("sharpness", "details", "artefacts")]))


class Clock:
    """Processor seconds of this process by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block."""
        begun = time.process_time()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - begun, 3)

    def iterate(self, name: str, values: Iterator[Any]) -> Iterator[Any]:
        """Count what it takes to get each value, and not what is done with it."""
        while True:
            with self.part(name):
                value = next(values, None)
            if value is None:
                return
            yield value


@contextmanager
def one_pass_decoding() -> Iterator[None]:
    """Let Wan's VAE decode all frames of a clip in one pass inside the block."""
    before = WanCausalConv3d.forward, WanResample.forward
    WanCausalConv3d.forward, WanResample.forward = planar_convolution, whole_resampling
    try:
        yield
    finally:
        WanCausalConv3d.forward, WanResample.forward = before


def videos(
    sampler: VideoSampler, prompts: Sequence[str], seeds: Sequence[int], steps: int, clock: Clock
) -> Iterator[VideoPixels]:
    """Sample videos (T, H, W, 3), and count what that takes."""
    batch = BATCH[sampler.device.type]
    with one_pass_decoding():
        for latents in clock.iterate("network", sampler.latents(prompts, seeds, steps, batch)):
            yield from clock.iterate("decoder", pixels(sampler, latents))


@torch.no_grad()
def pixels(sampler: VideoSampler, latents: torch.Tensor) -> Iterator[VideoPixels]:
    """Decode latents (B, F, C, H, W) to videos (T, H, W, 3); the VAE stays in bf16."""
    vae = sampler.vae
    model = vae._model.bfloat16()
    frames = DECODED_FRAMES[latents.device.type]
    for clips in torch.split(latents.float(), max(frames // latents.shape[1], 1)):
        video = decode(model, (clips.transpose(1, 2) * vae._std + vae._mean).bfloat16()).float()
        yield from to_pixels((video.transpose(1, 2) / 2 + 0.5).clamp(0, 1))


def pack(values: Sequence[Sequence[float]]) -> str:
    """Write numbers from 0 to 3 as text, to 1 / STEP; NaN stays NaN."""
    numbers = np.array(values, np.float64)
    whole = np.where(np.isnan(numbers), UNKNOWN, np.rint(np.nan_to_num(numbers) * STEP)).astype("<u2")
    header = np.array(whole.shape, "<u2").tobytes()
    # dimension by dimension, whose values resemble each other
    return base64.b64encode(zlib.compress(header + whole.T.tobytes(), 9)).decode()


def unpack(text: str) -> NDArray[np.float64]:
    """Read what ``pack`` wrote."""
    content = zlib.decompress(base64.b64decode(text))
    rows, columns = np.frombuffer(content[:4], "<u2")
    whole = np.frombuffer(content[4:], "<u2").reshape(columns, rows).T
    return np.where(whole == UNKNOWN, np.nan, whole / STEP)


def video_scores(packed: str, suite: ShapesSuite) -> list[VideoScore]:
    """The scores of a point's videos."""
    names = [dimension.name for dimension in suite.dimensions]
    return [
        VideoScore({name: float(v) for name, v in zip(names, row, strict=True) if not np.isnan(v)})
        for row in unpack(packed)
    ]
