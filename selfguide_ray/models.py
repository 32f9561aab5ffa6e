"""The table whose unit is the task: which tasks want a model, which are trained together, and how a model is published.

A task is done when its `model.json` is there; it is written last, with the folder's name (design, invariant 4).
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from selfguide_ray import student
from selfguide_ray.config import Config
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught, clear, note
from selfguide_ray.run import Run, digest
from selfguide_ray.tuning import Lesson, Told, make_tuner, packs_tasks

MODEL = "model.json"
UNFINISHED = "models/.unfinished"  # what packs go on from after a death


@dataclass(frozen=True)
class Pack:
    """Tasks that are trained together, with the shard of each, and what they cost: tokens of their pairs."""

    tasks: tuple[tuple[str, str], ...]
    tokens: int

    @property
    def name(self) -> str:
        """The same for the same tasks."""
        return digest([task for task, _ in self.tasks])

    def split(self) -> list["Pack"]:
        """Its tasks, each a pack of its own."""
        return [Pack((work,), self.tokens // len(self.tasks)) for work in self.tasks]


def learnable(run: Run) -> dict[str, tuple[str, int]]:
    """All tasks of the shards of `trainset` that are there: task → (shard, tokens of its pairs, an epoch)."""
    found: dict[str, tuple[str, int]] = {}
    for shard in run.shards("trainset"):
        names = run.read("tasks", shard, ["task"])["task"].to_pylist()
        rows = run.read("trainset", shard, ["task", "tokens", "drop_reason"])
        alive = rows.filter(pc.is_null(rows["drop_reason"])).group_by("task").aggregate([("tokens", "sum")]).to_pylist()
        tokens = {row["task"]: row["tokens_sum"] for row in alive}
        found |= {name: (shard, tokens.get(name, 0)) for name in names}
    return found


def untrained(run: Run) -> dict[str, tuple[str, int]]:
    """Those of `learnable` without a model."""
    done = set(run.trained())
    return {task: work for task, work in learnable(run).items() if task not in done}


def packs(run: Run, config: Config) -> list[Pack]:
    """Packs with work left, the costliest first.

    Which tasks share a pack depends on all that can be learned, not on what is left, so a continued run trains the same
    packs. Neighbours in tokens are together, so that none waits long for the others.
    """
    together = config.cluster.tasks_per_batch if packs_tasks(config) else 1
    works = sorted(
        ((tokens, task, shard) for task, (shard, tokens) in learnable(run).items() if tokens),
        key=lambda work: (-work[0], work[1]),
    )
    cut = [works[i : i + together] for i in range(0, len(works), together)]
    made = [Pack(tuple((task, shard) for _, task, shard in some), sum(tokens for tokens, _, _ in some)) for some in cut]
    done = set(run.trained())
    return sorted((pack for pack in made if not {task for task, _ in pack.tasks} <= done), key=lambda p: -p.tokens)


class Unfinished:
    """A pack's `tuning.Memory`: files in the run."""

    def __init__(self, run: Run, pack: Pack) -> None:
        self.run, self.folder = run, f"{UNFINISHED}/{pack.name}"

    def get(self, name: str) -> bytes | None:
        """See `tuning.Memory`."""
        return self.run.get(f"{self.folder}/{name}")

    def put(self, name: str, data: bytes) -> None:
        """See `tuning.Memory`."""
        self.run.put(f"{self.folder}/{name}", data)

    def clear(self) -> None:
        """See `tuning.Memory`."""
        self.run.remove(self.folder)


def learn(
    config: Config, work: Iterable[Pack], rank: int = 0, world: int = 1, barrier: Callable[[], None] = lambda: None
) -> None:
    """What one of `world` workers of a group does: train packs one after the other, and publish their models.

    A task that fails is noted and the others go on; a pack that fails as a whole is trained task by task.
    """
    run, tuner = Run(config.run), make_tuner(config, rank, world)
    facts = student.facts(config.student)

    def train(pack: Pack) -> None:
        done = {task for task, _ in pack.tasks if run.exists(f"models/{task}/{MODEL}")}
        barrier()  # all ranks have looked before one publishes, so all skip the same
        if len(done) == len(pack.tasks):
            return
        memory = Unfinished(run, pack)
        with run.scratch("models") if rank == 0 else contextlib.nullcontext() as scratch:
            with caught() as ended:
                told = tuner.train(_lessons(run, pack, scratch, done), memory)
            if ended.error is not None:
                if world > 1 and not isinstance(ended.error, SelfGuideError):
                    raise ended.error  # met by this rank alone, perhaps: the group has to start anew
                if len(pack.tasks) > 1:
                    for single in pack.split():
                        train(single)
                    return
                told = {task: ended.error for task, _ in pack.tasks}
            if rank == 0:
                _publish(run, told, scratch, facts, config)
                memory.clear()
        barrier()

    for pack in work:
        train(pack)


def _lessons(run: Run, pack: Pack, scratch: Path | None, done: set[str]) -> list[Lesson]:
    """The pack's tasks. One that is done already learns along, so that the others are what they would have been."""
    lessons = []
    for task, shard in pack.tasks:
        rows = run.read("trainset", shard)
        mine = rows.filter(pc.and_(pc.equal(rows["task"], task), pc.is_null(rows["drop_reason"])))
        folder = None
        if scratch is not None and task not in done:
            folder = scratch / task
            folder.mkdir()
        lessons.append(Lesson(task, mine, folder))
    return lessons


def _publish(run: Run, told: dict[str, Told | Exception], scratch: Path, facts: dict[str, Any], config: Config) -> None:
    """Publish what went well, note what did not."""
    settings = config.models.model_dump(mode="json")
    for task, what in told.items():
        if isinstance(what, Exception):
            note(run, "models", task, what)
        elif (folder := scratch / task).exists():
            _tell(folder, {"task": task, "trained": True} | what | {"student": facts, "settings": settings})
            run.publish(folder, f"models/{task}", MODEL)
            clear(run, "models", task)


def publish_untrained(run: Run, task: str) -> None:
    """A task with nothing to learn from has the student as its model, and says so."""
    with run.scratch("models") as folder:
        _tell(folder, {"task": task, "trained": False, "pairs": 0, "reason": "no training pair survived"})
        run.publish(folder, f"models/{task}", MODEL)


def receipt(run: Run, task: str) -> dict[str, Any]:
    """A finished task as the other tables' receipts look."""
    told = run.get_json(f"models/{task}/{MODEL}")
    kept = told["pairs"] if told["trained"] else 0
    return {"table": "models", "shard": task, "rows": told["pairs"], "kept": kept, "seconds": told.get("seconds", 0.0)}


def _tell(folder: Path, told: dict[str, Any]) -> None:
    (folder / MODEL).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
