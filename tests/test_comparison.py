"""Groups of runs side by side: means over tasks and seeds, gains over prompting, and what an ablation costs."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from typer.testing import CliRunner

from selfguide_ray.cli import app
from selfguide_ray.comparison import compare, tables
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, task_rows

TOPIC = Task("topic", "x", (), ("a", "b"), metric="exact_match")
MOOD = Task("mood", "x", (), ("a", "b"), metric="exact_match")
TITLE = Task("title", "x", ())
TASKS = (TOPIC, MOOD, TITLE)


@pytest.fixture
def make_run(tmp_path):
    """Writes a run: {system: (score of each task)}."""
    numbers = itertools.count()

    def make(tasks=TASKS, n=10, **systems):
        path = str(tmp_path / f"run{next(numbers)}")
        rows = [
            {"task": task.name, "system": system, "metric": task.metric, "value": value, "n": n}
            for system, values in systems.items()
            for task, value in zip(tasks, values, strict=True)
        ]
        Run(path).write("tasks", "00000", task_rows(tasks), {"kept": len(tasks)})
        Run(path).write("scores", "00000", pa.Table.from_pylist(rows, schema=TABLES["scores"]), {})
        return path

    return make


def family(told, name):
    return next(family for family in told["families"] if family["name"] == name)


def test_a_systems_mean_is_over_tasks_and_runs_with_an_interval_over_tasks(make_run):
    runs = [make_run(few_shot=(20.0, 40.0, 5.0)), make_run(few_shot=(30.0, 60.0, 7.0))]
    told = compare([runs])
    (group,) = family(told, "classification")["groups"]
    mean = group["systems"]["few_shot"]
    # The tasks' means over runs are 25 and 50; those of the runs over tasks 30 and 45.
    assert (mean["mean"], mean["low"], mean["high"]) == (37.5, 25.0, 50.0)
    assert mean["sd"] == pytest.approx(np.std([30, 45], ddof=1))
    (alone,) = family(told, "generation")["groups"]
    assert alone["systems"]["few_shot"] == {"mean": 6.0, "low": None, "high": None, "sd": pytest.approx(2**0.5)}
    assert [f["tasks"] for f in told["families"]] == [2, 1]


def test_the_gain_is_over_the_prompted_system_that_is_better_over_all_runs(make_run):
    runs = [
        make_run(zero_shot=(50.0, 50.0, 0.0), few_shot=(10.0, 20.0, 1.0), selfguide=(60.0, 80.0, 4.0)),
        make_run(zero_shot=(10.0, 20.0, 0.0), few_shot=(60.0, 90.0, 1.0), selfguide=(70.0, 80.0, 4.0)),
    ]
    (group,) = family(compare([runs]), "classification")["groups"]
    gain = group["gain"]
    # few_shot's mean is 45, zero_shot's 32.5. The tasks gain 30 and 25; the runs 55 and 0.
    assert gain["rival"] == "few_shot"
    assert (gain["mean"], gain["low"], gain["high"]) == (27.5, 25.0, 30.0)
    assert gain["sd"] == pytest.approx(np.std([55, 0], ddof=1))
    assert group["over_first"] is None


def test_other_groups_are_held_against_the_first_task_by_task(make_run):
    tasks = [Task(f"t{n}", "x", ()) for n in range(6)]
    full = [make_run(tasks, selfguide=[50.0 + n + seed for n in range(6)]) for seed in (0, 2)]
    bare = [make_run(tasks, selfguide=[40.0 + 2 * n + seed for n in range(6)]) for seed in (0, 2, 4)]
    alike = [make_run(tasks, selfguide=[51.0 + n for n in range(6)])]
    told = family(compare([full, bare, alike]), "generation")["groups"]
    over = told[1]["over_first"]
    # Each task: 42 + 2n less 51 + n.
    assert over["by_task"] == {f"t{n}": pytest.approx(n - 9) for n in range(6)}
    assert over["mean"] == pytest.approx(-6.5)
    assert -9 < over["low"] < -6.5 < over["high"] < -4
    assert (over["up"], over["down"], over["p"]) == (0, 6, 2 / 2**6)
    assert over["q"] == 2 * over["p"]  # two comparisons, the other of which has p = 1
    assert (told[2]["over_first"]["mean"], told[2]["over_first"]["p"], told[2]["over_first"]["q"]) == (0.0, 1.0, 1.0)


def test_systems_that_some_run_lacks_are_left_out(make_run):
    told = compare([[make_run(copy=(1.0, 1.0, 1.0), few_shot=(2.0, 2.0, 2.0)), make_run(few_shot=(3.0, 3.0, 3.0))]])
    (group,) = family(told, "classification")["groups"]
    assert list(group["systems"]) == ["few_shot"]
    assert group["gain"] is None


def test_a_table_for_each_family_shows_means_intervals_and_differences(make_run):
    full = make_run(few_shot=(20.0, 40.0, 5.0), selfguide=(40.0, 50.0, 8.0))
    bare = make_run(few_shot=(20.0, 40.0, 5.0), selfguide=(30.0, 46.0, 8.0))
    console = Console(width=140, color_system=None)
    with console.capture() as captured:
        for table in tables(compare([[full], [bare]])):
            console.print(table)
    shown = captured.get()
    for text in ("classification: 2 tasks", "45.0", "[40.0, 50.0]", "+15.0", "−7.0", "[−10.0, −4.0]", "0 up, 2 down"):
        assert text in shown
    assert "generation: 1 task," in shown
    assert "run0" in shown
    assert "over few_shot" in shown


def test_the_command_prints_tables_or_json(make_run):
    one, two, other = (make_run(few_shot=(1.0, 2.0, 3.0), selfguide=(4.0, 5.0, 6.0 + n)) for n in range(3))
    done = CliRunner().invoke(app, ["compare", f"{one},{two}", other, "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told == compare([[one, two], [other]])
    assert family(told, "generation")["groups"][1]["over_first"]["by_task"] == {"title": 1.5}


def unfinished(make_run):
    path = make_run(few_shot=(1.0, 2.0, 3.0))
    Run(path).write("tasks", "00001", task_rows([Task("more", "x", ())]), {"kept": 1})
    return [[path]]


BAD = {
    "other tasks": (
        lambda make: [[make(few_shot=(1.0, 2.0, 3.0))], [make((TOPIC, MOOD), few_shot=(1.0, 2.0))]],
        "the scores of the same tasks",
    ),
    "other numbers of instances": (
        lambda make: [[make(few_shot=(1.0, 2.0, 3.0)), make(n=9, few_shot=(1.0, 2.0, 3.0))]],
        "the scores of the same tasks",
    ),
    "no run": (lambda make: [["nowhere"]], "nowhere holds no run"),
    "an unfinished run": (unfinished, "lacks the scores of 1 of 2 shards"),
    "a run twice": (lambda make: [[make(few_shot=(1.0, 2.0, 3.0))] * 2], "is no group of runs"),
    "an empty group": (lambda make: [[]], "is no group of runs"),
}


@pytest.mark.parametrize("case", BAD)
def test_runs_that_cannot_be_compared_are_refused(make_run, case):
    given, said = BAD[case]
    with pytest.raises(SelfGuideError, match=said):
        compare(given(make_run))


def test_the_command_refuses_with_exit_code_2(make_run):
    first, other = make_run(few_shot=(1.0, 2.0, 3.0)), make_run((TOPIC, MOOD), few_shot=(1.0, 2.0))
    done = CliRunner().invoke(app, ["compare", first, other])
    assert done.exit_code == 2
    assert "instead:" in done.stderr
