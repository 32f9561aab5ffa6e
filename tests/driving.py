"""Starting, killing and finishing the whole job as a process of its own, for the tests of resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from selfguide_ray.engine import make_engine
from selfguide_ray.executor import ShardWorker
from selfguide_ray.inputs import Inputs
from selfguide_ray.method import plan
from selfguide_ray.models import learn, packs
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.run import READS, Run
from selfguide_ray.scores import Scores
from selfguide_ray.trainset import Trainset

JOB = Path(__file__).parents[1] / "jobs" / "selfguide.py"


def start(folder, text, delay="0"):
    """The whole job as a process of its own, on the test session's cluster."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text.format(run=folder / "run"))
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, JOB, folder / "config.yaml"],
            env=os.environ | {"SELFGUIDE_SCRIPTED_DELAY": delay},
            stdout=log,
            stderr=log,
        )


def finish(folder, text, delay="0"):
    process = start(folder, text, delay)
    assert process.wait(timeout=600) == 0, (folder / "log").read_text()[-3000:]
    return Run(str(folder / "run"))


def kill_when(folder, text, reached, delay="0"):
    """Run until `reached(run)`, then SIGKILL; True if the process was still alive to be killed."""
    run, process = Run(str(folder / "run")), start(folder, text, delay)
    deadline = time.monotonic() + 500
    while process.poll() is None and not reached(run):
        assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.01)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def published(run):
    """Every finished file with the time of its last change."""
    files = [p for p in Path(run.root).rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.parts)]
    kept = [p for p in files if p.suffix == ".parquet" or (p.parent / "model.json").exists()]
    return {str(p.relative_to(run.root)): p.stat().st_mtime_ns for p in kept}


def assert_equal_runs(one, other):
    for table in READS:
        if table != "models":
            assert one.shards(table) == other.shards(table)
            assert one.read_all(table).equals(other.read_all(table)), table
    assert one.trained() == other.trained()


def reached(table, count):
    return lambda run: len(run.trained() if table == "models" else run.shards(table)) >= count


def make_here(job):
    """A whole run but its report, by the same stages in this process and without Ray."""
    plan(job)
    engine = make_engine(job.config.student, job.config.cluster)
    for shard in job.run.shards("tasks"):
        list(ShardWorker(job.config, [Inputs, Outputs, Trainset], lambda: engine).work(shard))
    learn(job.config, packs(job.run, job.config))
    for shard in job.run.shards("tasks"):
        list(ShardWorker(job.config, [Predictions, Scores], lambda: engine).work(shard))
