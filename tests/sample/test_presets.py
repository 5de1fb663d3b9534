"""Presets give the latents of the published sampling procedures, written out here as their code runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import noise_stream
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.experts import ExpertPair, networks_of
from anyflow_cli.model.layout import Layout, Segment
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe.schema import ModelSection
from anyflow_cli.sample.presets import PRESETS
from anyflow_cli.sample.sampler import VideoSampler
from tests.model.helpers import distance, ours, theirs
from tests.tiny_pipeline import make_wan_folder

SIZE = (4, 4)  # latent height and width: 4 tokens per frame
TEXT = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(5))
SEEDS = [3, 4]
TABLE = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]  # of 1,000 training times, before their shift

Fresh = Callable[[Tensor], Tensor]
Predict = Callable[[Tensor, float], Tensor]  # the network: velocity of a state at a time in thousandths


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def vae(wan: Path) -> VideoVAE:
    return VideoVAE.load(wan)


def latents_of(preset: str, network: FlowMapTransformer, frames: int, vae: VideoVAE | None = None) -> Tensor:
    """What ``VideoSampler`` samples with a preset."""
    chosen = PRESETS[preset]
    for one in (network, *networks_of(network)):
        one.config = replace(one.config, causal=chosen.causal)
    model = ModelSection(frames=4 * frames - 3, height=32, width=32, precision="fp32")
    shape = (frames, 8, *SIZE)
    sampler = VideoSampler(network, model, shape, preset=chosen, vae=vae)
    (latents,) = sampler.latents(Condition(TEXT), SEEDS, chosen.steps or 1, batch=2)
    return latents


def noises(frames: int) -> tuple[Tensor, Fresh]:
    """Starting noise (B, F, C, H, W), and fresh noise, both from the seeds."""
    starts, generators = zip(*(noise_stream(seed, (frames, 8, *SIZE)) for seed in SEEDS), strict=True)

    def fresh(like: Tensor) -> Tensor:
        return torch.stack([torch.randn(like.shape[1:], generator=generator) for generator in generators])

    return torch.stack(starts), fresh


def few_steps(predict: Predict, z: Tensor, times: list[float], levels: list[float], fresh: Fresh) -> Tensor:
    """The loop of the Self-Forcing family, CausVid, FastVideo and rCM: x from the velocity, noised anew."""
    z, clean = z.double(), z
    for i, (time, level) in enumerate(zip(times, levels, strict=True)):
        clean = z - level * predict(z.float(), time).double()
        eps = fresh(clean).double()  # drawn in the last step, too, and not used there
        if i + 1 < len(times):
            z = (1 - levels[i + 1]) * clean + levels[i + 1] * eps
    return clean.float()


def warped(steps: list[int], k: float) -> list[float]:
    """``warp_denoising_step``: steps are positions in the shifted table, counted from its end."""
    table = 1000 * k * TABLE / (1 + (k - 1) * TABLE)
    return [table[1000 - step].item() for step in steps]


def looked_up(times: list[float], k: float) -> list[float]:
    """Noise levels of a scheduler that takes the nearest of its shifted times."""
    table = k * TABLE / (1 + (k - 1) * TABLE)
    return [table[(1000 * table - time).abs().argmin()].item() for time in times]


def thousandths(times: list[float]) -> list[float]:
    return [time / 1000 for time in times]


# --- bidirectional students, on diffusers' own network


@dataclass(frozen=True)
class Published:
    """Times that a network is given and the noise levels that belong to them."""

    times: list[float]
    levels: list[float]


RCM = [80 / 81, *(torch.tan(torch.tensor(a, dtype=torch.float64)).item() for a in (1.5, 1.4, 1.0))]
RCM = [RCM[0], *(ratio / (1 + ratio) for ratio in RCM[1:])]
RCM_720P = [120 / 121, *RCM[1:]]
BIDIRECTIONAL = {
    "rcm": Published([1000 * t for t in RCM], RCM),
    "rcm-720p": Published([1000 * t for t in RCM_720P], RCM_720P),
    "fastwan": Published([1000, 757, 522], looked_up([1000, 757, 522], 8)),
    "fastwan-5b": Published([1000, 757, 522], looked_up([1000, 757, 522], 5)),
    "causvid-bidirectional": Published([1000, 757, 522], looked_up([1000, 757, 522], 8)),
}


def diffusers_network(reference: object) -> Predict:
    def predict(z: Tensor, time: float) -> Tensor:
        times = torch.full((len(z),), time)
        with torch.no_grad():
            out: Tensor = reference(z.transpose(1, 2), times, TEXT, return_dict=False)[0]  # type: ignore[operator]
        return out.transpose(1, 2)

    return predict


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_bidirectional_preset_gives_the_latents_of_its_procedure(name: str) -> None:
    reference, published = theirs("WanTransformer3DModel"), BIDIRECTIONAL[name]
    start, fresh = noises(5)
    start = published.levels[0] * start  # rCM starts at a finite noise level
    expected = few_steps(diffusers_network(reference), start, published.times, published.levels, fresh)
    assert distance(latents_of(name, ours(reference), 5), expected) < 1e-5


def test_the_euler_preset_gives_the_latents_of_its_procedure() -> None:
    reference = theirs("WanTransformer3DModel")
    z, _ = noises(5)
    times = warped([1000, 750, 500, 250], 5)
    for time, after in zip(times, [*times[1:], 0.0], strict=True):
        z = z + diffusers_network(reference)(z, time) * (after - time) / 1000
    assert distance(latents_of("lightx2v-4step", ours(reference), 5), z) < 1e-5


# --- causal students


@dataclass(frozen=True)
class Chunkwise:
    """A causal system: its schedule, its chunks, and what a frame may attend to."""

    times: list[float]
    levels: list[float]
    chunk: int = 3
    first: list[float] | None = None  # times of the first chunk, if others
    window: int = 10**6
    sink: int = 0
    unipc: bool = False  # of Wan's own code, which diffusers has


FOUR, FOUR_OF_8 = (warped([1000, 750, 500, 250], k) for k in (5, 8))
CAUSAL_RCM = [1000 * 1600 / 1601, 1000 * 15 / 16, 1000 * 5 / 6, 1000 * 5 / 8]
NINE = warped([999, 934, 862, 756, 603, 410, 250, 140, 74], 8)
TWO = warped([1000, 500], 5)
CHUNKWISE = {
    "self-forcing": Chunkwise(FOUR, thousandths(FOUR)),
    "causvid": Chunkwise([1000, 757, 522], looked_up([1000, 757, 522], 8)),
    "causvid-4step": Chunkwise(FOUR_OF_8, thousandths(FOUR_OF_8)),
    "lightx2v-causvid": Chunkwise(NINE, thousandths(NINE)),
    "causal-forcing": Chunkwise(FOUR, thousandths(FOUR)),
    "causal-forcing-framewise": Chunkwise(FOUR, thousandths(FOUR), chunk=1),
    "causal-forcing-2step": Chunkwise(TWO, thousandths(TWO), chunk=1, first=FOUR),
    "causal-forcing-1step": Chunkwise([1000.0], [1.0], chunk=1, first=FOUR),
    "longlive": Chunkwise(FOUR, thousandths(FOUR), window=12, sink=3),
    "longlive-2": Chunkwise(FOUR, thousandths(FOUR), chunk=8, window=32, sink=8, unipc=True),
    "causal-rcm": Chunkwise(CAUSAL_RCM, thousandths(CAUSAL_RCM)),
    "causal-rcm-framewise": Chunkwise(CAUSAL_RCM, thousandths(CAUSAL_RCM), chunk=1),
}  # fmt: skip


def attended(i: int, how: Chunkwise) -> tuple[int, ...]:
    """Chunks that chunk ``i`` attends to: the sink, and the last frames of the window with its own."""
    end, size = (i + 1) * how.chunk, how.chunk
    near = [j for j in range(i + 1) if end - j * size <= how.window - how.sink]
    return tuple(sorted({*range(min(how.sink // size, i)), *near}))


def over_clean_past(
    network: FlowMapTransformer, past: list[Tensor], how: Chunkwise, first: int = 0
) -> Predict:
    """The network on a chunk whose past passes with it, clean and at time 0, under one mask and no cache.

    Keys of a cached chunk were computed when that chunk was clean and attended to its own window: so does it
    in the mask.
    """
    count, size = len(past), how.chunk
    layout = Layout(
        tuple(
            Segment(first + i * size, size, attended(i, how), is_output=i == count) for i in range(count + 1)
        ),
        *SIZE,
    )
    model = Conditioned(network, Condition(TEXT)).with_layout(layout)

    def predict(z: Tensor, time: float) -> Tensor:
        frames = torch.zeros(len(z), (count + 1) * size)
        frames[:, -size:] = time / 1000
        return model(torch.cat([*past, z], dim=1), frames, frames)

    return predict


def by_chunks(
    network: FlowMapTransformer, how: Chunkwise, start: Tensor, fresh: Fresh, past: list[Tensor] | None = None
) -> list[Tensor]:
    done: list[Tensor] = list(past or ())
    given = len(done)
    for z in torch.split(start, how.chunk, dim=1):
        times = how.first if how.first and not done else how.times
        levels = thousandths(times) if how.first and not done else how.levels
        predict = over_clean_past(network, done, how)
        if how.unipc:
            done.append(unipc(predict, z, len(times)))
        else:
            done.append(few_steps(predict, levels[0] * z, times, levels, fresh))
    return done[given:]


def unipc(predict: Predict, z: Tensor, steps: int) -> Tensor:
    """``FlowUniPCMultistepScheduler`` of Wan's code at shift 5, begun anew for each chunk."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        (z,) = scheduler.step(predict(z, time.item()), time, z, return_dict=False)
    return z


@pytest.mark.parametrize("name", CHUNKWISE)
def test_a_causal_preset_gives_the_latents_of_its_procedure(name: str) -> None:
    network, how = ours(theirs("WanTransformer3DModel")), CHUNKWISE[name]
    frames = (7 if how.window < 100 else 4) * how.chunk
    start, fresh = noises(frames)
    expected = torch.cat(by_chunks(network, how, start, fresh), dim=1)
    assert distance(latents_of(name, network, frames), expected) < 1e-5


def test_the_sink_and_the_window_are_what_a_chunk_attends_to() -> None:
    """LongLive's cache of 12 frames: 3 of the sink, 6 before the chunk, 3 of its own."""
    assert [attended(i, CHUNKWISE["longlive"]) for i in (2, 3, 4, 6)] == [
        (0, 1, 2), (0, 1, 2, 3), (0, 2, 3, 4), (0, 4, 5, 6)
    ]  # fmt: skip


def test_two_experts_hand_over_at_the_boundary_and_keep_a_cache_each() -> None:
    """FastVideo's CausalWan2.2: the high-noise expert predicts the state at the boundary, not the video."""
    experts = [ours(theirs("WanTransformer3DModel")) for _ in range(2)]
    with torch.no_grad():
        for weight in experts[1].parameters():
            weight.mul_(0.9)
    times = warped([1000, 850, 700, 550, 350, 275, 200, 125], 12)
    levels, (b,) = thousandths(times), looked_up([875], 12)
    start, fresh = noises(7)
    done: list[Tensor] = []
    for z in torch.split(start, [1, 3, 3], dim=1):
        sizes = (*(x.shape[1] for x in done), z.shape[1])
        predicts = [over_uneven_past(expert, done, sizes) for expert in experts]
        for i, (time, level) in enumerate(zip(times, levels, strict=True)):
            is_high = time >= 875
            velocity, eps = predicts[not is_high](z, time), fresh(z)
            after = levels[i + 1] if i < 7 else 0.0
            x = z - (level - b) * velocity if is_high else z - level * velocity
            if is_high and times[i + 1] >= 875:
                alpha = (1 - after) / (1 - b)
                z = alpha * x + (after**2 - (alpha * b) ** 2) ** 0.5 * eps
            else:
                z = x if is_high else (1 - after) * x + after * eps
        done.append(z)
    pair = ExpertPair(experts[0], experts[1], 0.875)
    assert distance(latents_of("causalwan2.2", pair, 7), torch.cat(done, dim=1)) < 1e-5


def over_uneven_past(network: FlowMapTransformer, past: list[Tensor], sizes: tuple[int, ...]) -> Predict:
    """The network on the last chunk of ``sizes``, each of which attends to everything before it."""
    segments = [
        Segment(sum(sizes[:i]), size, tuple(range(i + 1)), is_output=i == len(past))
        for i, size in enumerate(sizes)
    ]
    model = Conditioned(network, Condition(TEXT)).with_layout(Layout(tuple(segments), *SIZE))

    def predict(z: Tensor, time: float) -> Tensor:
        frames = torch.zeros(len(z), sum(sizes))
        frames[:, -sizes[-1] :] = time / 1000
        return model(torch.cat([*past, z], dim=1), frames, frames)

    return predict


class Pictures:
    """Pixels of a video so far, and the latent of a picture."""

    def __init__(self, vae: VideoVAE) -> None:
        self.vae, self.latents = vae, torch.empty(2, 0, 8, *SIZE)

    def start_of(self, overlap: int) -> Tensor:
        """The last latents, the first of which is encoded from the frame where it would start a video."""
        pixels = self.vae.decode(self.latents)[:, -(4 * (overlap - 1) + 1)]
        return torch.cat([self.vae.encode(pixels[:, None]), self.latents[:, -overlap + 1 :]], dim=1)


def test_krea_recomputes_its_cache_from_the_last_three_clean_frames(vae: VideoVAE) -> None:
    network, pictures = ours(theirs("WanTransformer3DModel")), Pictures(vae)
    how = Chunkwise([1000, 937, 833, 625], looked_up([1000, 937, 833, 625], 5))
    start, fresh = noises(12)
    for block, z in enumerate(torch.split(start, 3, dim=1)):
        context = [] if block == 0 else [pictures.latents if block == 1 else pictures.start_of(3)]
        predict = over_clean_past(network, context, how)  # so the block is at frame 0, then always at 3
        x = few_steps(predict, z, how.times, how.levels, fresh)
        pictures.latents = torch.cat([pictures.latents, x], dim=1)
    assert distance(latents_of("krea-realtime", network, 12, vae), pictures.latents) < 1e-5


def test_causvid_continues_long_videos_from_the_last_three_frames(vae: VideoVAE) -> None:
    network, pictures, how = ours(theirs("WanTransformer3DModel")), Pictures(vae), CHUNKWISE["causvid"]
    start, fresh = noises(27)
    pictures.latents = torch.cat(by_chunks(network, how, start[:, :21], fresh), dim=1)
    rest = by_chunks(network, how, start[:, 21:], fresh, [pictures.start_of(3)])
    expected = torch.cat([pictures.latents, *rest], dim=1)
    assert distance(latents_of("causvid", network, 27, vae), expected) < 1e-5


def test_every_preset_is_compared_with_its_procedure() -> None:
    others = {"krea-realtime", "lightx2v-4step", "skyreels-v2", "causalwan2.2"}
    assert BIDIRECTIONAL.keys() | CHUNKWISE.keys() | others == PRESETS.keys()
