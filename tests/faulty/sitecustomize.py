"""Imported by each Python process that starts with this folder on PYTHONPATH: a run's writes fail, or kill, on order.

SELFGUIDE_FAULTS names a folder; what lies in its `orders` are faults that are due. The process that first comes to the
point which an order names takes it (a rename decides between several), and meets the fault there.
"""

import errno
import json
import os
import pathlib
import signal

FOLDER = os.environ.get("SELFGUIDE_FAULTS", "")
POINTS = ("opening", "half", "written", "renamed")  # nothing is written, half is, all is, and it has its name
TEMPORARY = ".tmp-"

open_path, replace = pathlib.Path.open, os.replace


def due(point, path):
    """Take the order that this point of writing this file fulfils; None if there is none."""
    if not path.startswith(f"{FOLDER}/run/"):
        return None
    for name in os.listdir(f"{FOLDER}/orders"):
        try:
            with open(f"{FOLDER}/orders/{name}") as file:
                order = json.load(file)
            if order["point"] == point and f"/{order['place']}" in path:
                os.rename(f"{FOLDER}/orders/{name}", f"{FOLDER}/met/{name}")
                return order
        except FileNotFoundError:  # another process has it
            continue
    return None


def strike(order):
    """Meet the fault."""
    if order["manner"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = getattr(errno, order["manner"])
    raise OSError(number, os.strerror(number))


class Half:
    """A file whose disk ends half-way through what is written."""

    def __init__(self, file, order):
        self.file, self.order = file, order

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        strike(self.order)

    def __enter__(self):
        return self

    def __exit__(self, *ended):
        self.file.close()


def opening(self, mode="r", *rest, **more):
    """Path.open"""
    path = str(self)
    if TEMPORARY not in path or "w" not in mode:
        return open_path(self, mode, *rest, **more)
    if (order := due("opening", path)) is not None:
        strike(order)
    order = due("half", path)
    file = open_path(self, mode, *rest, **more)
    return file if order is None else Half(file, order)


def replacing(source, target, **more):
    """os.replace"""
    if TEMPORARY not in str(source):
        return replace(source, target, **more)
    if (order := due("written", str(target))) is not None:
        strike(order)
    replace(source, target, **more)
    if (order := due("renamed", str(target))) is not None:
        strike(order)
    return None


if FOLDER:
    pathlib.Path.open, os.replace = opening, replacing
