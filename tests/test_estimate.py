"""A plan counts what a run then has: exactly where numbers are set, about where the student decides."""

import json
import os
import subprocess
import sys

import pytest

from selfguide_ray import student
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine.scripted import ScriptedEngine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.estimate import SURVIVE, Told, against, estimate, observe
from selfguide_ray.executor import ShardWorker
from selfguide_ray.inputs import Inputs
from selfguide_ray.models import learn, learnable, packs
from selfguide_ray.outputs import Outputs
from selfguide_ray.planning import planning
from selfguide_ray.predictions import Predictions
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES
from selfguide_ray.scores import Scores
from selfguide_ray.tasks import plan
from selfguide_ray.trainset import Trainset

SMALL = (
    "student.engine=scripted",
    "tasks={per_shard: 3, instances: 7, gold: 2}",
    "inputs={rounds: 6, prompts_per_round: 5, length_slack: 0.5}",
    "outputs={samples: 4}",
    "trainset={keep: 4, length_slack: 0.5, in_context: 4}",
    "predictions.systems=[copy, zero_shot, few_shot, few_shot_vote, self_icl, gold_tuned, selfguide]",
    "models.epochs=1",
    "scores.bootstrap=0",
)


def settings(folder, *more):
    return load(overrides=[*SMALL, f"run={folder}", *more])


def work(config, stages, shards=None):
    """Stages over shards in this process, as an actor would do them."""
    run = Run(config.run)
    worker = ShardWorker(config, stages, lambda: ScriptedEngine(config.student))
    for shard in shards or run.shards("tasks"):
        assert not any(receipt.get("failed") for receipt in worker.work(shard))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A whole run of the scripted student over the example tasks, three shards, and its settings."""
    config = settings(tmp_path_factory.mktemp("ended") / "run")
    run = Run(config.run)
    plan(run, config, student.facts(config.student))
    work(config, [Inputs, Outputs, Trainset])
    learn(config, packs(run, config))
    work(config, [Predictions, Scores])
    return config, run


def by_table(told):
    return {row["table"]: row for row in told["tables"]}


def test_what_settings_decide_is_exact(ended):
    config, run = ended
    told = by_table(estimate(config, Told()))
    assert told["inputs"]["rows"] == run.read_all("inputs").num_rows == 8 * 30
    assert told["predictions"]["rows"] == run.read_all("predictions").num_rows == 8 * 7 * 7


def test_without_a_run_two_thirds_survive_and_no_time_is_told(ended):
    told = estimate(ended[0], Told(), price=3.0)
    assert told["shares"] == {"inputs": SURVIVE, "pairs": SURVIVE}
    assert by_table(told)["outputs"]["rows"] == round(240 * 2 / 3)
    assert all(row[name] is None for row in told["tables"] for name in ("hours", "wall_hours", "money"))
    assert told["total"] == {"hours": None, "wall_hours": None, "money": None}


def test_a_run_tells_what_survives(ended):
    config, run = ended
    told = observe(run)
    inputs, pairs = run.read_all("inputs"), run.read_all("trainset").to_pylist()
    mine = [row for row in pairs if row["system"] == "selfguide"]
    assert told.inputs == inputs["drop_reason"].null_count / inputs.num_rows
    assert told.pairs == sum(row["drop_reason"] is None for row in mine) / len(mine)
    planned = by_table(estimate(config, told))
    assert planned["outputs"]["rows"] == run.read_all("outputs").num_rows
    assert planned["trainset"]["rows"] == pytest.approx(len(pairs), abs=8)
    assert planned["models"]["rows"] == pytest.approx(
        sum(work.pairs for work in learnable(run, config).values()), abs=8
    )


def test_planned_tokens_are_about_the_runs(ended):
    config, run = ended
    for line in against(estimate(config, observe(run)), run):
        assert line["done"] == line["of"]
        for name in ("prompt_tokens", "generated_tokens", "trained_tokens"):
            if name in line:
                assert line[name][2] == pytest.approx(1, abs=0.3), (line["table"], name)


def test_of_a_run_half_made_the_plan_counts_for_what_is_made(ended, tmp_path):
    config = settings(tmp_path / "half")
    run = Run(config.run)
    plan(run, config, student.facts(config.student))
    work(config, [Inputs], run.shards("tasks")[:1])
    (line,) = against(estimate(config, Told()), run)
    assert (line["table"], line["done"], line["of"]) == ("inputs", 1, 3)
    assert line["rows"] == [80, 90, 90 / 80]  # a third of 240 rows; the first shard has 3 of 8 tasks


MORE = {  # what is set → tables whose tokens grow by it, and how
    "outputs.samples=8": {"outputs": 2},
    "models.epochs=2": {"models": 2},
    "inputs.rounds=12": {"outputs": 2},
    "models.validation=0.5": {"models": 0.5},
}


@pytest.mark.parametrize("more", MORE)
def test_tokens_grow_with_what_is_asked_for(ended, more):
    before, after = (by_table(estimate(settings(ended[1].root, *extra), Told())) for extra in ((), (more,)))
    for table, factor in MORE[more].items():
        name = "trained_tokens" if table == "models" else "generated_tokens"
        assert after[table][name] == pytest.approx(factor * before[table][name], rel=0.01)


def test_verifying_and_earlier_inputs_take_prompt_tokens(ended):
    def tokens(*more):
        return by_table(estimate(settings(ended[1].root, *more), Told()))["inputs"]["prompt_tokens"]

    assert tokens("inputs.max_earlier=0") < tokens() < tokens("inputs.verify=0.5")


def told_run(folder, receipts, model):
    """A folder whose tables are empty and whose receipts say what they are told to."""
    run = Run(str(folder))
    run.write("tasks", "00000", TABLES["tasks"].empty_table(), {"kept": 1})
    for table, receipt in receipts.items():
        run.write(table, "00000", TABLES[table].empty_table(), receipt)
    rows = [
        {"task": "t", "system": "selfguide", "tokens": 100, "drop_reason": reason} for reason in (None, None, "length")
    ]
    run.write("trainset", "00000", TABLES["trainset"].empty_table().from_pylist(rows, schema=TABLES["trainset"]), {})
    run.put("models/t/model.json", json.dumps(model).encode())
    return run


def test_hours_and_money_follow_from_the_receipts_of_a_run(ended, tmp_path):
    receipts = {
        "inputs": {"rows": 4, "kept": 3, "seconds": 9.0, "generated_tokens": 90, "engine_rates": {}},
        "outputs": {"seconds": 9.0, "generated_tokens": 9, "engine_rates": {"generated_tokens_per_s": 40.0}},
    }
    model = {"pairs": 2, "trained": True, "losses": [1.0, 0.5], "seconds": 8.0, "settings": {"validation": 0.0}}
    told = observe(told_run(tmp_path / "told", receipts, model))
    assert told == Told(inputs=3 / 4, pairs=2 / 3, generated={"inputs": 10.0, "outputs": 40.0}, trained=50.0)
    config = settings(tmp_path, "cluster={engines: 4, groups: 2, workers: 3}")
    planned = estimate(config, told, price=2.0)
    tables = by_table(planned)
    for table, speed in {"inputs": 10.0, "outputs": 40.0, "predictions": 25.0}.items():  # the mean, where it tells none
        hours = tables[table]["generated_tokens"] / speed / 3600
        assert tables[table]["hours"] == pytest.approx(hours)
        assert tables[table]["wall_hours"] == pytest.approx(hours / 4)
        assert tables[table]["money"] == pytest.approx(2 * hours)
    group = tables["models"]["trained_tokens"] / 50 / 3600
    assert tables["models"]["hours"] == pytest.approx(3 * group)  # of workers
    assert tables["models"]["wall_hours"] == pytest.approx(group / 2)
    assert tables["trainset"]["hours"] is None
    assert planned["total"]["money"] == pytest.approx(sum(row["money"] for row in planned["tables"] if row["money"]))


def test_a_run_that_has_begun_is_held_against_its_plan(ended, tmp_path):
    config, run = ended
    assert planning(config, None, None, None)["against"]["run"] == config.run
    other = settings(tmp_path / "new")
    assert "against" not in planning(other, None, None, None)
    assert planning(other, None, None, run.root)["against"]["run"] == run.root


def test_no_run_and_no_task_are_bad_input(ended, tmp_path):
    with pytest.raises(SelfGuideError, match="holds no run"):
        planning(ended[0], str(tmp_path / "nowhere"), None, None)
    (tmp_path / "bare.json").write_text('{"instruction": "Say yes.", "examples": []}')
    with pytest.raises(SelfGuideError, match="leaves no task"):
        estimate(settings(tmp_path / "run", f"tasks.source={tmp_path / 'bare.json'}"), Told())


def test_the_embedded_students_own_tokenizer_counts(tmp_path):
    config = load(overrides=[f"run={tmp_path}", "inputs.rounds=2", "tasks.select=example001*", "tasks.instances=4"])
    row = by_table(estimate(config, Told()))["inputs"]
    task = json.loads(next(resolve("embedded/tasks").glob("example001*")).read_text())
    assert row["rows"] == 20
    letters = 20 * len(json.dumps(task["Definition"])) if "Definition" in task else 20 * len(task["instruction"])
    assert row["prompt_tokens"] > letters / 8  # a token is a few letters, and the instruction is in every prompt


def test_the_command_prints_tables_or_json_and_writes_nothing(ended, tmp_path):
    (tmp_path / "config.yaml").write_text("run: out\nstudent: {engine: scripted}\n")

    def ask(*more):
        command = [sys.executable, "-m", "selfguide_ray.cli", "plan", "config.yaml", *more]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120, check=False
        )

    told = json.loads(ask("--json", "--rate", ended[1].root, "--price", "3").stdout)
    assert told["tasks"] == {"classification": 4, "generation": 4}
    shown = ask("--against", ended[1].root)
    assert shown.returncode == 0, shown.stderr
    assert "generated tokens" in shown.stdout
    assert "planned → actual" in shown.stdout
    assert ask("inputs.round=3").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
