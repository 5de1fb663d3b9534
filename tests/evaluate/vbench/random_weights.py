"""Random weights of the right architecture, in VBench's layout, to run its code.

Scores with them are meaningless. Run by the Python of VBench's environment, with the worker's directory
as PYTHONPATH: ``python random_weights.py DIRECTORY``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import worker  # type: ignore[import-not-found]  # in the same directory


def amt(directory: Path) -> None:
    """Frame interpolation, for motion_smoothness."""
    import vbench
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    config = Path(vbench.__file__).parent / "third_party/amt/cfgs/AMT-S.yaml"
    model = build_from_cfg(OmegaConf.load(config).network)
    save({"state_dict": model.state_dict()}, directory / "amt_model/amt-s.pth")


def raft(directory: Path) -> None:
    """Optical flow, for dynamic_degree and the static filter."""
    from easydict import EasyDict
    from vbench.third_party.RAFT.core.raft import RAFT

    model = RAFT(EasyDict(small=False, mixed_precision=False, alternate_corr=False))
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    save(weights, directory / "raft_model/models/raft-things.pth")


def musiq(directory: Path) -> None:
    """Image quality, for imaging_quality."""
    from pyiqa.archs.musiq_arch import MUSIQ

    model = MUSIQ(pretrained=False)
    save(model.state_dict(), directory / "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth")


def umt(directory: Path) -> None:
    """Action recognition, for human_action: VBench takes what the file has, and the rest is random anyway."""
    save({}, directory / "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth")


def save(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


if __name__ == "__main__":
    worker.import_torchvision()
    torch.manual_seed(0)
    for make in (amt, raft, musiq, umt):
        make(Path(sys.argv[1]))
