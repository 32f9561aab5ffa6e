"""Scores with and without the held-out instances that something learned or shown overlaps."""

import pyarrow as pa
import pytest

from selfguide_ray.config_file import load
from selfguide_ray.schema import TABLES, task_rows
from selfguide_ray.scores import Scores
from selfguide_ray.standings import Board
from selfguide_ray.suspects import suspicions

RIGHT = {"copy": "..x.", "few_shot": "xx..", "selfguide": "xxx."}  # which of four instances each system gets right


def rows_of(table, *rows):
    return pa.Table.from_pylist(list(rows), schema=TABLES[table])


def pair(suspects, reason=None, system="selfguide", task="things"):
    return {"task": task, "system": system, "drop_reason": reason, "suspects": suspects}


def scored(task, *pairs, settings=()):
    config = load(overrides=[f"predictions.systems=[{', '.join(RIGHT)}]", "scores.bootstrap=0", *settings])
    predictions = [
        {
            "task": task.name, "id": instance.id, "system": system,
            "prediction": instance.references[0] if RIGHT[system][place] == "x" else "wrong",
        }
        for system in RIGHT
        for place, instance in enumerate(task.instances)
    ]  # fmt: skip
    return Scores(config, None, None)(
        task_rows([task]), rows_of("predictions", *predictions), rows_of("trainset", *pairs)
    ).to_pylist()


@pytest.fixture
def task(make_task):
    instances = [("a", "yes"), ("b", "no"), ("c", "yes"), ("d", "no")]
    return make_task("things", labels=("yes", "no"), instances=instances)


def clean(rows, metric="exact_match"):
    return {
        row["system"]: (row["value"], row["clean_value"], row["clean_n"]) for row in rows if row["metric"] == metric
    }


def test_every_system_is_scored_without_the_same_instances(task):
    rows = scored(task, pair(["things-2"]), pair([]), pair(["things-2", "things-3"]))
    assert clean(rows) == {"copy": (25.0, 0.0, 2), "few_shot": (50.0, 100.0, 2), "selfguide": (75.0, 100.0, 2)}
    assert clean(rows, "macro_f1")["selfguide"][1:] == (100.0, 2)
    assert {row["n"] for row in rows} == {4}


@pytest.mark.parametrize(
    ("given", "settings", "left"),
    [
        (pair(["things-0"], "contaminated"), (), 4),  # it was not learned
        (pair(["things-0"], system="few_shot_tuned"), (), 3),  # prompts show the examples
        (pair(["things-0"], "too_long", "few_shot_tuned"), (), 3),  # even one too long to be learned
        (pair(["things-0"], task="other"), (), 4),
        (pair(["things-0"]), ("predictions.systems=[copy, few_shot]",), None),  # nothing was learned, so nobody looked
        (pair(["things-0", "things-1", "things-2", "things-3"]), (), 0),
    ],
)
def test_a_suspect_is_what_a_learned_pair_or_an_example_overlaps(task, given, settings, left):
    rows = scored(task, given, settings=settings)
    assert {row["clean_n"] for row in rows} == {left}
    if left == 4:
        assert all(row["clean_value"] == pytest.approx(row["value"]) for row in rows)
    if left == 0:
        assert {row["clean_value"] for row in rows} == {None}


def test_where_nobody_looked_nothing_is_said(task):
    rows = scored(task, pair(None), settings=("trainset.decontaminate=off",))
    assert {(row["clean_value"], row["clean_n"]) for row in rows} == {(None, None)}
    board = Board([task], {(row["task"], row["metric"], row["system"]): row for row in rows}, list(RIGHT))
    assert suspicions(board) is None


def test_means_with_and_without_suspects_are_over_the_same_tasks(make_task):
    several = [
        make_task(name, labels=("yes", "no"), instances=[(c, "yes") for c in "abcd"]) for name in ("k", "l", "m")
    ]
    pairs = [pair(["k-0"], task="k"), pair([f"l-{n}" for n in range(4)], task="l")]
    rows = [row for task in several for row in scored(task, *pairs)]
    board = Board(several, {(row["task"], row["metric"], row["system"]): row for row in rows}, list(RIGHT))
    told = suspicions(board)
    assert (told["held_out"], told["suspects"], told["tasks"]) == (12, 5, [("k", 1, 4), ("l", 4, 4)])
    assert told["without_rest"] == 1
    (family,) = told["families"]
    assert (family["name"], family["metric"]) == ("classification", "exact_match")
    wanted = [(25.0, (100 / 3 + 25) / 2), (50.0, (100 / 3 + 50) / 2), (75.0, (200 / 3 + 75) / 2)]
    assert [mean for pair in family["means"] for mean in pair] == pytest.approx([v for two in wanted for v in two])


def test_without_suspects_there_are_no_means_to_compare(task):
    rows = scored(task, pair([]))
    board = Board([task], {(row["task"], row["metric"], row["system"]): row for row in rows}, list(RIGHT))
    assert suspicions(board) == {"held_out": 4, "suspects": 0, "tasks": [], "without_rest": 0, "families": []}
