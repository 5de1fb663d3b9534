"""Dimensions and prompts of VBench and VBench-I2V as data, known without the benchmark's environment.

Ranges are not clamped, as in the benchmark. Its scripts count a missing dimension as 0, where
``compute_summary`` leaves Total empty. Source: VBench, ``scripts/constant.py``, ``cal_final_score.py``,
``cal_i2v_final_score.py``; prompt counts from ``VBench_full_info.json`` and ``vbench2_i2v_full_info.json``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from anyflow_cli.evaluate.suite import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, Dimension

Benchmark = Literal["vbench", "vbench-i2v"]

T2V = (
    #         dimension                 group      weight  low     high
    Dimension("subject_consistency",    "quality",  1.0, 0.1462, 1.0),
    Dimension("background_consistency", "quality",  1.0, 0.2615, 1.0),
    Dimension("temporal_flickering",    "quality",  1.0, 0.6293, 1.0),
    Dimension("motion_smoothness",      "quality",  1.0, 0.706,  0.9975),
    Dimension("dynamic_degree",         "quality",  0.5, 0.0,    1.0),
    Dimension("aesthetic_quality",      "quality",  1.0, 0.0,    1.0),
    Dimension("imaging_quality",        "quality",  1.0, 0.0,    1.0),
    Dimension("object_class",           "semantic", 1.0, 0.0,    1.0),
    Dimension("multiple_objects",       "semantic", 1.0, 0.0,    1.0),
    Dimension("human_action",           "semantic", 1.0, 0.0,    1.0),
    Dimension("color",                  "semantic", 1.0, 0.0,    1.0),
    Dimension("spatial_relationship",   "semantic", 1.0, 0.0,    1.0),
    Dimension("scene",                  "semantic", 1.0, 0.0,    0.8222),
    Dimension("appearance_style",       "semantic", 1.0, 0.0009, 0.2855),
    Dimension("temporal_style",         "semantic", 1.0, 0.0,    0.364),
    Dimension("overall_consistency",    "semantic", 1.0, 0.0,    0.364),
)  # fmt: skip

I2V = (
    #         dimension                 group      weight  low     high
    Dimension("subject_consistency",    "quality",  1.0, 0.1462, 1.0),
    Dimension("background_consistency", "quality",  1.0, 0.2615, 1.0),
    Dimension("motion_smoothness",      "quality",  1.0, 0.706,  0.9975),
    Dimension("dynamic_degree",         "quality",  0.5, 0.0,    1.0),
    Dimension("aesthetic_quality",      "quality",  1.0, 0.0,    1.0),
    Dimension("imaging_quality",        "quality",  1.0, 0.0,    1.0),
    Dimension("i2v_subject",            "i2v",      1.0, 0.1462, 1.0),
    Dimension("i2v_background",         "i2v",      1.0, 0.2615, 1.0),
    Dimension("camera_motion",          "i2v",      0.1, 0.0,    1.0),
)  # fmt: skip

VBENCH_DIMENSIONS: dict[Benchmark, tuple[Dimension, ...]] = {"vbench": T2V, "vbench-i2v": I2V}
GROUPS: dict[str, Mapping[str, float]] = {
    "vbench": TEXT_TO_VIDEO,
    "vbench-i2v": IMAGE_TO_VIDEO,
}

SAMPLES = 5  # videos per prompt
STATIC_SAMPLES = 25  # the same for temporal flickering, of which a filter keeps the first five static ones
FLICKERING = "temporal_flickering"

# Unique prompts by the set of dimensions that their videos are scored on.
PROMPT_COUNTS: dict[Benchmark, tuple[tuple[int, frozenset[str]], ...]] = {
    "vbench": (
        (75,  frozenset({FLICKERING})),
        (72,  frozenset({"subject_consistency", "motion_smoothness", "dynamic_degree"})),
        (86,  frozenset({"background_consistency", "scene"})),
        (91,  frozenset({"aesthetic_quality", "imaging_quality", "overall_consistency"})),
        (2,   frozenset({"aesthetic_quality", "imaging_quality", "overall_consistency", "appearance_style"})),
        (88,  frozenset({"appearance_style"})),
        (100, frozenset({"temporal_style"})),
        (79,  frozenset({"object_class"})),
        (82,  frozenset({"multiple_objects"})),
        (100, frozenset({"human_action"})),
        (85,  frozenset({"color"})),
        (84,  frozenset({"spatial_relationship"})),
    ),
    "vbench-i2v": (
        (109, frozenset({"i2v_background", "background_consistency", "aesthetic_quality",
                         "imaging_quality"})),
        (246, frozenset({"i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree",
                         "aesthetic_quality", "imaging_quality"})),
        (763, frozenset({"camera_motion"})),
    ),
}  # fmt: skip


def prompt_and_video_counts(
    benchmark: Benchmark,
    dimensions: Collection[str] | None = None,
    samples: int = SAMPLES,
    flickering: int = STATIC_SAMPLES,
) -> tuple[int, int]:
    """Count the prompts of a benchmark and the videos of one model.

    Args:
        benchmark: Which one.
        dimensions: Only prompts of these; None: all.
        samples: Videos per prompt.
        flickering: Videos per prompt of temporal flickering, where that is more than ``samples``.
    """
    chosen = [
        (count, scored_on) for count, scored_on in PROMPT_COUNTS[benchmark]
        if dimensions is None or scored_on & set(dimensions)
    ]  # fmt: skip
    many = benchmark == "vbench" and samples == SAMPLES
    videos = sum(
        count * (max(samples, flickering) if many and FLICKERING in scored_on else samples)
        for count, scored_on in chosen
    )
    return sum(count for count, _ in chosen), videos
