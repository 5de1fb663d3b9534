"""Requirements of each dimension besides videos: weights, Python modules, models of the Hub.

All weights are in one directory with the layout of VBench's own cache, so an existing cache can be used.
Nothing is downloaded here. Sizes are those of the published files; a SHA-256, or the start of one, is given
where the publisher states it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.utils.hub import cached_snapshot

HUB = "https://huggingface.co"
CLIP = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"


@dataclass(frozen=True)
class WeightFile:
    """A file, or a folder if ``path`` ends in ``/``, below the directory of weights."""

    path: str
    source: str
    megabytes: int | None = None  # None: not published
    sha256: str = ""  # the published part of it

    def line(self) -> str:
        """Where to download it, for people."""
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
class Requirements:
    """Requirements of one dimension."""

    files: tuple[WeightFile, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()  # module of the environment, how to install it
    hub: tuple[str, ...] = ()  # models that transformers loads from the Hub's cache
    cuda: bool = False


DETECTION = Requirements((GRIT,), (("detectron2", DETECTRON),), (BERT,))

REQUIREMENTS: dict[str, Requirements] = {
    "temporal_flickering": Requirements(),
    "motion_smoothness": Requirements((AMT,)),
    "dynamic_degree": Requirements((RAFT,)),
    "static_filter": Requirements((RAFT,)),  # not a dimension: it selects the videos of temporal_flickering
    "subject_consistency": Requirements((DINO, DINO_CODE)),
    "background_consistency": Requirements((CLIP_B32,)),
    "aesthetic_quality": Requirements((CLIP_L14, AESTHETIC)),
    "imaging_quality": Requirements((MUSIQ,)),
    "object_class": DETECTION,
    "multiple_objects": DETECTION,
    "color": DETECTION,
    "spatial_relationship": DETECTION,
    "human_action": Requirements((UMT,)),
    "scene": Requirements((TAG2TEXT,), hub=(BERT,)),
    "appearance_style": Requirements((CLIP_B32,)),
    "temporal_style": Requirements((VICLIP,)),
    "overall_consistency": Requirements((VICLIP,)),
    "i2v_subject": Requirements((DINO, DINO_CODE)),
    "i2v_background": Requirements((DREAMSIM,), (("dreamsim", "pip install dreamsim==0.2.1"),), cuda=True),
    "camera_motion": Requirements((COTRACKER, COTRACKER_CODE)),
}


def weights_directory(setting: str | None) -> Path:
    """Directory of weights: as the recipe says, else ``VBENCH_CACHE_DIR``, else ``~/.cache/vbench``."""
    return Path(setting or os.environ.get("VBENCH_CACHE_DIR") or "~/.cache/vbench").expanduser()


def missing_requirements(
    needs: Requirements, directory: Path, modules: Sequence[str], cuda: bool
) -> dict[str, str]:
    """Find what a dimension lacks, and how to get it.

    Args:
        needs: Requirements of the dimension.
        directory: Directory of weights.
        modules: Optional modules that the environment has.
        cuda: Whether the environment can use a GPU.
    """
    files = {file.path: file.line() for file in needs.files if not _is_there(directory / file.path, file)}
    code = {module: install for module, install in needs.modules if module not in modules}
    hub = {name: f"hf download {name}" for name in needs.hub if not cached_snapshot(name, "config.json")}
    return files | code | hub | ({"CUDA": "VBench runs it only on CUDA"} if needs.cuda and not cuda else {})


def _is_there(path: Path, file: WeightFile) -> bool:
    if file.path.endswith("/"):
        return path.is_dir() and any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0
