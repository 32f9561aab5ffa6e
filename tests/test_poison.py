"""A row that fails the engine, kills it or hangs it gets its verdict, and all other rows end as in a clean run."""

import random
from dataclasses import replace

import pytest
from poisoned import PoisonedEngine, Poisons, make, supervised
from recording import RecordingEngine

from selfguide_ray.config_file import load
from selfguide_ray.engine import Request, SamplingParams, make_engine
from selfguide_ray.executor import map_shards
from selfguide_ray.failures import failures
from selfguide_ray.guarding import FOLDER, HARMLESS_DEATHS, IDLE_DEATHS, Guard, Guarded
from selfguide_ray.inputs import Inputs
from selfguide_ray.models import publish_untrained
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.run import Run
from selfguide_ray.schema import row_seed, task_rows
from selfguide_ray.scores import Scores
from selfguide_ray.trainset import Trainset

STAGES = [Inputs, Outputs, Trainset, Predictions, Scores]
SETTINGS = ["student.engine=scripted", "inputs={rounds: 3, prompts_per_round: 8, length_filter: false}",
            "outputs.samples=3", "trainset.min_frequency=0", "scores.bootstrap=0",
            "predictions.systems=[copy, few_shot, selfguide]"]  # fmt: skip
INSTANCES = [("old house", "house"), ("deadly sun", "sun"), ("new car", "car")]
LAST = "r002i007"  # the last row that is written: no other row reads it


def planned(folder, make_task, *more):
    """A run with two shards of two tasks, whose models are the student itself."""
    config = load(overrides=[f"run={folder}", *SETTINGS, *more])
    run = Run(config.run)
    for shard in range(2):
        tasks = [make_task(f"toy{shard}{i}", instances=INSTANCES if shard + i == 0 else INSTANCES[::2]) for i in (0, 1)]
        run.write("tasks", f"{shard:05d}", task_rows(tasks), {})
        for task in tasks:
            publish_untrained(run, task.name)
    return config, run


@pytest.fixture(scope="module")
def clean(tmp_path_factory, make_task):
    """What a run without poison makes."""
    config, run = planned(tmp_path_factory.mktemp("poison") / "clean", make_task)
    make(config, STAGES, Poisons(), run.shards("tasks"))
    assert failures(run) == []
    return run


def seed_of(kind, task, row):
    return row_seed(0, task, kind, row)


def survivor(clean):
    """A row of toy01 that is answered."""
    rows = clean.read("outputs", "00000").to_pylist()
    return [row["id"] for row in rows if row["task"] == "toy01"][3]


def differences(run, clean, table):
    """{(task, id, system): row} of the rows that are not those of the clean run; both have the same rows."""

    def rows(run):
        return {(r["task"], r["id"], r.get("system")): r for r in run.read_all(table).to_pylist()}

    here, there = rows(run), rows(clean)
    assert here.keys() == there.keys()
    return {key: row for key, row in here.items() if row != there[key]}


def assert_no_notes(run):
    assert [name for table in run.names(FOLDER) for name in run.names(f"{FOLDER}/{table}")] == []


VERDICTS = {
    "exception": "engine_error",
    "SIGKILL": "killed_engine",
    "SIGSEGV": "killed_engine",
    "abort": "killed_engine",
    "hang": "timed_out",
}


@pytest.mark.parametrize("manner", VERDICTS)
def test_a_bad_row_of_each_table_gets_its_verdict_and_no_other_row_changes(tmp_path, make_task, clean, manner):
    config, run = planned(tmp_path, make_task, "cluster.stall_seconds=1")
    row = survivor(clean)
    poison = {seed_of("input", "toy00", LAST): manner, seed_of("output", "toy01", row): manner, "deadly": manner}
    deaths = supervised(config, STAGES, [Poisons(poison)], run)
    # The lost process is doubted once; the second bad row of a call costs its group's death and its own.
    assert deaths == {"exception": 0, "hang": 3 + 3 + 3 + 2}.get(manner, 5 + 5 + 5 + 3)
    assert failures(run) == []
    assert_no_notes(run)
    reason = VERDICTS[manner]
    changed = differences(run, clean, "inputs")
    assert [(key[:2], r["drop_reason"], r["finish_reason"], r["input"]) for key, r in changed.items()] == [
        (("toy00", LAST), reason, reason, "")
    ]
    gone = ("toy00", LAST)
    outputs = {(r["task"], r["id"]): r for r in run.read_all("outputs").to_pylist()}
    before = {(r["task"], r["id"]): r for r in clean.read_all("outputs").to_pylist()}
    assert outputs.pop(("toy01", row)) == before.pop(("toy01", row)) | {"drop_reason": reason, "candidates": []}
    assert outputs == {key: r for key, r in before.items() if key != gone}
    pairs = [r for r in run.read_all("trainset").to_pylist() if (r["task"], r["id"]) == ("toy01", row)]
    assert [pair["drop_reason"] for pair in pairs if pair["system"] == "selfguide"] == [reason]
    changed = differences(run, clean, "predictions")
    assert {key: (r["finish_reason"], r["prediction"]) for key, r in changed.items()} == {
        ("toy00", "toy00-1", system): (reason, "") for system in ("few_shot", "selfguide")
    }
    assert {r["n"] for r in run.read_all("scores").to_pylist() if r["task"] == "toy00"} == {3}  # it counts


def test_shards_beside_the_guilty_one_are_found_innocent(tmp_path, make_task, clean):
    """Both shards die together each time, at the same call and the same row."""
    config, run = planned(tmp_path, make_task)
    poison = {seed_of("input", "toy00", LAST): "SIGKILL"}
    supervised(config, [Inputs], [Poisons(poison, seconds=0.02)], run, threads=2)
    assert failures(run) == []
    assert list(differences(run, clean, "inputs")) == [("toy00", LAST, None)]


def test_bad_rows_of_two_shards_in_flight_are_both_found(tmp_path, make_task, clean):
    config, run = planned(tmp_path, make_task)
    poison = {seed_of("input", task, LAST): "SIGSEGV" for task in ("toy00", "toy11")}
    supervised(config, [Inputs], [Poisons(poison, seconds=0.02)], run, threads=2)
    assert failures(run) == []
    assert list(differences(run, clean, "inputs")) == [("toy00", LAST, None), ("toy11", LAST, None)]


def test_processes_lost_at_random_leave_no_verdict(tmp_path, make_task):
    """At every eighth call of the engine or so, where an undisturbed run makes 20."""
    config, clean = planned(tmp_path / "clean", make_task, "inputs.rounds=8")
    make(config, STAGES, Poisons(), clean.shards("tasks"))
    config, run = planned(tmp_path / "lost", make_task, "inputs.rounds=8")
    chance = random.Random(3)
    engines = [Poisons(lost_at=1 + int(chance.expovariate(1 / 8))) for _ in range(25)]
    deaths = supervised(config, STAGES, [*engines, Poisons()], run)
    assert deaths > 3
    assert failures(run) == []
    for table in ("inputs", "outputs", "trainset", "predictions", "scores"):
        assert run.read_all(table).equals(clean.read_all(table)), table


def test_an_over_long_prompt_is_too_long_and_no_other_row_changes(tmp_path, make_task, clean):
    config, run = planned(tmp_path, make_task)
    tasks = run.read("tasks", "00000").to_pylist()
    tasks[0]["instances"][1]["input"] = "deadly sun " * 800
    run.remove("tasks/00000.parquet")
    run.write("tasks", "00000", run.read("tasks", "00001").from_pylist(tasks), {})
    make(config, STAGES, Poisons(), run.shards("tasks"))
    changed = differences(run, clean, "predictions")
    assert {key: (r["finish_reason"], r["prediction"]) for key, r in changed.items() if key[2] != "copy"} == {
        ("toy00", "toy00-1", system): ("too_long", "") for system in ("few_shot", "selfguide")
    }
    assert run.read_all("outputs").equals(clean.read_all("outputs"))


@pytest.mark.parametrize("manner", ["exception", "SIGKILL"])
def test_with_too_many_bad_rows_the_shard_fails_and_the_others_do_not(tmp_path, make_task, clean, manner):
    config, run = planned(tmp_path, make_task, "cluster.bad_rows=2")
    poison = {seed_of("input", "toy00", f"r000i00{i}"): manner for i in range(3)}
    deaths = supervised(config, [Inputs], [Poisons(poison)], run)
    assert deaths <= 2 + 3 * 3
    (table, shard, told), *more = failures(run)
    assert (table, shard, more) == ("inputs", "00000", [])
    wanted = "RuntimeError: a kernel met a row that it cannot bear" if manner == "exception" else "inputs/00000: 3 rows"
    assert told.startswith(wanted)
    assert run.read("inputs", "00001").equals(clean.read("inputs", "00001"))
    assert_no_notes(run)
    supervised(config, [Inputs], [Poisons()], run)  # with another engine it goes on
    assert run.read_all("inputs").equals(clean.read_all("inputs"))


@pytest.mark.parametrize("place", ["before the engine is there", "at its first request"])
def test_an_engine_that_cannot_start_fails_the_shard_and_suspects_no_row(tmp_path, make_task, place):
    config, run = planned(tmp_path, make_task)
    run.remove("tasks/00001.parquet")

    def engine():
        dead = PoisonedEngine({}, lost_at=1)
        if place == "before the engine is there":
            dead.generate([])
        return dead

    deaths = supervised(config, [Inputs], [engine], run)
    # The first death at a request is laid on the call.
    assert deaths == (IDLE_DEATHS + 1 if place == "before the engine is there" else 1 + HARMLESS_DEATHS + 1)
    ((table, shard, told),) = failures(run)
    assert (table, shard, told.split(":")[0]) == ("inputs", "00000", "inputs/00000")
    assert_no_notes(run)


def test_an_engine_that_an_error_has_broken_is_started_anew(tmp_path, make_task, clean):
    config, run = planned(tmp_path, make_task)
    poison = {seed_of("input", "toy00", LAST): "exception"}
    assert supervised(config, [Inputs], [Poisons(poison, broken=True)], run) == 3
    assert failures(run) == []
    changed = differences(run, clean, "inputs")
    assert {key: r["drop_reason"] for key, r in changed.items()} == {("toy00", LAST, None): "engine_error"}


def asked(count, seeds=None):
    engine = RecordingEngine()
    prompts = [tuple(engine.tokenizer.encode(f"Name it.\nITEM: thing {i}\nASSISTANT:")) for i in range(count)]
    params = SamplingParams(n=2, max_new_tokens=8)
    return [Request((), prompt, params, seed) for prompt, seed in zip(prompts, seeds or range(count), strict=True)]


def test_a_failing_row_is_found_by_halving_and_a_good_call_is_made_once(tmp_path):
    guard = Guard(Run(str(tmp_path)), 3, None)
    engine = PoisonedEngine({40: "exception"})
    guarded, requests = Guarded(engine, guard), asked(64)
    with guard.making("outputs", "00000"):
        answers = guarded.generate(requests)
        assert len(engine.calls) == 1 + 2 * 6
        assert guarded.generate(requests[:5]) == answers[:5]
        assert engine.calls[-1] == 5
        assert guarded.generate([]) == []
    assert [c.finish_reason for c in answers[40]] == ["engine_error"] * 2
    good = [i for i in range(64) if i != 40]
    assert [answers[i] for i in good] == PoisonedEngine({}).generate([requests[i] for i in good])


@pytest.fixture(scope="module", params=["batching", "cached"])
def student(request):
    """The embedded student with a bound on a row's time, over each kind of batch; a row of seed 7 gets old quickly."""
    settings = load(overrides=["student.request_seconds=500"])
    engine = make_engine(settings.student, settings.cluster)
    if request.param == "cached":
        engine.probe = replace(engine.probe, shared=False)
        engine.base.set_attn_implementation("sdpa")
    advance = engine._advance

    def age(row, token):
        row.began -= 400 * (row.request.seed == 7)
        advance(row, token)

    engine._advance = age
    return engine


def test_a_row_that_takes_too_long_is_timed_out_without_text(student):
    prompts = [tuple(student.tokenizer.encode(f"Say something about {i} long words")) for i in range(4)]
    params = SamplingParams(n=2, temperature=1.0, max_new_tokens=8, logprobs=1)
    requests = [Request((), prompt, params, seed) for prompt, seed in zip(prompts, (5, 6, 7, 8), strict=True)]
    calm = student.generate([replace(request, seed=request.seed + 100) for request in requests])
    assert {c.finish_reason for several in calm for c in several} <= {"stop", "length"}
    answers = student.generate(requests)
    for completion in answers[2]:
        assert (completion.text, completion.ids, completion.finish_reason) == ("", (), "timed_out")
        assert (completion.logprob, completion.logprobs) == (0.0, ())
    others = student.generate([requests[i] for i in (0, 1, 3)])
    assert [[c.ids for c in answers[i]] for i in (0, 1, 3)] == [[c.ids for c in several] for several in others]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_actors_that_rows_kill_and_hang_are_started_again_and_end_the_same(tmp_path, make_task, clean, cluster):
    import poisoned
    import ray

    ray.cloudpickle.register_pickle_by_value(poisoned)  # workers do not find the tests' folder
    config, run = planned(tmp_path, make_task, "cluster.stall_seconds=2")
    row = survivor(clean)
    poison = {seed_of("input", "toy00", LAST): "SIGKILL", seed_of("output", "toy01", row): "hang"}
    receipts = list(map_shards(config, run.shards("tasks"), [Inputs, Outputs], Poisons(poison)))
    assert not any(receipt.get("failed") for receipt in receipts)
    assert failures(run) == []
    changed = differences(run, clean, "inputs")
    assert {key[:2]: r["drop_reason"] for key, r in changed.items()} == {("toy00", LAST): "killed_engine"}
    outputs = {(r["task"], r["id"]): r for r in run.read_all("outputs").to_pylist()}
    before = {(r["task"], r["id"]): r for r in clean.read_all("outputs").to_pylist()}
    assert outputs.pop(("toy01", row))["drop_reason"] == "timed_out"
    assert outputs == {key: r for key, r in before.items() if key not in (("toy01", row), ("toy00", LAST))}
