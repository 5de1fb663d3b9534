"""Evaluation with a generator that draws: what is made, what is made again, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anyflow_cli.data.video import ClipFormat, read_clip
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.generate import alone_in
from anyflow_cli.evaluate.protocol import subject, variant
from anyflow_cli.evaluate.results import Evaluation
from anyflow_cli.evaluate.run import prepare_evaluation, run_evaluation
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.schema import ModelSection, Recipe
from anyflow_cli.runs.open import ModelChoice
from tests.evaluate.drawn import CAPTIONED, Drawn, KilledError, make_folder, make_job
from tests.evaluate.drawn import drawn as drawn_clip


def test_every_variant_makes_every_video_from_the_same_seeds(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path), Drawn()
    heard: list[int] = []
    found = run_evaluation(job, drawn.open, heard.append)
    by_steps = {steps: [(p, s) for p, s, n in drawn.asked if n == steps] for steps in (1, 2, 5)}
    assert by_steps[1] == by_steps[2] == by_steps[5]
    assert [seed for _, seed in by_steps[1]] == [7, 8, 9, 10]
    assert [prompt for prompt, _ in by_steps[1]] == list(job.protocol.prompts)
    assert heard == [0, 2, 4, 6, 8, 10, 12]
    assert [one.title for one in found.columns] == ["1 step", "2 steps", "teacher 5x2"]
    assert [one.evaluations for one in found.columns] == [1, 2, 10]


def test_samples_of_a_prompt_have_seeds_of_their_own(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path, nfe=(2,), prompts=2, samples=2, teacher=False), Drawn()
    run_evaluation(job, drawn.open)
    first, second = job.protocol.prompts
    assert drawn.asked == [(first, 7, 2), (first, 8, 2), (second, 9, 2), (second, 10, 2)]


def test_scores_latency_and_videos_are_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    found = run_evaluation(job, Drawn().open)
    one = found.models[0]
    assert (one.network_seconds, one.seconds, one.batch) == (0.5, 0.75, 2)
    assert one.result.dimensions["sharpness"] < found.columns[-1].result.dimensions["sharpness"] - 30
    clip = read_clip(one.directory / one.scored[0].file, ClipFormat(33, 16, 64, 64))
    assert clip.changes == ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run_evaluation(make_job(tmp_path_factory.mktemp("whole")), Drawn().open)


@pytest.mark.parametrize("lives", [0, 1, 5, 11])
def test_a_killed_evaluation_goes_on_and_ends_the_same(tmp_path: Path, whole: Evaluation, lives: int) -> None:
    job, first, second = make_job(tmp_path / "cut"), Drawn(lives=lives), Drawn()
    with pytest.raises(KilledError):
        run_evaluation(job, first.open)
    found = run_evaluation(job, second.open)
    kept = first.asked[: lives // 2 * 2]  # whole batches
    assert len(kept + second.asked) == len({*kept, *second.asked}) == 12
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


def test_more_prompts_and_steps_add_to_what_is_there(tmp_path: Path) -> None:
    run_evaluation(make_job(tmp_path, nfe=(1,), prompts=2, teacher=False), Drawn().open)
    more = Drawn()
    run_evaluation(make_job(tmp_path, nfe=(1, 2), prompts=3, teacher=False), more.open)
    assert [(seed, nfe) for _, seed, nfe in more.asked] == [(9, 1), (7, 2), (8, 2), (9, 2)]


def test_a_model_trained_further_is_scored_anew_and_the_teacher_is_not(tmp_path: Path) -> None:
    run_evaluation(make_job(tmp_path, nfe=(1,)), Drawn().open)
    (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"newer")
    again = Drawn()
    run_evaluation(make_job(tmp_path, nfe=(1,)), again.open)
    assert {nfe for *_, nfe in again.asked} == {1}
    assert len(again.asked) == 4


def test_notes_about_a_model_do_not_make_it_another(tmp_path: Path) -> None:
    before = make_job(tmp_path).variants[0]
    (tmp_path / "model" / "lineage.json").write_text('{"parent": "x"}')
    after = make_job(tmp_path).variants[0]
    assert after.key == before.key
    assert after.subject.lineage == {"parent": "x"}


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"shift": 2.0}),
        ("model", {"max_text_tokens": 9}),
        ("model", {"frames": 5}),
    ],
)
def test_what_changes_videos_changes_the_key(
    tmp_path: Path, section: str, changes: dict[str, object]
) -> None:
    job = make_job(tmp_path)
    part = getattr(job.recipe, section).model_copy(update=changes)
    other = job.recipe.model_copy(update={section: part})
    of = job.variants[0].subject
    assert variant(of, 1, job.protocol, other).key != job.variants[0].key


def make_checkpoint(path: Path, teacher: Path, recipe: Recipe, weights: dict[str, float]) -> None:
    path.mkdir(parents=True)
    (path / "COMPLETE").touch()
    (path / "state.json").write_text('{"format": 1}')
    save_file({name: torch.full((1,), value) for name, value in weights.items()}, path / "ema.safetensors")
    run = path.parent.parent
    (run / "lineage.json").write_text(json.dumps({"base": str(teacher)}))
    (run / "recipe.yaml").write_text(dump(recipe))


def test_a_later_checkpoint_of_a_run_is_another_model(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    folder = tmp_path / "distill"
    steps = [folder / "checkpoints" / f"step-{step:06d}" for step in (1, 2)]
    for value, step in enumerate(steps):
        weights = {"condition_embedder.delta_embedder.x": float(value)}
        make_checkpoint(step, tmp_path / "teacher", job.recipe, weights)
    first, second, newest = (
        subject(ModelChoice(str(path), "given"), job.recipe) for path in (*steps, folder)
    )
    assert first.weights != second.weights == newest.weights
    assert not first.teacher  # it has grown a second time
    assert first.partition is None
    assert newest.lineage["checkpoint"] == "step-000002"


def test_a_checkpoint_that_became_causal_has_the_chunks_of_its_recipe(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    causal = {"partition": (1, 4, 4), "full_chunks": 2}
    model = ModelSection(**(job.recipe.model.model_dump() | {"causal": causal}))
    path = tmp_path / "distill" / "checkpoints" / "step-000001"
    weights = {"condition_embedder.delta_embedder.x": 1.0, "far_patch_embedding.bias": 1.0}
    make_checkpoint(path, tmp_path / "teacher", job.recipe.model_copy(update={"model": model}), weights)
    assert subject(ModelChoice(str(path), "given"), job.recipe).partition == (1, 4, 4)


def test_guidance_belongs_to_the_teacher_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,))
    sample = job.recipe.sample.model_copy(update={"teacher_guidance": 2.0})
    other = job.recipe.model_copy(update={"sample": sample})
    keys = [
        [variant(one.subject, 1, job.protocol, recipe).key for one in job.variants]
        for recipe in (job.recipe, other)
    ]
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_the_line_that_a_kill_cut_off_is_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    run_evaluation(job, Drawn().open)
    path = job.store(job.variants[0]).directory / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    again = Drawn()
    run_evaluation(job, again.open)
    assert [seed for _, seed, _ in again.asked] == [10]
    assert len(path.read_text().splitlines()) == 4


def test_a_video_that_is_gone_is_made_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    found = run_evaluation(job, Drawn().open)
    (found.models[0].directory / found.models[0].scored[2].file).unlink()
    again = Drawn()
    run_evaluation(job, again.open)
    assert [seed for _, seed, _ in again.asked] == [9]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    run_evaluation(job, Drawn().open)
    path = job.store(job.variants[0]).directory / "scores.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[2:]]) + "\n")
    with pytest.raises(AnyflowError, match=r"Line 2 of .*scores\.jsonl cannot be read"):
        run_evaluation(job, Drawn().open)


def test_two_evaluations_in_one_directory_do_not_mix(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    with (
        alone_in(job.out),
        pytest.raises(UsageError, match="Another evaluation is running in"),
    ):
        run_evaluation(job, Drawn().open)


def test_the_model_may_be_the_teacher_itself(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(2, 5))
    make_folder(tmp_path / "same", b"old")
    same = prepare_evaluation(job.recipe, job.protocol, ModelChoice(str(tmp_path / "same"), "given"), job.out)
    assert [one.label for one in same.variants] == ["2x2", "5x2"]
    assert [one.title for one in run_evaluation(same, Drawn().open).columns] == ["2x2 steps", "5x2 steps"]


def test_the_card_says_what_a_stranger_needs(whole: Evaluation) -> None:
    card = json.loads(json.dumps(whole.card))
    assert card["comparable"] is True
    assert card["prompts"] == 4
    assert len(card["prompt set"]) == 64
    assert card["seeds"] == [7, 10]
    assert card["versions"].keys() >= {"anyflow", "torch", "diffusers"}
    for entry in card["models"].values():
        assert entry.keys() >= {"weights", "sampler", "steps", "guidance", "shift", "precision", "lineage"}


def test_other_prompts_have_another_hash(tmp_path: Path) -> None:
    cards = [run_evaluation(make_job(tmp_path, prompts=n), Drawn().open).card for n in (3, 4)]
    assert cards[0]["prompt set"] != cards[1]["prompt set"]


def test_image_to_video_begins_every_video_with_its_own_picture(tmp_path: Path) -> None:
    job, drawn = make_job(tmp_path, nfe=(2,), task="i2v", kind="AnyFlowFAR"), Drawn()
    found = run_evaluation(job, drawn.open)
    wanted = job.protocol.suite.images([item.prompt for item in job.protocol.items], [7, 8, 9, 10])
    assert wanted is not None
    assert all((a == b).all() for a, b in zip(drawn.begun, wanted, strict=True))
    assert [one.reference for one in found.columns] == [False]  # a teacher takes no picture
    assert found.card["suite"] == "shapes-i2v"
    first = found.models[0].scored[0]
    again = job.protocol.suite.score([drawn_clip(CAPTIONED[first.prompt], 2)], [first.prompt], wanted[:1])[0]
    assert first.score.scores == pytest.approx(again.scores)
    assert len(first.score.pieces) == 9


def test_a_bidirectional_model_is_refused_a_picture(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="begins with no picture") as error:
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
    assert [one.settings["sampler"] for one in student] == ["consistency", "guided Euler"]
    assert student[0].settings["guidance"] is None
    drawn = Drawn()
    assert [one.title for one in run_evaluation(replace(job, variants=student), drawn.open).columns] == [
        "4 steps", "teacher 5x2",
    ]  # fmt: skip
