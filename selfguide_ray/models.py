"""The table whose unit is the task: which tasks want a model, which are trained together, and how a model is published.

A task is done when its `model.json` is there; it is written last, with the folder's name (design, invariant 4). Where
baselines are tuned too, a task has a model for each of these systems; to training they are tasks like any other.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from selfguide_ray import student
from selfguide_ray.config import Config
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught, clear, failures, note, noted
from selfguide_ray.redaction import redacted_values
from selfguide_ray.run import Run, digest, model_of, pairs_of
from selfguide_ray.tuning import Lesson, Told, make_tuner, packs_tasks

MODEL = "model.json"
UNFINISHED = "models/.unfinished"  # what packs go on from after a death
HIDDEN = ".train"  # Ray Train's own files, inside the run
GROUP = "group-"  # begins the unit of a failure that is a training group's and no task's


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


class Work(NamedTuple):
    """What a task costs: its shard, the tokens of its pairs, and how many pairs these are."""

    shard: str
    tokens: int
    pairs: int


def learnable(run: Run, config: Config, shards: Collection[str] | None = None) -> dict[str, Work]:
    """All models that the systems want, of the shards of `trainset` that are there, or of some of them."""
    found: dict[str, Work] = {}
    for shard in run.shards("trainset"):
        if shards is not None and shard not in shards:
            continue
        names = run.read("tasks", shard, ["task"])["task"].to_pylist()
        with noted(run, "trainset", shard):  # one that is damaged holds back its own tasks only
            costs = _costs(run, shard)
            for system in config.predictions.tuned or ("selfguide",):
                for name in names:
                    model = model_of(name, system)
                    found[model] = Work(shard, *costs.get(model, (0, 0)))
    return found


def _costs(run: Run, shard: str) -> dict[str, tuple[int, int]]:
    """Model → tokens of its pairs, and how many these are."""
    rows = run.read("trainset", shard, ["task", "system", "tokens", "drop_reason"])
    alive = rows.filter(pc.is_null(rows["drop_reason"])).group_by(["task", "system"])
    sums = alive.aggregate([("tokens", "sum"), ("tokens", "count")]).to_pylist()
    return {model_of(row["task"], row["system"]): (row["tokens_sum"], row["tokens_count"]) for row in sums}


def untrained(run: Run, config: Config, shards: Collection[str] | None = None) -> dict[str, Work]:
    """Those of `learnable` that are not there."""
    done = set(run.trained())
    return {model: work for model, work in learnable(run, config, shards).items() if model not in done}


def packs(run: Run, config: Config, shards: Collection[str] | None = None) -> list[Pack]:
    """Packs with work left, the costliest first.

    Which tasks share a pack depends on all that can be learned, not on what is left, so a continued run trains the same
    packs. Neighbours in tokens are together, so that none waits long for the others, and as many as fill a pass: a batch
    that fills it alone gains nothing from company.
    """
    most = config.cluster.tasks_per_batch if packs_tasks(config) else 1
    works = [(task, work) for task, work in learnable(run, config, shards).items() if work.pairs]
    made: list[list[tuple[str, Work]]] = []
    load = 0.0
    for task, work in sorted(works, key=lambda one: (-one[1].tokens, one[0])):
        step = work.tokens / work.pairs * min(config.models.batch_size, work.pairs)
        if not made or len(made[-1]) == most or load + step > config.cluster.tokens_per_pass:
            made.append([])
            load = 0.0
        made[-1].append((task, work))
        load += step
    cut = [
        Pack(tuple((task, work.shard) for task, work in some), sum(work.tokens for _, work in some)) for some in made
    ]
    done = set(run.trained())
    return sorted((pack for pack in cut if not {task for task, _ in pack.tasks} <= done), key=lambda p: -p.tokens)


class Unfinished:
    """A pack's `tuning.Memory`: files in the run."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.folder = run, f"{UNFINISHED}/{name}"

    def get(self, name: str) -> bytes | None:
        """See `tuning.Memory`."""
        return self.run.get(f"{self.folder}/{name}")

    def put(self, name: str, data: bytes) -> None:
        """See `tuning.Memory`."""
        self.run.put(f"{self.folder}/{name}", data)

    def remove(self, name: str) -> None:
        """See `tuning.Memory`."""
        self.run.remove(f"{self.folder}/{name}")

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
        memory = Unfinished(run, pack.name)
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
        name, system = pairs_of(task)
        mine = rows.filter(pc.and_(pc.equal(rows["task"], name), pc.equal(rows["system"], system)))
        mine = mine.filter(pc.is_null(mine["drop_reason"]))
        folder = None
        if scratch is not None and task not in done:
            folder = scratch / task
            folder.mkdir()
        lessons.append(Lesson(task, mine, folder))
    return lessons


def _publish(run: Run, told: dict[str, Told | Exception], scratch: Path, facts: dict[str, Any], config: Config) -> None:
    """Publish what went well, note what did not."""
    settings = redacted_values(config.models.model_dump(mode="json"))
    for task, what in told.items():
        if isinstance(what, Exception):
            note(run, "models", task, what)
        elif (folder := scratch / task).exists():
            _tell(folder, {"task": task, "trained": True} | what | {"student": facts, "settings": settings})
            run.publish(folder, f"models/{task}", MODEL)
            clear(run, "models", task)


def tidy(run: Run) -> None:
    """Remove what training leaves that is no model, once all models are there: it may have died before it did so."""
    run.remove(HIDDEN)
    run.remove(UNFINISHED)  # what other settings had begun
    for table, unit, _ in failures(run):
        if table == "models" and unit.startswith(GROUP):  # another has done what this one failed to do
            clear(run, table, unit)


def publish_untrained(run: Run, task: str) -> None:
    """A task with nothing to learn from has the student as its model, and says so."""
    with run.scratch("models") as folder:
        _tell(folder, {"task": task, "trained": False, "pairs": 0, "reason": "no training pair survived"})
        run.publish(folder, f"models/{task}", MODEL)


def discard(run: Run, tasks: Iterable[str]) -> None:
    """Remove the weights of tasks whose predictions are made; `model.json` stays, and says that they have gone."""
    for task in tasks:
        told = run.get_json(f"models/{task}/{MODEL}", dict)
        if told is None or not told["trained"] or told.get("weights") == "removed":
            continue
        run.put(f"models/{task}/{MODEL}", _lines(told | {"weights": "removed"}))
        for name in run.names(f"models/{task}"):
            if name != MODEL:
                run.remove(f"models/{task}/{name}")


def receipt(run: Run, task: str) -> dict[str, Any]:
    """A finished task as the other tables' receipts look."""
    told = run.get_json(f"models/{task}/{MODEL}", dict)
    kept = told["pairs"] if told["trained"] else 0
    return {"table": "models", "shard": task, "rows": told["pairs"], "kept": kept, "seconds": told.get("seconds", 0.0)}


def _tell(folder: Path, told: dict[str, Any]) -> None:
    (folder / MODEL).write_bytes(_lines(told))


def _lines(told: dict[str, Any]) -> bytes:
    return json.dumps(told, indent=1).encode() + b"\n"
