"""What the driver and Ray cost beside the work itself: time between two shards, workers side by side, memory."""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import ray

from benchmarks import Measured
from selfguide_ray.config import Config, Student
from selfguide_ray.config_file import load
from selfguide_ray.engine.scripted import ScriptedEngine
from selfguide_ray.executor import connect, map_shards
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES

WORKERS, SECONDS, SHARDS = 16, 2.0, 30  # shards of a worker
EMPTY = 400  # shards without work
SIZES = (100, 2000)  # tasks
SETTINGS = (
    "student.engine=scripted",
    "tasks.per_shard=8",
    "tasks.instances=4",
    "inputs.rounds=1",
    "inputs.prompts_per_round=4",
    "inputs.length_slack=5",
    "outputs.samples=2",
    "trainset.length_slack=9",
    "trainset.balance=false",
    "trainset.min_frequency=0",
    "scores.bootstrap=20",
)


class Sleeping(ScriptedEngine):
    """An engine that takes its time and needs no processor for it; its fingerprint tells the process it is in."""

    def __init__(self, seconds: float) -> None:
        super().__init__(Student(engine="scripted"))
        self.delay, self.fingerprint = seconds, f"sleeping {os.getpid()}"


class Nothing:
    """A stage whose only work is the engine's, and which makes a shard without rows."""

    writes = "inputs"
    reads = {"tasks": ("task",)}  # noqa: RUF012

    def __init__(self, config: Config, run: Run, engine: Sleeping) -> None:
        self.engine = engine

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """See `executor.Stage`."""
        self.engine.generate([])
        return TABLES["inputs"].empty_table()


def scheduling(arguments: argparse.Namespace) -> Measured:
    """Shards a second of many workers that sleep, against as many times one; and what a shard without work takes."""
    workers, shards = arguments.workers or WORKERS, arguments.rows or SHARDS
    with local_cluster(workers + 1):
        empty = spans(1, EMPTY, 0.0)
        one, many = spans(1, shards, SECONDS), spans(workers, shards * workers, SECONDS)
    (alone,) = empty.values()
    between = (alone[-1][1] - alone[0][0] - sum(end - start for start, end in alone)) / (len(alone) - 1)
    rate = busy(one) / SECONDS
    return {
        "work": f"shards of {SECONDS:g} s of sleep, {shards} a worker, on {workers} workers of one CPU each, while all are up",
        "unit": "shards/s",
        "rates": {"ours": workers * busy(many) / SECONDS, f"{workers} times one worker": workers * rate},
        "share_of_time_at_work": {"1": busy(one), str(workers): busy(many)},
        "milliseconds_between_shards": {"mean": 1000 * between, "shards": EMPTY},
    }


@contextlib.contextmanager
def local_cluster(cpus: int) -> Iterator[None]:
    """A Ray cluster of its own that believes in so many CPUs; what they do here needs none."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        connect()
        yield
    finally:
        ray.shutdown()


def spans(workers: int, shards: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """When each worker was at work on a shard: worker → (start, end) in seconds, in order."""
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, [f"run={folder}/run", f"cluster.engines={workers}", "cluster.shards_in_flight=1"])
        run, names = Run(config.run), [f"{number:05}" for number in range(shards)]
        for name in names:
            run.write("tasks", name, TABLES["tasks"].empty_table(), {})
        for receipt in map_shards(config, names, [Nothing], functools.partial(Sleeping, seconds)):
            path = Path(run.root) / "inputs" / f"{receipt['shard']}.parquet"
            end = path.stat().st_mtime
            # A file's time is that of its writing, which a receipt's seconds leave out.
            found.setdefault(receipt["engine"], []).append((end - receipt["seconds"], end))
    return {worker: sorted(several) for worker, several in found.items()}


def busy(found: dict[str, list[tuple[float, float]]]) -> float:
    """The share of the time in which all workers are up that they are at work."""
    begin = max(several[0][0] for several in found.values())
    end = min(several[-1][1] for several in found.values())
    worked = sum(max(0.0, min(b, end) - max(a, begin)) for several in found.values() for a, b in several)
    return worked / (len(found) * (end - begin))


def driver_memory(arguments: argparse.Namespace) -> Measured:
    """The driver's peak with many tasks, against few: the whole method with the engine that has no model."""
    sizes = [int(size) for size in arguments.tasks.split(",")] if arguments.tasks else SIZES
    peaks = {count: peak_of_driver(count) for count in sizes}
    few, many = min(peaks), max(peaks)
    return {
        "work": f"the driver of a whole run of {many} tasks, without a model, against one of {few} tasks",
        "unit": "MB",
        "rates": {"ours": peaks[many][0], f"{few} tasks": peaks[few][0]},
        "seconds": {str(count): seconds for count, (_, seconds) in peaks.items()},
    }


def peak_of_driver(tasks: int) -> tuple[float, float]:
    """(the driver's largest resident memory in MB, seconds) of a whole run over so many made-up tasks."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tasks"
        source.mkdir()
        for number in range(tasks):
            (source / f"made{number:04}.json").write_text(json.dumps(made(number)))
        command = [sys.executable, "-m", "selfguide_ray.cli", "run", *SETTINGS]
        command += [f"run={folder}/run", f"tasks.source={source}", "cluster.engines=2"]
        started, peak = time.monotonic(), 0
        with (Path(folder) / "log").open("wb") as log:
            driver = subprocess.Popen(command, stdout=log, stderr=log)
            while driver.poll() is None:
                peak = max(peak, high_water(driver.pid))
                time.sleep(0.05)
        if driver.returncode:
            raise RuntimeError((Path(folder) / "log").read_text()[-2000:])
        return peak / 1000, round(time.monotonic() - started, 1)


def high_water(process: int) -> int:
    """The largest resident memory of a process so far, in kB; 0 once it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def made(number: int) -> dict[str, object]:
    """A task file; every other one has labels."""
    words = [f"{a}{b}{number}" for a in "bdfgk" for b in ("an", "el", "is", "or")]
    labelled = number % 2 == 1
    pairs = [
        {"input": f"{word} and {other} here", "output": ("yes", "no")[place % 2] if labelled else word}
        for place, (word, other) in enumerate(zip(words, reversed(words), strict=True))
    ]
    return {
        "instruction": f"Treat item {number} as shown.",
        "examples": pairs[:3],
        "instances": pairs[3:],
        **({"labels": ["yes", "no"]} if labelled else {}),
    }
