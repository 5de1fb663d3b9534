"""One job inside VBench's own environment: a dimension over a list of videos, JSON in and JSON out.

``python worker.py REQUEST ANSWER``. Another interpreter (3.8 or newer) runs this file, so it imports nothing
from this package, and VBench's modules only when needed. Results and errors, with their traceback, go to
ANSWER; if ANSWER is missing, the process died. The output of VBench goes to the log.

VBench gets a cache directory of its own in SCRATCH with links to the weights that the job may use, so that it
never downloads a missing file into the user's cache, and links to videos under the names it requires.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

I2V_ONLY = ("i2v_subject", "i2v_background", "camera_motion")  # in vbench2_beta_i2v
NAMED = ("human_action", "camera_motion")  # read the label of a video from its file name
READ = (".mp4", ".gif")  # suffixes by which VBench chooses a reader; our links end in .mp4
PARTIAL = ("color",)  # skips videos in which its object is not found, and omits them from its mean
OPERATORS = ("nms", "qnms")  # torchvision looks them up when it is imported
PARENT_POLL_SECONDS = 1.0  # between checks that the parent is alive
VBENCH_PACKAGES = ("vbench", "torch", "torchvision", "transformers", "numpy", "decord", "opencv-python")
HUB_LINKS = {  # path below torch.hub's directory -> file or folder of weights
    "checkpoints/dino_vitbase16_pretrain.pth": "dino_model/dino_vitbase16_pretrain.pth",
    "checkpoints/cotracker2.pth": "cotracker_model/cotracker2.pth",
    "facebookresearch_co-tracker_main": "cotracker_model/facebookresearch_co-tracker_main",
}
declared: list[Any] = []  # torchvision's operators, where its build does not match torch


def serve(request: str, answer: str) -> int:
    """Run ``request`` and write ``answer``; the exit code is 0 if that holds a result."""
    end_with_parent()
    try:
        found: dict[str, Any] = {"result": run(json.loads(Path(request).read_text(encoding="utf-8")))}
    except BaseException as error:  # including SystemExit, which VBench raises
        name = type(error).__name__
        found = {"error": f"{name}: {error}".rstrip(": "), "traceback": traceback.format_exc()}
    temporary = Path(answer).with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, answer)
    return 0 if "result" in found else 1


def end_with_parent() -> None:
    """End this process when its parent is gone, even if that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Inspect the environment, or score a dimension."""
    return look(request["modules"]) if request["job"] == "look" else score(request)


def look(modules: list[str]) -> dict[str, Any]:
    """Report versions, available modules, devices and the path of the package's prompts."""
    import torch

    import_torchvision()
    package = Path(str(importlib.util.find_spec("vbench").origin)).parent  # type: ignore[union-attr]
    return {
        "versions": versions(),
        "python": sys.version.split()[0],
        "modules": [name for name in modules if importlib.util.find_spec(name)],
        "devices": torch.cuda.device_count(),
        "full_info": str(package / "VBench_full_info.json"),
    }


def import_torchvision() -> None:
    """Import torchvision, even a CUDA build beside a CPU build of torch.

    Such a build cannot load its operators and refuses to be imported without them, so they are declared here.
    Calling one fails, but VBench calls none.
    """
    from torch.library import Library

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in OPERATORS:
            library.define(  # type: ignore[no-untyped-call]
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        declared.append(library)  # the declaration lives as long as this object
        importlib.import_module("torchvision")


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Return the score of a dimension and of each video that has one, by its requested path."""
    scratch, dimension = Path(request["scratch"]), request["dimension"]
    prepare_scratch(scratch, Path(request["weights"]), request["files"])
    import torch

    import_torchvision()

    requested = [path for entry in request["entries"] for path in entry["video_list"]]
    entries, original = with_required_names(dimension, request["entries"], scratch)
    full_info = scratch / "full_info.json"
    full_info.write_text(json.dumps(entries), encoding="utf-8")
    device = torch.device(request["device"])  # the string "cuda" would rescale large videos
    if dimension == "static_filter":
        total, videos = None, static_videos(requested, device)
    else:
        total, videos = compute(dimension, full_info, device)
        videos = {original[path]: value for path, value in videos.items()}
        if not isinstance(total, float) or not math.isfinite(total):
            raise ValueError(f"VBench returned no finite number for {dimension}: {total}")
    skipped = sorted(set(requested) - set(videos))
    if skipped and dimension not in PARTIAL:
        raise ValueError(
            f"VBench skipped {len(skipped)} of {len(requested)} videos: {', '.join(skipped[:5])}"
        )
    weights = {name: file_hash(Path(request["weights"]) / name) for name in request["files"]}
    return {"score": total, "videos": videos, "versions": versions(), "weights": weights}


def prepare_scratch(scratch: Path, weights: Path, files: list[str]) -> None:
    """Link weights to the paths where VBench, torch.hub and dreamsim look for them."""
    cache, hub = scratch / "cache", scratch / "torch" / "hub"
    for name in files:
        link(weights / name, cache / name)
    for name, file in HUB_LINKS.items():
        if (cache / file).exists():
            link(cache / file, hub / name)
    if (cache / "dreamsim_model").exists():
        link(cache / "dreamsim_model", scratch / "models")
    if "ViCLIP/ViClip-InternVid-10M-FLT.pth" in files:
        clip = Path(str(importlib.util.find_spec("clip").origin)).parent  # type: ignore[union-attr]
        words = "bpe_simple_vocab_16e6.txt.gz"  # otherwise VBench downloads it on import
        link(clip / words, cache / "ViCLIP" / words)
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["VBENCH_CACHE_DIR"], os.environ["TORCH_HOME"] = str(cache), str(scratch / "torch")
    os.chdir(scratch)


def link(target: Path, name: Path) -> None:
    """Make a link, replacing one that a killed job left."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.is_symlink():
        name.unlink()
    name.symlink_to(target.resolve())


def with_required_names(
    dimension: str, entries: list[dict[str, Any]], scratch: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Replace paths by links with the names VBench requires; also return the original of each path."""
    seen, original = [], {}
    for number, entry in enumerate(entries):
        paths = list(entry["video_list"])
        for k, target in enumerate(entry["video_list"]):
            if dimension in NAMED or not target.endswith(READ):
                name = scratch / "named" / str(number) / f"{entry['prompt_en']}-{k}.mp4"
                link(Path(target), name)
                paths[k] = str(name)
        original.update(dict(zip(paths, entry["video_list"])))  # noqa: B905  # strict= needs Python 3.10
        seen.append({**entry, "video_list": paths})
    return seen, original


def compute(dimension: str, full_info: Path, device: Any) -> tuple[float, dict[str, float]]:
    """Call VBench's function for a dimension."""
    if dimension == "camera_motion":  # imports a drawing tool that the package lacks and never uses
        tool = types.ModuleType("vbench2_beta_i2v.third_party.cotracker.utils.visualizer")
        tool.Visualizer = None  # type: ignore[attr-defined]
        for depth in range(2, tool.__name__.count(".") + 2):
            name = ".".join(tool.__name__.split(".")[:depth])
            sys.modules[name] = tool if name == tool.__name__ else types.ModuleType(name)
    package = "vbench2_beta_i2v" if dimension in I2V_ONLY else "vbench"
    parts = importlib.import_module(package + ".utils").init_submodules([dimension], local=True)[dimension]
    module = importlib.import_module(f"{package}.{dimension}")
    answer = getattr(module, f"compute_{dimension}")(str(full_info), device, parts)
    return float(answer[0]), {one["video_path"]: float(one["video_results"]) for one in answer[-1]}


def static_videos(paths: list[str], device: Any) -> dict[str, float]:
    """Classify videos by VBench's static filter: 1 for static, 0 for moving."""
    from easydict import EasyDict
    from vbench.cli import static_filter

    static_filter.DEVICE = device
    model = os.path.join(os.environ["VBENCH_CACHE_DIR"], "raft_model/models/raft-things.pth")
    settings = EasyDict(model=model, small=False, mixed_precision=False, alternate_corr=False)
    classifier = static_filter.StaticFilter(settings, device=device)
    return {path: float(classifier.infer(path)) for path in paths}


def versions() -> dict[str, str]:
    """Versions of the packages that scores depend on."""
    from importlib.metadata import PackageNotFoundError, version

    known = {}
    for name in VBENCH_PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    if declared:
        known["torchvision"] += " without its operators"
    return known


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and ".git" not in p.parts)
        listed = [f"{p.relative_to(path)} {file_hash(p)}" for p in files]
        return hashlib.sha256("\n".join(listed).encode()).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        for piece in iter(lambda: handle.read(1 << 22), b""):
            digest.update(piece)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(serve(*sys.argv[1:]))
