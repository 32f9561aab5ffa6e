"""kill -9 while tasks are learned: of a worker, of a whole group, of the driver. The adapters end equal bit for bit.

SELFGUIDE_KILLS makes a soak of it: so many deaths of each kind.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alike import adapter, assert_equal
from pairs import pair, write_pairs

from selfguide_ray.config_file import load
from selfguide_ray.failures import failures
from selfguide_ray.method import Job, plan
from selfguide_ray.models import UNFINISHED, learn, packs
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, tasks_of
from selfguide_ray.student import StudentTokenizer
from selfguide_ray.tuning.side_by_side import STATE, described

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("SELFGUIDE_KILLS", "1"))
JOB = Path(__file__).parents[1] / "jobs" / "train.py"
PAIRS = 40
TEXT = """
run: {run}
cluster: {{groups: 2, tasks_per_batch: 2, checkpoint_seconds: 0}}
tasks: {{select: "example00[1-4]*"}}
models: {{epochs: 8, batch_size: 2, learning_rate: 1.0e-3}}
"""


def prepared(folder):
    """A run whose pairs are made, so that only training is due."""
    folder.mkdir()
    (folder / "config.yaml").write_text(TEXT.format(run=folder / "run"))
    config = load(folder / "config.yaml")
    job = Job(config, Run(config.run))
    plan(job)
    prompts = Prompts(StudentTokenizer(config.student), 500)
    for shard in job.run.shards("tasks"):
        rows = [
            pair(prompts, task, i, f"thing {i} of {task.name[:12]}", f"kind {i % 5}", task.examples[:1])
            for task in tasks_of(job.run.read("tasks", shard))
            for i in range(PAIRS)
        ]
        for table in ("inputs", "outputs"):
            job.run.write(table, shard, TABLES[table].empty_table(), {})
        write_pairs(job.run, shard, rows)
    return config, job.run


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """What an undisturbed process learns."""
    config, run = prepared(tmp_path_factory.mktemp("kills") / "calm")
    learn(config, packs(run, config))
    assert failures(run) == []
    assert len(run.trained()) == 4
    return run


def steps(run):
    """The step that each unfinished pack has kept."""
    found = {}
    for folder in Path(run.root, UNFINISHED).glob("*"):
        data = run.get(f"{UNFINISHED}/{folder.name}/{STATE}")
        if data:
            found[folder.name] = int(described(data)["step"])
    return found


def wait_for(run, process, more):
    """Wait until training has come this many steps further; False if it ended before."""

    def come():
        return sum(steps(run).values()) + 1000 * len(run.trained())

    before, deadline = come(), time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < deadline, "no step for four minutes"
        if come() >= before + more:
            return True
        time.sleep(0.02)
    return False


def processes(*titles):
    """Processes of this machine whose command line begins so: {pid: command line}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if line.startswith(titles):
            found[int(path.parent.name)] = line
    return found


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_same(run, calm):
    assert failures(run) == []
    assert run.trained() == calm.trained()
    for task in calm.trained():
        assert_equal(adapter(run, task), adapter(calm, task))
    assert not run.names(UNFINISHED)


ALONE = """
import sys
from selfguide_ray.config_file import load
from selfguide_ray.models import Run, learn, packs
config = load(sys.argv[1])
learn(config, packs(Run(config.run), config))
"""


def test_a_process_killed_at_any_step_ends_the_same(tmp_path, calm):
    _, run = prepared(tmp_path / "alone")
    chance, killed = random.Random(4), 0
    command = [sys.executable, "-c", ALONE, tmp_path / "alone" / "config.yaml"]
    while killed < 4 * KILLS:
        process = subprocess.Popen(command)
        assert wait_for(run, process, chance.randint(1, max(2, 240 // (4 * KILLS))))
        process.kill()
        process.wait()
        killed += 1
    assert subprocess.run(command, check=False).returncode == 0
    assert_same(run, calm)


@pytest.mark.ray
def test_workers_groups_and_the_driver_killed_at_random_end_the_same(tmp_path, calm):
    _, run = prepared(tmp_path / "cluster")
    chance, done = random.Random(7), []
    lost = []  # seconds from a death of all that learns to the next step that is kept
    environment = os.environ | {"RAY_ADDRESS": "local"}  # a cluster that dies with its driver
    published = {}

    def start():
        log = (tmp_path / "log").open("ab")
        return subprocess.Popen(
            [sys.executable, JOB, tmp_path / "cluster" / "config.yaml"], env=environment, stdout=log, stderr=log
        )

    process = start()
    for kind in ["worker", "group", "driver"] * KILLS:
        if not wait_for(run, process, chance.randint(1, max(2, 90 // KILLS))):
            break
        mine = {pid for pid in processes("ray::RayTrainWorker") if descends(pid, process.pid)}
        if kind == "worker":
            kill(sorted(mine)[:1])
        elif kind == "group":
            kill(
                [*mine, *(p for p in processes("ray::TrainController", "ray::train_group") if descends(p, process.pid))]
            )
        else:
            process.kill()
            process.wait()
        done.append(kind)
        now = {task: run.get(f"models/{task}/model.json") for task in run.trained()}
        assert {task: now[task] for task in published} == published  # what is finished is not trained again
        published = now
        died = time.monotonic()
        if process.poll() is not None:
            process = start()
        if kind == "group" and wait_for(run, process, 1):
            lost.append(round(time.monotonic() - died, 1))
    print("seconds lost with a group:", lost)
    if process.wait(timeout=400) != 0:
        process = start()
        assert process.wait(timeout=400) == 0, (tmp_path / "log").read_text()[-3000:]
    assert len(done) >= 2 * KILLS, done
    assert_same(run, calm)


def descends(pid, ancestor):
    """Whether a process was started by another, directly or not."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            return False
    return False
