"""Whatever a task file, a settings file or a table holds: it is read, or refused in three parts, soon, and nothing else."""

import json
import os
import random
import shutil
from collections import Counter

import pytest
from fuzzing import FULL, SEED, archive_of, damaged, finish, settings, snapshot, task_file, tried, write_folder

from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.inputs import Inputs
from selfguide_ray.outputs import Outputs
from selfguide_ray.planning import planning
from selfguide_ray.predictions import Predictions
from selfguide_ray.report import headline, write_report
from selfguide_ray.report import settings as told_settings
from selfguide_ray.run import READS, Run, made_by
from selfguide_ray.schema import TABLES, tasks_of
from selfguide_ray.scores import Scores
from selfguide_ray.status import progress_of
from selfguide_ray.task_files import TaskFile, read_task, task_files
from selfguide_ray.tasks import plan
from selfguide_ray.trainset import Trainset

TASKS, FOLDER = (10_000, 500) if FULL else (600, 150)
ARCHIVES = 500 if FULL else 40
CONFIGS = 2_000 if FULL else 300
TABLE_FILES = 1_000 if FULL else 60
FACTS = {"model": "m", "fingerprint": "scripted"}


@pytest.mark.parametrize("number", range(TASKS // FOLDER))
def test_a_folder_of_mutated_task_files_gives_the_good_ones_and_a_reason_for_each_other(tmp_path, number):
    rng, source = random.Random(f"{SEED} tasks {number}"), tmp_path / "source"
    count = write_folder(source, rng, FOLDER)
    before = snapshot(tmp_path, tmp_path / "run")
    for file in task_files(source):
        tried(lambda file=file: read_task(file))
    overrides = [f"tasks.source={source}", f"run={tmp_path}/run", "tasks.per_shard=64", "student.engine=scripted"]
    done = tried(lambda: plan(Run(f"{tmp_path}/run"), load(overrides=overrides), FACTS))
    assert done["tasks"] + len(done["refused"]) == count
    assert done["tasks"] > FOLDER // 20
    for refused in done["refused"]:
        assert all(refused[part].strip() for part in ("file", "what", "why", "instead"))
        json.dumps(refused, ensure_ascii=False).encode()
    tasks = tasks_of(Run(f"{tmp_path}/run").read_all("tasks"))
    assert len({task.name.casefold() for task in tasks}) == len(tasks) == done["tasks"]
    assert snapshot(tmp_path, tmp_path / "run") == before
    assert not os.path.exists("/tmp/selfguide-was-here")


def test_damaged_archives_are_read_or_refused(tmp_path):
    rng, read = random.Random(f"{SEED} archives"), Counter()
    for _ in range(ARCHIVES):
        suffix, data = archive_of(rng, [task_file(rng, index) for index in range(rng.randrange(1, 5))])
        path = tmp_path / f"t{suffix}"
        path.write_bytes(data)
        found = tried(lambda path=path: list(task_files(path)))
        read[type(found).__name__] += 1
        for file in found if isinstance(found, list) else ():
            tried(lambda file=file: read_task(file))
        path.unlink()
        assert list(tmp_path.iterdir()) == []
    assert min(read["list"], read["SelfGuideError"]) > ARCHIVES // 20
    assert set(read) == {"list", "SelfGuideError"}


def test_mutated_settings_are_read_or_refused(tmp_path):
    rng, ends = random.Random(f"{SEED} settings"), Counter()
    path = tmp_path / "config.yaml"
    for _ in range(CONFIGS):
        text, overrides = settings(rng)
        if text is not None:
            path.write_bytes(text)
        found = tried(lambda text=text, overrides=overrides: load(path if text is not None else None, overrides))
        ends[type(found).__name__] += 1
        if isinstance(found, Config):  # then a run can note it, tell it, and know it again
            told_settings(found)
            for table in READS:
                noted = made_by(table, found, FACTS)
                assert json.loads(json.dumps(noted)) == json.loads(json.dumps(made_by(table, found, FACTS)))
            json.dumps(found.model_dump(mode="json"), ensure_ascii=False).encode()
    assert set(ends) == {"Config", "SelfGuideError"}
    assert ends["Config"] > CONFIGS // 20
    assert [item.name for item in tmp_path.iterdir()] == ["config.yaml"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three small tasks in two shards, its settings, and a folder that holds it and nothing else."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = load(
        overrides=[
            f"run={folder}/run",
            "student.engine=scripted",
            "tasks={select: 'example00[1-3]*,example006*', per_shard: 2, instances: 4}",
            "inputs={rounds: 3, prompts_per_round: 4, length_slack: 0.5}",
            "outputs.samples=4",
            "trainset={keep: 4, length_slack: 0.5, min_frequency: 0.5}",
            "scores.bootstrap=20",
        ]
    )
    run, engine = finish(config)
    return config, run, engine, folder


def use(finished, table, with_report):
    """What may be done with a run: look at it, report it, go on with it. Each ends well or with a reason."""
    config, run, engine, _ = finished
    ends = [tried(lambda: progress_of(run)), tried(lambda: headline(run))]
    for kind in (Inputs, Outputs, Trainset, Predictions, Scores):
        if table in kind(config, run, engine).reads and (kind is not Inputs or with_report):
            for shard in run.shards("tasks"):
                stage = kind(config, run, engine)
                ends.append(tried(lambda s=stage, n=shard: s(*(run.read(t, n, c) for t, c in s.reads.items()))))
    if with_report:
        ends.append(tried(lambda: write_report(run, config)))
        ends.append(tried(lambda: planning(config, config.run, None, None)))
    return Counter(isinstance(end, SelfGuideError) for end in ends)


def test_a_damaged_table_file_is_told_by_name_and_never_read_as_something_else(finished):
    _, run, _, folder = finished
    rng = random.Random(f"{SEED} tables")
    files = [f"{table}/{shard}.parquet" for table in TABLES for shard in run.shards(table)]
    whole = {name: run.get(name) for name in files}
    tables = {name: run.read(*name.removesuffix(".parquet").split("/")) for name in files}
    before, ends = snapshot(folder, folder / "run"), Counter()
    for number in range(TABLE_FILES):
        name = rng.choice(files)
        data = whole[name]
        bad = whole[rng.choice(files)] if rng.random() < 0.1 else damaged(rng, data)
        if bad == data:
            continue
        run.put(name, bad)
        table, shard = name.removesuffix(".parquet").split("/")
        found = tried(lambda t=table, s=shard: run.read(t, s))
        if isinstance(found, SelfGuideError):
            assert name in found.what
            ends["refused"] += 1
        else:
            assert found.equals(tables[name]), (name, number)
            ends["the same"] += 1
        ends += Counter({f"use {k}": v for k, v in use(finished, table, number % 4 == 0).items()})
        run.put(name, data)
    assert ends["refused"] > TABLE_FILES // 2, ends
    assert snapshot(folder, folder / "run") == before
    print(ends)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"7"])
def test_a_torn_json_file_of_a_run_is_told_by_name(finished, tmp_path, data):
    config, run, _, _ = finished
    shutil.copytree(run.root, tmp_path / "run")
    other, model = Run(f"{tmp_path}/run"), run.trained()[0]
    for name, action in {
        "tasks/_plan.json": lambda: progress_of(other),
        f"models/{model}/model.json": lambda: progress_of(other),
        "inputs/_settings.json": lambda: other.check(config, FACTS),
    }.items():
        kept = other.get(name)
        other.put(name, data)
        error = tried(action)
        assert isinstance(error, SelfGuideError)
        assert name in error.what
        other.put(name, kept)


def test_a_file_of_the_package_is_no_mutant():
    file = next(task_files(resolve("embedded/tasks")))
    assert read_task(TaskFile(file.name, file.origin, file.data)).examples
