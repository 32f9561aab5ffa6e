"""The plan: which tasks are selected, what is held out, and what is refused."""

import json
from collections import Counter

import pytest

from selfguide_ray.config import Tasks as Settings
from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import Run
from selfguide_ray.schema import tasks_of
from selfguide_ray.tasks import expected_cost, plan, selected, set_apart

STUDENT = {"model": "none", "fingerprint": "scripted"}


def write_task(folder, name, instances=5, **changes):
    document = {
        "Definition": ["Repeat it."],
        "Categories": ["Echo"],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Positive Examples": [{"input": f"demo {i}", "output": f"demo {i}"} for i in range(2)],
        "Instances": [{"id": f"{name}-{i}", "input": f"text {i}", "output": [f"text {i}"]} for i in range(instances)],
    }
    (folder / f"{name}.json").write_text(json.dumps(document | changes))


@pytest.fixture
def suite(tmp_path):
    """Six tasks in a folder, with split lists beside it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, "task1_a", Categories=["Translation"], Output_language=["French"])
    write_task(folder, "task2_b", Categories=["Translation"], Input_language=["Panjabi"])
    write_task(folder, "task3_c", instances=250)
    write_task(folder, "task4_d", instances=250)
    write_task(folder, "task5_e")
    write_task(folder, "other")
    for split, names in {"default/test": "task3_c task5_e missing", "default/train": "task1_a task4_d"}.items():
        path = tmp_path / "splits" / f"{split}_tasks.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(names.split()) + "\n")
    return folder


@pytest.fixture
def settings(suite, tmp_path):
    """Builds a config for the suite."""
    return lambda *more: load(overrides=[f"run={tmp_path}/run", f"tasks.source={suite}", *more])


def make_plan(config):
    return plan(Run(config.run), config, STUDENT)


def refusal(config):
    with pytest.raises(SelfGuideError) as caught:
        make_plan(config)
    return caught.value


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("all", "other 1 2 3 4 5"),
        ("task1_a", "1"),
        ("task*", "1 2 3 4 5"),
        ("task[12]_*", "1 2"),
        ("task5_e, task1_a", "1 5"),
        ("default/test", "3 5"),
        ("default/train", "1 4"),
        ("category:Translation", "1 2"),
        ("category:translation", "1 2"),
        ("language:French", "1"),
        ("language:panjabi,language:French", "1 2"),
        ("default/train&category:Translation", "1"),
        ("default/test & task3*,other", "other 3"),
        ("category:Translation,default/test", "1 2 3 5"),
        ("all,!task*", "other"),
        ("!other", "1 2 3 4 5"),
        ("!category:Translation,!other", "3 4 5"),
        ("!default/train&category:Translation", "other 2 3 4 5"),
        ("!task3_c,default/test", "5"),  # a taking term counts wherever it stands
        ("[task2_b, '!task1*', default/train]", "2 4"),
    ],
)
def test_the_terms_of_a_selection_give_and_take(settings, select, names):
    refusals = []
    found = [task.name for task in selected(settings(f"tasks.select={select}"), refusals)]
    assert [name[4] if name != "other" else name for name in found] == names.split()
    assert refusals == []


def test_a_yaml_file_may_select_with_a_list(suite, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"tasks:\n  source: {suite}\n  select:\n  - task*\n  - '!task1_a'\n  - '!default/test'\n")
    config = load(path)
    assert config.tasks.select == "task*,!task1_a,!default/test"
    assert [task.name for task in selected(config, [])] == ["task2_b", "task4_d"]


def test_a_split_without_split_lists_is_refused(settings, suite, tmp_path):
    (tmp_path / "splits").rename(tmp_path / "elsewhere")
    error = refusal(settings("tasks.select=default/test"))
    assert error.what == "tasks.select: default/test is a split, and no split lists were found."
    assert [t.name for t in selected(settings("tasks.select=default/test", f"tasks.splits={tmp_path}/elsewhere"), [])]


def test_an_unknown_split_is_refused_with_the_known_ones(settings):
    error = refusal(settings("tasks.select=default/tset"))
    assert error.what == "tasks.select: there is no split default/tset."
    assert error.why.endswith("splits has default/test, default/train.")


def test_a_splits_folder_that_is_not_there_is_refused(settings, tmp_path):
    assert (
        refusal(settings(f"tasks.splits={tmp_path}/none")).what == f"tasks.splits: {tmp_path}/none is not a directory."
    )


def test_selecting_nothing_names_the_nearest_task_and_writes_nothing(settings, tmp_path):
    error = refusal(settings("tasks.select=task4_dd"))
    assert error.what.startswith("tasks.select: task4_dd selects none of the 6 tasks in ")
    assert error.instead == "Use names as in task4_d, or all."
    assert not (tmp_path / "run").exists()


# --- what is held out ------------------------------------------------------------------------------------------------


def test_a_test_task_holds_out_its_first_instances_and_others_a_seeded_sample(settings):
    def ids(*more):
        return {task.name: [i.id for i in task.instances] for task in selected(settings(*more), [])}

    first = ids()
    assert first["task3_c"] == [f"task3_c-{i}" for i in range(100)]
    sample = [int(name.split("-")[1]) for name in first["task4_d"]]
    assert len(sample) == len(set(sample)) == 100
    assert sample == sorted(sample) != list(range(100))
    assert first["task1_a"] == [f"task1_a-{i}" for i in range(5)]
    assert ids() == first
    assert ids("seed=1")["task4_d"] != first["task4_d"]
    assert ids("seed=1")["task3_c"] == first["task3_c"]
    assert ids("tasks.select=task4_d")["task4_d"] == first["task4_d"]  # other tasks do not matter
    assert {len(some) for some in ids("tasks.instances=3").values()} == {3}
    assert {len(some) for some in ids("tasks.instances=0").values()} == {0}


def test_holding_out_touches_nothing_but_instances(make_task):
    task = make_task(instances=[(f"text {i}", f"thing {i}") for i in range(9)])
    left = set_apart(task, official=False, settings=Settings(instances=4), seed=0)
    assert len(left.instances) == 4
    assert set(left.instances) < set(task.instances)
    assert (left.name, left.examples, left.instruction) == (task.name, task.examples, task.instruction)
    assert set_apart(task, official=False, settings=Settings(instances=9), seed=0) == task


def test_instances_for_validation_and_gold_are_others_in_the_proportions_of_the_answers(make_task):
    rights = ["yes"] * 60 + ["no"] * 30 + ["maybe"] * 10
    task = make_task(labels=("yes", "no", "maybe"), instances=[(f"text {i}", right) for i, right in enumerate(rights)])
    for official in (False, True):
        cut = set_apart(task, official, Settings(instances=50, validation=20, gold=20), seed=0)
        parts = [{i.id for i in part} for part in (cut.instances, cut.validation, cut.gold)]
        assert [len(part) for part in parts] == [50, 20, 20]
        assert len(set.union(*parts)) == 90
        left = Counter(i.references[0] for i in task.instances if i not in cut.instances)
        for part in (cut.validation, cut.gold):
            counts = Counter(i.references[0] for i in part)
            assert all(abs(counts[answer] - 20 * count / 50) <= 1 for answer, count in left.items())
        assert cut.instances == set_apart(task, official, Settings(instances=50), seed=0).instances
        assert cut.validation == set_apart(task, official, Settings(instances=50, validation=20), seed=0).validation
        assert cut.validation != set_apart(task, official, Settings(instances=50, validation=20), seed=1).validation
    few = set_apart(task, official=False, settings=Settings(instances=95, validation=20, gold=20), seed=0)
    assert (len(few.instances), len(few.validation), len(few.gold)) == (95, 5, 0)  # there are no more


# --- broken files ----------------------------------------------------------------------------------------------------


def test_a_broken_file_among_good_ones_is_left_out_and_listed(settings, suite, tmp_path):
    (suite / "task2_b.json").write_text('{"Definition": ')
    write_task(suite, "task6_f", **{"Positive Examples": []})
    write_task(suite, "task7_g", **{"Positive Examples": [{"input": "a", "output": "b"}]})
    done = make_plan(settings("tasks.select=task*"))
    assert (done["tasks"], done["shards"]) == (4, 1)
    assert [refused["file"] for refused in done["refused"]] == [
        str(suite / f"task{n}.json") for n in ("2_b", "6_f", "7_g")
    ]
    assert "cannot be parsed" in done["refused"][0]["what"]
    assert done["refused"][1]["what"] == f"{suite}/task6_f.json: task6_f has no examples."
    assert done["refused"][2]["what"] == f"{suite}/task7_g.json: task7_g has 1 example."
    assert json.loads((tmp_path / "run/tasks/_plan.json").read_text()) == done
    names = Run(settings().run).read("tasks", "00000")["task"].to_pylist()
    assert names == ["task1_a", "task3_c", "task4_d", "task5_e"]


def test_a_broken_file_that_is_not_selected_does_not_matter(settings, suite):
    (suite / "task2_b.json").write_text('{"Definition": ')
    assert make_plan(settings("tasks.select=task1_a"))["refused"] == []


def test_strict_raises_before_anything_is_written(settings, suite, tmp_path):
    (suite / "task5_e.json").write_text('{"Definition": ')  # behind the first shard
    error = refusal(settings("tasks.strict=true", "tasks.per_shard=1"))
    assert error.what.startswith(f"{suite}/task5_e.json: cannot be parsed")
    assert not (tmp_path / "run").exists()
    write_task(suite, "task5_e")
    assert make_plan(settings("tasks.strict=true", "tasks.per_shard=1"))["tasks"] == 6


def test_only_broken_files_raise_the_first_of_them_and_count_the_others(settings, suite, tmp_path):
    for name in ("task1_a", "task2_b"):
        (suite / f"{name}.json").write_text("[]")
    error = refusal(settings("tasks.select=task[12]*"))
    assert error.what.endswith("task1_a.json: holds a list, not a mapping of keys. (1 more files are broken.)")
    assert not (tmp_path / "run").exists()


def test_a_second_task_of_the_same_name_is_refused(settings, suite):
    examples = "[{input: a, output: b}, {input: c, output: d}]"
    (suite / "task1_a.yaml").write_text(f"instruction: Again\nexamples: {examples}\n")
    done = make_plan(settings("tasks.select=task1_a"))
    assert done["tasks"] == 1
    assert [refused["what"] for refused in done["refused"]] == [f"{suite}/task1_a.yaml: a second task named task1_a."]
    (task,) = tasks_of(Run(settings().run).read("tasks", "00000"))
    assert task.instruction == "Repeat it."


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_shard", "sizes"), [(1, [1] * 6), (4, [4, 2]), (6, [6]), (7, [6])])
def test_shards_hold_the_tasks_in_order(settings, tmp_path, per_shard, sizes):
    done = make_plan(settings(f"tasks.per_shard={per_shard}"))
    run = Run(str(tmp_path / "run"))
    assert run.shards("tasks") == [f"{number:05d}" for number in range(len(sizes))]
    assert [run.read("tasks", shard).num_rows for shard in run.shards("tasks")] == sizes
    assert [run.receipt("tasks", shard) for shard in run.shards("tasks")] == [{"kept": size} for size in sizes]
    assert run.read_all("tasks")["task"].to_pylist() == ["other", "task1_a", "task2_b", "task3_c", "task4_d", "task5_e"]
    costs = done.pop("costs")
    assert done == {"shards": len(sizes), "tasks": 6, "refused": [], "splits": str(tmp_path / "splits")}
    assert list(costs) == run.shards("tasks")
    config = settings()
    assert sum(costs.values()) == sum(expected_cost(task, config) for task in selected(config, []))


def test_what_the_student_has_to_read_and_write_is_what_a_task_costs(settings, make_task):
    def cost(*overrides, **task):
        return expected_cost(make_task(**task), settings(*overrides))

    assert cost(instruction="Name the thing. " * 9) > cost()
    assert cost(instances=[("old house", "house")] * 99) > cost()
    assert cost(labels=("apple", "sky", "tree")) > cost()  # it has twice the rounds
    assert cost("inputs.rounds=7") < cost()
    assert cost("outputs.samples=2") < cost()


def test_a_planned_task_reads_back_as_it_was(settings, tmp_path):
    make_plan(settings())
    planned = tasks_of(Run(str(tmp_path / "run")).read_all("tasks"))
    assert planned == list(selected(settings(), []))


def test_a_second_plan_does_nothing(settings, tmp_path):
    config = settings("tasks.per_shard=2")
    first = make_plan(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert make_plan(config) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_an_interrupted_plan_is_completed(settings, tmp_path):
    config = settings("tasks.per_shard=2")
    first = make_plan(config)
    whole = Run(config.run).read_all("tasks")
    for name in ("_plan.json", "00002.parquet"):
        (tmp_path / "run/tasks" / name).unlink()
    assert make_plan(config) == first
    assert Run(config.run).read_all("tasks").equals(whole)


def test_a_shard_that_is_gone_is_made_again_unless_the_files_have_changed(settings, suite, tmp_path):
    config = settings("tasks.per_shard=2")
    first = make_plan(config)
    run = Run(config.run)
    whole = run.read_all("tasks")
    run.remove("tasks/00001.parquet")
    assert make_plan(config) == first
    assert run.read_all("tasks").equals(whole)

    run.remove("tasks/00001.parquet")
    write_task(suite, "task0_new")
    error = refusal(config)
    assert error.what == f"{run.root}/tasks/00000 holds other tasks than {config.tasks.source} gives it now."
    assert run.shards("tasks") == ["00000", "00002"]


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_shard_is_refused_by_name_before_anything_else_is_done(settings, tmp_path, how):
    config = settings("tasks.per_shard=2")
    first = make_plan(config)
    run = Run(config.run)
    whole, file = run.read_all("tasks"), tmp_path / "run/tasks/00001.parquet"
    data = bytearray(file.read_bytes())
    data[60] ^= 1  # in the first page
    file.write_bytes(data if how == "flipped" else data[:-9])
    error = refusal(config)
    assert error.what == f"{file} is damaged."
    assert error.instead == "Delete it, and the same command makes it again."
    file.unlink()
    assert make_plan(config) == first
    assert run.read_all("tasks").equals(whole)


def test_other_settings_are_refused_with_the_difference(settings, tmp_path):
    make_plan(settings("tasks.per_shard=2"))
    before = sorted((tmp_path / "run").rglob("*"))
    error = refusal(settings("tasks.per_shard=3"))
    assert error.what == f"{tmp_path}/run/tasks was made by other settings: tasks.per_shard: 2 there, 3 now."
    assert "delete tasks, inputs, outputs, trainset, models, predictions, scores" in error.instead
    assert "inputs.top_k: 40 there, 41 now" in refusal(settings("tasks.per_shard=2", "inputs.top_k=41")).what
    assert make_plan(settings("tasks.per_shard=2", "tasks.strict=true", "cluster.engines=4"))["shards"] == 3
    assert sorted((tmp_path / "run").rglob("*")) == before
