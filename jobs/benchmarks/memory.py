"""What the engine holds in memory: with prefixes that do not fit, and after many requests."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import Measured
from benchmarks.workload import SHAPES, Work, save_model
from selfguide_ray.config import Cluster, Student
from selfguide_ray.engine import Engine, make_engine

LIMIT_GIB = 0.25
SHAPE = SHAPES["tiny"]  # 1 KiB of keys and values a token: the prefixes below are 2 GiB
DISTINCT = Work(tasks=1000, requests=1, prefix=2000, suffix=(5, 35), new_tokens=8)
SHORT = Work(tasks=1, requests=500, prefix=20, suffix=(1, 8), new_tokens=2)  # one call
MARKS = (5_000, 50_000)  # requests


def memory(temporary: Path, threads: int, work: Work = DISTINCT) -> Measured:
    """By how much the process grows while it answers requests with a long prefix each."""
    return _alone(peak, save_model(temporary / "tiny", SHAPE), threads, work)


def growth(temporary: Path, threads: int, marks: tuple[int, ...] = MARKS) -> Measured:
    """The process's memory after so many short requests, each call with a prefix that is never seen again."""
    return _alone(after, save_model(temporary / "tiny", SHAPE), threads, marks)


def _alone(measure: Callable[..., Measured], *arguments: Any) -> Measured:
    """The measure, taken in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def peak(folder: Path, threads: int, work: Work) -> Measured:
    engine = _engine(folder, threads)
    requests = work.draw(SHAPE.words, seed=1)
    engine.generate(replace(work, tasks=2).draw(SHAPE.words, seed=2))  # code and buffers of every shape are there
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = _mib("VmRSS"), time.perf_counter()
    completions = [completion for (completion,) in engine.generate(requests)]
    return {
        "work": f"{len(requests)} requests queued, each with its own prefix of {work.prefix} tokens",
        "kv_memory_mib": LIMIT_GIB * 1024,
        "before_mib": before,
        "peak_growth_mib": _mib("VmHWM") - before,
        "growth_mib": _mib("VmRSS") - before,
        "answered": sum(completion.finish_reason in ("stop", "length") for completion in completions),
        "seconds": round(time.perf_counter() - started),
    }


def after(folder: Path, threads: int, marks: tuple[int, ...]) -> Measured:
    engine, count, told = _engine(folder, threads), 0, {}
    started = time.perf_counter()
    for mark in marks:
        while count < mark:
            engine.generate(SHORT.draw(SHAPE.words, seed=count))
            count += SHORT.requests
        told[f"after_{count}_mib"] = _mib("VmRSS")
    return {"work": f"calls of {SHORT}"} | told | {"seconds": round(time.perf_counter() - started)}


def _engine(folder: Path, threads: int) -> Engine:
    student = Student(model=str(folder), dtype="float32", kv_memory_gib=LIMIT_GIB)
    return make_engine(student, Cluster(cpus_per_engine=threads))


def _mib(name: str) -> float:
    """A figure of /proc/self/status. ru_maxrss would not do: a child starts with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return round(int(line.split()[1]) / 1024, 1)
