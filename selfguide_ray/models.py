"""The table whose unit is the task: which tasks want a model, who trains which, and how a model is published.

A task is done when its `model.json` is there; it is written last, with the folder's name (design, invariant 4).
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from selfguide_ray.config import Config
from selfguide_ray.failures import clear, noted
from selfguide_ray.run import Run

MODEL = "model.json"
Share = list[tuple[str, str]]  # (task, its shard)


class Tuner(Protocol):
    """Trains one task after the other on a student that stays loaded."""

    def train(self, task: str, rows: pa.Table, folder: Path | None) -> dict[str, Any]:
        """Learn a task's rows of `trainset`, leave the model in `folder` (None on all ranks but 0), tell what was done."""


def make_tuner(config: Config, rank: int, world: int) -> Tuner:
    """The tuner that belongs to the student's engine."""
    if config.student.engine == "scripted":
        from selfguide_ray.engine.scripted import ScriptedTuner

        return ScriptedTuner()
    from selfguide_ray.fine_tuning import FineTuner

    return FineTuner(config, rank, world)


def untrained(run: Run) -> dict[str, tuple[str, int]]:
    """Tasks without a model: task → (shard, training tokens), from the shards of `trainset` that are there."""
    done: set[str] = set(run.trained())
    due: dict[str, tuple[str, int]] = {}
    for shard in run.shards("trainset"):
        names = run.read("tasks", shard, ["task"])["task"].to_pylist()
        if set(names) <= done:
            continue
        rows = run.read("trainset", shard, ["task", "tokens", "drop_reason"])
        alive = rows.filter(pc.is_null(rows["drop_reason"])).group_by("task").aggregate([("tokens", "sum")]).to_pylist()
        tokens = {row["task"]: row["tokens_sum"] for row in alive}
        due |= {name: (shard, tokens.get(name, 0)) for name in names if name not in done}
    return due


def divide(due: dict[str, tuple[str, int]], groups: int) -> list[Share]:
    """Shares of about equal cost, the largest tasks first; no share is empty."""
    shares: list[Share] = [[] for _ in range(min(groups, len(due)))]
    loads = [0] * len(shares)
    for task, (shard, tokens) in sorted(due.items(), key=lambda item: (-item[1][1], item[0])):
        lightest = loads.index(min(loads))
        shares[lightest].append((task, shard))
        loads[lightest] += tokens + 1
    return shares


def learn(config: Config, share: Share, rank: int, world: int, barrier: Callable[[], None]) -> None:
    """What one of `world` workers does with a share: train its tasks one after the other, skipping those that are done.

    A task that fails is noted and the next one goes on. All ranks go through the same tasks in step.
    """
    run, tuner = Run(config.run), make_tuner(config, rank, world)
    done = set(run.trained())
    barrier()  # all ranks have listed before one publishes, so all skip the same tasks
    for task, shard in share:
        if task in done:
            continue
        with noted(run, "models", task), _place(run, task, rank) as folder:
            rows = run.read("trainset", shard)
            mine = rows.filter(pc.and_(pc.equal(rows["task"], task), pc.is_null(rows["drop_reason"])))
            told = tuner.train(task, mine, folder)
            if folder is not None:
                _tell(folder, {"task": task, "trained": True} | told)
                clear(run, "models", task)
        barrier()


def publish_untrained(run: Run, task: str) -> None:
    """A task with nothing to learn from has the student as its model, and says so."""
    with run.staging(f"models/{task}", MODEL) as folder:
        _tell(folder, {"task": task, "trained": False, "pairs": 0, "reason": "no training pair survived"})


def receipt(run: Run, task: str) -> dict[str, Any]:
    """A finished task as the other tables' receipts look."""
    told = run.get_json(f"models/{task}/{MODEL}")
    kept = told["pairs"] if told["trained"] else 0
    return {"table": "models", "shard": task, "rows": told["pairs"], "kept": kept, "seconds": told.get("seconds", 0.0)}


def _place(run: Run, task: str, rank: int) -> contextlib.AbstractContextManager[Path | None]:
    """Where a task's model is put together; only rank 0 writes."""
    return run.staging(f"models/{task}", MODEL) if rank == 0 else contextlib.nullcontext()


def _tell(folder: Path, told: dict[str, Any]) -> None:
    (folder / MODEL).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
