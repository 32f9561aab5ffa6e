"""Deaths and failing writes at the points where they leave most behind: the next submission finds all in order."""

import errno
import json
import os
import signal
import subprocess
import sys
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

ROOT = Path(__file__).parents[1]
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


# --- writes that fail or kill at each named point -----------------------------------------------------------------------

WRITES = """
import json, os, sys
from pathlib import Path
from selfguide_ray.run import Run

folder = sys.argv[1]
run = Run(f"{folder}/run")
for point in ("opening", "half", "written", "renamed"):
    for manner in ("kill", "EIO", "ENOSPC"):
        name = f"{point}-{manner}"
        with open(f"{folder}/orders/{name}", "w") as order:
            json.dump({"point": point, "manner": manner, "place": "inputs/"}, order)
        run.put(f"outputs/{name}", b"no such place was ordered")
        if (child := os.fork()) == 0:
            try:
                run.put(f"inputs/{name}", b"0123456789")
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        half = [path.read_bytes() for path in Path(run.root).rglob(".tmp-*")]
        run.sweep()
        print(json.dumps([point, manner, os.waitstatus_to_exitcode(status), repr(run.get(f"inputs/{name}")), repr(half)]))
        run.put(f"inputs/{name}", b"0123456789")
        assert run.get(f"inputs/{name}") == b"0123456789"
"""


def test_a_write_that_is_cut_off_at_any_point_leaves_a_whole_file_or_none(tmp_path):
    for name in ("orders", "met"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WRITES, tmp_path],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env=os.environ | {"SELFGUIDE_FAULTS": str(tmp_path), "PYTHONPATH": f"{ROOT / 'tests' / 'faulty'}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    codes = {"kill": -signal.SIGKILL, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
    written = {"opening": [], "half": [b"01234"], "written": [b"0123456789"], "renamed": []}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        [
            point,
            manner,
            codes[manner],
            repr(b"0123456789" if point == "renamed" else None),
            repr(left if manner == "kill" else []),  # a process that lives tidies up itself
        ]
        for point, left in written.items()
        for manner in codes
    ]
    assert len(list((tmp_path / "met").iterdir())) == 12
