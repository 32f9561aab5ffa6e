"""One job at a time works on a run, the dead are found out, and who is told to stop finishes what it has in hand."""

import ast
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from selfguide_ray import lease
from selfguide_ray.config_file import load
from selfguide_ray.engine import make_engine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.executor import ShardWorker
from selfguide_ray.inputs import Inputs
from selfguide_ray.lease import LEASE, Lease, goes_on, owner, read
from selfguide_ray.method import guarded, perform, plan, report, synthesize
from selfguide_ray.models import Pack
from selfguide_ray.outputs import Outputs
from selfguide_ray.run import Run
from selfguide_ray.schema import task_rows
from selfguide_ray.stopping import Work
from selfguide_ray.trainer import WorkList

QUICK = {"renew": 0.05, "stale": 0.2}


@pytest.fixture(params=["local", "object store"])
def run(request, tmp_path, monkeypatch):
    """A run, on a disk and on what has no renaming and no locks."""
    if request.param == "local":
        return Run(str(tmp_path / "run"))
    monkeypatch.setattr(lease, "SETTLE", 0.05)
    return store()


def store():
    """A run on an object store in this process's memory."""
    run = Run("run")
    run.fs, run.root = pafs.FileSystem.from_uri("mock:///bucket/run")
    run.local = False
    run.fs.create_dir(run.root)
    return run


def leave(run, **given):
    """A lease as another process would have left it."""
    now = time.time()
    found = {"token": "theirs", **owner(), "since": now, "alive": now, "stopping": False} | given
    run.put(LEASE, json.dumps(found).encode())
    return found


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def spawn(code, *arguments):
    """A Python process whose first line tells that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


# --- one job at a time


def test_a_second_job_is_refused_by_name_and_writes_nothing(run, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_x"}}))
    first = Lease(run, "first")
    assert first.take() is None
    before = run.get(LEASE)
    with pytest.raises(SelfGuideError) as refused:
        Lease(run, "second").take()
    assert f"held by job raysubmit_x, process {os.getpid()} on {os.uname().nodename} since" in refused.value.what
    assert "last sign of life" in refused.value.what
    assert "ray job stop raysubmit_x" in refused.value.instead
    assert run.get(LEASE) == before
    first.release()
    assert Lease(run, "second").take() is None


def test_a_lease_is_no_part_of_the_run_and_leaves_nothing(run):
    one = Lease(run, "one")
    one.take()
    assert run.names("") == []
    one.release()
    assert not run.exists(LEASE)
    if run.local:
        assert not run.exists()


def test_the_folder_of_a_run_stays_when_the_lease_goes(run):
    one = Lease(run, "one")
    one.take()
    run.put("notes.txt", b"x")
    one.release()
    assert run.get("notes.txt") == b"x"


def test_of_many_who_come_at_once_one_gets_the_lease(tmp_path):
    for stale in (False, True):
        run = Run(str(tmp_path / f"run-{stale}"))
        if stale:
            leave(run, pid=dead_pid(), started="1")
        got, refused, together = [], [], threading.Barrier(12)

        def contend(run=run, got=got, refused=refused, together=together):
            mine = Lease(Run(run.uri), uuid.uuid4().hex)
            together.wait()
            try:
                mine.take()
                got.append(mine.token)
            except SelfGuideError as error:
                refused.append(error)

        several = [threading.Thread(target=contend) for _ in range(12)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        assert len(got) == 1
        assert len(refused) == 11
        assert read(run)["token"] == got[0]


def test_of_two_writers_of_an_object_store_the_last_has_it(monkeypatch):
    """The first to write looks again, and sees the other."""
    run = store()
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: leave(run))
    with pytest.raises(SelfGuideError, match="held by process"):
        Lease(run, "mine").take()
    assert read(run)["token"] == "theirs"


# --- who is dead, and who is not


def test_a_killed_process_is_found_dead_at_once(tmp_path):
    run = Run(str(tmp_path / "run"))
    process = spawn(
        "import sys, time; from selfguide_ray.run import Run; from selfguide_ray.lease import Lease;"
        "Lease(Run(sys.argv[1]), 'theirs').take(); print('ready', flush=True); time.sleep(600)",
        run.root,
    )
    with pytest.raises(SelfGuideError, match=f"process {process.pid} on"):
        Lease(run, "mine").take()
    process.kill()
    end = time.monotonic() + 30
    while lease.started(process.pid) is not None:  # a process that nobody has waited for is dead as well
        assert time.monotonic() < end
        time.sleep(0.01)
    assert f"process {process.pid} on" in Lease(run, "mine").take()
    assert read(run)["token"] == "mine"
    process.wait()


DEAD = {
    "no such process": lambda: {"pid": dead_pid(), "started": "1"},
    "another process with the same id": lambda: {"started": "1"},
    "a process without a known start": lambda: {"pid": dead_pid(), "started": None},
    "on another machine, and long silent": lambda: {"machine": "elsewhere", "alive": time.time() - 1000},
    "of a clock that is ahead, and silent": lambda: {"machine": "elsewhere", "alive": time.time() + 1000},
    "alive here, and long silent": lambda: {"alive": time.time() - 1000},
}
ALIVE = {
    "this process": lambda: {},
    "this process without a known start": lambda: {"started": None},
    "on another machine": lambda: {"machine": "elsewhere", "pid": 1, "started": "1"},
}


@pytest.mark.parametrize("case", DEAD)
def test_a_dead_job_is_taken_over(run, case):
    leave(run, **DEAD[case]())
    assert "on " in Lease(run, "mine", **QUICK).take()
    assert read(run)["token"] == "mine"


@pytest.mark.parametrize("case", ALIVE)
def test_a_living_job_is_not_taken_over(run, case):
    left = leave(run, **ALIVE[case]())
    with pytest.raises(SelfGuideError, match="is held by"):
        Lease(run, "mine").take()
    assert read(run) == left


def test_a_job_whose_clock_is_behind_is_seen_to_live(run):
    """By its clock it is long silent; who watches sees it renew."""
    leave(run, machine="elsewhere", alive=time.time() - 1000)
    end = threading.Event()

    def renew():
        beat = 0
        while not end.wait(0.01):
            beat += 1
            leave(run, machine="elsewhere", alive=time.time() - 1000 + beat)

    living = threading.Thread(target=renew)
    living.start()
    try:
        with pytest.raises(SelfGuideError, match="is held by"):
            Lease(run, "mine", renew=1.0, stale=1.0).take()
    finally:
        end.set()
        living.join()


def test_an_unreadable_lease_is_taken_over_after_a_while(run):
    run.put(LEASE, b'{"token": "th')
    assert "an unknown machine" in Lease(run, "mine", **QUICK).take()


# --- at work


def test_a_job_at_work_shows_signs_of_life_and_ends_with_the_block(run):
    def job():
        with Work(60, renew=0.01) as work:
            work.hold(run)
            work.hold(run)  # its own is no other's
            seen, end = {read(run)["alive"]}, time.monotonic() + 60
            while len(seen) < 4:
                assert time.monotonic() < end
                seen.add((read(run) or {}).get("alive"))
            work.check()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert not run.exists(LEASE)


def test_a_job_that_was_taken_over_ends_with_an_error_and_leaves_the_others_lease(run):
    def job():
        with Work(60, renew=0.05) as work:
            work.hold(run)
            leave(run)
            time.sleep(60)  # the thread that renews the lease interrupts it
            pytest.fail("it went on")

    with pytest.raises(SelfGuideError, match="was taken over by") as told:
        job()
    assert "Leave the run to that job" in told.value.instead
    assert read(run)["token"] == "theirs"


def test_a_job_that_was_taken_over_begins_no_other_piece_of_work(run):
    with Work(60) as work:
        work.hold(run)
        leave(run)
        with pytest.raises(SelfGuideError, match="was taken over by"):
            work.check()


def test_a_suspended_job_that_was_taken_over_ends_when_it_wakes(tmp_path):
    run = Run(str(tmp_path / "run"))
    process = spawn(
        "import sys, time; from selfguide_ray.run import Run; from selfguide_ray.stopping import Work\n"
        "with Work(60, renew=0.05, stale=0.2) as work:\n"
        "    work.hold(Run(sys.argv[1])); print('ready', flush=True); time.sleep(600)",
        run.root,
    )
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    assert f"process {process.pid} on" in Lease(run, "mine", **QUICK).take()
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SelfGuideError: " in told
    assert "was taken over by" in told
    assert read(run)["token"] == "mine"


# --- stopping


def test_workers_begin_nothing_once_their_job_is_told_to_stop(run):
    with Work(60) as work:
        work.hold(run)
        may = work.permit(run) if not run.local else pickle.loads(pickle.dumps(work.permit(run)))
        assert may()
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 60
        while may():
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            work.check()
    assert goes_on(run, "the next job")  # it is not told by a word that was meant for another


def test_workers_begin_nothing_in_a_run_that_another_has(run):
    leave(run)
    assert goes_on(run, "theirs")
    assert not goes_on(run, "mine")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(tmp_path, number):
    before = signal.getsignal(number)

    def job():
        with Work(600) as work:
            work.hold(Run(str(tmp_path / "run")))
            os.kill(os.getpid(), number)
            assert work.stopping
            os.kill(os.getpid(), number)
            pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        job()
    assert signal.getsignal(number) is before


def test_what_is_in_hand_for_too_long_is_left(tmp_path):
    def job():
        with Work(0.1) as work:
            work.hold(Run(str(tmp_path / "run")))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        job()


def test_a_worker_finishes_the_table_in_hand_and_goes_on_from_there(tmp_path, make_task):
    config = load(overrides=[f"run={tmp_path}", "student.engine=scripted", "inputs.rounds=2"])
    run, answers = Run(config.run), iter([True, False])
    run.write("tasks", "00000", task_rows([make_task()]), {})

    def engine():
        return make_engine(config.student, config.cluster)

    stopped = ShardWorker(config, [Inputs, Outputs], engine, lambda: next(answers))
    (told,) = stopped({"shard": np.array(["00000"])})["receipt"]
    assert json.loads(told)["table"] == "inputs"
    assert (run.shards("inputs"), run.shards("outputs")) == (["00000"], [])
    (told,) = ShardWorker(config, [Inputs, Outputs], engine)({"shard": np.array(["00000"])})["receipt"]
    assert json.loads(told)["table"] == "outputs"


def test_no_group_gets_another_pack_once_the_job_is_told_to_stop():
    packs, answers = [Pack((("a", "0"),), 2), Pack((("b", "0"),), 1)], iter([True, False])
    works = WorkList(packs, lambda: next(answers))
    works.begin(0, 1)
    assert (works.take(0), works.take(0)) == (packs[0], None)
    assert works.left() == (1, [])  # it waits, and nobody has failed


# --- commands


@pytest.fixture
def settings(tmp_path):
    return load(overrides=[f"run={tmp_path / 'run'}", "student.engine=scripted", "tasks.select=example001*"])


def test_a_command_that_writes_is_refused_with_exit_code_2_and_the_report_is_not(settings, capsys):
    run = Run(settings.run)
    assert perform(settings, [plan, plan]) == 0
    left = leave(run)
    before = sorted(Path(run.root).rglob("*"))
    assert guarded(lambda: perform(settings, [plan, synthesize])) == 2
    told = capsys.readouterr().err
    assert "is held by process" in told
    assert "\n  why: " in told
    assert "\n  instead: " in told
    assert sorted(Path(run.root).rglob("*")) == before
    assert perform(settings, [plan, report]) == 0
    assert read(run) == left


def test_a_stopped_command_says_so_and_ends_with_130(settings, capsys):
    assert guarded(lambda: perform(settings, [plan, lambda job: os.kill(os.getpid(), signal.SIGTERM), plan])) == 130
    told = capsys.readouterr().err
    assert "finishing what is in hand" in told
    assert "the same command goes on from there" in told
    assert not Run(settings.run).exists(LEASE)


def test_a_takeover_is_told(settings, capsys):
    leave(Run(settings.run), pid=dead_pid(), started="1")
    assert perform(settings, [plan, lambda job: None]) == 0
    assert '"event": "taken_over"' in capsys.readouterr().err


def test_a_refused_command_leaves_no_folder(settings):
    other = settings.model_copy(update={"tasks": settings.tasks.model_copy(update={"select": "none-such"})})
    assert guarded(lambda: perform(other, [plan, synthesize])) == 2
    assert not Run(settings.run).exists()


def test_no_code_gives_a_job_another_environment_than_it_was_submitted_with():
    """In a submitted job, ray.init refuses a runtime_env that differs from the job's."""
    package = Path(lease.__file__).parent
    calls = [
        node
        for folder in (package, package.parent / "jobs")
        for path in folder.rglob("*.py")
        if "ray.init" in (text := path.read_text(encoding="utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    assert calls
    assert not [ast.unparse(call) for call in calls if any(k.arg in ("runtime_env", None) for k in call.keywords)]
