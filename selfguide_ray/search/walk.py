"""The way through a search: every point is a run; what another run has made is taken over, the rest is made.

All that is known lies in the runs, so a search that was stopped is gone on with by starting it again.
"""

import json
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from selfguide_ray import progress, student
from selfguide_ray.config import Config
from selfguide_ray.method import Job, evaluate, plan, synthesize, train
from selfguide_ray.models import MODEL
from selfguide_ray.run import PLAN, READS, Run, made_by
from selfguide_ray.schema import TASK_COLUMNS, Task, tasks_of
from selfguide_ray.search import Point, Search, baselines, final, points
from selfguide_ray.search.selection import choose, hopeless, instance_scores
from selfguide_ray.standings import TUNED, Board
from selfguide_ray.status import left_behind

CHOSEN = "chosen.json"
Scores = dict[str, float]  # task → score, 0-100


class Walk:
    """A search under way."""

    def __init__(self, search: Search) -> None:
        self.search, self.points = search, points(search)
        self.run = Run(search.run)
        self.facts = student.facts(self.points[0].config.student)
        self.jobs: dict[str, Job] = {}  # by the run's folder
        self.makers: dict[tuple[str, str], Run] = {}  # (table, what it is made by) → the run that makes it
        self.taken_over = dict.fromkeys(READS, 0)  # shards, and models, that were made for another run
        self.stopped: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, Task] = {}
        self.shards: list[str] = []

    def go(self) -> dict[str, Any]:
        """Search, choose by validation, judge the choice by what is held out; returns what the report tells."""
        rival = self._job(baselines(self.search, "validation"))
        self.shards = rival.run.shards("tasks")
        self.tasks = {t.name: t for s in self.shards for t in tasks_of(rival.run.read("tasks", s, TASK_COLUMNS))}
        evaluate(rival)
        theirs = self._means(rival, self.search.rival)
        first = self.shards[: max(1, round(self.search.first_rung * len(self.shards)))]
        for point in self.points:
            self._make(point, self._job(point.config), first)
        if self.search.stop and len(first) < len(self.shards):
            self._stop_hopeless(first)
        for point in self.points:
            if point.name not in self.stopped:
                self._make(point, self._job(point.config), self.shards)
        found = {point.name: self._means(self._job(point.config), TUNED) for point in self.points}
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
            "taken_over": self.taken_over,
        }

    def left(self) -> list[str]:
        """What the runs could not do."""
        return sorted({what for job in self.jobs.values() for what in left_behind(job.run)})

    def _job(self, config: Config) -> Job:
        """The job of a run, with its plan."""
        if config.run not in self.jobs:
            job = Job(config, Run(config.run))
            self._take_over(job, "tasks", None)
            plan(job)
            for table in READS:
                self.makers.setdefault((table, self._key(table, job)), job.run)
            self.jobs[config.run] = job
        return self.jobs[config.run]

    def _make(self, point: Point, job: Job, shards: Sequence[str]) -> None:
        """Take a point through the shards, up to its scores."""
        progress.say(f"[bold]{point.label}[/bold]")
        for table in list(READS)[1:]:
            self._take_over(job, table, shards)
        synthesize(job, shards)
        train(job, shards)
        evaluate(job, shards)

    def _key(self, table: str, job: Job) -> str:
        return json.dumps(made_by(table, job.config, self.facts), sort_keys=True)

    def _take_over(self, job: Job, table: str, shards: Sequence[str] | None) -> None:
        """Copy the shards, or the models of their tasks, that another run has made by the same settings."""
        maker = self.makers.get((table, self._key(table, job)))
        if maker is None or maker.root == job.run.root:
            return
        if table == "models":
            wanted = {name for shard in shards or () for name in _names(job, shard)} - set(job.run.trained())
            for name in sorted(wanted & set(maker.trained())):
                # Weights that did not stay are learned again.
                if (maker.get_json(f"models/{name}/{MODEL}") or {}).get("weights") != "removed":
                    job.run.take_folder(maker, f"models/{name}", MODEL)
                    self.taken_over[table] += 1
            return
        for shard in maker.shards(table):
            if shards is None or shard in shards:
                self.taken_over[table] += job.run.take(maker, f"{table}/{shard}.parquet")
        if table == "tasks":
            job.run.take(maker, PLAN)

    def _means(self, job: Job, system: str) -> Scores:
        """A system's score of each task in its main metric, which method: reference has its own of."""
        board = Board.read(job.run, list(self.tasks.values()))
        found = {task.name: board.value(task, board.main(task), system) for task in board.tasks}
        return {task: value for task, value in found.items() if value is not None}

    def _stop_hopeless(self, shards: Sequence[str]) -> None:
        runs = {point.name: self._job(point.config).run for point in self.points}
        found = {name: instance_scores(run, self.tasks, TUNED, shards) for name, run in runs.items()}
        for name, (leader, upper) in hopeless(found, self.points[0].config.seed).items():
            self.stopped[name] = {"leader": leader, "upper": upper, "shards": len(shards)}
            progress.event("stopped", point=name, leader=leader, upper=round(upper, 2))

    def _judged(self, chosen: dict[str, str]) -> dict[str, Scores]:
        """Task → system → score on the held-out instances, selfguide's of the point that was chosen for the task."""
        judged: dict[str, Scores] = {task: {} for task in self.tasks}
        theirs = self._job(baselines(self.search, "held_out"))
        evaluate(theirs)
        for system in self.search.baselines:
            for task, value in self._means(theirs, system).items():
                judged[task][system] = value
        for point in self.points:
            mine = {task for task, name in chosen.items() if name == point.name}
            if mine:
                job = self._job(final(self.search, point))
                self._make(point, job, [shard for shard in self.shards if mine & set(_names(job, shard))])
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


def _names(job: Job, shard: str) -> Iterable[str]:
    return job.run.read("tasks", shard, ["task"])["task"].to_pylist()
