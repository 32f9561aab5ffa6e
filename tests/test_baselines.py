"""What SELF-GUIDE is held against: what these systems are shown, learn and answer (spec §3, F40, F41, F45)."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from recording import RecordingEngine
from test_stages import MEMORY, go, rows_of, settings

from selfguide_ray.baselines import CHOICES, TAUGHT, Material, at_random, shown, taught
from selfguide_ray.config import LEARNERS, Config, Trainset
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import Example, Instance
from selfguide_ray.task_files import read_task, task_files
from selfguide_ray.votes import Votes

EVERY = [
    "few_shot", "few_shot_random", "few_shot_filtered", "few_shot_vote", "self_icl", "few_shot_tuned", "self_icl_tuned",
    "unfiltered_tuned", "flipped_tuned", "gold_tuned", "selfguide",
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks():
    """A classification and a generation task of the package, with instances of all three kinds."""
    read = [read_task(file) for file in task_files(resolve("embedded/tasks"))]
    return [
        replace(t, instances=t.instances[:12], validation=t.instances[12:20], gold=t.instances[20:28])
        for t in (read[0], read[4])
    ]


@pytest.fixture(scope="module")
def engine():
    return RecordingEngine()


@pytest.fixture(scope="module")
def run(tasks, engine, tmp_path_factory):
    systems = f"predictions.systems={EVERY}".replace("'", "")
    folder = tmp_path_factory.mktemp("every")
    return go(folder, tasks, systems, "tasks.gold=8", "trainset.in_context=4", engine=engine)


def learned(run, task, system):
    rows = rows_of(run, "trainset", task.name)
    return [row for row in rows if row["system"] == system and row["drop_reason"] is None]


def test_every_learner_but_selfguide_is_taught_something():
    assert set(TAUGHT) == set(LEARNERS) - {"selfguide"}


def test_each_system_answers_every_instance_and_is_scored(run, tasks):
    answers = Counter((row["task"], row["system"]) for row in rows_of(run, "predictions"))
    assert answers == {(task.name, system): 12 for task in tasks for system in EVERY}
    assert {row["system"] for row in rows_of(run, "scores")} == set(EVERY)


def test_gold_fine_tuning_learns_what_people_wrote(run, tasks):
    for task in tasks:
        pairs = [(row["input"], row["output"]) for row in learned(run, task, "gold_tuned")]
        assert pairs == [(i.input.strip(), i.references[0].strip()) for i in task.gold]
        assert run.get_json(f"models/{task.name}@gold_tuned/{MEMORY}") == dict(pairs)


def test_a_flipped_pair_has_another_answer(run, tasks):
    for task in tasks:
        right = {row["id"]: row["output"] for row in learned(run, task, "selfguide")}
        wrong = {row["id"]: row["output"] for row in learned(run, task, "flipped_tuned")}
        assert right.keys() == wrong.keys()
        assert all(wrong[name] != right[name] for name in right)
        assert set(wrong.values()) <= set(task.labels or right.values())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_so_many_pairs_are_flipped_as_asked_for(make_task, share):  # F40
    task = make_task(labels=("a", "b", "c"))
    rows = [{"id": str(i), "input": f"text {i}", "output": "abc"[i % 3]} for i in range(60)]
    given = Material(task, rows, [], Trainset(flipped=share), random.Random(0))
    changed = sum(pair.output != row["output"] for pair, row in zip(TAUGHT["flipped_tuned"](given), rows, strict=True))
    assert changed == round(60 * share)


def test_unfiltered_pairs_are_as_many_and_have_their_first_sample(run, tasks):
    for task in tasks:
        first = {row["id"]: row["candidates"][0]["output"] for row in rows_of(run, "outputs", task.name)}
        pairs = learned(run, task, "unfiltered_tuned")
        assert len(pairs) == len(learned(run, task, "selfguide"))
        assert all(row["output"] == first[row["id"]] for row in pairs)
        assert {row["id"] for row in pairs} != {row["id"] for row in learned(run, task, "selfguide")}


def test_what_a_context_holds_is_balanced_and_shown_behind_the_examples(run, tasks, engine):
    for task in tasks:
        pairs = learned(run, task, "self_icl_tuned")
        mine = {(row["id"], row["input"], row["output"]) for row in learned(run, task, "selfguide")}
        assert {(row["id"], row["input"], row["output"]) for row in pairs} <= mine
        assert len(pairs) == 4
        if task.labels:
            assert Counter(row["output"] for row in pairs) == dict.fromkeys(task.labels, 2)
        few = [Example(row["input"], row["output"]) for row in pairs]
        wanted = (*task.examples, *few)
        assert shown("self_icl", task, few, 0) == wanted
        last = task.instances[-1].input
        prompts = [engine.tokenizer.decode(r.prefix + r.suffix) for r in engine.requests]
        turns = "\n".join(f"USER: ITEM: {e.input.strip()}\nASSISTANT: {e.output.strip()}" for e in wanted)
        assert any(f"{turns}\nUSER: ITEM: {last.strip()}\n" in prompt for prompt in prompts)


def test_pairs_that_find_no_room_are_not_shown_and_the_examples_are(tasks, tmp_path):
    narrow = RecordingEngine()
    limits = ["student.max_prompt_tokens=1000", "outputs.max_new_tokens=20", "trainset.in_context=200"]
    go(tmp_path, tasks[1:], "predictions.systems=[self_icl]", *limits, engine=narrow)
    prompts = [narrow.tokenizer.decode(r.prefix + r.suffix) for r in narrow.requests[-12:]]
    assert all(len(prompt) <= 1000 for prompt in prompts)
    assert all(f"ITEM: {e.input}" in prompt for prompt in prompts for e in tasks[1].examples)
    turns = {prompt.count("\nASSISTANT:") for prompt in prompts}
    assert len(tasks[1].examples) + 3 <= max(turns) < 20  # some pairs, by far not all


def test_random_labels_in_the_prompt_are_labels_and_outputs_change_places(tasks):  # F41
    classification, generation = tasks
    found = {example.output for seed in range(20) for example in at_random(classification, seed)}
    assert found == set(classification.labels)
    assert len({at_random(classification, seed) for seed in range(20)}) > 1
    exchanged = at_random(generation, 0)
    assert [e.input for e in exchanged] == [e.input for e in generation.examples]
    assert sorted(e.output for e in exchanged) == sorted(e.output for e in generation.examples)
    assert all(a.output != b.output for a, b in zip(exchanged, generation.examples, strict=True))


def candidates(*texts):
    return [
        {"output": text, "logprob": -float(i), "finish_reason": "stop", "probability": None}
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("texts", "voted", "filtered"),
    [
        (("sky", "tree", "tree"), "tree", "sky"),
        (("", "the output is a tree", "tree"), "tree", "tree"),  # the likeliest that passes the filters
        (("", "  ", ""), None, None),
        (("a", "b", "c", "d"), None, "a"),  # no answer has three votes of ten
    ],
)
def test_one_answer_is_made_of_several_samples(make_task, texts, voted, filtered):
    task, rules = make_task(), Trainset(length_slack=20.0)
    assert CHOICES["few_shot_vote"](task, candidates(*texts), rules, Votes(task, rules)) == voted
    assert CHOICES["few_shot_filtered"](task, candidates(*texts), rules, Votes(task, rules)) == filtered


def test_the_first_label_that_a_survivor_names_is_the_filtered_answer(make_task):
    task = make_task(labels=("yes", "no"))
    assert (
        CHOICES["few_shot_filtered"](
            task, candidates("perhaps", "I say no", "yes"), Trainset(), Votes(task, Trainset())
        )
        == "no"
    )


def test_the_annotator_as_a_predictor_is_asked_as_the_annotator_is(run, engine):
    asked = [request for request in engine.requests if request.params.n == 6]
    assert {(r.params.temperature, r.params.top_k) for r in asked} == {(0.2, 10)}
    # Both systems that choose of samples choose of the same.
    rows = rows_of(run, "predictions")
    assert {row["prediction"] for row in rows if row["system"] == "few_shot_vote"} - {""}
    assert {row["prediction"] for row in rows if row["system"] == "few_shot_filtered"} - {""}


def test_pairs_of_baselines_are_made_only_where_a_system_wants_them(tasks, tmp_path):
    few = go(tmp_path, tasks[:1], "predictions.systems=[self_icl]")
    assert {row["system"] for row in rows_of(few, "trainset")} == {"selfguide", "few_shot_tuned", "self_icl_tuned"}


def test_validation_is_answered_instead_of_what_is_held_out(tasks, tmp_path):
    options = ["predictions.systems=[copy, majority, selfguide]", "tasks.validation=8"]
    run = go(tmp_path, tasks, *options, "predictions.instances=validation")
    for task in tasks:
        rows = rows_of(run, "predictions", task.name)
        assert {row["id"] for row in rows} == {i.id for i in task.validation}
        assert {row["n"] for row in rows_of(run, "scores", task.name)} == {8}


def test_what_is_held_out_cannot_change_what_validation_says(tasks, tmp_path):  # statement 25
    options = ["tasks.validation=8", "predictions.instances=validation"]
    other = [replace(t, instances=(Instance("x", "nothing", ("at all",)),)) for t in tasks]
    mine, theirs = go(tmp_path / "a", tasks, *options), go(tmp_path / "b", other, *options)
    assert rows_of(mine, "scores") == rows_of(theirs, "scores")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("predictions.systems=[gold_tuned]", "tasks.gold: is 0"),
        ("predictions.instances=validation", "tasks.validation"),
    ],
)
def test_instances_that_nobody_set_apart_are_asked_for(tmp_path, option, told):
    with pytest.raises(SelfGuideError, match=told):
        settings(tmp_path, option)


def test_the_seed_decides_what_a_baseline_draws(make_task):
    task = make_task(labels=("a", "b"))
    rows = [{"id": str(i), "input": f"text {i}", "output": "ab"[i % 2], "drop_reason": None} for i in range(60)]

    def draw(seed):
        return taught("self_icl_tuned", task, rows, [], Config(seed=seed))

    assert draw(1) == draw(1) != draw(2)
