"""VBench's arithmetic against a result of the benchmark's own script and the rows of the paper."""

from __future__ import annotations

import pytest

from anyflow_cli.evaluate.suite import compute_summary, total_score
from anyflow_cli.evaluate.vbench.dimensions import (
    GROUPS,
    I2V,
    T2V,
    VBENCH_DIMENSIONS,
    Benchmark,
    prompt_and_video_counts,
)
from anyflow_cli.evaluate.vbench.published import PublishedRow, published

CHECK = {  # percent; the benchmark's own script gives 85.09, 75.82 and 83.24
    "subject_consistency": 97.37, "background_consistency": 97.76, "temporal_flickering": 99.44,
    "motion_smoothness": 98.99, "dynamic_degree": 70.83, "aesthetic_quality": 60.36, "imaging_quality": 67.56,
    "object_class": 86.10, "multiple_objects": 68.55, "human_action": 94.40, "color": 91.60,
    "spatial_relationship": 68.68, "scene": 53.88, "appearance_style": 19.80, "temporal_style": 23.89,
    "overall_consistency": 26.44,
}  # fmt: skip
RAW = {name: value / 100 for name, value in CHECK.items()}


def test_the_check_vector_is_reproduced_to_the_last_digit() -> None:
    sums = compute_summary(T2V, GROUPS["vbench"], RAW)
    assert {name: round(mean or 0, 2) for name, mean in sums.groups.items()} == {
        "quality": 85.09, "semantic": 75.82,
    }  # fmt: skip
    assert round(sums.total or 0, 2) == 83.24
    assert sums.missing == ()


@pytest.mark.parametrize("name", CHECK)
def test_without_any_one_dimension_there_is_no_total(name: str) -> None:
    sums = compute_summary(T2V, GROUPS["vbench"], {n: v for n, v in RAW.items() if n != name})
    assert (sums.total, sums.missing) == (None, (name,))
    assert list(sums.groups.values()).count(None) == 1


def test_scores_outside_their_range_are_not_clamped() -> None:
    dimensions = compute_summary(
        T2V, GROUPS["vbench"], RAW | {"scene": 0.9, "temporal_flickering": 0.5}
    ).dimensions
    assert dimensions["scene"] == pytest.approx(100 * 0.9 / 0.8222)
    assert dimensions["temporal_flickering"] == pytest.approx(100 * (0.5 - 0.6293) / (1 - 0.6293))


def test_image_to_video_has_its_own_weights() -> None:
    raw = {d.name: d.low + 0.5 * (d.high - d.low) for d in I2V}
    raw |= {"dynamic_degree": 1.0, "camera_motion": 0.0}
    sums = compute_summary(I2V, GROUPS["vbench-i2v"], raw)
    quality, i2v = 100 * (5 * 0.5 + 0.5 * 1.0) / 5.5, 100 * (0.5 + 0.5 + 0.1 * 0.0) / 2.1
    assert sums.groups == pytest.approx({"quality": quality, "i2v": i2v})
    assert sums.total == pytest.approx((quality + i2v) / 2)


def test_the_dimensions_have_the_weights_of_the_benchmark() -> None:
    weights = {
        (benchmark, group): sum(d.weight for d in dimensions if d.group == group)
        for benchmark, dimensions in VBENCH_DIMENSIONS.items()
        for group in GROUPS[benchmark]
    }
    assert weights == pytest.approx(
        {("vbench", "quality"): 6.5, ("vbench", "semantic"): 9, ("vbench-i2v", "quality"): 5.5,
         ("vbench-i2v", "i2v"): 2.1}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("benchmark", "counts"),
    [
        (
            "vbench",
            {"subject_consistency": 72, "scene": 86, "overall_consistency": 93},
        ),
        ("vbench-i2v", {"i2v_subject": 246, "i2v_background": 109, "camera_motion": 763}),
    ],
)
def test_prompts_are_counted_for_any_choice_of_dimensions(
    benchmark: Benchmark, counts: dict[str, int]
) -> None:
    names = [dimension.name for dimension in VBENCH_DIMENSIONS[benchmark]]
    assert all(prompt_and_video_counts(benchmark, [name])[0] > 0 for name in names)
    assert {name: prompt_and_video_counts(benchmark, [name])[0] for name in counts} == counts
    assert prompt_and_video_counts(benchmark, names) == prompt_and_video_counts(benchmark)


def rows() -> list[tuple[Benchmark, PublishedRow]]:
    benchmarks: tuple[Benchmark, ...] = ("vbench", "vbench-i2v")
    return [(benchmark, row) for benchmark in benchmarks for row in published(benchmark)]


def adds_up(row: PublishedRow, benchmark: Benchmark) -> bool:
    """Whether some groups that are printed like these give a Total that is printed like this one."""
    total = total_score(row.groups, GROUPS[benchmark])
    return total is not None and abs(total - row.total) <= 2 * 0.005 + 1e-9


def test_the_rows_that_do_not_add_up_are_marked() -> None:
    """HunyuanVideo's would with a Semantic of 75.82: the check vector has its Quality and its Total."""
    assert len(rows()) == 28
    wrong = [row for benchmark, row in rows() if not adds_up(row, benchmark)]
    assert [(row.model, row.groups, row.total) for row in wrong] == [
        ("HunyuanVideo", {"quality": 85.09, "semantic": 76.88}, 83.24)
    ]
    assert [row for _, row in rows() if row.remark] == wrong
    row = published("vbench-i2v")[0]
    assert not adds_up(row.model_copy(update={"total": row.total + 0.02}), "vbench-i2v")
