"""Runs that share: what one has made another takes over, shard by shard, where both are made by the same settings.

All that is known lies in the runs, so whoever goes through them again makes nothing twice.
"""

import json
from collections.abc import Sequence
from typing import Any

from selfguide_ray import progress
from selfguide_ray.config import Config
from selfguide_ray.method import Job, evaluate, plan, synthesize, train
from selfguide_ray.models import MODEL
from selfguide_ray.run import PLAN, READS, Run, made_by
from selfguide_ray.status import left_behind
from selfguide_ray.stopping import Work


class Sharing:
    """Runs of one student over the same tasks. `facts` are the student's; `work` holds the runs."""

    def __init__(self, facts: dict[str, Any], work: Work | None = None) -> None:
        self.facts, self.work = facts, work
        self.jobs: dict[str, Job] = {}  # by the run's folder
        self.makers: dict[tuple[str, str], list[Run]] = {}  # (table, what it is made by) → the runs that have it so
        self.taken_over = dict.fromkeys(READS, 0)  # shards, and models, that were made for another run

    def job(self, config: Config) -> Job:
        """The job of a run, with its plan."""
        if config.run not in self.jobs:
            job = Job(config, Run(config.run))
            if self.work is not None:
                job.take(self.work)
            self._take_over(job, "tasks", None)
            plan(job)
            for table in READS:
                self.makers.setdefault((table, self._key(table, job)), []).append(job.run)
            self.jobs[config.run] = job
        return self.jobs[config.run]

    def make(self, label: str, job: Job, shards: Sequence[str]) -> None:
        """Take a run through the shards, up to its scores."""
        progress.say("", lead=label)
        for table in list(READS)[1:]:
            self._take_over(job, table, shards)
        synthesize(job, shards)
        train(job, shards)
        evaluate(job, shards)

    def left(self) -> list[str]:
        """What the runs could not do."""
        return sorted({what for job in self.jobs.values() for what in left_behind(job.run)})

    def _key(self, table: str, job: Job) -> str:
        return json.dumps(made_by(table, job.config, self.facts), sort_keys=True)

    def _take_over(self, job: Job, table: str, shards: Sequence[str] | None) -> None:
        """Copy the shards, or the models of their tasks, that other runs have made by the same settings."""
        for maker in self.makers.get((table, self._key(table, job)), ()):
            if maker.root == job.run.root:
                continue
            if table == "models":
                self._take_models(job, maker, shards or ())
                continue
            for shard in maker.shards(table):
                if shards is None or shard in shards:
                    self.taken_over[table] += job.run.take(maker, f"{table}/{shard}.parquet")
            if table == "tasks":
                job.run.take(maker, PLAN)

    def _take_models(self, job: Job, maker: Run, shards: Sequence[str]) -> None:
        wanted = {name for shard in shards for name in names(job, shard)} - set(job.run.trained())
        for name in sorted(wanted & set(maker.trained())):
            # Weights that did not stay are learned again.
            if (maker.get_json(f"models/{name}/{MODEL}") or {}).get("weights") != "removed":
                job.run.take_folder(maker, f"models/{name}", MODEL)
                self.taken_over["models"] += 1


def names(job: Job, shard: str) -> list[str]:
    """The tasks of a shard."""
    return job.run.read("tasks", shard, ["task"])["task"].to_pylist()
