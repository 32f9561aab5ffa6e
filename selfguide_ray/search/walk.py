"""The way through a search: every point is a run. One that was stopped is gone on with by starting it again."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from selfguide_ray import progress, student
from selfguide_ray.method import Job, evaluate
from selfguide_ray.run import Run
from selfguide_ray.schema import TASK_COLUMNS, Task, tasks_of
from selfguide_ray.search import Point, Search, baselines, final, points
from selfguide_ray.search.selection import choose, hopeless, instance_scores
from selfguide_ray.search.sharing import Sharing, names
from selfguide_ray.standings import TUNED, Board
from selfguide_ray.stopping import Work

CHOSEN = "chosen.json"
Scores = dict[str, float]  # task → score, 0-100


class Walk:
    """A search under way."""

    def __init__(self, search: Search, work: Work | None = None) -> None:
        self.search, self.points = search, points(search)
        self.run = Run(search.run)
        self.sharing = Sharing(student.facts(self.points[0].config.student), work)
        self.stopped: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, Task] = {}
        self.shards: list[str] = []

    def go(self) -> dict[str, Any]:
        """Search, choose by validation, judge the choice by what is held out; returns what the report tells."""
        rival = self.sharing.job(baselines(self.search, "validation"))
        self.shards = rival.run.shards("tasks")
        self.tasks = {t.name: t for s in self.shards for t in tasks_of(rival.run.read("tasks", s, TASK_COLUMNS))}
        evaluate(rival)
        theirs = self._means(rival, self.search.rival)
        first = self.shards[: max(1, round(self.search.first_rung * len(self.shards)))]
        for point in self.points:
            self.sharing.make(point.label, self.sharing.job(point.config), first)
        if self.search.stop and len(first) < len(self.shards):
            self._stop_hopeless(first)
        for point in self.points:
            if point.name not in self.stopped:
                self.sharing.make(point.label, self.sharing.job(point.config), self.shards)
        found = {point.name: self._means(self.sharing.job(point.config), TUNED) for point in self.points}
        families = [[name for name, task in self.tasks.items() if bool(task.labels) == kind] for kind in (True, False)]
        through = {name: scores for name, scores in found.items() if name not in self.stopped}
        chosen = choose(self.search.rule, through, theirs, families)
        # Written down before a held-out instance is looked at.
        self.run.put(CHOSEN, json.dumps({"rule": self.search.rule, "tasks": chosen}, indent=1).encode())
        return {
            **self.search.model_dump(include={"rule", "rival", "baselines"}),
            "points": [self._row(point, found[point.name], theirs, chosen) for point in self.points],
            "chosen": chosen,
            "judged": self._judged(chosen),
            "tasks": {name: {"metric": task.metric, "labels": list(task.labels)} for name, task in self.tasks.items()},
            "taken_over": self.sharing.taken_over,
        }

    def _means(self, job: Job, system: str) -> Scores:
        """A system's score of each task in its main metric, which method: reference has its own of."""
        board = Board.read(job.run, list(self.tasks.values()))
        found = {task.name: board.value(task, board.main(task), system) for task in board.tasks}
        return {task: value for task, value in found.items() if value is not None}

    def _stop_hopeless(self, shards: Sequence[str]) -> None:
        runs = {point.name: self.sharing.job(point.config).run for point in self.points}
        found = {name: instance_scores(run, self.tasks, TUNED, shards) for name, run in runs.items()}
        for name, (leader, upper) in hopeless(found, self.points[0].config.seed).items():
            self.stopped[name] = {"leader": leader, "upper": upper, "shards": len(shards)}
            progress.event("stopped", point=name, leader=leader, upper=round(upper, 2))

    def _judged(self, chosen: dict[str, str]) -> dict[str, Scores]:
        """Task → system → score on the held-out instances, selfguide's of the point that was chosen for the task."""
        judged: dict[str, Scores] = {task: {} for task in self.tasks}
        theirs = self.sharing.job(baselines(self.search, "held_out"))
        evaluate(theirs)
        for system in self.search.baselines:
            for task, value in self._means(theirs, system).items():
                judged[task][system] = value
        for point in self.points:
            mine = {task for task, name in chosen.items() if name == point.name}
            if mine:
                job = self.sharing.job(final(self.search, point))
                self.sharing.make(point.label, job, [shard for shard in self.shards if mine & set(names(job, shard))])
                for task in mine & (scores := self._means(job, TUNED)).keys():
                    judged[task][TUNED] = scores[task]
        return judged

    def _row(self, point: Point, scores: Scores, rival: Scores, chosen: dict[str, str]) -> dict[str, Any]:
        gains = [value - rival[task] for task, value in scores.items() if task in rival]
        return {
            "name": point.name,
            "label": point.label,
            "scored": len(gains),
            "gain": fmean(gains) if gains else None,
            "worst": min(gains, default=None),
            "chosen_for": [task for task, name in chosen.items() if name == point.name],
            "stopped": self.stopped.get(point.name),
        }
