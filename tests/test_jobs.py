"""A run as jobs of a real head: submitted, refused beside another, stopped at work, and gone on with."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest
from driving import assert_equal_runs, make_here, published, reached
from heads import environment, get, head

from selfguide_ray.config_file import load
from selfguide_ray.failures import failures
from selfguide_ray.lease import LEASE
from selfguide_ray.method import Job
from selfguide_ray.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"
SETTINGS = [
    "student.engine=scripted", "tasks.per_shard=1", "tasks.instances=6", "inputs.rounds=6", "inputs.prompts_per_round=6",
    "inputs.length_slack=1.0", "outputs.samples=4", "outputs.labels=free", "trainset.length_slack=3.0",
    "scores.bootstrap=50", "cluster.engines=1", "cluster.cpus_per_worker=1", "cluster.tasks_per_batch=1",
]  # fmt: skip
DELAY = "0.6"  # seconds of a call of the engine, and of training a task


class Head:
    """A head, and the run that its jobs work on."""

    def __init__(self, address, folder):
        self.address, self.folder, self.run = address, folder, Run(str(folder / "run"))

    def submit(self, *options):
        """`selfguide submit`; returns its exit code and the job's name."""
        line = [sys.executable, "-m", "selfguide_ray.cli", "submit", CONFIG, f"run={self.run.root}", *SETTINGS]
        done = self._call([*line, "--address", self.address, *options])
        return done.returncode, re.search(r"Job '(\w+)' submitted", done.stdout)[1]

    def stop(self, job):
        """What `ray job stop` does: it asks the head, and waits for the end. (To start the command takes seconds.)"""
        request = urllib.request.Request(f"{self.address}/api/jobs/{job}/stop", method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer) == {"stopped": True}
        end = time.monotonic() + 200
        while self.status(job)[0] == "RUNNING":
            assert time.monotonic() < end
            time.sleep(0.1)

    def events(self, job):
        """What the job's log tells, in order."""
        lines = get(f"{self.address}/api/jobs/{job}/logs")["logs"].splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"time"')]

    def status(self, job):
        """(state, exit code) of a job."""
        told = get(f"{self.address}/api/jobs/{job}")
        return told["status"], told["driver_exit_code"]

    def wait(self, job, happened):
        """Until the run has come to a point, with the job at work."""
        end = time.monotonic() + 600
        while not happened(self.run):
            assert time.monotonic() < end
            assert self.status(job)[0] in ("PENDING", "RUNNING"), self.events(job)
            time.sleep(0.1)

    def _call(self, line):
        return subprocess.run(
            line,
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A job is stopped while it writes, the next one while it trains, and the third comes to the end."""
    told = {}
    with head(SELFGUIDE_SCRIPTED_DELAY=DELAY, OMP_NUM_THREADS="1") as started:
        jobs = Head(started.dashboard, tmp_path_factory.mktemp("jobs"))
        _, first = jobs.submit("--no-wait")
        jobs.wait(first, lambda run: run.exists(LEASE))
        told["holder"], told["first"] = jobs.run.get_json(LEASE), first
        told["second"] = jobs._call([sys.executable, "jobs/selfguide.py", CONFIG, f"run={jobs.run.root}", *SETTINGS])
        for name, point in (("first", reached("inputs", 1)), ("next", reached("models", 1))):
            job = told["first"] if name == "first" else jobs.submit("--no-wait")[1]
            jobs.wait(job, point)
            jobs.stop(job)
            made = published(jobs.run)
            told[f"{name} stopped"] = jobs.status(job), jobs.events(job), made, jobs.run.exists(LEASE)
        code, last = jobs.submit()
        told["last"] = code, jobs.status(last), jobs.events(last)
        told["run"] = jobs.run
    return told


def test_a_job_holds_its_run_by_the_name_under_which_it_was_submitted(story):
    assert story["holder"]["job"] == story["first"]


def test_a_second_job_on_the_same_folder_is_refused_with_exit_code_2(story):
    second = story["second"]
    assert second.returncode == 2
    assert f"is held by job {story['first']}, process {story['holder']['pid']} on" in second.stderr
    assert f"stop it with ray job stop {story['first']}" in second.stderr


def unit(name):
    """(table, shard) of a published file."""
    return tuple(name.removesuffix(".parquet").split("/")[:2])


@pytest.mark.parametrize(("job", "table"), [("first", "inputs"), ("next", "models")])
def test_a_stopped_job_finishes_what_it_has_in_hand_and_begins_no_more(story, job, table):
    (state, _), events, made, still_held = story[f"{job} stopped"]
    assert state == "STOPPED"
    assert not still_held  # it came to its end by itself
    names = [event["event"] for event in events]
    after = events[names.index("stopping") :]
    assert {event["event"] for event in after} == {"stopping", "done"}
    assert {event["table"] for event in events if event["event"] == "done"} >= {table}
    # What is told is there, and nothing else is.
    done = {(e["table"], e["shard"]) for e in events if e["event"] == "done"}
    here = {unit(name) for name in made if not name.startswith("tasks/")}
    assert done <= here
    # A table each of the two shards in flight, or the one pack. The event tells its time in whole seconds.
    told = datetime.strptime(after[0]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    assert len({unit(name) for name, at in made.items() if at >= (told + 1) * 1e9}) <= 2
    assert 1 <= sum(name == table for name, _ in here) < 8


def test_what_was_stopped_is_gone_on_with_and_nothing_is_made_twice(story):
    code, (state, exit_code), events = story["last"]
    assert (code, state, exit_code) == (0, "SUCCEEDED", 0)
    now = published(story["run"])
    for job in ("first", "next"):
        made = story[f"{job} stopped"][2]
        assert {name: now.get(name) for name in made} == made
    assert events[-1]["event"] == "end"
    assert not story["run"].exists(LEASE)
    assert not list(Path(story["run"].root).rglob(".tmp-*"))


def test_a_run_that_was_stopped_twice_equals_an_undisturbed_one(story, tmp_path):
    config = load(ROOT / CONFIG, [f"run={tmp_path}", *SETTINGS])
    job = Job(config, Run(config.run))
    make_here(job)
    assert failures(job.run) == failures(story["run"]) == []
    assert_equal_runs(story["run"], job.run)
