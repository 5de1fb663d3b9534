"""One job inside VBench's own environment: a dimension over given videos, JSON in and JSON out.

``python worker.py REQUEST ANSWER``. This file is run by another interpreter (3.8 on), imports nothing of this
package, and only VBench's modules when it needs them. Whatever happens is written to ANSWER, errors with
their whole traceback; if ANSWER is not there, the process died. All else that VBench prints goes to the log.

VBench sees a cache directory of its own in SCRATCH, of links to the weights that the job may use, so that a
missing file is never fetched into the user's, and files under the names it wants them by.
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

OWN = ("i2v_subject", "i2v_background", "camera_motion")  # in vbench2_beta_i2v
NAMED = ("human_action", "camera_motion")  # read what a video shows from the name of its file
READ = (".mp4", ".gif")  # endings by which VBench tells how to read a video; a name of ours is an mp4's
PARTIAL = ("color",)  # has no word on a video in which its object is not found, and leaves it out of the mean
OPERATORS = ("nms", "qnms")  # that torchvision wants to see when it is imported
LOOK_EVERY = 1.0  # seconds between looks at whether the parent is there
PACKAGES = ("vbench", "torch", "torchvision", "transformers", "numpy", "decord", "opencv-python")
HUB_LINKS = {  # where torch.hub looks: our file or folder
    "checkpoints/dino_vitbase16_pretrain.pth": "dino_model/dino_vitbase16_pretrain.pth",
    "checkpoints/cotracker2.pth": "cotracker_model/cotracker2.pth",
    "facebookresearch_co-tracker_main": "cotracker_model/facebookresearch_co-tracker_main",
}
declared: list[Any] = []  # torchvision's operators, where its build does not fit torch's


def main(request: str, answer: str) -> int:
    """Do what ``request`` asks; the exit code is 0 where ``answer`` holds a result."""
    end_with_parent()
    try:
        found: dict[str, Any] = {"result": run(json.loads(Path(request).read_text(encoding="utf-8")))}
    except BaseException as error:  # also what VBench raises to end the process
        name = type(error).__name__
        found = {"error": f"{name}: {error}".rstrip(": "), "traceback": traceback.format_exc()}
    temporary = Path(answer).with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, answer)
    return 0 if "result" in found else 1


def end_with_parent() -> None:
    """End this process when the one that started it is gone, killed without a chance to say so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Either look at the environment, or score."""
    return look(request["modules"]) if request["job"] == "look" else score(request)


def look(modules: list[str]) -> dict[str, Any]:
    """Versions, which modules can be found, devices, and the prompts that come with the package."""
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
    """Also a build for CUDA beside a torch for the CPU, which is all that some indices have.

    Such a build cannot load its operators and refuses to be imported without them. They are then declared;
    whatever calls one fails, but VBench calls none.
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
        declared.append(library)  # it holds as long as this object lives
        importlib.import_module("torchvision")


def score(request: dict[str, Any]) -> dict[str, Any]:
    """The dimension's score, and that of each video it has a word on, by the path it was asked with."""
    scratch, dimension = Path(request["scratch"]), request["dimension"]
    prepare_scratch(scratch, Path(request["weights"]), request["files"])
    import torch

    import_torchvision()

    asked = [path for entry in request["entries"] for path in entry["video_list"]]
    entries, original = under_their_names(dimension, request["entries"], scratch)
    full_info = scratch / "full_info.json"
    full_info.write_text(json.dumps(entries), encoding="utf-8")
    device = torch.device(request["device"])  # the string "cuda" would rescale large videos
    if dimension == "static_filter":
        total, videos = None, static_videos(asked, device)
    else:
        total, videos = compute(dimension, full_info, device)
        videos = {original[path]: value for path, value in videos.items()}
        if not isinstance(total, float) or not math.isfinite(total):
            raise ValueError(f"VBench gave no number for {dimension}: {total}")
    silent = sorted(set(asked) - set(videos))
    if silent and dimension not in PARTIAL:
        raise ValueError(f"VBench skipped {len(silent)} of {len(asked)} videos: {', '.join(silent[:5])}")
    weights = {name: file_hash(Path(request["weights"]) / name) for name in request["files"]}
    return {"score": total, "videos": videos, "versions": versions(), "weights": weights}


def prepare_scratch(scratch: Path, weights: Path, files: list[str]) -> None:
    """Links under the names by which VBench, torch.hub and dreamsim look for weights."""
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
        words = "bpe_simple_vocab_16e6.txt.gz"  # else VBench fetches it while it is imported
        link(clip / words, cache / "ViCLIP" / words)
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["VBENCH_CACHE_DIR"], os.environ["TORCH_HOME"] = str(cache), str(scratch / "torch")
    os.chdir(scratch)


def link(target: Path, name: Path) -> None:
    """Make the link, whatever a killed job left there."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if name.is_symlink():
        name.unlink()
    name.symlink_to(target.resolve())


def under_their_names(
    dimension: str, entries: list[dict[str, Any]], scratch: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The entries as VBench is to see them, and the path that each of its paths stands for."""
    seen, original = [], {}
    for number, entry in enumerate(entries):
        paths = list(entry["video_list"])
        for k, target in enumerate(entry["video_list"]):
            if dimension in NAMED or not target.endswith(READ):
                name = scratch / "named" / str(number) / f"{entry['prompt_en']}-{k}.mp4"
                link(Path(target), name)
                paths[k] = str(name)
        original.update(dict(zip(paths, entry["video_list"])))  # noqa: B905  # strict= is of Python 3.10
        seen.append({**entry, "video_list": paths})
    return seen, original


def compute(dimension: str, full_info: Path, device: Any) -> tuple[float, dict[str, float]]:
    """Call VBench's own function."""
    if dimension == "camera_motion":  # it imports a drawing tool that the package forgot, and never draws
        tool = types.ModuleType("vbench2_beta_i2v.third_party.cotracker.utils.visualizer")
        tool.Visualizer = None  # type: ignore[attr-defined]
        for depth in range(2, tool.__name__.count(".") + 2):
            name = ".".join(tool.__name__.split(".")[:depth])
            sys.modules[name] = tool if name == tool.__name__ else types.ModuleType(name)
    package = "vbench2_beta_i2v" if dimension in OWN else "vbench"
    parts = importlib.import_module(package + ".utils").init_submodules([dimension], local=True)[dimension]
    module = importlib.import_module(f"{package}.{dimension}")
    answer = getattr(module, f"compute_{dimension}")(str(full_info), device, parts)
    return float(answer[0]), {one["video_path"]: float(one["video_results"]) for one in answer[-1]}


def static_videos(paths: list[str], device: Any) -> dict[str, float]:
    """1 for each video in which nothing moves, by VBench's filter."""
    from easydict import EasyDict
    from vbench.cli import static_filter

    static_filter.DEVICE = device
    model = os.path.join(os.environ["VBENCH_CACHE_DIR"], "raft_model/models/raft-things.pth")
    settings = EasyDict(model=model, small=False, mixed_precision=False, alternate_corr=False)
    judge = static_filter.StaticFilter(settings, device=device)
    return {path: float(judge.infer(path)) for path in paths}


def versions() -> dict[str, str]:
    """Of the packages that a score may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    known = {}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    if declared:
        known["torchvision"] += " without its operators"
    return known


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a folder, of its files' names and hashes."""
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
    sys.exit(main(*sys.argv[1:]))
