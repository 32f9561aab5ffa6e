"""The plan of a run: which tasks, in which shards, and which of their instances are held out."""

import difflib
import fnmatch
import functools
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from selfguide_ray.config import Config
from selfguide_ray.config import Tasks as Settings
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import redacted
from selfguide_ray.run import PLAN, Run
from selfguide_ray.schema import Task, row_seed, task_rows
from selfguide_ray.storage import shown
from selfguide_ray.task_files import read_task, task_files

MIN_EXAMPLES = 2
READERS = 16  # shards read at a time: on an object store each is a wait

# Yes, no, or (None) not to be known before the file is read.
Atom = Callable[[str, Task | None], bool | None]


@dataclass
class Refusal:
    """A task file that was left out, and why."""

    file: str
    what: str
    why: str
    instead: str


def plan(run: Run, config: Config, student: dict[str, Any]) -> dict[str, Any]:
    """Write `tasks/`, unless it is complete; returns {shards, tasks, refused: [Refusal as a mapping], splits, costs}.

    Raises SelfGuideError before anything is written if the folder was made by other settings, a shard of it is damaged, no
    task is left, or under tasks.strict any file is broken. A shard that is gone is made again.
    """
    run.check(config, student)
    done, there = run.get_json(PLAN, dict), run.shards("tasks")
    with ThreadPoolExecutor(READERS) as pool:
        held = dict(zip(there, pool.map(functools.partial(_names, run), there), strict=True))
    if done is not None and len(there) >= done["shards"]:
        run.claim(config, student)
        return done
    refusals: list[Refusal] = []
    if config.tasks.strict:
        for _ in shards(config, refusals):
            pass  # every file is read once before the first shard is written
        refusals.clear()
    several = shards(config, refusals)
    first = next(several, None)
    if first is None:
        _refuse_empty(config, refusals)
    run.claim(config, student)
    tasks = count = 0
    costs: dict[str, int] = {}
    for count, shard in enumerate(chain([first], several), start=1):
        name = f"{count - 1:05d}"
        if name in held and held[name] != [task.name for task in shard]:
            raise _changed(run, name, config)
        run.write("tasks", name, task_rows(shard), {"kept": len(shard)})
        costs[name] = sum(expected_cost(task, config) for task in shard)
        tasks += len(shard)
    splits = find_splits(config)
    done = {"shards": count, "tasks": tasks, "refused": [vars(r) for r in refusals], "splits": splits and str(splits)}
    done["costs"] = costs
    run.put(PLAN, json.dumps(done, indent=1).encode() + b"\n")
    return done


def _names(run: Run, shard: str) -> list[str]:
    """The tasks of a shard, all of whose file is read, since all that follows is made from it."""
    return run.read("tasks", shard)["task"].to_pylist()


def _changed(run: Run, shard: str, config: Config) -> SelfGuideError:
    return SelfGuideError(
        f"{shown(run.uri, 'tasks', shard)} holds other tasks than {redacted(config.tasks.source)} gives it now.",
        "The task files have changed since, and the shards that are missing would not go with those that are there.",
        "Restore the task files, or choose another run=DIR.",
    )


def expected_cost(task: Task, config: Config) -> int:
    """About how many characters the student will read and write for a task: what makes shards differ."""
    asked = config.inputs.rounds.of(task.labels) * config.inputs.prompts_per_round
    shown = len(task.instruction) + sum(len(e.input) + len(e.output) for e in task.examples)
    item, answer = (
        sum(len(text) for text in texts) // max(1, len(task.examples))
        for texts in ([e.input for e in task.examples], [e.output for e in task.examples])
    )
    predicted = len(task.instances) * len(config.predictions.systems)
    return (
        (2 * asked + predicted) * (shown + item) + asked * item + (asked * config.outputs.samples + predicted) * answer
    )


def shards(config: Config, refusals: list[Refusal]) -> Iterator[list[Task]]:
    """The selected tasks in groups of `per_shard`; files that cannot be used go to `refusals`, or raise if strict."""
    buffer: list[Task] = []
    for task in selected(config, refusals):
        buffer.append(task)
        if len(buffer) == config.tasks.per_shard:
            yield buffer
            buffer = []
    if buffer:
        yield buffer


def selected(config: Config, refusals: list[Refusal]) -> Iterator[Task]:
    """Each selected task with its held-out instances, in the order of the source."""
    splits = find_splits(config)
    wanted = Selection(config.tasks.select, splits)
    official = {name for track in ("default", "xlingual") if splits for name in split_names(splits, f"{track}/test")}
    seen: set[str] = set()
    for file in task_files(resolve(config.tasks.source)):
        if wanted(file.name, None) is False:
            continue
        try:
            task = read_task(file)
            if wanted(task.name, task):
                _check(task, file.origin, seen)
                seen.add(task.name.casefold())
                yield set_apart(task, task.name in official, config.tasks, config.seed)
        except SelfGuideError as error:
            if config.tasks.strict:
                raise
            refusals.append(Refusal(file.origin, error.what, error.why, error.instead))


def _check(task: Task, origin: str, seen: set[str]) -> None:
    if task.name.casefold() in seen:
        raise SelfGuideError(
            f"{origin}: a second task named {task.name}.",
            "A name is one folder of the run, and on some disks case does not tell names apart.",
            "Rename one of the files.",
        )
    if len(task.examples) < MIN_EXAMPLES:
        raise SelfGuideError(
            f"{origin}: {task.name} has {len(task.examples) or 'no'} example{'s' * (len(task.examples) != 1)}.",
            f"SELF-GUIDE starts from demonstrations, {MIN_EXAMPLES} at least.",
            f"Add examples, or leave the task out with tasks.select=all,!{task.name}.",
        )


def set_apart(task: Task, official: bool, settings: Settings, seed: int) -> Task:
    """The task with its held-out instances, and of the others those for validation and for gold fine-tuning.

    Held out are the first ones of an official test task, in order, else a seeded sample: upstream put the test instances
    first; other files are often sorted by class, so their beginning would be one class.
    """
    limit, everything = settings.instances, range(len(task.instances))
    held_out = list(everything[:limit])
    if not official and len(everything) > limit:
        held_out = sorted(random.Random(row_seed(seed, task.name, "instances")).sample(everything, limit))
    left = stratified(task, sorted(set(everything) - set(held_out)), seed)
    validation, gold = left[: settings.validation], left[settings.validation :][: settings.gold]
    chosen = {"instances": held_out, "validation": sorted(validation), "gold": sorted(gold)}
    return replace(task, **{name: tuple(task.instances[i] for i in places) for name, places in chosen.items()})


def stratified(task: Task, places: list[int], seed: int) -> list[int]:
    """Instances in random order, such that every first part of it has the answers in proportion (spec F3).

    Only classes are told apart; a generation task's answers are all different.
    """
    random.Random(row_seed(seed, task.name, "validation")).shuffle(places)
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(task.instances[place].references[0] if task.labels else "", []).append(place)
    spaced = [((at + 0.5) / len(group), place) for group in groups.values() for at, place in enumerate(group)]
    return [place for _, place in sorted(spaced, key=lambda one: one[0])]


def find_splits(config: Config) -> Path | None:
    """The directory of split lists: the one set, or `splits` beside the source or one level above it."""
    if config.tasks.splits is not None:
        path = resolve(config.tasks.splits)
        if not path.is_dir():
            raise SelfGuideError(
                f"tasks.splits: {path} is not a directory.",
                "Split lists lie in default/ and xlingual/ inside it.",
                "Give the directory `splits` of a Natural Instructions checkout.",
            )
        return path
    source = resolve(config.tasks.source).absolute()
    return next((p / "splits" for p in (source.parent, source.parent.parent) if (p / "splits").is_dir()), None)


def split_names(splits: Path, split: str) -> set[str]:
    """Task names of a split such as default/test; empty if the track has no such list."""
    path = splits / f"{split}_tasks.txt"
    return set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()


class Selection:
    """tasks.select as a predicate: terms joined by commas, `a&b` for both, `!a` to take away what the others gave."""

    def __init__(self, text: str, splits: Path | None) -> None:
        terms = [term.strip() for term in text.split(",") if term.strip()]
        self.given = [self._term(term, splits) for term in terms if not term.startswith("!")]
        self.taken = [self._term(term[1:], splits) for term in terms if term.startswith("!")]

    def __call__(self, name: str, task: Task | None) -> bool | None:
        """Whether a task is selected; None while that depends on what its file says."""
        given = _any([term(name, task) for term in self.given]) if self.given else True
        taken = _any([term(name, task) for term in self.taken])
        return _all([given, None if taken is None else not taken])

    def _term(self, term: str, splits: Path | None) -> Atom:
        atoms = [_atom(part.strip(), splits) for part in term.split("&")]
        return lambda name, task: _all([atom(name, task) for atom in atoms])


def _atom(text: str, splits: Path | None) -> Atom:
    if text == "all":
        return lambda name, task: True
    kind, colon, value = text.partition(":")
    if colon and kind == "category":
        return lambda name, task: None if task is None else task.category.casefold() == value.casefold()
    if colon and kind == "language":
        return lambda name, task: None if task is None else value.casefold() in map(str.casefold, task.languages)
    if "/" in text:
        if splits is None:
            raise SelfGuideError(
                f"tasks.select: {text} is a split, and no split lists were found.",
                "They are looked for in a folder `splits` beside tasks.source.",
                "Set tasks.splits=DIR.",
            )
        names = split_names(splits, text)
        if not names:
            known = sorted(str(p.relative_to(splits)).removesuffix("_tasks.txt") for p in splits.glob("*/*_tasks.txt"))
            raise SelfGuideError(
                f"tasks.select: there is no split {text}.", f"{splits} has {', '.join(known)}.", "Choose one of these."
            )
        return lambda name, task: name in names
    return lambda name, task: fnmatch.fnmatchcase(name, text)


def _any(values: list[bool | None]) -> bool | None:
    return True if True in values else None if None in values else False


def _all(values: list[bool | None]) -> bool | None:
    return False if False in values else None if None in values else True


def _refuse_empty(config: Config, refusals: list[Refusal]) -> None:
    if refusals:
        first = refusals[0]
        others = f" ({len(refusals) - 1} more files are broken.)" if len(refusals) > 1 else ""
        raise SelfGuideError(first.what + others, first.why, first.instead)
    names = [file.name for file in task_files(resolve(config.tasks.source))]
    near = difflib.get_close_matches(config.tasks.select, names, n=1, cutoff=0.4) or names[:1]
    raise SelfGuideError(
        f"tasks.select: {config.tasks.select} selects none of the {len(names)} tasks in {config.tasks.source}.",
        "A run needs at least one task.",
        f"Use names as in {near[0]}, or all." if near else "Give a directory that holds task files.",
    )
