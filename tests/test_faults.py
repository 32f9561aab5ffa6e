"""Faults of every kind, injected and counted; nodes that go in each phase; a head that is lost with all it knew.

SELFGUIDE_FAULTS_SOAK makes a long soak of the short one: so many faults.
"""

import os
from pathlib import Path

import pytest

from selfguide_ray.config_file import load
from selfguide_ray.engine import make_engine
from selfguide_ray.executor import ShardWorker
from selfguide_ray.failures import failures, note
from selfguide_ray.guarding import FOLDER as IN_HAND
from selfguide_ray.inputs import Inputs
from selfguide_ray.method import Job, perform, plan, synthesize, train
from selfguide_ray.models import HIDDEN, UNFINISHED, learn, packs
from selfguide_ray.outputs import Outputs
from selfguide_ray.run import Run
from selfguide_ray.trainset import Trainset

FAULTS = int(os.environ.get("SELFGUIDE_FAULTS_SOAK", "20"))
HERE = Path(__file__).parent
SETTINGS = ["student.engine=scripted", "tasks.per_shard=4", "tasks.instances=2", "inputs.rounds=2",
            "inputs.prompts_per_round=4", "outputs.samples=2"]  # fmt: skip
STEPS = [plan, synthesize, train]


# --- what a death between two last steps leaves ------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    """A run all of whose models are there: another job has nothing to do but to look."""
    config = load(overrides=[f"run={tmp_path / 'run'}", *SETTINGS])
    run = Run(config.run)
    plan(Job(config, run))
    worker = ShardWorker(config, [Inputs, Outputs, Trainset], lambda: make_engine(config.student, config.cluster))
    for shard in run.shards("tasks"):
        list(worker.work(shard))
    learn(config, packs(run, config))
    assert perform(config, STEPS) == 0
    return config, run


def test_a_failure_to_write_what_was_written_all_the_same_is_forgotten(trained):
    config, run = trained
    for table, unit in (("inputs", "00000"), ("models", run.trained()[0]), ("models", "group-1")):
        note(run, table, unit, OSError(5, "Input/output error"))
    assert perform(config, STEPS) == 0
    assert failures(run) == []


def test_a_failure_of_what_is_absent_or_torn_stands(trained):
    config, run = trained
    path = Path(run.root, "trainset", "00001.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    run.remove("inputs/00000.parquet")
    note(run, "inputs", "00000", OSError(5, "Input/output error"))
    note(run, "trainset", "00001", OSError(5, "Input/output error"))
    assert perform(config, [plan]) == 1
    assert [(table, unit) for table, unit, _ in failures(run)] == [("inputs", "00000"), ("trainset", "00001")]


def test_what_was_left_by_a_death_after_the_last_file_is_removed(trained):
    config, run = trained
    made = {f"{IN_HAND}/inputs/00000.json", f"{HIDDEN}/group/state.json", f"{UNFINISHED}/pack/state.bin"}
    for name in made:
        run.put(name, b"{}")
    assert perform(config, STEPS) == 0
    assert not [name for name in made if run.exists(name)]


def test_the_note_of_a_shard_that_is_still_to_be_made_stays(trained):
    config, run = trained
    run.remove("trainset/00001.parquet")
    run.put(f"{IN_HAND}/trainset/00001.json", b"{}")
    assert perform(config, [plan]) == 0
    assert run.exists(f"{IN_HAND}/trainset/00001.json")
