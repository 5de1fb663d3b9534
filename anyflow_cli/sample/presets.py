"""How published few-step and causal students of Wan are sampled, one row per system.

A row says what the system's own code does: the times of its steps and how it goes from one to the next, its
chunks and what each attends to, and the size, length and shift that it is published for. ``VideoSampler``
reads rows; it knows no system. Sources: the inference code of each project.

Legend: times are in thousandths, as the projects write them; lengths of chunks, windows and rollouts are in
latent frames.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.samplers import SAMPLERS, Sampler, consistency, expert_consistency
from anyflow_cli.flow.times import TRAINING_TIMES, grid, shift
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.lora_formats import split_loras
from anyflow_cli.model.pipeline_io import BUILT_IN, read_config
from anyflow_cli.recipe.load import Override
from anyflow_cli.recipe.schema import Recipe, latent_frames
from anyflow_cli.runs.open import describe
from anyflow_cli.sample.unipc import sample_unipc

EVERYTHING = 10**6  # chunks that a window without a limit holds


@dataclass(frozen=True)
class VideoShape:
    """Frames, height, width and frame rate of the videos that a model is made for."""

    frames: int
    height: int
    width: int
    fps: int = 16


WAN_480P = VideoShape(81, 480, 832)


@dataclass(frozen=True)
class SamplerPreset:
    """How one published system is sampled.

    Attributes:
        name: Value of ``--sampler-preset``.
        system: The system and the sizes it is published in.
        weights: Where its weights are published.
        files: Regular expression that the path of a published file or folder matches.
        shift: Timestep shift, also of ``table``.
        times: Time of each step, which UniPC only counts; empty: a teacher, sampled by its recipe's solver,
            steps and guidance.
        first_times: Times of the first chunk, if others.
        table: Whether each time stands for the nearest of 1,000 shifted times, as in the projects whose
            scheduler looks its noise levels up; the network is still given the time itself.
        method: From one time to the next: by predicting the video and noising it anew, by Euler, or by UniPC
            at times of its own, begun anew for each chunk.
        chunk: Latent frames per chunk; None: bidirectional.
        first_chunk: Latent frames of the first chunk, if others.
        window: Latent frames that a chunk attends to, itself and the sink included; None: all.
        sink: First latent frames that stay in the cache.
        rollout: Latent frames after which the cache starts anew from the last ``overlap`` ones, the first of
            them encoded again as a picture; None: never.
        overlap: Latent frames that two rollouts share.
        longest: Most latent frames that the system samples.
        boundary: Time at which the high-noise expert of two hands over to the low-noise one.
        overwrites: Whether its UniPC reads an overwritten state, see ``sample_unipc``.
        shape: Size of its videos.
        channels: Latent channels.
        settings: Further keys of the recipe.
    """

    name: str
    system: str
    weights: str
    files: str
    shift: float = 5.0
    times: tuple[float, ...] = ()
    first_times: tuple[float, ...] = ()
    table: bool = False
    method: Literal["consistency", "euler", "unipc"] = "consistency"
    chunk: int | None = None
    first_chunk: int | None = None
    window: int | None = None
    sink: int = 0
    rollout: int | None = None
    overlap: int = 0
    longest: int | None = None
    boundary: float | None = None
    overwrites: bool = False
    shape: VideoShape = WAN_480P
    channels: int = 16
    settings: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int | None:
        """Evaluations per chunk; None where the recipe says how many."""
        return len(self.times) or None

    @property
    def overrides(self) -> list[Override]:
        """Keys of the recipe that sampling as published sets; assignments of the user follow them."""
        keys: dict[str, Any] = {f"model.{key}": value for key, value in asdict(self.shape).items()}
        keys |= {"model.shift": self.shift, "evaluate.teacher": False, **(self.settings or {})}
        if self.steps is not None:
            keys |= {"sample.nfe": (self.steps,), "evaluate.nfe": (self.steps,)}
        return [Override(key, value, f"--sampler-preset {self.name}") for key, value in keys.items()]

    @property
    def causal(self) -> CausalConfig | None:
        """Chunks and cache of the network."""
        if self.chunk is None:
            return None
        kept = EVERYTHING if self.window is None else (self.window - self.sink) // self.chunk
        first = () if self.first_chunk is None else (self.first_chunk,)
        return CausalConfig(
            full_chunks=kept,
            partition=(*first, self.chunk),
            compresses=False,
            sink_chunks=self.sink // self.chunk,
        )

    @property
    def grids(self) -> list[Tensor]:
        """Grid (N + 1,) of the first chunk and, if it differs, of those that follow."""
        return [self._grid(times) for times in (self.first_times, self.times) if times]

    @property
    def sampler(self) -> Sampler:
        """From one time of a grid to the next."""
        if self.method == "unipc":
            return lambda model, z, grid, generator=None: sample_unipc(model, z, len(grid) - 1, self.shift)
        if self.method == "euler":
            return SAMPLERS[self.method]
        known = {
            level: time / 1000
            for times in (self.first_times, self.times)
            for level, time in zip(self._grid(times).tolist(), times, strict=False)
        }
        if self.boundary is None:
            return partial(consistency, network_times=known)
        (boundary, _) = self._grid((self.boundary,)).tolist()
        return partial(expert_consistency, boundary=boundary, network_times=known)

    @property
    def in_words(self) -> str:
        """Everything that determines a video, in one line."""
        kind = "renoise" if self.method == "consistency" else "Euler"
        steps = f"{kind} at {_listed(self.times)}" if self.times else "solver of the recipe"
        steps = f"UniPC, {self.steps} steps" if self.method == "unipc" else steps
        first = f", first chunk {_listed(self.first_times)}" if self.first_times else ""
        rule = "bidirectional"
        if self.chunk is not None:
            seen = f", window {self.window}" if self.window else ""
            sink = f" with a sink of {self.sink}" if self.sink else ""
            anew = f", rollouts of {self.rollout} that share {self.overlap}" if self.rollout else ""
            begun = f" after one of {self.first_chunk}" if self.first_chunk else ""
            rule = f"chunks of {self.chunk}{begun}{seen}{sink}{anew}"
        table = f" of the table of shift {self.shift:g}" if self.table else ""
        experts = f", experts that meet at {self.boundary:g}" if self.boundary else ""
        return f"{self.name}: {steps}{table}{first}{experts}; {rule}"

    def check(self, address: str, network: NetworkConfig) -> None:
        """Refuse a model that the system is not.

        Args:
            address: Address of the model, which may be that of another system.
            network: Its sizes.
        """
        what = None
        if network.two_time:
            what = "an any-step model, which needs no preset"
        elif (network.boundary is None) != (self.boundary is None):
            what = f"a model of {'one network' if network.boundary is None else 'two experts'}"
        elif network.out_channels != self.channels:
            what = f"a model of {network.out_channels} latent channels, not of {self.channels}"
        elif address in (*BUILT_IN, *KNOWN_MODELS) and self.times:
            what = "the pretrained model, not a student of it"
        elif (others := presets_of(split_loras(address)[0])) and self not in others:
            names = " or ".join(other.name for other in others)
            what = f"published for --sampler-preset {names}"
        if what is not None:
            raise UsageError(
                f"The preset {self.name} is for {self.system}; {address} is {what}.",
                "`anyflow inspect` names the preset of a model; `anyflow sample --list-presets` lists them.",
            )

    def check_request(self, frames: int, counts: Sequence[object]) -> None:
        """Refuse a number of frames or of steps that the system cannot sample.

        Args:
            frames: Frames of a video.
            counts: Numbers of steps to compare.
        """
        if self.steps is not None and set(counts) != {self.steps}:
            raise UsageError(
                f"The preset {self.name} takes {self.steps} steps, not {', '.join(map(str, counts))}.",
                "Leave the number of steps to the preset.",
            )
        latents, chunk, first = latent_frames(frames), self.chunk or 1, self.first_chunk or 0
        count, rest = divmod(latents - first, chunk)
        if rest or count < 0:
            fitting = [4 * (first + n * chunk) - 3 for n in (count, count + 1) if first + n * chunk > 0]
            after = f" after one of {first}" if first else ""
            raise UsageError(
                f"The preset {self.name} samples chunks of {chunk} latent frames{after}, and {frames} frames "
                f"are {latents}.",
                f"Sample {' or '.join(map(str, fitting))} frames.",
            )
        if self.longest is not None and latents > self.longest:
            raise UsageError(
                f"The preset {self.name} samples at most {4 * self.longest - 3} frames, not {frames}.",
                "Sample fewer with --frames, or take a model of longer videos, such as LongLive.",
            )

    def _grid(self, times: tuple[float, ...]) -> Tensor:
        levels = torch.tensor(times, dtype=torch.float64) / 1000
        if self.table:
            known = grid(TRAINING_TIMES, self.shift)[:-1].double()
            levels = known[(known - levels.unsqueeze(1)).abs().argmin(dim=1)]
        return torch.cat((levels, levels.new_zeros(1))).float()


def _listed(times: tuple[float, ...]) -> str:
    return ", ".join(f"{time:.6g}" for time in times)


def _shifted(times: tuple[float, ...], k: float) -> tuple[float, ...]:
    """Times that a project shifts ("warps") before it samples."""
    levels = shift(torch.tensor(times, dtype=torch.float64) / 1000, k)
    return tuple((1000 * levels).tolist())


FOUR_STEPS = _shifted((1000, 750, 500, 250), 5)  # of Self-Forcing and those who build on it
DMD_TIMES = (1000, 757, 522)  # of CausVid and FastVideo


def _rcm_times(largest: float) -> tuple[float, ...]:
    """Times of rCM's angles: the largest noise-to-signal ratio, then tangents of 1.5, 1.4 and 1."""
    ratios = torch.tensor([largest, *torch.tensor([1.5, 1.4, 1.0], dtype=torch.float64).tan().tolist()])
    return tuple((1000 * ratios.double() / (1 + ratios.double())).tolist())


_SELF_FORCING = SamplerPreset(
    "self-forcing", "Self-Forcing 1.3B", "gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt",
    r"self[_-]forcing|SFWan2\.1", times=FOUR_STEPS, chunk=3, longest=21,
)  # fmt: skip
_CAUSVID = SamplerPreset(
    "causvid", "CausVid 1.3B, 3 steps", "tianweiy/CausVid: autoregressive_checkpoint/model.pt",
    r"autoregressive_checkpoint/", shift=8, times=DMD_TIMES, table=True, chunk=3, rollout=21, overlap=3,
)  # fmt: skip
_RCM = SamplerPreset(
    "rcm", "rCM 1.3B and 14B at 480p", "worstcoder/rcm-Wan: rCM_Wan2.1_T2V_*_480p.pt",
    r"(?<!Causal_)rCM_Wan2\.1.*480p", times=_rcm_times(80), shape=VideoShape(77, 480, 832),
)  # fmt: skip
_FASTWAN = SamplerPreset(
    "fastwan", "FastWan 2.1 1.3B and 14B", "FastVideo/FastWan2.1-T2V-{1.3B,14B-480P}-Diffusers",
    r"FastWan2\.1", shift=8, times=DMD_TIMES, table=True, shape=VideoShape(77, 448, 832),
)  # fmt: skip

PRESETS = {
    preset.name: preset
    for preset in (
        _SELF_FORCING,
        _CAUSVID,
        replace(
            _CAUSVID, name="causvid-4step", system="CausVid 1.3B, 4 steps", table=False,
            weights="tianweiy/CausVid: autoregressive_checkpoint_warp_4step_cfg2/model.pt",
            files=r"warp_4step", times=_shifted((1000, 750, 500, 250), 8),
        ),
        replace(
            _CAUSVID, name="causvid-bidirectional", system="CausVid's bidirectional 1.3B",
            weights="tianweiy/CausVid: bidirectional_checkpoint{1,2}/model.pt",
            files=r"bidirectional_checkpoint", chunk=None, rollout=None, overlap=0,
        ),
        SamplerPreset(
            "lightx2v-causvid", "LightX2V's CausVid 14B", "lightx2v/Wan2.1-T2V-14B-CausVid: causal_model.*",
            r"14B-CausVid|causal_model\.", shift=8, chunk=3, longest=21,
            times=_shifted((999, 934, 862, 756, 603, 410, 250, 140, 74), 8),
        ),
        SamplerPreset(
            "lightx2v-4step", "LightX2V's 4-step 14B", "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill*",
            r"StepDistill|lightx2v_4step|distill_model\.", times=FOUR_STEPS, method="euler",
        ),
        replace(
            _SELF_FORCING, name="causal-forcing", system="Causal-Forcing 1.3B by chunks",
            weights="zhuhz22/Causal-Forcing: chunkwise/causal_forcing.pt", files=r"chunkwise/causal_",
        ),
        replace(
            _SELF_FORCING, name="causal-forcing-framewise", system="Causal-Forcing 1.3B by frames",
            weights="zhuhz22/Causal-Forcing: framewise/causal_forcing.pt", files=r"framewise/causal_",
            chunk=1,
        ),
        replace(
            _SELF_FORCING, name="causal-forcing-2step", system="Causal-Forcing++ 1.3B, 2 steps",
            weights="zhuhz22/Causal-Forcing: causal-forcing++/framewise-2step.pt", files=r"framewise-2step",
            chunk=1, times=_shifted((1000, 500), 5), first_times=FOUR_STEPS,
        ),
        replace(
            _SELF_FORCING, name="causal-forcing-1step", system="Causal-Forcing++ 1.3B, 1 step",
            weights="zhuhz22/Causal-Forcing: causal-forcing++/framewise-1step.pt", files=r"framewise-1step",
            chunk=1, times=(1000,), first_times=FOUR_STEPS,
        ),
        replace(
            _SELF_FORCING, name="longlive", system="LongLive 1.0 1.3B",
            weights="Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt with --lora models/lora.pt",
            files=r"longlive(?!-2)", window=12, sink=3, longest=None,
        ),
        SamplerPreset(
            "longlive-2", "LongLive 2.0 5B", "Efficient-Large-Model/LongLive-2.0-5B: model_bf16.pt",
            r"LongLive-2\.0-5B", times=FOUR_STEPS, method="unipc", chunk=8, window=32, sink=8, channels=48,
            shape=VideoShape(509, 704, 1280, 24), settings={"model.vae_scale": 16},
        ),
        SamplerPreset(
            "krea-realtime", "Krea Realtime 14B",
            "krea/krea-realtime-video: krea-realtime-video-14b.safetensors",
            r"krea-realtime", times=(1000, 937, 833, 625), table=True, chunk=3, rollout=6, overlap=3,
        ),
        _RCM,
        replace(
            _RCM, name="rcm-720p", system="rCM 14B at 720p", times=_rcm_times(120),
            weights="worstcoder/rcm-Wan: rCM_Wan2.1_T2V_14B_720p.pt", files=r"rCM_Wan2\.1.*720p",
            shape=VideoShape(77, 720, 1280),
        ),
        replace(
            _SELF_FORCING, name="causal-rcm", system="Causal-rCM 1.3B by chunks of 3",
            weights="worstcoder/rcm-Wan: Causal_rCM_Wan2.1_T2V_1.3B_480p_*_c3-3*.pt",
            files=r"Causal_rCM.*_c3-3", times=(1000 * 1600 / 1601, *FOUR_STEPS[1:]),
        ),
        replace(
            _SELF_FORCING, name="causal-rcm-framewise", system="Causal-rCM 1.3B by frames",
            weights="worstcoder/rcm-Wan: Causal_rCM_Wan2.1_T2V_1.3B_480p_*_c1-1*.pt",
            files=r"Causal_rCM.*_c1-1", times=(1000 * 1600 / 1601, *FOUR_STEPS[1:]), chunk=1,
        ),
        _FASTWAN,
        replace(
            _FASTWAN, name="fastwan-5b", system="FastWan 2.2 TI2V 5B", shift=5, channels=48,
            weights="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", files=r"FastWan2\.2",
            shape=VideoShape(121, 704, 1280, 24),
        ),
        # Asked for 81 frames, FastVideo samples a chunk of 1 and six of 3 latent frames and drops the rest.
        SamplerPreset(
            "causalwan2.2", "FastVideo CausalWan2.2 A14B",
            "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers, rand0nmr/SFWan2.2-T2V-A14B-Diffusers",
            r"CausalWan2\.2|SFWan2\.2", shift=12, table=True, boundary=875, chunk=3, first_chunk=1,
            times=_shifted((1000, 850, 700, 550, 350, 275, 200, 125), 12), longest=19,
            shape=VideoShape(73, 448, 832),
        ),
        SamplerPreset(
            "skyreels-v2", "SkyReels-V2 DF at 540p, synchronous",
            "Skywork/SkyReels-V2-DF-{1.3B,14B}-540P-Diffusers",
            r"SkyReels-V2-DF", shift=8, shape=VideoShape(97, 544, 960, 24), longest=25, overwrites=True,
            settings={
                "sample.teacher_sampler": "unipc", "sample.teacher_steps": 30, "sample.teacher_guidance": 6.0,
                "evaluate.nfe": (30,),
            },
        ),
    )
}  # fmt: skip


def check_model(preset: SamplerPreset, address: str, recipe: Recipe) -> None:
    """Refuse a model for a preset without loading it."""
    info = describe(address, recipe)
    network = read_config(info.path if info.run is None else info.run.base)
    preset.check(address, replace(network, two_time=info.two_time))


def preset_table() -> list[dict[str, str]]:
    """Every preset: what it is for, where the weights are, and what it does."""
    return [
        {"preset": one.name, "system": one.system, "weights": one.weights, "sampling": one.in_words}
        for one in PRESETS.values()
    ]


def preset_of(name: str | None) -> SamplerPreset | None:
    """The preset of ``--sampler-preset``."""
    if name is not None and name not in PRESETS:
        raise UsageError(f"There is no preset {name!a}.", f"There are {', '.join(PRESETS)}.")
    return None if name is None else PRESETS[name]


def presets_of(address: str) -> list[SamplerPreset]:
    """Presets of the systems that publish a file or folder of this name, in a folder of this name."""
    name = "/".join(Path(address).parts[-3:])
    return [preset for preset in PRESETS.values() if re.search(preset.files, name, re.IGNORECASE)]
