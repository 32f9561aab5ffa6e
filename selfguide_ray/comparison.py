"""Runs of the same tasks side by side: groups of runs that differ by seed, and what a group gains over the first one.

A task's value is its mean over the runs of a group. Every 95 % interval resamples tasks, so it says how far the tasks
speak for others like them. How far runs differ by their seed is told beside it, as a standard deviation between runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from selfguide_ray.charts import chance, number, signed, tasks
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.metrics import benjamini_hochberg, bootstrap_interval, sign_flip_p
from selfguide_ray.run import Run
from selfguide_ray.schema import TASK_COLUMNS, tasks_of
from selfguide_ray.standings import FAMILIES, KNOWN, PROMPTED, RESAMPLES, TUNED, Board

KEY = "mean ± standard deviation between runs, [95 % interval over tasks]; gain: selfguide less the prompted system"


@dataclass(frozen=True)
class Group:
    """Runs that differ by seed."""

    uris: list[str]
    boards: list[Board]

    @property
    def systems(self) -> list[str]:
        """The systems of every run, floors first."""
        there = set.intersection(*(set(board.systems) for board in self.boards))
        return sorted(there, key=[*KNOWN, *sorted(there)].index)

    def by_run(self, family: str, system: str) -> list[dict[str, float]]:
        """For each run, the system's score on each task of a family."""
        return [board.values(family, system) for board in self.boards]

    def mean(self, family: str, system: str) -> float:
        """The mean over tasks and runs."""
        return float(np.mean([value for run in self.by_run(family, system) for value in run.values()]))


def compare(groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """{families: [{name, metric, tasks, groups: [{runs, systems, gain, over_first}]}]} of runs, given by path or URI.

    `systems` and `gain` (selfguide over the group's better prompted system, `rival`) hold mean, low, high, and sd, the
    standard deviation between runs; `over_first` is selfguide less that of the first group, with p (signs of the tasks'
    differences flipped), q (over all groups and families) and each task's points. What there is too little for is None.

    Raises SelfGuideError if a run lacks scores, or holds other tasks than the first one.
    """
    read = [_read(uris) for uris in groups]
    _check([pair for group in read for pair in zip(group.uris, group.boards, strict=True)])
    board = read[0].boards[0]
    families = [
        {
            "name": family,
            "metric": board.metric(family),
            "tasks": scored,
            "groups": [_told(group, None if group is read[0] else read[0], family) for group in read],
        }
        for family in FAMILIES
        if (scored := sum(board.n(task) is not None for task in board.family(family)))
    ]
    differences = [group["over_first"] for family in families for group in family["groups"] if group["over_first"]]
    for difference, q in zip(differences, benjamini_hochberg([d["p"] for d in differences]), strict=True):
        difference["q"] = q
    return {"families": families}


def _read(uris: Sequence[str]) -> Group:
    if not uris or len(set(uris)) < len(uris):
        raise SelfGuideError(
            f"{','.join(uris)!r} is no group of runs.",
            "A group names one run or more, each once; a run that is named twice would count twice.",
            "Give runs of one setting that differ by seed, with commas between: RUN,RUN,RUN.",
        )
    boards = []
    for uri in uris:
        run = Run(uri)
        shards, due = run.shards("tasks"), run.missing("scores") if run.shards("tasks") else []
        if due or not shards:
            raise SelfGuideError(
                f"{uri} lacks the scores of {len(due)} of {len(shards)} shards." if shards else f"{uri} holds no run.",
                "What is compared are the scores of finished runs.",
                "Check the path, or finish the run: selfguide run CONFIG run=DIR.",
            )
        planned = [task for shard in shards for task in tasks_of(run.read("tasks", shard, TASK_COLUMNS))]
        boards.append(Board.read(run, planned))
    return Group(list(uris), boards)


def _check(runs: Sequence[tuple[str, Board]]) -> None:
    first, wanted = runs[0][0], _held_out(runs[0][1])
    for uri, board in runs:
        if odd := sorted(wanted.items() ^ _held_out(board).items()):
            names = list(dict.fromkeys(name for name, _ in odd))
            raise SelfGuideError(
                f"{uri} does not hold the scores of the same tasks as {first}: {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more." if len(names) > 5 else "."),
                "Systems are compared task by task, in one metric, on as many held-out instances.",
                "Run one of them again with the tasks.* settings of the other.",
            )


def _held_out(board: Board) -> dict[str, tuple[str, int]]:
    """The metric and the number of held-out instances of each task that has scores."""
    return {task.name: (board.main(task), n) for task in board.tasks if (n := board.n(task)) is not None}


def _told(group: Group, first: Group | None, family: str) -> dict[str, Any]:
    systems = {name: _mean(group.by_run(family, name)) for name in group.systems}
    return {
        "runs": group.uris,
        "systems": {name: told for name, told in systems.items() if told},
        "gain": _gain(group, family),
        "over_first": _over(group, first, family) if first else None,
    }


def _gain(group: Group, family: str) -> dict[str, Any] | None:
    """selfguide less the prompted system with the better mean over tasks and runs; None if either was not run."""
    means = {name: group.mean(family, name) for name in PROMPTED if name in group.systems}
    if not means or TUNED not in group.systems:
        return None
    rival = max(means, key=lambda name: means[name])
    pairs = zip(group.by_run(family, TUNED), group.by_run(family, rival), strict=True)
    told = _mean([{task: ours[task] - theirs[task] for task in ours if task in theirs} for ours, theirs in pairs])
    return {"rival": rival} | told if told else None


def _over(group: Group, first: Group, family: str) -> dict[str, Any] | None:
    if TUNED not in group.systems or TUNED not in first.systems:
        return None
    ours, theirs = (_averaged(several.by_run(family, TUNED)) for several in (group, first))
    points = {task: ours[task] - theirs[task] for task in ours if task in theirs}
    told = _mean([points])
    if not told:
        return None
    up, down = sum(p > 0 for p in points.values()), sum(p < 0 for p in points.values())
    del told["sd"]  # runs of two groups are no pairs
    return told | {"up": up, "down": down, "p": sign_flip_p(list(points.values()), seed=0), "by_task": points}


def _mean(runs: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """The mean over tasks of each task's mean over runs, its 95 % interval over tasks, and the deviation of the runs."""
    values = list(_averaged(runs).values())
    if not values:
        return None
    low, high = bootstrap_interval(values, RESAMPLES, seed=0) if len(values) > 1 else (None, None)
    between = float(np.std([np.mean(list(run.values())) for run in runs], ddof=1)) if len(runs) > 1 else None
    return {"mean": float(np.mean(values)), "low": low, "high": high, "sd": between}


def _averaged(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each task's mean over runs."""
    return {task: float(np.mean([run[task] for run in runs])) for task in sorted(set.intersection(*map(set, runs)))}


def tables(told: dict[str, Any]) -> Iterator[Table]:
    """What `compare` tells as a table for each family: a group a row, mean ± deviation between runs above the interval."""
    for family in told["families"]:
        groups = family["groups"]
        systems = dict.fromkeys(name for group in groups for name in group["systems"])
        title = f"{family['name']}: {tasks(family['tasks'])}, {family['metric']}"
        table = Table(title=title, caption=KEY, title_justify="left", caption_justify="left", show_lines=True)
        table.add_column("runs", overflow="fold")
        for system in systems:
            table.add_column(system, justify="right", no_wrap=True)
        table.add_column("gain", justify="right", no_wrap=True)
        if len(groups) > 1:
            table.add_column("over the first", justify="right", no_wrap=True)
        for group in groups:
            gain, over = group["gain"], group["over_first"]
            cells = [_cell(group["systems"].get(system), number) for system in systems]
            cells.append(_cell(gain, signed, f"over {gain['rival']}" if gain else ""))
            if len(groups) > 1:
                cells.append(
                    _cell(over, signed, f"{over['up']} up, {over['down']} down\nq {chance(over['q'])}" if over else "")
                )
            runs = "\n".join(run.rstrip("/").rsplit("/", 1)[-1] for run in group["runs"])
            table.add_row(Text(runs), *map(Text, cells))
        yield table


def _cell(told: dict[str, Any] | None, spelled: Callable[[float], str], below: str = "") -> str:
    if told is None:
        return "–"
    mean = spelled(told["mean"]) + (f" ± {told['sd']:.1f}" if told.get("sd") is not None else "")
    interval = f"[{spelled(told['low'])}, {spelled(told['high'])}]" if told["low"] is not None else ""
    return "\n".join(part for part in (mean, interval, below) if part)
