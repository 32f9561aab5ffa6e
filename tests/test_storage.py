"""A run on an object store, over a real S3 protocol on loopback, and on a disk that fails."""

import gc
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driving import assert_equal_runs
from objects import BUCKET, Faults, environment, objects, proxy, store
from typer.testing import CliRunner

from selfguide_ray.cli import app
from selfguide_ray.config_file import load
from selfguide_ray.engine import make_engine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.executor import ShardWorker
from selfguide_ray.failures import failures
from selfguide_ray.inputs import Inputs
from selfguide_ray.method import SELFGUIDE, Job, guarded, perform, plan, report
from selfguide_ray.models import learn, learnable, packs
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.run import Run
from selfguide_ray.scores import Scores
from selfguide_ray.storage import attempts, inside, shown
from selfguide_ray.trainset import Trainset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCRIPTED = [
    "student.engine=scripted",
    "tasks={per_shard: 2, instances: 4}",
    "inputs={rounds: 2, prompts_per_round: 4, length_slack: 1.0}",
    "outputs.samples=3",
    "trainset.length_slack=3.0",
    "scores.bootstrap=20",
]
EMBEDDED = [
    "student={strict: true, batch_rows: 8}",
    "tasks={select: example005*, instances: 4}",
    "inputs={rounds: 1, prompts_per_round: 6, length_slack: 1.0, max_new_tokens: 24}",
    "outputs={samples: 2, max_new_tokens: 8}",
    "trainset={length_slack: 3.0, balance: false, min_frequency: 0.0}",
    "models={epochs: 1, batch_size: 4, learning_rate: 1.0e-3}",
    "scores.bootstrap=20",
]
SHARDS = ["00000", "00001", "00002", "00003"]


@pytest.fixture(scope="module")
def server():
    """The port of an object store with one empty bucket."""
    with store() as port:
        yield port


@pytest.fixture
def s3(server, monkeypatch):
    """The environment in which s3:// is that store."""
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    return server


def whole(uri, overrides):
    """A run made in this process, without Ray."""
    job = Job(load(overrides=[f"run={uri}", *overrides]), Run(str(uri)))
    plan(job)
    engine = make_engine(job.config.student, job.config.cluster)
    for stages in ([Inputs, Outputs, Trainset], [Predictions, Scores]):
        if stages[0] is Predictions:
            learn(job.config, packs(job.run, job.config))
        for shard in job.run.shards("tasks"):
            list(ShardWorker(job.config, stages, lambda: engine).work(shard))
    assert failures(job.run) == []
    report(job)
    return job.run


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The scripted run on a disk."""
    return whole(tmp_path_factory.mktemp("local") / "run", SCRIPTED)


# --- a whole run -----------------------------------------------------------------------------------------------------


def start(folder, uri, delay="0"):
    """The whole job as a process of its own, on the test session's cluster."""
    (folder / "config.yaml").write_text("")
    command = [sys.executable, "-m", "selfguide_ray.cli", "run", folder / "config.yaml", f"run={uri}", *SCRIPTED]
    with (folder / "log").open("wb") as log:
        known = os.environ | {"SELFGUIDE_SCRIPTED_DELAY": delay}
        return subprocess.Popen(command, env=known, stdout=log, stderr=log)


def until(process, port, prefix):
    """Wait for a shard below the prefix, while the process lives."""
    deadline = time.monotonic() + 400
    while not any(key.endswith(".parquet") for key in objects(port, prefix)):
        assert process.poll() is None, prefix
        assert time.monotonic() < deadline, prefix
        time.sleep(0.05)


def said(*arguments):
    """What a command prints."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.ray
@pytest.mark.skipif("SELFGUIDE_STORE" not in os.environ, reason="minutes of waiting for a store: SELFGUIDE_STORE=1")
def test_a_run_that_is_killed_and_cut_off_from_a_faulty_store_ends_as_on_a_disk(cluster, server, local, tmp_path, s3):
    """Every eighth request fails: by 500, 503 or a dropped connection. The run is killed, started again, loses the store
    for good, and is started a third time.
    """
    faults, log = Faults(share=1 / 8, seed=3), tmp_path / "log"
    with proxy(server, faults) as port:
        uri = f"s3://{BUCKET}/faulty/run?endpoint_override=127.0.0.1:{port}&scheme=http"
        process = start(tmp_path, uri, delay="0.1")
        until(process, server, "faulty/run/inputs/")
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = objects(server, "faulty/run/inputs/0")

        faults.share = 0.0
        process = start(tmp_path, uri, delay="0.1")
        until(process, server, "faulty/run/trainset/")
        faults.down = True
        assert process.wait(timeout=500) == 1
        told = log.read_text()
        assert re.search(r"^error: .*AWS Error.*\n  why: .*\n  instead: .*the same command goes on", told, re.MULTILINE)
        assert not objects(server, "faulty/run/report")

        faults.down, faults.share = False, 1 / 8
        process = start(tmp_path, uri)
        assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    assert faults.failed > 20
    now = objects(server, "faulty/run/")
    assert {key: now[key] for key in kept} == kept  # nothing is made twice
    assert [key for key in now if "/.train/" in key or "/.unfinished/" in key or ".tmp-" in key] == []
    assert_equal_runs(Run(f"s3://{BUCKET}/faulty/run"), local)


def test_a_run_on_a_faulty_store_equals_one_on_a_disk_and_the_commands_read_it(server, local, s3):
    faults = Faults(share=1 / 8, seed=3)
    with proxy(server, faults) as port:
        whole(f"s3://{BUCKET}/one/run?endpoint_override=127.0.0.1:{port}&scheme=http", SCRIPTED)
    assert faults.failed > 20
    uri = f"s3://{BUCKET}/one/run"  # by the environment's endpoint from here on, past the proxy
    run = Run(uri)
    assert_equal_runs(run, local)
    assert json.loads(said("status", uri, "--json"))["left_behind"] == []
    assert said("report", uri) == said("report", local.uri)
    (one, other) = json.loads(said("compare", uri, local.uri, "--json"))["families"][0]["groups"]
    assert one["systems"] == other["systems"]
    assert "<html" in run.get("report.html").decode()
    assert "made-up" not in run.get("report.html").decode()


def test_the_embedded_student_learns_on_a_store_what_it_learns_on_a_disk(s3, one_process, tmp_path):
    uri = f"s3://{BUCKET}/embedded/run?endpoint_override=127.0.0.1:{s3}&scheme=http"
    remote, local = whole(uri, EMBEDDED), whole(tmp_path / "run", EMBEDDED)
    assert_equal_runs(remote, local)
    (task,) = local.trained()
    assert remote.names(f"models/{task}") == local.names(f"models/{task}")
    weights = f"models/{task}/adapter_model.safetensors"
    assert remote.get(weights) == local.get(weights)
    assert remote.get(weights) is not None
    assert remote.uri == uri


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("zz://host/run", r"zz:// is no place for a run\.\n  why: Known are file://, s3://"),
        ("https://host/run", "https:// is no place for a run"),
        ("s3://made-up:open-sesame@bucket/run", "holds credentials, before the @"),
        ("s3://open-sesame@bucket/run", "holds credentials, before the @"),
        ("s3://bucket/run?access_key=open-sesame", "holds credentials, in access_key="),
        ("gs://bucket/run?access_token=open-sesame", "holds credentials, in access_token="),
        ("abfs://container@account.dfs.core.windows.net/run?account_key=open-sesame", "in account_key="),
        ("s3://bucket/run?region=eu-west-1&colour=blue", "Unexpected query parameter in S3 URI: 'colour'"),
        ("s3://bucket/run#2", "has a # in it"),
        ("s3:///run", "cannot be opened"),
        ("s3://bucket/a run", "cannot be opened"),
    ],
)
def test_a_uri_that_is_no_place_or_carries_credentials_is_refused_by_name(uri, what, s3):
    with pytest.raises(SelfGuideError, match=what) as refused:
        Run(uri)
    assert "open-sesame" not in str(refused.value)
    done = CliRunner().invoke(app, ["status", uri])
    assert done.exit_code == 2
    assert "open-sesame" not in done.output


def test_other_stores_are_opened_as_arrow_opens_them(tmp_path):
    assert Run("gs://anonymous@bucket/a/run/").root == "bucket/a/run"
    assert Run("gs://anonymous@bucket/run").fs.type_name == "gcs"
    assert Run(f"file://{tmp_path}/run").local


def test_attempts_are_those_of_the_environment(monkeypatch, s3):
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    assert attempts() == 8
    for given in ("0", "-1", "many"):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", given)
        with pytest.raises(SelfGuideError, match=f"AWS_MAX_ATTEMPTS is '{given}'"):
            Run(f"s3://{BUCKET}/run")


def test_what_lies_inside_a_uri_stands_before_its_query():
    assert inside("runs/a/", "b", "c") == "runs/a/b/c"
    assert inside("s3://b/a?scheme=http&region=x", "b") == "s3://b/a/b?scheme=http&region=x"
    assert shown("s3://b/a?scheme=http", "tasks") == "s3://b/a/tasks"
    assert shown("runs/what?", "tasks") == "runs/what?/tasks"


@pytest.mark.parametrize(
    "override", ["tasks.source=s3://b/tasks", "tasks.splits=gs://b/splits", "student.model=s3://b/model"]
)
def test_what_is_read_from_disk_only_is_refused_as_a_uri(override):
    with pytest.raises(SelfGuideError) as refused:
        load(overrides=[override])
    assert refused.value.what.startswith(f"{override.replace('=', ': ')} is a URI.")
    assert "local path" in refused.value.why


# --- what is visible -------------------------------------------------------------------------------------------------


def test_an_upload_that_fails_half_way_is_never_seen(s3, monkeypatch):
    """Arrow's own stream would publish what it has, when it is closed by an exception and when it is garbage."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    run, big = Run(f"s3://{BUCKET}/torn"), b"x" * (1 << 24)
    with pytest.raises(TypeError):
        run.put("small", "a text where bytes are wanted")
    run.put("old", b"old")
    faults = Faults()
    with proxy(s3, faults) as port:
        cut_off = Run(f"s3://{BUCKET}/torn?endpoint_override=127.0.0.1:{port}&scheme=http")
        faults.after = 2  # the upload begins, one part of two arrives
        for name in ("big", "old"):
            faults.seen = 0
            with pytest.raises(OSError, match="AWS Error"):
                cut_off.put(name, big)
        faults.after = None
        gc.collect()
    assert run.names("") == ["old"]
    assert run.get("old") == b"old"
    assert run.put("big", big) is True
    assert run.get("big") == big


def test_a_model_on_a_store_counts_from_its_last_file_on_and_takes_the_place_of_a_torn_one(s3, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    faults = Faults()
    with proxy(s3, faults) as port:
        run = Run(f"s3://{BUCKET}/models?endpoint_override=127.0.0.1:{port}&scheme=http")
        run.put("models/one/leftover", b"of a process that died")
        with run.scratch("models") as folder:
            for name in ("weights", "model.json", "zero"):
                (folder / name).write_bytes(b"" if name == "zero" else name.encode())
            faults.after = 4
            with pytest.raises(OSError, match="AWS Error"):
                run.publish(folder, "models/one", "model.json")
            faults.after = None
            assert "model.json" not in run.names("models/one")
            assert run.trained() == []
            run.publish(folder, "models/one", "model.json")
        assert run.names("models/one") == ["model.json", "weights", "zero"]
        assert run.trained() == ["one"]
        with run.local_copy("models/one") as copy:
            assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
                "model.json": b"model.json",
                "weights": b"weights",
                "zero": b"",
            }
        with run.scratch("models") as folder:
            (folder / "model.json").write_bytes(b"second")
            run.publish(folder, "models/one", "model.json")
        assert run.get("models/one/model.json") == b"model.json"


def test_folders_of_a_store_are_there_with_their_files_and_go_with_them(s3):
    run = Run(f"s3://{BUCKET}/folders")
    assert (run.exists(), run.exists("a"), run.get("a/b")) == (False, False, None)
    assert (run.names("a"), run.trained()) == ([], [])
    run.remove("a")
    run.put("a/b/c", b"1")
    assert (run.exists("a"), run.exists("a/b"), run.names("a")) == (True, True, ["b"])
    assert run.put("a/b/c", b"2", replace=False) is False
    run.remove("a/b/c")
    assert run.names("a/b") == []
    run.put("a/b/d", b"1")
    run.put("ab", b"1")  # begins like the folder's name
    run.remove("a")
    assert (run.exists("a"), run.names(""), run.get("ab")) == (False, ["ab"], b"1")


def test_a_store_is_as_patient_in_the_processes_that_it_is_sent_to(s3):
    """Ray sends a run to actors, and its file system to the controller and the workers of Ray Train."""
    faults = Faults()
    with proxy(s3, faults) as port:
        run = Run(f"s3://{BUCKET}/patient?endpoint_override=127.0.0.1:{port}&scheme=http")
        run.put("a", b"1")
        sent = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(run))))
        faults.seen, faults.first = 0, 4  # Arrow by itself tries thrice
        assert sent.get("a") == b"1"
        assert faults.failed == 4


# --- a disk that fails, files that others damage -----------------------------------------------------------------------


DISK = """
import resource, signal, sys
from selfguide_ray.config_file import load
from selfguide_ray.engine import make_engine
from selfguide_ray.executor import ShardWorker
from selfguide_ray.failures import failures
from selfguide_ray.inputs import Inputs
from selfguide_ray.method import guarded
from selfguide_ray.outputs import Outputs
from selfguide_ray.run import Run
from selfguide_ray.trainset import Trainset

config, most = load(overrides=sys.argv[2:]), int(sys.argv[1])
run, engine = Run(config.run), make_engine(config.student, config.cluster)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

def go():
    for shard in run.shards("tasks"):
        list(ShardWorker(config, [Inputs, Outputs, Trainset], lambda: engine).work(shard))
    return 1 if failures(run) else 0

sys.exit(guarded(go))
"""


def test_a_full_disk_fails_a_shard_with_a_note_or_ends_the_job_and_leaves_no_torn_file(tmp_path, local):
    folder = tmp_path / "run"
    plan(Job(config := load(overrides=[f"run={folder}", *SCRIPTED]), run := Run(str(folder))))

    def go(most):
        command = [sys.executable, "-c", DISK, str(most), f"run={folder}", *SCRIPTED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert [path for path in folder.rglob("*") if path.name.startswith(".tmp-")] == []
        return done

    sizes = [path.stat().st_size for path in (local.root / Path("inputs")).glob("*.parquet")]
    noted = go(min(sizes) - 1)  # room for a note, and for no shard
    assert noted.returncode == 1, noted.stderr
    assert [(table, unit) for table, unit, _ in failures(run)] == [("inputs", shard) for shard in SHARDS]
    assert all("File too large" in line for _, _, line in failures(run))
    assert run.shards("inputs") == []

    full = go(100)  # not even for that
    assert full.returncode == 1
    assert "error: [Errno 27] File too large\n  why: " in full.stderr
    assert run.shards("inputs") == []

    assert go(1 << 30).returncode == 0
    for table in ("inputs", "outputs", "trainset"):
        assert run.read_all(table).equals(local.read_all(table)), table
    assert config.run == str(folder)


def damaged(run, name, how):
    path = Path(run.root, name)
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "flipped":
        data[60] ^= 1  # in the first page
    else:
        data = bytearray()
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied"])
def test_a_damaged_shard_is_named_and_the_others_go_on(tmp_path, local, how):
    shutil.copytree(local.root, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    config = load(overrides=[f"run={run.root}", *SCRIPTED])
    engine = make_engine(config.student, config.cluster)

    def work(*stages):
        return [r for shard in SHARDS for r in ShardWorker(config, stages, lambda: engine).work(shard)]

    for table in ("outputs", "trainset", "models", "predictions", "scores"):
        run.remove(table)
    run.claim(config, json.loads(local.get("models/_settings.json"))["student"])
    damaged(run, "inputs/00002.parquet", how)
    told = f"{run.root}/inputs/00002.parquet is damaged."
    with pytest.raises(SelfGuideError, match="Delete it, and the same command makes it again") as error:
        run.read("inputs", "00002")
    assert error.value.what == told
    failed = [(r["table"], r["shard"]) for r in work(Outputs, Trainset) if r.get("failed")]
    assert failed == [("outputs", "00002")]
    assert failures(run) == [("outputs", "00002", told)]
    assert run.shards("trainset") == ["00000", "00001", "00003"]

    run.remove("inputs/00002.parquet")
    assert not any(r.get("failed") for r in work(Inputs, Outputs, Trainset))
    assert failures(run) == []
    for table in ("inputs", "outputs", "trainset"):
        assert run.read_all(table).equals(local.read_all(table)), table

    damaged(run, "tasks/_plan.json", "cut")
    with pytest.raises(SelfGuideError, match=r"tasks/_plan\.json is damaged"):
        plan(Job(config, run))
    run.remove("tasks/_plan.json")
    plan(Job(config, run))
    assert run.get_json("tasks/_plan.json") == local.get_json("tasks/_plan.json")

    damaged(run, "trainset/00001.parquet", how)
    assert {work.shard for work in learnable(run, config).values()} == {"00000", "00002", "00003"}
    assert [(table, unit) for table, unit, _ in failures(run)] == [("trainset", "00001")]


def test_a_shard_damaged_after_its_use_ends_the_job_by_name_and_is_made_again(tmp_path, local, capsys):
    shutil.copytree(local.root, tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    config = load(overrides=[f"run={run.root}", *SCRIPTED])
    damaged(run, "inputs/00001.parquet", "flipped")
    assert guarded(lambda: perform(config, SELFGUIDE)) == 2
    told = capsys.readouterr().err
    assert f"error: {run.root}/inputs/00001.parquet is damaged.\n  why: " in told
    assert "\n  instead: Delete it, and the same command makes it again.\n" in told
    assert "Traceback" not in told

    run.remove("inputs/00001.parquet")
    list(ShardWorker(config, [Inputs], lambda: make_engine(config.student, config.cluster)).work("00001"))
    assert perform(config, SELFGUIDE) == 0
    assert_equal_runs(run, local)
