"""What each dimension needs besides videos: files of weights, Python modules, models of the Hub.

Everything lies in one directory, laid out as VBench lays out its own cache, so that an existing one can be
given. Nothing here fetches anything. Sizes are of the published files; a SHA-256, or its start, stands where
the publisher states it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HUB = "https://huggingface.co"
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"


@dataclass(frozen=True)
class WeightFile:
    """A file, or a folder where ``path`` ends in ``/``, under the directory of weights."""

    path: str
    source: str
    megabytes: int | None = None  # None: not known
    sha256: str = ""  # as much of it as is published

    def line(self) -> str:
        """For people who are to fetch it."""
        size = "" if self.megabytes is None else f"{self.megabytes:,} MB, "
        digest = f"SHA-256 {self.sha256}, " if self.sha256 else ""
        return f"{size}{digest}from {self.source}"


CLIP_B32 = WeightFile("clip_model/ViT-B-32.pt", f"{CLIP}/{CLIP_B}/ViT-B-32.pt", 354, CLIP_B)
CLIP_L14 = WeightFile("clip_model/ViT-L-14.pt", f"{CLIP}/{CLIP_L}/ViT-L-14.pt", 933, CLIP_L)
DINO = WeightFile(
    "dino_model/dino_vitbase16_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    343,
)
DINO_CODE = WeightFile("dino_model/facebookresearch_dino_main/", "https://github.com/facebookresearch/dino")
RAFT = WeightFile(
    "raft_model/models/raft-things.pth", "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip", 21
)
AMT = WeightFile("amt_model/amt-s.pth", f"{HUB}/lalala125/AMT/resolve/main/amt-s.pth", 12)
MUSIQ = WeightFile(
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    109,
    "358bb6af",
)
AESTHETIC = WeightFile(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
)
UMT = WeightFile(
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
    f"{HUB}/OpenGVLab/VBench_Used_Models/resolve/main/l16_ptk710_ftk710_ftk400_f16_res224.pth",
)
VICLIP = WeightFile(
    "ViCLIP/ViClip-InternVid-10M-FLT.pth",
    f"{HUB}/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth",
)
TAG2TEXT = WeightFile(
    "caption_model/tag2text_swin_14m.pth",
    f"{HUB}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
)
GRIT = WeightFile(
    "grit_model/grit_b_densecap_objectdet.pth",
    "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
    900,
)
COTRACKER = WeightFile(
    "cotracker_model/cotracker2.pth", f"{HUB}/facebook/cotracker/resolve/main/cotracker2.pth"
)
COTRACKER_CODE = WeightFile(
    "cotracker_model/facebookresearch_co-tracker_main/", "https://github.com/facebookresearch/co-tracker"
)
DREAMSIM = WeightFile(
    "dreamsim_model/", "https://github.com/ssundaram21/dreamsim/releases, its ensemble unpacked"
)
BERT = "bert-base-uncased"
DETECTRON = "pip install 'git+https://github.com/facebookresearch/detectron2' (it is not on PyPI)"


@dataclass(frozen=True)
class Needs:
    """What a dimension cannot do without."""

    files: tuple[WeightFile, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()  # name of a module of the environment, how it is installed
    hub: tuple[str, ...] = ()  # models that transformers takes from the Hub's cache
    cuda: bool = False


DETECTION = Needs((GRIT,), (("detectron2", DETECTRON),), (BERT,))

NEEDS: dict[str, Needs] = {
    "temporal_flickering": Needs(),
    "motion_smoothness": Needs((AMT,)),
    "dynamic_degree": Needs((RAFT,)),
    "static_filter": Needs((RAFT,)),  # no dimension; it picks the videos of temporal_flickering
    "subject_consistency": Needs((DINO, DINO_CODE)),
    "background_consistency": Needs((CLIP_B32,)),
    "aesthetic_quality": Needs((CLIP_L14, AESTHETIC)),
    "imaging_quality": Needs((MUSIQ,)),
    "object_class": DETECTION,
    "multiple_objects": DETECTION,
    "color": DETECTION,
    "spatial_relationship": DETECTION,
    "human_action": Needs((UMT,)),
    "scene": Needs((TAG2TEXT,), hub=(BERT,)),
    "appearance_style": Needs((CLIP_B32,)),
    "temporal_style": Needs((VICLIP,)),
    "overall_consistency": Needs((VICLIP,)),
    "i2v_subject": Needs((DINO, DINO_CODE)),
    "i2v_background": Needs((DREAMSIM,), (("dreamsim", "pip install dreamsim==0.2.1"),), cuda=True),
    "camera_motion": Needs((COTRACKER, COTRACKER_CODE)),
}


def default_directory() -> Path:
    """VBench's own cache: ``VBENCH_CACHE_DIR``, else ``~/.cache/vbench``."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser()


def absent(needs: Needs, directory: Path) -> list[WeightFile]:
    """The files of a dimension that are not in the directory."""
    return [file for file in needs.files if not _there(directory / file.path, folder=file.path.endswith("/"))]


def lacking(needs: Needs, directory: Path, modules: Sequence[str], cuda: bool) -> dict[str, str]:
    """What a dimension needs and does not find, given the modules of its environment; and how to get it."""
    files = {file.path: file.line() for file in absent(needs, directory)}
    code = {module: install for module, install in needs.modules if module not in modules}
    hub = {name: f"hf download {name}" for name in needs.hub if not _cached(name)}
    return files | code | hub | ({"CUDA": "VBench runs it on CUDA alone"} if needs.cuda and not cuda else {})


def _there(path: Path, *, folder: bool) -> bool:
    return path.is_dir() and any(path.iterdir()) if folder else path.is_file() and path.stat().st_size > 0


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
