"""Wins, ties and losses of a run, and the tasks that cannot tell."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from selfguide_ray import significance
from selfguide_ray.config import Config
from selfguide_ray.report import headline, write_report
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, task_rows
from selfguide_ray.scores import Scores
from selfguide_ray.standings import Board, learns


def task_of(name, labels=(), category=""):
    return Task(name, "Do it.", (), labels, category, "exact_match" if labels else "rouge_l")


def row(task, system, value, against=(), n=50):
    given = {"task": task.name, "category": task.category, "system": system, "metric": task.metric}
    told = [dict(zip(("system", "gain", "low", "high", "p"), one, strict=True)) for one in against]
    return given | {"value": value, "n": n, "against": told}


def board_of(*given, n=50):
    """A board of tasks (name, family's labels, category, few_shot, selfguide, low, high, p); zero_shot lies below."""
    tasks, rows = [], []
    for name, labels, category, prompted, tuned, low, high, p in given:
        tasks.append(task := task_of(name, labels, category))
        over = [("few_shot", tuned - prompted, low, high, p), ("zero_shot", tuned, -1.0, 1.0, 0.9)]
        rows += [row(task, "zero_shot", 0.0, n=n), row(task, "few_shot", prompted, n=n)]
        rows += [row(task, "selfguide", tuned, over, n=n)]
    return Board(
        tasks, {(r["task"], r["metric"], r["system"]): r for r in rows}, ["zero_shot", "few_shot", "selfguide"]
    )


AB = ("a", "b")
SUITE = (
    ("c1", AB, "Topics", 20.0, 50.0, 20.0, 40.0, 0.001),
    ("c2", AB, "Topics", 50.0, 60.0, -2.0, 22.0, 0.2),
    ("c3", AB, "Moods", 50.0, 50.0, 0.0, 0.0, 1.0),
    ("g1", (), "Titles", 60.0, 40.0, -28.0, -12.0, 0.004),
    ("g2", (), "Titles", 30.0, 36.0, 1.0, 11.0, 0.04),
)


def test_each_gain_is_over_the_better_prompted_system_with_the_test_that_scores_hold():
    found = {gain.task: gain for gain in significance.gains(board_of(*SUITE))}
    assert list(found) == ["c1", "c2", "g2", "c3", "g1"]  # by gain
    c1 = found["c1"]
    assert (c1.rival, c1.n, c1.points, c1.low, c1.high, c1.p) == ("few_shot", 50, 30.0, 20.0, 40.0, 0.001)


def test_q_values_count_all_tasks_of_the_run_and_decide_wins_and_losses():
    found = {gain.task: gain for gain in significance.gains(board_of(*SUITE))}
    # Of five p-values: .001 * 5/1, .004 * 5/2, .04 * 5/3, .2 * 5/4, 1.
    assert [found[name].q for name in ("c1", "g1", "g2", "c2", "c3")] == pytest.approx([0.005, 0.01, 0.2 / 3, 0.25, 1])
    outcomes = {name: gain.outcome for name, gain in found.items()}
    # g2's own p is below 0.05; among five it is not enough.
    assert outcomes == {"c1": "win", "c2": "tie", "g2": "tie", "c3": "tie", "g1": "loss"}


def test_families_and_categories_are_counted_and_have_intervals_over_tasks():
    classification, generation = significance.by_family(significance.gains(board_of(*SUITE)))
    counted = ("wins", "ties", "losses", "up", "down", "tasks", "untested")
    assert [classification[key] for key in counted] == [1, 2, 0, 2, 0, 3, 0]
    assert [generation[key] for key in counted] == [0, 1, 1, 1, 1, 2, 0]
    assert classification["points"] == pytest.approx(40 / 3)
    # Of two tasks every resample's mean is one of them or their mean.
    assert (generation["low"], generation["high"]) == (-20.0, 6.0)
    topics, moods = classification["categories"]
    assert (topics["name"], topics["points"], topics["low"], topics["high"]) == ("Topics", 20.0, 10.0, 30.0)
    assert (moods["name"], moods["points"], moods["low"], moods["high"]) == ("Moods", 0.0, None, None)


def test_a_family_in_one_line():
    classification, generation = significance.by_family(significance.gains(board_of(*SUITE)))
    assert significance.line(generation) == (
        "generation: selfguide −7.0 [−20.0, +6.0] over few_shot; 0 wins, 1 tie, 1 loss (q ≤ 0.05)"
    )
    assert significance.line(classification).endswith("over few_shot; 1 win, 2 ties, 0 losses (q ≤ 0.05)")
    (alone,) = significance.by_family(significance.gains(board_of(SUITE[0])))
    assert (
        significance.line(alone) == "classification: selfguide +30.0 over few_shot; 1 win, 0 ties, 0 losses (q ≤ 0.05)"
    )


@pytest.mark.parametrize(
    ("n", "low", "high", "reach", "few", "wide"),
    [
        (5, 100.0, 100.0, 100 * (1 - 0.05 ** (1 / 5)), True, False),  # all five right: p = 2 / 2^5
        (6, 100.0, 100.0, 100 * (1 - 0.05 ** (1 / 6)), False, True),
        (50, -9.0, 11.0, 10.0, False, False),
        (50, -9.0, 11.2, 10.1, False, True),
        (28, 0.0, 0.0, 100 * (1 - 0.05 ** (1 / 28)), False, True),  # nothing differs, but 10 % might have
        (29, 0.0, 0.0, 100 * (1 - 0.05 ** (1 / 29)), False, False),
        (50, None, None, None, False, False),
    ],
)
def test_tasks_that_cannot_tell_are_named(n, low, high, reach, few, wide):
    found = significance.gains(board_of(("t", AB, "", 10.0, 10.0, low, high, 1.0), n=n))
    assert found[0].reach == pytest.approx(reach)
    assert (significance.too_few(found), significance.too_wide(found)) == (["t"] * few, ["t"] * wide)


def test_six_instances_are_the_fewest_that_can_reach_the_level():
    assert 2 ** (1 - significance.FEWEST) <= significance.LEVEL < 2 ** (2 - significance.FEWEST)


def test_scores_without_tests_are_told_by_their_signs():
    board = board_of(*SUITE)
    for one in board.rows.values():
        one["against"] = None  # as a run of an earlier version reads
    (family, _) = significance.by_family(significance.gains(board))
    assert (family["untested"], family["wins"]) == (3, 0)
    assert significance.line(family).endswith("over few_shot; 2 up, 0 down, not tested")


@pytest.mark.parametrize("missing", [("selfguide",), ("zero_shot", "few_shot")])
def test_without_selfguide_or_a_rival_there_is_no_gain(missing):
    board = board_of(*SUITE)
    rows = {key: one for key, one in board.rows.items() if key[2] not in missing}
    assert significance.told(Board(board.tasks, rows, [s for s in board.systems if s not in missing])) is None


# --- in `scores` ------------------------------------------------------------------------------------------------------

ALL = ("copy", "majority", "zero_shot", "few_shot", "few_shot_tuned", "selfguide")


def scored(make_task, systems=ALL, right=None, **scores):
    """The rows of `scores` of a task with ten instances; the first `right[system]` answers of a system are right."""
    task = make_task("t", labels=AB, metric="exact_match", instances=[(f"x{n}", "a") for n in range(10)])
    right = {"copy": 0, "majority": 10, "zero_shot": 2, "few_shot": 3, "few_shot_tuned": 3, "selfguide": 9} | (
        right or {}
    )
    answers = [
        {"task": "t", "id": f"t-{n}", "system": system, "prediction": "a" if n < right[system] else "b"}
        for system in systems
        for n in range(10)
    ]
    config = Config(predictions={"systems": systems}, scores=scores)
    predictions = pa.Table.from_pylist(answers, schema=TABLES["predictions"])
    rows = Scores(config, None, None)(task_rows([task]), predictions).to_pylist()
    return {(r["system"], r["metric"]): r for r in rows}


def test_systems_that_learn_are_held_against_prompted_ones_and_floors(make_task):
    rows = scored(make_task)
    for (system, metric), told in rows.items():
        others = [one["system"] for one in told["against"]]
        assert others == (list(ALL[:4]) if learns(system) and metric != "macro_f1" else [])
    over = {one["system"]: one for one in rows["selfguide", "exact_match"]["against"]}
    assert over["few_shot"]["gain"] == pytest.approx(60.0)
    assert over["few_shot"]["p"] == pytest.approx(2 / 2**6)  # six answers changed, all for the better
    assert over["few_shot"]["low"] > 0
    assert over["majority"]["p"] == 1.0  # one answer changed
    (alike,) = [one for one in rows["few_shot_tuned", "exact_match"]["against"] if one["system"] == "few_shot"]
    assert (alike["gain"], alike["low"], alike["high"], alike["p"]) == (0.0, 0.0, 0.0, 1.0)


def test_only_systems_that_were_run_are_rivals_in_any_order(make_task):
    rows = scored(make_task, systems=("selfguide", "few_shot"))
    assert [one["system"] for one in rows["selfguide", "exact_match"]["against"]] == ["few_shot"]
    assert rows["few_shot", "exact_match"]["against"] == []


def test_without_resamples_there_is_a_p_value_and_no_interval(make_task):
    (over, *_) = scored(make_task, bootstrap=0)["selfguide", "exact_match"]["against"]
    assert (over["low"], over["high"]) == (None, None)
    assert over["p"] < 0.05


# --- in the report ----------------------------------------------------------------------------------------------------


def write(folder, board):
    run = Run(str(folder))
    run.write("tasks", "00000", task_rows(board.tasks), {})
    run.write("scores", "00000", pa.Table.from_pylist(list(board.rows.values()), schema=TABLES["scores"]), {})
    return run


def page_of(run):
    """The text of the chapter on gains, a row of a table a line."""
    write_report(run, Config(run=run.uri))
    chapter = run.get("report.html").decode().split("<h4>Gains over prompting</h4>")[1].split("</section>")[0]
    chapter = re.sub(r"\s+", " ", chapter).replace("</tr>", "\n").replace("</table>", "\n").replace("<wbr>", "")
    return "\n".join(" ".join(re.sub("<[^>]*>", " ", line).split()) for line in chapter.splitlines())


def test_the_report_tells_wins_and_gains_by_family_category_and_task(tmp_path):
    lines = page_of(write(tmp_path / "run", board_of(*SUITE))).splitlines()
    assert "generation, over few_shot 2 −7.0 −20.0 to +6.0 0 1 1 1 1" in lines
    assert "Topics 2 +20.0 +10.0 to +30.0 1 1 0 2 0" in lines
    assert "Moods 1 0.0 0 1 0 0 0" in lines
    by_task = [line for line in lines if re.match(r"[cg]\d ", line)]
    assert by_task[0] == "c1 exact match 50 +30.0 +20.0 to +40.0 ±10.0 0.001 0.005 win"
    assert by_task[-1] == "g1 ROUGE-L 50 −20.0 −28.0 to −12.0 ±8.0 0.004 0.010 loss"
    assert any("1 task too small to tell 10 points from nothing, by their reach: c2." in line for line in lines)
    assert not any("too few items" in line for line in lines)


def test_the_report_names_tasks_with_too_few_items(tmp_path):
    board = board_of(("c1", AB, "", 10.0, 100.0, 90.0, 90.0, 0.125), ("g1", (), "", 1.0, 2.0, 0.0, 2.0, 0.5), n=4)
    text = page_of(write(tmp_path / "run", board))
    assert "2 tasks with too few items to tell anything" in text
    assert "is above 0.05: c1, g1." in text
    assert "c1 exact match 4 +90.0 +90.0 to +90.0 ±52.7 0.125 0.250 tie too few" in text


def test_of_many_tasks_the_report_shows_both_ends(tmp_path):
    suite = [(f"t{n:03d}", AB, "", 40.0, 40.0 + n / 10 - 5, -9.0, 9.0, 0.5) for n in range(100)]
    lines = page_of(write(tmp_path / "run", board_of(*suite))).splitlines()
    shown = [line.split()[0] for line in lines if re.match(r"t\d{3} ", line)]
    assert shown == [f"t{n:03d}" for n in [*range(99, 79, -1), *range(19, -1, -1)]]
    assert any("60 tasks between; all are in the table scores" in line for line in lines)


def test_a_report_of_scores_without_tests_says_how_to_make_them(tmp_path):
    run = write(tmp_path / "run", board_of(*SUITE))
    shard = pa.Table.from_pylist(
        [{k: v for k, v in one.items() if k != "against"} for one in board_of(*SUITE).rows.values()],
        schema=pa.schema([field for field in TABLES["scores"] if field.name != "against"]),
    )
    pq.write_table(shard, tmp_path / "run/scores/00000.parquet")  # as an earlier version wrote it
    text = page_of(run)
    assert "5 tasks not tested" in text
    assert "classification, over few_shot 3 +13.3 0.0 to +30.0 – – – 2 0" in text


def test_the_terminal_has_a_line_for_each_family(tmp_path):
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(headline(write(tmp_path / "run", board_of(*SUITE))))
    last = captured.get().splitlines()[-2:]
    assert last[1] == "generation: selfguide −7.0 [−20.0, +6.0] over few_shot; 0 wins, 1 tie, 1 loss (q ≤ 0.05)"
    assert last[0].startswith("classification: selfguide +13.3 [")
