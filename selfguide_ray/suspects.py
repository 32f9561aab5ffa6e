"""How far scores rest on held-out instances that something learned or shown overlaps: each mean with and without them."""

from statistics import fmean
from typing import Any

from selfguide_ray.standings import FAMILIES, Board


def suspicions(board: Board) -> dict[str, Any] | None:
    """The suspects of each task, and each family's means with and without them; None if nobody looked.

    A task all of whose instances are suspects has no score without them, so it is in neither of the two means.
    """
    rows = {task: row for (task, _, _), row in board.rows.items()}  # what they tell of suspects is a task's
    looked = {task: row for task, row in rows.items() if row["clean_n"] is not None}
    if not looked:
        return None
    found = {task: (row["n"] - row["clean_n"], row["n"]) for task, row in looked.items() if row["clean_n"] < row["n"]}
    return {
        "held_out": sum(row["n"] for row in looked.values()),
        "suspects": sum(count for count, _ in found.values()),
        "tasks": [(task.name, *found[task.name]) for task in board.tasks if task.name in found],
        "without_rest": sum(row["clean_n"] == 0 for row in looked.values()),
        "families": [_means(board, family) for family in FAMILIES if board.family(family)] if found else [],
    }


def _means(board: Board, family: str) -> dict[str, Any]:
    """(mean, mean without suspects) of each system over the tasks of a family, None where there is none."""
    metric = FAMILIES[family]
    means = []
    for system in board.systems:
        rows = [board.rows.get((task.name, metric, system)) for task in board.family(family)]
        both = [(row["value"], row["clean_value"]) for row in rows if row and row["clean_value"] is not None]
        means.append(tuple(fmean(values) for values in zip(*both, strict=True)) or (None, None))
    return {"name": family, "metric": metric, "means": means}
