"""The dimensions of VBench and VBench-I2V: ranges, weights and groups, as the benchmark itself sums them.

Ranges are not clamped, as the benchmark does not clamp. Its scripts count a missing dimension as 0;
``sum_up`` gives no Total instead. Source: VBench, ``scripts/constant.py``, ``cal_final_score.py``,
``cal_i2v_final_score.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
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
