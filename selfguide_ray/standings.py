"""Who is ahead, and how sure that is: the scores of a run by system, family and category."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from selfguide_ray import reference
from selfguide_ray.config import LEARNERS, SystemName
from selfguide_ray.metrics import bootstrap_interval
from selfguide_ray.run import Run
from selfguide_ray.schema import Task

FAMILIES = {"classification": "exact_match", "generation": "rouge_l"}  # the metric behind each family's mean
FLOORS, PROMPTED, TUNED = ("copy", "majority"), ("zero_shot", "few_shot"), "selfguide"
RESAMPLES = 10_000  # of tasks, behind the interval of the uplift
FEW_TASKS = 6  # with fewer, even a coin falls on the same side every time in more than 1 of 20 runs
KNOWN = get_args(SystemName)
USUAL = (*FLOORS, *PROMPTED, "few_shot_tuned", TUNED)  # the systems that a report misses where they were not run


def learns(system: str) -> bool:
    """Whether a system learns; the others are floors, or prompted."""
    return system in LEARNERS


def best_of(values: Iterable[float | None]) -> float | None:
    """The highest value; None where all are zero or absent, since nothing is best at getting everything wrong."""
    return max((value for value in values if value), default=None)


@dataclass(frozen=True)
class Board:
    """Who scored what: the row of `scores` of each (task, metric, system), and the systems that were run, floors first."""

    tasks: list[Task]
    rows: dict[tuple[str, str, str], dict[str, Any]]
    systems: list[str]

    @classmethod
    def read(cls, run: Run, tasks: list[Task]) -> "Board":
        """The board of a run, from its table `scores`."""
        rows = {(row["task"], row["metric"], row["system"]): row for row in run.read_all("scores").to_pylist()}
        there = {system for _, _, system in rows}
        return cls(tasks, rows, sorted(there, key=[*KNOWN, *sorted(there)].index))

    def family(self, family: str) -> list[Task]:
        """The tasks of a family: classification has labels, generation none."""
        return [task for task in self.tasks if ("classification" if task.labels else "generation") == family]

    def value(self, task: Task, metric: str, system: str) -> float | None:
        """A score, None if there is none."""
        row = self.rows.get((task.name, metric, system))
        return row["value"] if row else None

    def n(self, task: Task) -> int | None:
        """The held-out instances behind a task's scores in its main metric, None if it has no score."""
        metric = self.main(task)
        rows = (self.rows.get((task.name, metric, system)) for system in self.systems)
        return next((row["n"] for row in rows if row), None)

    def metric(self, family: str) -> str:
        """The metric behind a family's mean: the reference's own where the run was scored by it (method: reference)."""
        own = reference.METRICS[family]
        return own if any(metric == own for _, metric, _ in self.rows) else FAMILIES[family]

    def main(self, task: Task) -> str:
        """The metric that a task is ranked by: its official one, or the reference's where it was scored by that."""
        own = reference.METRICS["classification" if task.labels else "generation"]
        return own if any((task.name, own, system) in self.rows for system in self.systems) else task.metric

    def values(self, family: str, system: str) -> dict[str, float]:
        """A system's score on each task of a family, in the family's metric."""
        metric = self.metric(family)
        found = {task.name: self.value(task, metric, system) for task in self.family(family)}
        return {name: value for name, value in found.items() if value is not None}

    def mean(self, family: str, system: str) -> float | None:
        """The mean over tasks, each task counting once."""
        values = self.values(family, system)
        return float(np.mean(list(values.values()))) if values else None


def standings(board: Board, family: str) -> dict[str, Any]:
    """A family's systems, run or not, with their scores and means; the floor; and the uplift."""
    systems = []
    for name in [*board.systems, *(name for name in USUAL if name not in board.systems)]:
        values, mean = list(board.values(family, name).values()), board.mean(family, name)
        systems.append({"name": name, "floor": name in FLOORS, "mean": mean, "values": values})
    ran = [system for system in systems if system["values"]]
    floor = max((s for s in ran if s["floor"]), key=lambda system: system["mean"], default=None)
    return {
        "name": family,
        "metric": board.metric(family),
        "scored": max((len(system["values"]) for system in ran), default=0),
        "systems": systems,
        "floor": floor,
        "floored": [s["name"] for s in ran if floor and not s["floor"] and s["mean"] <= floor["mean"]],
        "uplift": uplift(board, family),
    }


def rival_of(board: Board, family: str) -> str | None:
    """The prompted system with the better mean in a family; None if none was run."""
    means = {name: mean for name in PROMPTED if (mean := board.mean(family, name)) is not None}
    return max(means, key=lambda name: means[name], default=None)


def uplift(board: Board, family: str) -> dict[str, Any] | None:
    """selfguide less the prompted system with the better mean, paired by task; None if either was not run."""
    rival, tuned = rival_of(board, family), board.values(family, TUNED)
    if rival is None or not tuned:
        return None
    prompted = board.values(family, rival)
    differences = [tuned[task] - prompted[task] for task in tuned if task in prompted]
    if not differences:
        return None
    several = len(differences) > 1
    low, high = bootstrap_interval(differences, RESAMPLES, seed=0) if several else (None, None)
    return {
        "rival": rival,
        "points": float(np.mean(differences)),
        "low": low,
        "high": high,
        "tasks": len(differences),
        "up": sum(d > 0 for d in differences),
        "down": sum(d < 0 for d in differences),
        "verdict": verdict(rival, len(differences), low, high),
    }


def verdict(rival: str, tasks: int, low: float | None, high: float | None) -> str:
    """What the interval allows to say, and no more."""
    if low is None or high is None:
        return f"One task cannot show how {TUNED} and {rival} differ."
    if low <= 0 <= high:
        return f"No difference that {tasks} tasks could show."
    side = "above" if low > 0 else "below"
    if tasks < FEW_TASKS:
        return f"{TUNED} is {side} {rival} on these {tasks} tasks, which are too few to conclude from."
    return f"{TUNED} is {side} {rival}."


def score_table(board: Board) -> dict[str, Any]:
    """Tasks by systems, by category; below the main metric of a task stand the official one and macro-F1, if they are others."""
    scored = sorted((t for t in board.tasks if board.n(t) is not None), key=lambda task: (task.category, task.name))
    groups: dict[str, list[dict[str, Any]]] = {}
    for task in scored:
        lines = [
            _score_line(board, task, metric) for metric in dict.fromkeys((board.main(task), task.metric, "macro_f1"))
        ]
        row = {"task": task.name, "n": board.n(task), "lines": [line for line in lines if line]}
        groups.setdefault(task.category, []).append(row)
    return {
        "systems": board.systems,
        "groups": groups,
        "tasks": len(scored),
        "unscored": len(board.tasks) - len(scored),
        "floors": [system for system in board.systems if system in FLOORS],
    }


def _score_line(board: Board, task: Task, metric: str) -> dict[str, Any] | None:
    cells = [board.rows.get((task.name, metric, system)) for system in board.systems]
    values = {cell["system"]: cell["value"] for cell in cells if cell}
    floor = max((values[name] for name in FLOORS if name in values), default=None)
    if not values:
        return None
    n = next(cell["n"] for cell in cells if cell)
    return {"metric": metric, "n": n, "cells": cells, "best": best_of(values.values()), "floor": floor}
