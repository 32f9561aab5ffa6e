"""Settings: their defaults are the reference's, and a mistake in them is explained."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from selfguide_ray.config import Config
from selfguide_ray.config_file import fields, load, read
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.pretraining import Recipe
from selfguide_ray.search import Search
from selfguide_ray.search.ablation import Ablation, configs

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def refusal(*overrides, path=None):
    with pytest.raises(SelfGuideError) as caught:
        load(path, overrides)
    return caught.value


def value_of(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # statement 6: rounds and sampling of inputs (spec §1.1, §1.2)
        ("inputs.rounds.classification", 40),
        ("inputs.rounds.generation", 20),
        ("inputs.prompts_per_round", 10),
        ("inputs.temperature.classification", 0.6),
        ("inputs.temperature.generation", 1.0),
        ("inputs.top_k", 40),
        ("inputs.top_p", 1.0),
        ("inputs.max_new_tokens", 500),
        ("inputs.max_earlier", 10),
        ("inputs.prefixes", ()),  # none of these is in the reference, or it is dead code there (F42, F43, B14)
        ("inputs.max_perplexity", None),
        ("inputs.verify", None),
        ("inputs.least.classification", 0),
        ("inputs.least.generation", 0),
        ("inputs.extra_rounds", 0),
        ("trainset.prefixes", ()),
        ("inputs.length_filter", True),
        ("inputs.length_sigmas", 2.0),
        ("inputs.length_slack", 0.0),
        ("student.max_prompt_tokens", 3000),
        # statement 13: sampling of answers, and the vote (spec §1.3, §1.4)
        ("outputs.samples", 20),
        ("outputs.temperature", 0.2),
        ("outputs.top_k", 10),
        ("outputs.top_p", 1.0),
        ("outputs.max_new_tokens", 500),
        ("trainset.keep", 10),
        ("trainset.min_frequency", 0.3),
        ("trainset.vote_among", "survivors"),
        ("trainset.length_filter.classification", False),
        ("trainset.length_filter.generation", True),
        ("trainset.length_sigmas", 2.0),
        ("trainset.length_slack", 0.0),
        ("trainset.balance", True),
        ("trainset.max_tokens", 2000),
        # statement 20: fine-tuning (spec §2)
        ("models.epochs", 3),
        ("models.batch_size", 1),
        ("models.schedule", "linear"),
        ("models.warmup_steps", 0),
        ("models.weight_decay", 0.0),
        ("models.clip", 1.0),
    ],
)
def test_the_defaults_are_the_references(name, value):
    found = value_of(Config(), name)
    assert found == value
    assert type(found) is type(value)


def test_training_all_weights_runs_at_the_references_rate():
    assert load(overrides=["models.method=full"]).models.peak_rate == 5e-5
    assert load(overrides=["models.method=lora"]).models.peak_rate == 2e-4
    assert load(overrides=["models.method=lora", "models.learning_rate=1e-3"]).models.peak_rate == 1e-3


def test_the_words_input_and_output_are_noise_on_both_sides():
    config = Config()
    assert {"input", "output"} < set(config.inputs.noise_words) & set(config.trainset.noise_words)


def test_a_setting_per_family_goes_by_the_labels():
    rounds = load(overrides=["inputs.rounds={classification: 4, generation: 2}"]).inputs.rounds
    assert (rounds.of(("yes", "no")), rounds.of(())) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "rounds"),
    [
        (["inputs.rounds=3"], (3, 3)),
        (["inputs.rounds=3", "inputs.rounds.generation=2"], (3, 2)),
        (["inputs.rounds.generation=2", "inputs.rounds=3"], (3, 3)),
        (["inputs.rounds.generation=2", "inputs.rounds.classification=5"], (5, 2)),
        (["inputs.rounds.generation=2"], (40, 2)),
        (["inputs.rounds.classification=2"], (2, 20)),
        ([], (40, 20)),
    ],
)
def test_overrides_apply_one_after_the_other(overrides, rounds):
    found = load(overrides=overrides).inputs.rounds
    assert (found.classification, found.generation) == rounds


def test_overrides_win_over_the_file_and_values_are_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: runs/a\ninputs: {rounds: 4}\nmodels: {learning_rate: 2e-3}\n")
    config = load(path, ["inputs.rounds.generation=2", "tasks.select=!task1*,all", "tasks.strict=yes", "run=a=b"])
    assert (config.inputs.rounds.classification, config.inputs.rounds.generation) == (4, 2)
    assert (config.tasks.select, config.tasks.strict, config.run) == ("!task1*,all", True, "a=b")
    assert config.models.learning_rate == 2e-3


@pytest.mark.parametrize("name", ["2024-31-12", "*", "!x", "@home", "a: b: c"])
def test_a_text_that_is_no_yaml_is_taken_as_it_stands(name):
    assert load(overrides=[f"tasks.select={name}"]).tasks.select == name


@pytest.mark.parametrize(
    ("override", "what", "instead"),
    [
        ("inputs.round=3", "inputs.round is not a setting.", "Did you mean inputs.rounds?"),
        ("inputs.samples=3", "inputs.samples is not a setting.", "Did you mean outputs.samples?"),
        ("models.prompts_per_round=3", "models.prompts_per_round is not a setting.",
         "Did you mean inputs.prompts_per_round?"),
        ("studnet.model=x", "studnet is not a setting.", "Did you mean student?"),
        ("qqq=3", "qqq is not a setting.", "`selfguide settings` lists them all."),
        ("inputs.rounds=many", "inputs.rounds is 'many'. (1 more: see after correcting this one.)",
         "inputs.rounds: Rounds; each sees the inputs that survived the rounds before."),
        ("outputs.samples=0", "outputs.samples is 0.", "outputs.samples: Answers sampled for each input."),
        ("outputs.samples=2.5", "outputs.samples is 2.5.", "outputs.samples: Answers sampled for each input."),
        ("trainset.min_frequency=1.5", "trainset.min_frequency is 1.5.",
         "trainset.min_frequency: The most frequent answer needs this share of the votes."),
        ("models.zero_stage=4", "models.zero_stage is 4.",
         "models.zero_stage: How far DeepSpeed shards optimiser, gradients and weights over a group's workers."),
        ("predictions.systems=[]", "predictions.systems is [].",
             "predictions.systems: The systems, floors first; the README tells what each is."),
        ("run=[a]", "run is ['a'].", "run: The run's folder: a path, or a URI such as s3://bucket/run."),
    ],
)  # fmt: skip
def test_a_wrong_override_is_explained(override, what, instead):
    error = refusal(override)
    assert (error.what, error.instead) == (f"command line: {what}", instead)
    assert error.why


def test_a_mistake_in_a_family_is_told_by_what_was_written():
    assert refusal("inputs.rounds=1", "inputs.rounds.generation=x").what == "command line: inputs.rounds is 'x'."
    typo = refusal("inputs.rounds=1", "inputs.rounds.generatoin=2")
    assert typo.what == "command line: inputs.rounds.generatoin is not a setting."
    assert "generatoin" in refusal("inputs.rounds.generatoin=2").what
    assert refusal("inputs.rounds.generatoin=2").what.startswith("command line: ")


@pytest.mark.parametrize("override", ["inputs.rounds", "=3", " =3", ""])
def test_an_override_without_name_or_value_is_refused(override):
    assert refusal(override).what == f"command line: {override!r} is not an override."


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("inputs: {round: 3}", "inputs.round is not a setting."),
        ("inputs: {rounds: [1]}", "inputs.rounds is [1]. (1 more: see after correcting this one.)"),
        ("inputs: 3", "inputs is 3."),
        ("seed: -1", "seed is -1."),
        ("- a\n- b", "holds a list."),
        ("text", "holds a str."),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, what):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert refusal(path=path).what == f"{path}: {what}"


@pytest.mark.parametrize("data", [b"a: [1", b"a: b: c", b"\tx: 1", b"run: caf\xe9", b"run: 2024-31-12"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path, data):
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    assert refusal(path=path).what.startswith(f"{path}: cannot be parsed: ")


def test_a_missing_file_is_refused_and_an_empty_one_means_the_defaults(tmp_path):
    assert refusal(path=tmp_path / "none.yaml").what == f"{tmp_path}/none.yaml: there is no such file."
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(tmp_path / "empty.yaml") == Config()


def test_settings_are_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.inputs.rounds.generation = 1


def test_every_setting_has_a_default_and_a_meaning():
    table = {name: (default, meaning) for name, default, meaning in fields()}
    assert [name for name, (_, meaning) in table.items() if not meaning.endswith(".")] == []
    assert table["inputs.rounds"] == ("40 / 20", "Rounds; each sees the inputs that survived the rounds before.")
    assert table["tasks.splits"][0] == "null"
    assert table["trainset.length_filter"][0] == "false / true"
    assert {name.split(".")[0] for name in table} == set(Config.model_fields)


def test_there_are_configs():
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path):
    if path.name.startswith("student-"):
        assert read(Recipe, path) != Recipe()
    elif path.name.startswith("ablation"):
        assert len(configs(read(Ablation, path))["base"]) == 3
    elif path.name.startswith("search"):
        assert read(Search, path) != Search()
    else:
        assert load(path) != Config()
