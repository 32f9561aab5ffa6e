"""Predictions become scores: a task, a system, a metric (0-100), with a 95 % bootstrap interval."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine
from selfguide_ray.metrics import METRICS, bootstrap_interval, macro_f1
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, row_seed, tasks_of


class Scores:
    """tasks, predictions → scores. Every instance counts, answered or not; a task without instances has no scores."""

    writes: ClassVar = "scores"
    reads: ClassVar = {"tasks": None, "predictions": None}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config = config
        self.of_method = reference.scoring(config, engine)

    def __call__(self, tasks: pa.Table, predictions: pa.Table) -> pa.Table:
        """The rows of `scores` for a shard."""
        answers = {(row["task"], row["system"], row["id"]): row["prediction"] for row in predictions.to_pylist()}
        rows = [
            {"task": task.name, "category": task.category, "system": system, "n": len(task.instances)} | score
            for task in tasks_of(tasks)
            if task.instances
            for system in self.config.predictions.systems
            for score in self._scores(task, system, [answers[task.name, system, i.id] for i in task.instances])
        ]
        return pa.Table.from_pylist(rows, schema=TABLES["scores"])

    def _scores(self, task: Task, system: str, answers: list[str]) -> Iterator[dict[str, Any]]:
        references = [instance.references for instance in task.instances]
        columns = {
            name: [100 * metric(answer, right) for answer, right in zip(answers, references, strict=True)]
            for name, metric in METRICS.items()
        }
        for name, values in (columns | self.of_method(task, answers)).items():
            # The resampled instances are the same for every system of a task, so that intervals can be compared.
            seed = row_seed(self.config.seed, task.name, "bootstrap")
            resamples = self.config.scores.bootstrap
            low, high = bootstrap_interval(values, resamples, seed) if resamples else (None, None)
            mean = sum(values) / len(values)
            yield {"metric": name, "n": len(values), "value": mean, "low": low, "high": high}
        if task.labels:
            yield {"metric": "macro_f1", "value": 100 * macro_f1(answers, references)}
