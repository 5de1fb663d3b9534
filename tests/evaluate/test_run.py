"""Evaluation with a rendering generator: what is sampled, what is reused, and what is reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyflow_cli.data.video import ClipFormat, read_clip
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.protocol import (
    SamplingSettings,
    Variant,
    evaluated_model,
    protocol_card,
    sampling_note,
    variant,
)
from anyflow_cli.evaluate.results import Evaluation
from anyflow_cli.evaluate.run import prepare_evaluation, run_evaluation
from anyflow_cli.evaluate.suite import Assessment, ScoringNotes
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.schema import ModelSection, Recipe
from anyflow_cli.runs.checkpoint import CheckpointState, LoopState, save
from anyflow_cli.runs.lineage import RunLineage
from anyflow_cli.runs.open import ModelChoice
from anyflow_cli.utils.run_lock import RunLock
from tests.evaluate.drawn import CAPTIONED, Drawn, KilledError, make_folder, make_job
from tests.evaluate.drawn import drawn as drawn_clip


def test_all_variants_sample_the_same_prompts_and_seeds(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path), Drawn()
    progress: list[int] = []
    found = run_evaluation(job, drawn.open, progress.append)
    by_steps = {steps: [(p, s) for p, s, n in drawn.requests if n == steps] for steps in (1, 2, 5)}
    assert by_steps[1] == by_steps[2] == by_steps[5]
    assert [seed for _, seed in by_steps[1]] == [7, 8, 9, 10]
    assert [prompt for prompt, _ in by_steps[1]] == list(job.protocol.prompts)
    assert progress == [0, 2, 4, 6, 8, 10, 12]
    assert [one.title for one in found.columns] == ["1 step", "2 steps", "teacher 5x2"]
    assert [one.evaluations for one in found.columns] == [1, 2, 10]


def test_each_video_of_a_prompt_has_its_own_seed(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path, nfe=(2,), prompts=2, samples=2, teacher=False), Drawn()
    run_evaluation(job, drawn.open)
    first, second = job.protocol.prompts
    assert drawn.requests == [(first, 7, 2), (first, 8, 2), (second, 9, 2), (second, 10, 2)]


def test_scores_latency_and_videos_are_stored(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    found = run_evaluation(job, Drawn().open)
    one = found.models[0]
    assert (one.network_seconds, one.seconds, one.batch) == (0.5, 0.75, 2)
    assert one.result.dimensions["sharpness"] < found.columns[-1].result.dimensions["sharpness"] - 30
    clip = read_clip(one.files[0], ClipFormat(33, 16, 64, 64))
    assert clip.changes == ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run_evaluation(make_job(tmp_path_factory.mktemp("whole")), Drawn().open)


@pytest.mark.parametrize("lives", [0, 1, 5, 11])
def test_an_evaluation_resumed_after_a_kill_has_the_same_result(
    tmp_path: Path, whole: Evaluation, lives: int
) -> None:
    job, first, second = make_job(tmp_path / "cut"), Drawn(lives=lives), Drawn()
    with pytest.raises(KilledError):
        run_evaluation(job, first.open)
    found = run_evaluation(job, second.open)
    kept = first.requests[: lives // 2 * 2]  # whole batches
    assert len(kept + second.requests) == len({*kept, *second.requests}) == 12
    for a, b in zip(whole.measured, found.measured, strict=True):
        assert a.result == b.result
        assert a.interval == b.interval


def test_a_finished_evaluation_loads_no_model(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    before = run_evaluation(job, Drawn().open)
    assert (
        run_evaluation(job, lambda of, recipe: pytest.fail("a model was loaded")).as_json()
        == before.as_json()
    )


def test_more_prompts_and_steps_extend_what_is_there(tmp_path: Path) -> None:
    run_evaluation(make_job(tmp_path, nfe=(1,), prompts=2, teacher=False), Drawn().open)
    more = Drawn()
    run_evaluation(make_job(tmp_path, nfe=(1, 2), prompts=3, teacher=False), more.open)
    assert [(seed, nfe) for _, seed, nfe in more.requests] == [(9, 1), (7, 2), (8, 2), (9, 2)]


def test_a_model_trained_further_is_scored_again_but_its_teacher_is_not(tmp_path: Path) -> None:
    run_evaluation(make_job(tmp_path, nfe=(1,)), Drawn().open)
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"newer")
    again = Drawn()
    run_evaluation(make_job(tmp_path, nfe=(1,)), again.open)
    assert {nfe for *_, nfe in again.requests} == {1}
    assert len(again.requests) == 4


def test_metadata_does_not_change_the_key(tmp_path: Path) -> None:
    before = make_job(tmp_path).variants[0]
    (tmp_path / "model" / "lineage.json").write_text('{"parent": "x"}')
    after = make_job(tmp_path).variants[0]
    assert after.key == before.key
    assert after.model.lineage == {"parent": "x"}


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"shift": 2.0}),
        ("model", {"max_text_tokens": 9}),
        ("model", {"frames": 5}),
    ],
)
def test_settings_that_change_videos_change_the_key(
    tmp_path: Path, section: str, changes: dict[str, object]
) -> None:
    job = make_job(tmp_path)
    part = getattr(job.recipe, section).model_copy(update=changes)
    other = job.recipe.model_copy(update={section: part})
    of = job.variants[0].model
    assert variant(of, 1, job.protocol, other).key != job.variants[0].key


def settings_of(one: Variant) -> SamplingSettings:
    assert isinstance(one.settings, SamplingSettings)
    return one.settings


def make_checkpoint(path: Path, teacher: Path, recipe: Recipe, weights: dict[str, float]) -> None:
    average = {name: torch.full((1,), value) for name, value in weights.items()}
    step = int(path.name.removeprefix("step-"))
    save(path.parent, CheckpointState(step, {"ema": average}, {}, LoopState({}, 0)), keep=9)
    run = path.parent.parent
    lineage = RunLineage(
        stage="distill", command=[], recipe="", base=str(teacher), versions={}, inputs={},
        precision="fp32", processes=1,
    )  # fmt: skip
    (run / "lineage.json").write_text(json.dumps(lineage.as_dict()))
    (run / "recipe.yaml").write_text(dump(recipe))


def test_each_checkpoint_of_a_run_is_a_model_of_its_own(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    folder = tmp_path / "distill"
    steps = [folder / "checkpoints" / f"step-{step:06d}" for step in (1, 2)]
    for value, step in enumerate(steps):
        weights = {"condition_embedder.delta_embedder.x": float(value)}
        make_checkpoint(step, tmp_path / "teacher", job.recipe, weights)
    first, second, newest = (
        evaluated_model(ModelChoice(str(path), "given"), job.recipe) for path in (*steps, folder)
    )
    assert first.weights != second.weights == newest.weights
    assert not first.teacher  # it has a second time
    assert first.partition is None
    assert newest.lineage["checkpoint"] == "step-000002"


def test_a_checkpoint_that_was_made_causal_has_the_chunks_of_its_recipe(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    causal = {"partition": (1, 4, 4), "full_chunks": 2}
    model = ModelSection(**(job.recipe.model.model_dump() | {"causal": causal}))
    path = tmp_path / "distill" / "checkpoints" / "step-000001"
    weights = {"condition_embedder.delta_embedder.x": 1.0, "far_patch_embedding.bias": 1.0}
    make_checkpoint(path, tmp_path / "teacher", job.recipe.model_copy(update={"model": model}), weights)
    assert evaluated_model(ModelChoice(str(path), "given"), job.recipe).partition == (1, 4, 4)


def test_guidance_is_part_of_the_teachers_key_only(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,))
    sample = job.recipe.sample.model_copy(update={"teacher_guidance": 2.0})
    other = job.recipe.model_copy(update={"sample": sample})
    keys = [
        [variant(one.model, 1, job.protocol, recipe).key for one in job.variants]
        for recipe in (job.recipe, other)
    ]
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_a_partial_line_is_dropped_and_its_video_sampled_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    run_evaluation(job, Drawn().open)
    path = job.store(job.variants[0]).directory / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    again = Drawn()
    run_evaluation(job, again.open)
    assert [seed for _, seed, _ in again.requests] == [10]
    assert len(path.read_text().splitlines()) == 4


def test_a_deleted_video_is_sampled_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    found = run_evaluation(job, Drawn().open)
    found.models[0].files[2].unlink()
    again = Drawn()
    run_evaluation(job, again.open)
    assert [seed for _, seed, _ in again.requests] == [9]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    run_evaluation(job, Drawn().open)
    path = job.store(job.variants[0]).directory / "scores.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    with pytest.raises(AnyflowError, match=r"Line 2 of .*scores\.jsonl is damaged: prompt: Field required"):
        run_evaluation(job, Drawn().open)


def test_a_second_evaluation_in_a_directory_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    with (
        RunLock(job.out),
        pytest.raises(UsageError, match=r"out is in use by process \d+ on "),
    ):
        run_evaluation(job, Drawn().open)


def test_the_model_may_be_the_teacher_itself(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(2, 5))
    make_folder(tmp_path / "same", b"old")
    same = prepare_evaluation(job.recipe, job.protocol, ModelChoice(str(tmp_path / "same"), "given"), job.out)
    assert [one.label for one in same.variants] == ["2x2", "5x2"]
    assert [one.title for one in run_evaluation(same, Drawn().open).columns] == ["2x2 steps", "5x2 steps"]


def test_the_card_has_everything_needed_to_repeat_the_numbers(whole: Evaluation) -> None:
    card = json.loads(json.dumps(whole.card.as_json()))
    assert card["comparable"] is True
    assert card["prompts"] == 4
    assert len(card["prompt_set"]) == 64
    assert card["seeds"] == [7, 10]
    assert card["versions"].keys() >= {"anyflow", "torch", "diffusers"}
    for entry in card["models"].values():
        assert entry.keys() >= {"weights", "sampler", "steps", "guidance", "shift", "precision", "lineage"}


def test_the_suites_notes_do_not_replace_the_models_hash(tmp_path: Path) -> None:
    """Version 0.1 put the weights of VBench under the key of the model's own."""
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    notes = ScoringNotes(("scene",), False, {"vbench": "0.1.5"}, {"caption_model/x.pth": "f" * 64})
    card = protocol_card(job.protocol, job.variants, job.recipe, [Assessment([], {}, notes=notes)])
    (entry,) = card.models.values()
    assert entry.weights == job.variants[0].model.weights
    assert entry.vbench_weights == {"caption_model/x.pth": "f" * 64}


def test_the_card_names_the_scheduler_that_the_sampler_replaces(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,))
    folder = tmp_path / "teacher" / "scheduler"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text('{"_class_name": "Some", "flow_shift": 3.0}')
    before, after = job.variants[1], make_job(tmp_path, nfe=(1,)).variants[1]
    assert before.model.scheduler is None
    assert after.model.scheduler == "Some, shift 3"
    assert sampling_note(after) == "guided Euler, 5x2 steps, shift 5 (its own scheduler: Some, shift 3)"
    card = protocol_card(job.protocol, [after], job.recipe, [Assessment([], {})])
    assert card.as_json()["models"][after.key]["scheduler"] == "Some, shift 3"


def test_other_prompts_have_another_hash(tmp_path: Path) -> None:
    cards = [run_evaluation(make_job(tmp_path, prompts=n), Drawn().open).card for n in (3, 4)]
    assert cards[0].prompt_set != cards[1].prompt_set


def test_image_to_video_conditions_each_video_on_its_own_image(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path, nfe=(2,), task="i2v", kind="AnyFlowFAR"), Drawn()
    found = run_evaluation(job, drawn.open)
    wanted = job.protocol.suite.images([item.prompt for item in job.protocol.requests], [7, 8, 9, 10])
    assert wanted is not None
    assert all((a == b).all() for a, b in zip(drawn.conditions, wanted, strict=True))
    assert [one.reference for one in found.columns] == [False]  # a teacher is not conditioned on images
    assert found.card.suite == "shapes-i2v"
    first = found.models[0].records[0]
    again = job.protocol.suite.score([drawn_clip(CAPTIONED[first.prompt], 2)], [first.prompt], wanted[:1])[0]
    assert first.score.scores == pytest.approx(again.scores)
    assert len(first.score.pieces) == 9


def test_image_to_video_refuses_a_bidirectional_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes no videos from text and a first frame") as error:
        make_job(tmp_path, task="i2v")
    assert "causal" in str(error.value.hint)


def test_a_plain_wan_model_with_the_consistency_sampler_is_a_student(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(4,))
    own = job.recipe.evaluate.model_copy(update={"sampler": "consistency"})
    recipe = job.recipe.model_copy(update={"evaluate": own})
    student = prepare_evaluation(
        recipe, job.protocol, ModelChoice(recipe.model.teacher, "given"), job.out
    ).variants
    assert [one.label for one in student] == ["4", "5x2"]
    assert [one.evaluations for one in student] == [4, 10]
    assert [settings_of(one).sampler for one in student] == ["consistency", "guided Euler"]
    assert settings_of(student[0]).guidance is None
    drawn = Drawn()
    assert [one.title for one in run_evaluation(replace(job, variants=student), drawn.open).columns] == [
        "4 steps", "teacher 5x2",
    ]  # fmt: skip
