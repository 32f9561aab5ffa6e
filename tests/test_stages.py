"""A whole shard through all stages in one process: nothing is lost, nothing leaks, and it comes out the same twice."""

import json
from collections import Counter
from dataclasses import replace

import pyarrow.compute as pc
import pytest
from recording import RecordingEngine

from selfguide_ray.baselines import majority
from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine.scripted import MEMORY
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.inputs import Inputs
from selfguide_ray.metrics import exact_match, macro_f1, rouge_l
from selfguide_ray.models import learn, packs, publish_untrained, untrained
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.run import Run
from selfguide_ray.schema import PEOPLES, TABLES, Instance, task_rows
from selfguide_ray.scores import Scores
from selfguide_ray.task_files import read_task, task_files
from selfguide_ray.trainset import Trainset

SHARD = "00000"
SYSTEMS = Config().predictions.systems
ROUNDS, PROMPTS = 6, 5


def settings(folder, *more):
    small = [
        f"run={folder}",
        "student.engine=scripted",
        f"inputs={{rounds: {ROUNDS}, prompts_per_round: {PROMPTS}, length_slack: 0.5}}",
        "outputs.samples=6",
        "trainset={keep: 5, length_slack: 0.5, min_frequency: 0.7}",
        "scores.bootstrap=50",
    ]
    return load(overrides=[*small, *more])


def work(kind, config, run, engine):
    """One stage over the shard, from the columns it may see to its file."""
    stage = kind(config, run, engine)
    rows = stage(*(run.read(table, SHARD, columns) for table, columns in stage.reads.items()))
    assert run.write(stage.writes, SHARD, rows, {})


def train(config, run, without=()):
    """Models for all tasks; those `without` one of their own, and those with nothing to learn from, say so."""
    for task, work in untrained(run, config).items():
        if task in without or not work.pairs:
            publish_untrained(run, task)
    learn(config, packs(run, config))


def go(folder, tasks, *more, engine=None, without=()):
    """The method over one shard with these tasks."""
    config, engine = settings(folder, *more), engine or RecordingEngine()
    run = Run(config.run)
    run.write("tasks", SHARD, task_rows(tasks), {})
    for stage in (Inputs, Outputs, Trainset):
        work(stage, config, run, engine)
    train(config, run, without)
    for stage in (Predictions, Scores):
        work(stage, config, run, engine)
    return run


def rows_of(run, table, task=None):
    rows = run.read(table, SHARD).to_pylist()
    return [row for row in rows if task in (None, row["task"])]


def pairs_of(run, task=None):
    """What selfguide learns from."""
    return [row for row in rows_of(run, "trainset", task) if row["system"] == "selfguide"]


def tables(run, task):
    """All rows that belong to a task, table by table, and what its model knows."""
    return {name: rows_of(run, name, task) for name in TABLES} | {"model": run.get(f"models/{task}/{MEMORY}")}


@pytest.fixture(scope="module")
def examples():
    """The tasks inside the package, twelve instances each."""
    tasks = [read_task(file) for file in task_files(resolve("embedded/tasks"))]
    return [replace(task, instances=task.instances[:12]) for task in tasks]


@pytest.fixture(scope="module")
def whole(examples, tmp_path_factory):
    """All example tasks in one shard."""
    return go(tmp_path_factory.mktemp("whole"), examples)


# --- nothing is lost -------------------------------------------------------------------------------------------------


def test_the_examples_are_of_both_families(examples):
    assert [len(task.labels) for task in examples] == [2, 4, 3, 2, 0, 0, 0, 0]


def test_each_task_has_a_row_of_inputs_for_each_prompt(whole, examples):  # statement 6
    counts = Counter((row["task"], row["round"]) for row in rows_of(whole, "inputs"))
    assert counts == {(task.name, number): PROMPTS for task in examples for number in range(ROUNDS)}
    names = [(row["task"], row["id"]) for row in rows_of(whole, "inputs")]
    assert len(set(names)) == len(names) == len(examples) * ROUNDS * PROMPTS


def test_the_scripted_student_meets_every_verdict_on_inputs(whole):
    reasons = Counter(row["drop_reason"] for row in rows_of(whole, "inputs"))
    assert set(reasons) == {None, "empty", "length", "noise", "duplicate"}  # statement 11
    assert sum(reasons.values()) == 8 * ROUNDS * PROMPTS


def test_accepted_inputs_grow_about_linearly_with_the_prompts(examples, tmp_path):  # statement 30
    shares = []
    for rounds in (8, 40, 160):  # of 50 prompts: 400 to 8,000
        config = settings(
            tmp_path, f"inputs={{rounds: {rounds}, prompts_per_round: 50, length_filter: false, noise_words: []}}"
        )
        rows = Inputs(config, None, RecordingEngine())(task_rows(examples[:1]))
        assert rows.num_rows == 50 * rounds
        shares.append(rows["drop_reason"].null_count / rows.num_rows)
    assert min(shares) > 0.5
    assert max(shares) < 1.25 * min(shares)


def test_an_accepted_text_is_neither_an_example_nor_another_accepted_text(whole, examples):  # statement 12
    for task in examples:
        texts = [row["input"] for row in rows_of(whole, "inputs", task.name) if row["drop_reason"] is None]
        known = [example.input for example in task.examples]
        folded = [" ".join(text.casefold().split()) for text in texts + known]
        assert len(texts) > 5
        assert len(set(folded)) == len(folded)


def test_accepted_inputs_outputs_and_pairs_are_the_same_rows(whole):
    accepted = [
        (row["task"], row["id"], row["input"]) for row in rows_of(whole, "inputs") if row["drop_reason"] is None
    ]
    for rows in (rows_of(whole, "outputs"), pairs_of(whole)):
        assert [(row["task"], row["id"], row["input"]) for row in rows] == accepted
    assert {len(row["candidates"]) for row in rows_of(whole, "outputs")} == {6}


def test_each_pair_is_alive_or_has_its_reason(whole, examples):
    rows = pairs_of(whole)
    assert {row["drop_reason"] for row in rows} == {None, "imbalanced", "no_majority"}
    for row in rows:
        assert (row["output"] is None) == (row["prompt"] is None) == (row["completion"] is None)
        assert (row["drop_reason"] is None) <= (row["output"] is not None)
        assert len(row["verdicts"]) == 6
        assert row["verdicts"].count("not_kept") == 1
        assert row["verdicts"].count(None) == row["voters"] >= row["votes"]
    for task in examples:
        alive = Counter(row["output"] for row in pairs_of(whole, task.name) if row["drop_reason"] is None)
        if task.labels:  # statement 17
            assert set(alive) <= set(task.labels)
            assert len(set(alive.values())) == 1


def test_every_system_answers_every_instance(whole, examples):  # statement 24
    rows = rows_of(whole, "predictions")
    assert [(row["task"], row["system"], row["id"]) for row in rows] == [
        (task.name, system, instance.id) for task in examples for system in SYSTEMS for instance in task.instances
    ]
    assert all(row["prediction"] is not None for row in rows)


def test_every_instance_is_scored_by_every_metric(whole, examples):
    answers = {(row["task"], row["system"], row["id"]): row["prediction"] for row in rows_of(whole, "predictions")}
    found = {(row["task"], row["system"], row["metric"]): row for row in rows_of(whole, "scores")}
    assert len(found) == len(rows_of(whole, "scores")) == 5 * (4 * 3 + 4 * 2)
    for task in examples:
        for system in SYSTEMS:
            given = [(answers[task.name, system, i.id], i.references) for i in task.instances]
            wanted = {
                "exact_match": 100 * sum(exact_match(*pair) for pair in given) / 12,
                "rouge_l": 100 * sum(rouge_l(*pair) for pair in given) / 12,
            }
            if task.labels:
                wanted["macro_f1"] = 100 * macro_f1(*zip(*given, strict=True))
            for metric, value in wanted.items():
                row = found[task.name, system, metric]
                assert (row["n"], row["category"]) == (12, task.category)
                assert row["value"] == pytest.approx(value)
                assert (row["low"] is None) == (metric == "macro_f1")
                if row["low"] is not None:
                    assert 0 <= row["low"] <= row["value"] + 1e-9
                    assert row["value"] - 1e-9 <= row["high"] <= 100


def test_the_floors_are_what_they_say(examples, whole):  # statement 23
    for task in examples:
        rows = rows_of(whole, "predictions", task.name)
        assert [row["prediction"] for row in rows if row["system"] == "copy"] == [i.input for i in task.instances]
        commonest = Counter(i.references[0] for i in task.instances).most_common(1)[0]
        constant = {row["prediction"] for row in rows if row["system"] == "majority"}
        assert constant == {commonest[0]}
        scores = {(row["system"], row["metric"]): row["value"] for row in rows_of(whole, "scores", task.name)}
        if task.labels:
            assert scores["majority", "exact_match"] == pytest.approx(100 * commonest[1] / 12)


@pytest.mark.parametrize(("rights", "answer"), [("xyy", "y"), ("xyyx", "x"), ("yxxy", "y"), ("z", "z")])
def test_the_majority_is_the_commonest_reference_and_the_first_of_equals(make_task, rights, answer):
    assert majority(make_task(instances=[(f"text {n}", right) for n, right in enumerate(rights)])) == answer


# --- it comes out the same -------------------------------------------------------------------------------------------


def test_two_runs_are_equal(whole, examples, tmp_path):  # statement 29
    again = go(tmp_path, examples)
    assert all(again.read(table, SHARD).equals(whole.read(table, SHARD)) for table in TABLES)
    assert whole.trained() == again.trained() == sorted(task.name for task in examples)


def test_another_seed_makes_other_rows(whole, examples, tmp_path):
    other = go(tmp_path, examples[:1], "seed=1")
    name = examples[0].name
    for table in ("inputs", "outputs", "trainset"):
        assert rows_of(other, table) != rows_of(whole, table, name)


@pytest.mark.parametrize("number", [0, 5])
def test_a_tasks_rows_do_not_depend_on_the_other_tasks_of_its_shard(whole, examples, tmp_path, number):
    task = examples[number]
    alone = tables(go(tmp_path / "alone", [task]), task.name)
    four = [examples[7], examples[2], task, examples[4]]
    assert alone == tables(go(tmp_path / "four", four), task.name)
    assert alone == tables(go(tmp_path / "reversed", four[::-1]), task.name)
    assert alone == tables(whole, task.name)
    assert len(alone["predictions"]) == 60


class SilentEngine(RecordingEngine):
    """An engine that must not be asked."""

    def generate(self, requests):
        raise AssertionError(f"asked {len(requests)} times")


@pytest.mark.parametrize(
    "changed",
    [
        "trainset.min_frequency=0.95", "trainset.keep=2", "trainset.novelty=0.3", "trainset.middle_lengths=0.5",
        "trainset.answer=agreed", "trainset.overlap_rouge=0.2", "trainset.decontaminate=off", "trainset.balance=false",
        "trainset.max_tokens=400",
    ],
)  # fmt: skip
def test_a_changed_threshold_makes_pairs_anew_without_one_engine_call(whole, tmp_path, changed):
    config = settings(tmp_path, changed)
    stage = Trainset(config, whole, SilentEngine())
    rows = stage(*(whole.read(table, SHARD, columns) for table, columns in stage.reads.items())).to_pylist()
    assert len(rows) == len(rows_of(whole, "trainset"))
    assert rows != rows_of(whole, "trainset")


def test_fewer_systems_leave_the_answers_of_the_others_as_they_were(whole, examples, tmp_path):
    few = go(tmp_path, examples[:2], "predictions.systems=[few_shot, copy]")
    wanted = [
        row
        for task in examples[:2]
        for system in ("few_shot", "copy")
        for row in rows_of(whole, "predictions", task.name)
        if row["system"] == system
    ]
    assert rows_of(few, "predictions") == wanted


# --- nothing leaks ---------------------------------------------------------------------------------------------------


def test_held_out_items_never_reach_what_makes_training_data(examples, tmp_path):
    """The synthesis of a task is the same whatever is held out, and no prompt of it holds a held-out text."""

    def synthesis(folder, tasks):
        config, engine = settings(folder), RecordingEngine()
        run = Run(config.run)
        run.write("tasks", SHARD, task_rows(tasks), {})
        for stage in (Inputs, Outputs, Trainset):
            work(stage, config, run, engine)
        prompts = [engine.tokenizer.decode(request.prefix + request.suffix) for request in engine.requests]
        return run, prompts + [row["prompt"] or "" for row in rows_of(run, "trainset")]

    def marked(task):
        return tuple(Instance(f"{task.name}-{n}", f"canary item {n}", (f"canary answer {n}",)) for n in range(9))

    plain, _ = synthesis(tmp_path / "plain", [replace(task, instances=()) for task in examples])
    with_canaries, prompts = synthesis(
        tmp_path / "canary", [replace(task, instances=marked(task)) for task in examples]
    )
    assert len(prompts) > 8 * ROUNDS * PROMPTS
    assert [prompt for prompt in prompts if "canary" in prompt] == []
    for table in ("inputs", "outputs", "trainset"):
        assert plain.read(table, SHARD).equals(with_canaries.read(table, SHARD))


def test_no_held_out_item_of_the_examples_stands_in_a_training_prompt(whole, examples):
    for task in examples:
        shown = {example.input.strip() for example in task.examples}
        held_out = {instance.input.strip() for instance in task.instances} - shown
        made = {row["input"] for row in rows_of(whole, "inputs", task.name)}
        lines = {
            line.removeprefix("USER: ITEM: ")
            for row in pairs_of(whole, task.name)
            for line in (row["prompt"] or "").split("\n")
        }
        assert held_out & (lines - made) == set()
        assert len(held_out) == 12


def test_the_stages_that_the_student_speaks_in_never_read_instances():
    for stage in (Inputs, Outputs):
        assert set(stage.reads["tasks"]) == set(TABLES["tasks"].names) - set(PEOPLES)
    # Held-out instances to keep pairs apart from them, gold for gold fine-tuning alone.
    assert set(Trainset.reads["tasks"]) - set(Inputs.reads["tasks"]) == {"instances", "gold"}


# --- requests --------------------------------------------------------------------------------------------------------


def test_requests_are_made_with_the_references_sampling(examples, tmp_path):  # statements 6 and 13
    closed, generative = examples[0], examples[4]
    config, engine = load(overrides=["inputs.rounds=1"]), RecordingEngine()
    tasks = task_rows([closed, generative])
    inputs = Inputs(config, None, engine)(tasks)
    asked = [request.params for request in engine.requests]
    assert len(asked) == 20
    assert {(p.n, p.top_k, p.top_p, p.max_new_tokens) for p in asked} == {(1, 40, 1.0, 500)}
    assert [p.temperature for p in asked] == [0.6] * 10 + [1.0] * 10
    engine.requests.clear()
    Outputs(config, None, engine)(tasks, inputs)
    answered = [request.params for request in engine.requests]
    assert len(answered) == inputs["drop_reason"].null_count > 0
    assert {(p.n, p.temperature, p.top_k, p.top_p, p.max_new_tokens) for p in answered} == {(20, 0.2, 10, 1.0, 500)}


def test_seeds_of_requests_are_all_different(examples, tmp_path):
    config, engine = settings(tmp_path), RecordingEngine()
    tasks = task_rows(examples)
    Outputs(config, None, engine)(tasks, Inputs(config, None, engine)(tasks))
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == len(seeds) > 8 * ROUNDS * PROMPTS


def test_prompted_systems_decode_greedily_and_only_selfguide_has_a_model(examples, tmp_path):
    engine = RecordingEngine()
    run = go(tmp_path, examples[:1], engine=engine)
    asked = [request for request in engine.requests if request.params.temperature == 0]
    assert {(request.params.n, request.params.max_new_tokens) for request in asked} == {(1, 500)}
    assert [request.adapter for request in asked] == [None] * 24 + [f"{run.root}/models/{examples[0].name}"] * 12


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_missing_model_raises(examples, tmp_path):
    config = settings(tmp_path)
    run = Run(config.run)
    with pytest.raises(FileNotFoundError, match=r"models/example001_review_sentiment/model\.json"):
        Predictions(config, run, RecordingEngine())(task_rows(examples[:1]))
    without = settings(tmp_path, "predictions.systems=[copy, majority, zero_shot, few_shot]")
    assert Predictions(without, run, RecordingEngine())(task_rows(examples[:1])).num_rows == 48


def test_a_task_without_a_model_of_its_own_is_answered_by_the_student_itself(whole, examples, tmp_path):
    name, other = examples[0].name, examples[1].name
    run = go(tmp_path, examples[:2], without=[name])

    def answers(run, task, system):
        return [row["prediction"] for row in rows_of(run, "predictions", task) if row["system"] == system]

    assert answers(run, name, "selfguide") == answers(run, name, "few_shot") == answers(whole, name, "few_shot")
    assert answers(run, other, "selfguide") == answers(whole, other, "selfguide") != answers(whole, other, "few_shot")


def test_a_tuned_baseline_has_models_of_its_own(examples, tmp_path):
    run = go(tmp_path, examples[:2], "predictions.systems=[few_shot_tuned, selfguide]")
    names = [task.name for task in examples[:2]]
    assert run.trained() == sorted([*names, *(f"{name}@few_shot_tuned" for name in names)])
    for task in examples[:2]:
        learned = run.get_json(f"models/{task.name}@few_shot_tuned/{MEMORY}")
        assert learned == {example.input: example.output for example in task.examples}
        assert learned != run.get_json(f"models/{task.name}/{MEMORY}")
    answers = {
        system: [row["prediction"] for row in rows_of(run, "predictions") if row["system"] == system]
        for system in ("few_shot_tuned", "selfguide")
    }
    assert len(answers["selfguide"]) == sum(len(task.instances) for task in examples[:2])
    assert answers["few_shot_tuned"] != answers["selfguide"]


def test_the_models_of_a_run_answer_in_the_next_one(whole, examples, tmp_path):
    engine = RecordingEngine()
    run = go(tmp_path, examples, f"outputs.guided_by={whole.root}", engine=engine)
    answering = [request for request in engine.requests if request.params.n == 6]
    assert {request.adapter for request in answering} == {f"{whole.root}/models/{task.name}" for task in examples}
    assert rows_of(run, "inputs") == rows_of(whole, "inputs")  # the student itself writes them
    assert rows_of(run, "outputs") != rows_of(whole, "outputs")


def test_a_guide_whose_models_are_another_students_is_refused(examples, tmp_path):
    guide = go(tmp_path / "guide", examples[:1])
    path = f"models/{examples[0].name}/model.json"
    guide.put(path, json.dumps(guide.get_json(path) | {"student": {"model": "other"}}).encode())
    with pytest.raises(SelfGuideError, match=r"belong to \{'model': 'other'\}"):
        go(tmp_path / "next", examples[:1], f"outputs.guided_by={guide.root}")


def test_a_model_learns_the_pairs_that_are_alive_and_no_others(whole, examples):
    assert untrained(whole, Config()) == {}
    for task in examples:
        alive = [row for row in pairs_of(whole, task.name) if row["drop_reason"] is None]
        assert whole.get_json(f"models/{task.name}/{MEMORY}") == {row["input"]: row["output"] for row in alive}
        assert whole.get_json(f"models/{task.name}/model.json")["pairs"] == len(alive) > 0


# --- corners ---------------------------------------------------------------------------------------------------------


def test_an_instance_without_room_is_answered_by_nothing_and_counts(examples, tmp_path):
    task = examples[4]
    long = replace(task, instances=(*task.instances[:3], Instance("long", "word " * 20_000, ("Geneva",))))
    config, run = settings(tmp_path, "predictions.systems=[copy, few_shot]", "student.max_prompt_tokens=4000"), None
    predictions = Predictions(config, run, RecordingEngine())(task_rows([long]))
    last = [row for row in predictions.to_pylist() if row["id"] == "long"]
    assert [(row["system"], row["finish_reason"]) for row in last] == [("copy", "stop"), ("few_shot", "too_long")]
    assert last[1]["prediction"] == ""
    nothing_learned = TABLES["trainset"].empty_table()
    scored = Scores(config, run, RecordingEngine())(task_rows([long]), predictions, nothing_learned).to_pylist()
    assert {row["n"] for row in scored} == {4}
    assert all(row["value"] <= 75 for row in scored)


def test_a_task_without_instances_has_no_predictions_and_no_scores(examples, tmp_path):
    run = go(tmp_path, [replace(examples[0], instances=()), examples[1]])
    for table in ("predictions", "scores"):
        assert {row["task"] for row in rows_of(run, table)} == {examples[1].name}
    assert len(rows_of(run, "trainset", examples[0].name)) > 0


def test_intervals_can_be_left_out(examples, tmp_path):
    run = go(tmp_path, examples[:1], "scores.bootstrap=0")
    scores = run.read("scores", SHARD)
    assert scores.num_rows == 15
    assert pc.all(pc.is_null(scores["low"])).as_py()


def test_a_shard_whose_inputs_were_all_dropped_goes_on_with_empty_tables(examples, tmp_path):
    run = go(tmp_path, examples[:1], "inputs.rounds=1", "student.max_prompt_tokens=16")
    assert {row["drop_reason"] for row in rows_of(run, "inputs")} == {"too_long"}
    assert rows_of(run, "outputs") == pairs_of(run) == []
    told = run.get_json(f"models/{examples[0].name}/model.json")
    assert (told["trained"], told["pairs"]) == (False, 0)
    assert len(rows_of(run, "predictions")) == 60


@pytest.mark.parametrize(
    ("change", "told"),
    [({"weights": "removed"}, "have been removed"), ({"student": {"model": "other"}}, "belong to {'model': 'other'}")],
)
def test_weights_that_have_gone_or_belong_to_another_base_are_refused(examples, tmp_path, change, told):
    run = go(tmp_path, examples[:1])
    path = f"models/{examples[0].name}/model.json"
    run.put(path, json.dumps(run.get_json(path) | change).encode())
    predictions = Predictions(settings(tmp_path), run, RecordingEngine())
    with pytest.raises(SelfGuideError, match=told) as caught:
        predictions(run.read("tasks", SHARD))
    assert caught.value.instead
