"""kill -9 of the driver, anywhere, then the same command: nothing is lost, nothing is made twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfguide_ray.run import READS, Run

JOB = Path(__file__).parents[1] / "jobs" / "selfguide.py"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPTED = """
run: {run}
student: {{engine: scripted}}
tasks: {{per_shard: 2, instances: 10}}
inputs: {{rounds: 3, prompts_per_round: 6, length_slack: 1.0}}
outputs: {{samples: 4}}
trainset: {{length_slack: 3.0}}
scores: {{bootstrap: 50}}
"""
REAL = """
run: {run}
tasks: {{select: "example001*,example005*", per_shard: 1, instances: 8}}
inputs: {{rounds: 2, prompts_per_round: 6, length_slack: 1.0, max_new_tokens: 24}}
outputs: {{samples: 4, max_new_tokens: 8}}
trainset: {{length_slack: 3.0, balance: false, min_frequency: 0.0}}
models: {{epochs: 1, batch_size: 4, learning_rate: 1.0e-3}}
scores: {{bootstrap: 50}}
"""


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
    assert process.wait(timeout=300) == 0, (folder / "log").read_text()[-3000:]
    return Run(str(folder / "run"))


def kill_when(folder, text, reached, delay="0"):
    """Run until `reached(run)`, then SIGKILL; True if the process was still alive to be killed."""
    run, process = Run(str(folder / "run")), start(folder, text, delay)
    deadline = time.monotonic() + 200
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


# Inside every stage (some shards made, others not) and at every boundary between two.
POINTS = [
    ("tasks", 1),
    ("inputs", 1),
    ("outputs", 2),
    ("trainset", 3),
    ("trainset", 4),
    ("models", 1),
    ("models", 4),
    ("models", 8),
    ("predictions", 1),
    ("predictions", 3),
    ("scores", 4),
]


def test_a_run_killed_in_and_between_all_stages_equals_an_undisturbed_one(tmp_path, cluster):
    disturbed = Run(str(tmp_path / "disturbed" / "run"))
    seen, killed = {}, 0
    for point in POINTS:
        killed += kill_when(tmp_path / "disturbed", SCRIPTED, reached(*point), delay="0.1")
        now = published(disturbed)
        assert {name: now.get(name) for name in seen} == seen, f"made again before {point}"
        seen = now
    assert killed >= len(POINTS) - 2  # the last points may be passed while the process ends by itself
    finish(tmp_path / "disturbed", SCRIPTED)
    now = published(disturbed)
    assert {name: now.get(name) for name in seen} == seen
    assert_equal_runs(disturbed, finish(tmp_path / "calm", SCRIPTED))
    assert not list(Path(disturbed.root).rglob(".tmp-*"))


def test_the_real_student_killed_while_it_writes_and_while_it_learns_ends_the_same(tmp_path, cluster):
    for point in [("inputs", 1), ("models", 1)]:
        kill_when(tmp_path / "disturbed", REAL, reached(*point))
    before = published(Run(str(tmp_path / "disturbed" / "run")))
    disturbed = finish(tmp_path / "disturbed", REAL)
    after = published(disturbed)
    assert {name: after[name] for name in before} == before
    calm = finish(tmp_path / "calm", REAL)
    assert_equal_runs(disturbed, calm)
    for task in calm.trained():
        weights = f"models/{task}/adapter_model.safetensors"
        assert calm.get(weights) == disturbed.get(weights)
        assert calm.get(weights) is not None
