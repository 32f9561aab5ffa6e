"""Reading the whole offline suite of tasks, in time and memory."""

import argparse
import json
import resource
import tarfile
import time

from benchmarks import Measured, alternate
from selfguide_ray.task_files import read_task, task_files


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
