"""Measure this project against its peers, alternating in one run, medians; the ratio is what counts.

python jobs/benchmark.py NAME --json FILE [--data NATURAL_INSTRUCTIONS] [--repeats 3]
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfguide_ray.task_files import read_task, task_files

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "selfguide_ray")
Measured = dict[str, Any]


def alternate(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median rate of each candidate, taking turns, so that a noisy machine troubles all alike."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            rates[name].append(run())
    return {name: statistics.median(several) for name, several in rates.items()}


def loading(arguments: argparse.Namespace) -> Measured:
    """Tasks read a second from the whole suite, against parsing the same files and doing nothing with them."""
    archive, partial = arguments.data / "tasks.tar.xz", arguments.data / "tasks_partial"
    tasks, marks = 0, []

    def ours() -> float:
        nonlocal tasks
        started, tasks = time.perf_counter(), 0
        for source in (archive, partial):
            for file in task_files(source):
                read_task(file)
                tasks += 1
                if tasks in (100, 700, 1400):
                    marks.append((tasks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return tasks / (time.perf_counter() - started)

    def json_only() -> float:
        started, count = time.perf_counter(), 0
        with tarfile.open(archive, "r:*") as members:
            for member in members:
                if member.isfile():
                    json.load(members.extractfile(member))
                    count += 1
        for path in partial.glob("*.json"):
            json.loads(path.read_text())
            count += 1
        return count / (time.perf_counter() - started)

    rates = alternate({"ours": ours, "json_only": json_only}, arguments.repeats)
    memory = {f"after_{count}_tasks": round(megabytes) for count, megabytes in marks[:3]}
    return {"work": f"{tasks} task files", "unit": "tasks/s", "rates": rates, "peak_memory_mb": memory}


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Measured]] = {"loading": loading}


def main() -> None:
    """Run one benchmark, print its figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/natural_instructions"), help="Natural Instructions"
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    measured = BENCHMARKS[arguments.name](arguments)
    rates = measured.pop("rates")
    ours, peers = rates.pop("ours"), rates
    result = {
        "name": arguments.name,
        **measured,
        "ours": ours,
        "peers": peers,
        "ratio": {peer: ours / rate for peer, rate in peers.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
