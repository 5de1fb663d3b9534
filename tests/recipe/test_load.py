"""Finding, inheriting and overriding recipes, and all their mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.load import Override, load_recipe, recipe_names
from anyflow_cli.recipe.schema import DistillSection, LoraSection, Recipe


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str | Override, **others: str) -> Recipe:
    """Write ``text`` to mine.yaml, ``others`` beside it, and load it."""
    for name, content in {"mine": text, **others}.items():
        Path(f"{name}.yaml").write_text(content, encoding="utf-8")
    return load_recipe("mine.yaml", overrides)


def refused(text: str, *overrides: str | Override, **others: str) -> str:
    """Load what must be refused, and give the message."""
    with pytest.raises(UsageError) as caught:
        load(text, *overrides, **others)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_named_by_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_the_default_is_tiny() -> None:
    assert load_recipe() == load_recipe("tiny")


def test_the_nearer_file_wins_key_by_key() -> None:
    recipe = load(
        "extends: ./below.yaml\ndistill: {optimizer: {lr: 1e-6}}\nevaluate: {nfe: [8]}\n",
        below="extends: tiny\ndistill: {steps: 7, optimizer: {lr: 3e-6, grad_clip: 2.0}}\n",
    )
    assert recipe.distill.steps == 7
    assert (recipe.distill.optimizer.lr, recipe.distill.optimizer.grad_clip) == (1e-6, 2.0)
    assert recipe.evaluate.nfe == (8,)
    assert recipe.model == load_recipe("tiny").model


def test_extends_is_relative_to_the_file_that_says_it() -> None:
    Path("family").mkdir()
    Path("family/base.yaml").write_text("sample: {seed: 5}", encoding="utf-8")
    Path("family/child.yaml").write_text("extends: ./base.yaml", encoding="utf-8")
    assert load("extends: family/child.yaml").sample.seed == 5


def test_name_and_description_are_never_inherited() -> None:
    recipe = load("extends: ./base.yaml", base="name: other\ndescription: words\nsample: {seed: 5}")
    assert (recipe.name, recipe.description, recipe.sample.seed) == ("mine", "", 5)
    assert load("name: chosen").name == "chosen"


def test_null_takes_a_section_away_and_an_override_brings_it_back() -> None:
    base = "model: {lora: {rank: 4, alpha: 2}}"
    assert load("extends: ./base.yaml\nmodel: {lora: null}", base=base).model.lora is None
    assert load("model: {lora: null}", "model.lora.rank=8").model.lora == LoraSection(rank=8)


def test_a_section_given_in_part_keeps_the_defaults_of_its_place() -> None:
    distill = load("distill: {optimizer: {grad_clip: 0.5}, ema: {decay: 0.5}}").distill
    assert distill.optimizer == DistillSection().optimizer.model_copy(update={"grad_clip": 0.5})
    assert (distill.ema.decay, distill.ema.start) == (0.5, DistillSection().ema.start)


def test_the_fake_score_takes_from_the_student_what_it_leaves_out() -> None:
    distill = load("distill: {optimizer: {lr: 1e-5, grad_clip: 0.5}, fake_optimizer: {lr: 2e-4}}").distill
    assert distill.fake_optimizer == distill.optimizer.model_copy(update={"lr": 2e-4})


def test_overrides_are_typed_and_the_last_wins() -> None:
    recipe = load(
        "sample: {seed: 1}",
        "sample.seed=2", "sample.seed=3", "sample.nfe=[1, 2]", "data.prompts=a=b.txt",
        "distill.optimizer.lr=1e-7", Override("synthesize.count", 9, "--count"),
    )  # fmt: skip
    assert (recipe.sample.seed, recipe.sample.nfe, recipe.synthesize.count) == (3, (1, 2), 9)
    assert (recipe.data.prompts, recipe.distill.optimizer.lr) == ("a=b.txt", 1e-7)


def test_a_file_of_the_same_content_loads_the_same_twice() -> None:
    text = "extends: tiny\nsample: {seed: 1}"
    assert load(text, "sample.seed=4").sample.seed == 4
    assert load(text).sample.seed == 1  # an override leaves nothing behind


def test_all_mistakes_are_said_at_once_in_the_order_of_lines() -> None:
    message = refused(
        "extends: ./base.yaml\nmodle: {}\nmodel:\n  height: 65\ndistill:\n  lr: 1e-5\n  t_max: 0.01\n",
        "model.gate=2",
        "nonsense",
        Override("sample.seed", "x", "--seed"),
        base="finetune:\n  steps: 0\n",
    )
    assert message.split("\n  ") == [
        "The recipe has 8 mistakes.",
        "--seed: sample.seed must be a whole number, got 'x'",
        "--set model.gate=2: model.gate must be a number of at most 1, got 2",
        "--set nonsense: must be written as --set KEY=VALUE, e.g. --set distill.steps=100",
        "./base.yaml:2: finetune.steps must be a number of at least 1, got 0",
        "mine.yaml:2: modle is not a key of recipes; did you mean model?",
        "mine.yaml:4: model.height must be a multiple of 16 (8 of the VAE times 2 of a patch), got 65",
        "mine.yaml:6: distill.lr is not a key of recipes; did you mean distill.optimizer.lr?",
        "mine.yaml:7: distill.t_max must be above t_min (0.02), got 0.01",
    ]


LONG = "x" * 90


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a/b",
         "1: name must be letters, digits, '.', '_' and '-', as it names a directory, got 'a/b'."),
        ("name: 7", "1: name must be text (put it in quotes), got 7."),
        ("model:", "1: model must be a section of keys, got nothing."),
        ("model: {frames: 32}",
         "1: model.frames must be 4 n + 1, as the VAE encodes frames (33, 49, 81, ...), got 32."),
        ("model: {width: 500}",
         "1: model.width must be a multiple of 16 (8 of the VAE times 2 of a patch), got 500."),
        ("model: {fps: 8.5}", "1: model.fps must be a whole number, got 8.5."),
        ("model: {fps: true}", "1: model.fps must be a whole number, got true."),
        ("model: {fps: '8'}", "1: model.fps must be a whole number, got '8'."),
        ("model: {shift: 0}", "1: model.shift must be a number above 0, got 0."),
        ("model: {shift: .inf}", "1: model.shift must be a finite number, got inf."),
        ("model: {gate: big}", "1: model.gate must be a number, got 'big'."),
        ("synthesize: {previews: yes}", "1: synthesize.previews must be true or false, got 'yes'."),
        ("model: {causal: yes}", "1: model.causal must be a section of keys, got 'yes'."),
        (
            "model: {causal: {partition: [1, 3]}}",
            "1: model.causal must have a partition that sums to 21 latent frames, got {partition: [1, 3]}.",
        ),
        (
            "model: {height: 336, causal: {}}",
            "1: model.causal must have a compressed_patch that divides height / 8 and width / 8, got {}.",
        ),
        (
            "train_flowmap: {flow_map: {conditioning_prob: 0.5}}",
            "1: train_flowmap must leave flow_map.conditioning_prob at 0: only a causal model, or one with "
            "model.pictures: optional-first, continues frames, got {flow_map: {conditioning_prob: 0.5}}.",
        ),
        (
            "model: {vae_scale: 16, height: 48}",
            "1: model.height must be a multiple of 32 (16 of the VAE times 2 of a patch), got 48.",
        ),
        (
            "model: {vae_scale: 16, height: 96, causal: {}}",
            "1: model.causal must have a compressed_patch that divides height / 16 and width / 16, got {}.",
        ),
        (
            "model: {pictures: first, causal: {}}",
            "1: model.pictures must be none where model.causal is set: a causal model continues frames "
            "without it, got 'first'.",
        ),
        (
            "model: {conditioning: zero_init}",
            "1: model.conditioning must be 'interpolate' or 'zero-init', got 'zero_init'; "
            "did you mean zero-init?",
        ),
        ("model: {hieght: 64}", "1: model.hieght is not a key of recipes; did you mean model.height?"),
        ("memory: {limit: x}", "1: memory.limit must be 'auto' or a number, got 'x'."),
        ("synthesize: {guidance: [4, 3]}",
         "1: synthesize.guidance must be a number or a section of keys, got [4, 3]."),
        ("synthesize: {guidance: {high: 4}}", "1: synthesize.guidance.low is missing."),
        ("evaluate: {nfe: 4}", "1: evaluate.nfe must be a list, e.g. [4, 32], got 4."),
        ("evaluate: {nfe: []}", "1: evaluate.nfe must be a list of at least 1, got []."),
        ("evaluate: {nfe: [0]}", "1: evaluate.nfe[0] must be a number of at least 1, got 0."),
        ("distill: {optimizer: {betas: [0.9]}}", "1: distill.optimizer.betas[1] is missing."),
        (
            "distill: {optimizer: {betas: [0, 0, 0]}}",
            "1: distill.optimizer.betas must be a list of 2, got [0, 0, 0].",
        ),
        (
            "train_flowmap: {flow_map: {boundary: 0.9}}",
            "1: train_flowmap.flow_map.to_zero must be at most 1 - boundary (0.1), got 0.25.",
        ),
        ("finetune:\n  global_batch: 8\n  micro_batch: 3",
         "3: finetune.micro_batch must divide the global_batch of 8, got 3."),
        ("finetune: {micro_batch: 5}", "1: finetune.micro_batch must divide the global_batch of 32, got 5."),
        ("totally: 1", "1: totally is not a key of recipes."),
        ("extends: [tiny]", "1: extends must be the name or the path of one recipe, got ['tiny']."),
        ("extends: tinny", '1: There is no recipe "tinny"; did you mean tiny?'),
        ("extends: ./gone.yaml", "1: There is no recipe file ./gone.yaml."),
        (f"data: {{prompts: [{LONG}]}}",
         f"1: data.prompts must be text (put it in quotes), got ['{LONG[:55]}...."),
    ],
)  # fmt: skip
def test_one_mistake_is_one_sentence(text: str, sentence: str) -> None:
    assert refused(text) == f"mine.yaml:{sentence}"


def test_a_circle_names_its_members_and_no_others() -> None:
    own = refused("extends: ./mine.yaml")
    assert own == "These recipes extend one another in a circle: mine.yaml -> ./mine.yaml."
    message = refused("extends: ./a.yaml", a="extends: ./b.yaml", b="extends: ./a.yaml")
    assert message == "These recipes extend one another in a circle: ./a.yaml -> ./b.yaml -> ./a.yaml."


def test_a_mistake_below_is_named_where_it_stands() -> None:
    message = refused("extends: ./a.yaml", a="extends: tiny\nsample: {sede: 1}")
    assert message == "./a.yaml:2: sample.sede is not a key of recipes; did you mean sample.seed?"


def test_an_override_answers_for_what_it_replaced() -> None:
    text = "sample:\n  nfe: [4]\ndistill:\n  steps: 3"
    assert refused(text, "sample.nfe=[0]").startswith("--set sample.nfe=[0]: sample.nfe[0] must be")
    assert refused(text, "distill.steps.x=1").startswith("--set distill.steps.x=1: distill.steps must be")


@pytest.mark.parametrize("item", ["=3", "a", "a..b=1", ".a=1"])
def test_an_override_without_key_or_value_is_refused(item: str) -> None:
    assert refused("name: a", item).startswith(f"--set {item}: must be written as --set KEY=VALUE")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tine", 'There is no recipe "tine"; did you mean tiny?'),
        ("zzzzzz", 'There is no recipe "zzzzzz".'),
        ("", 'There is no recipe "".'),
        ("mine", 'There is no recipe "mine"; did you mean ./mine.yaml?'),
        ("./gone.yaml", "There is no recipe file ./gone.yaml."),
        ("./", "./ is a directory, not a recipe."),
    ],
)
def test_an_unknown_recipe_is_named_with_the_likely_one(address: str, sentence: str) -> None:
    Path("mine.yaml").write_text("name: a", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_recipe(address)
    assert caught.value.message == sentence


def test_the_hint_for_an_unknown_name_lists_all() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("zzzzzz")
    assert all(name in (caught.value.hint or "") for name in recipe_names())


@pytest.mark.parametrize(
    ("recipe", "overrides", "must"),
    [
        ("tiny", ["train_flowmap.flow_map.target=teacher"], "adaptive must be off where target is teacher"),
        ("tiny", ["train_flowmap.flow_map.states=own"], "states must be data where target is data"),
        (
            "tiny",
            [
                "train_flowmap.flow_map={target: teacher, adaptive: off, states: own, noise: paired}",
            ],
            "states must be data where noise is paired",
        ),
        ("tiny", ["distill.matching=none", "distill.joint=false"], "joint must be true where matching is no"),
        ("tiny", ["distill.matching=none", "distill.matching_gradient=orthogonal"], "be full where matching"),
        ("tiny", ["distill.matching=fake-free", "distill.fake_updates=5"], "no fake score to update"),
        (
            "tiny",
            ["distill.matching=fake-free", "distill.guidance_times=own"],
            "shared where matching is fake-",
        ),
        (
            "tiny",
            ["distill.real_guidance=1", "distill.guidance_times=own"],
            "shared where real_guidance is 1",
        ),
        ("tiny", ["distill.replay_rollout=true"], "only for a causal model"),
        ("tiny", ["distill.first_chunk_budgets=[8]"], "only for a causal model"),
        (
            "tiny-causal",
            ["distill.replay_rollout=true", "distill.rollout_frames=65"],
            "where rollout_frames is",
        ),
        (
            "tiny-causal",
            ["distill.first_chunk_budgets=[8]", "distill.simulation=consistency"],
            "be null where",
        ),
        (
            "tiny-causal",
            ["distill.replay_rollout=true", "distill.first_chunk_budgets=[8]"],
            "false where first_chunk_budgets is",
        ),
        ("tiny-causal", ["distill.matching=fake-free"], "another matching than fake-free for a causal"),
        ("tiny-causal", ["finetune.flow_map={target: teacher, adaptive: off}"], "target data for a causal"),
        ("tiny-causal", ["distill.simulation=fixed-steps"], "another simulation than fixed-steps"),
        ("bidirectional1b", ["train_flowmap.flow_map.derivative_precision=fp32"], "precision same"),
    ],
)
def test_settings_that_cannot_work_are_refused(recipe: str, overrides: list[str], must: str) -> None:
    with pytest.raises(UsageError, match=must):
        load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    "keys", ["{guidance: 1, target: teacher, adaptive: off}", "{guidance: 1, objective: composition}"]
)
def test_without_guidance_sharded_processes_may_learn_from_a_teacher_or_by_composition(keys: str) -> None:
    stages = [f"{stage}.flow_map={keys}" for stage in ("train_flowmap", "distill", "finetune")]
    assert load_recipe("tiny", [*stages, "launch.sharding=full"]).launch.sharding == "full"
    plain = [f"{stage}.flow_map.guidance=1" for stage in ("train_flowmap", "distill", "finetune")]
    with pytest.raises(UsageError, match="would not call the network alike"):
        load_recipe("tiny", [*plain, "launch.sharding=full"])


@pytest.mark.parametrize(
    ("value", "meaning"), [("true", "sample"), ("false", "off"), ("off", "off"), ("group", "group")]
)
def test_eq_7_was_a_switch_and_is_a_choice(value: str, meaning: str) -> None:
    recipe = load_recipe("tiny", [f"train_flowmap.flow_map.adaptive={value}"])
    assert recipe.train_flowmap.flow_map.adaptive == meaning
