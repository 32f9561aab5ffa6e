"""Predictions become scores: a task, a system, a metric (0-100), with a 95 % bootstrap interval."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray.config import Config
from selfguide_ray.engine import Engine
from selfguide_ray.metrics import METRICS, bootstrap_interval, macro_f1
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, row_seed, tasks_of


class Scores:
    """tasks, predictions, trainset → scores. Every instance counts, answered or not; a task without any has no scores.

    Each score is told a second time without the suspects: instances that a learned pair, or an example, overlaps.
    """

    writes: ClassVar = "scores"
    reads: ClassVar = {"tasks": None, "predictions": None, "trainset": ("task", "system", "drop_reason", "suspects")}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config = config

    def __call__(self, tasks: pa.Table, predictions: pa.Table, trainset: pa.Table) -> pa.Table:
        """The rows of `scores` for a shard."""
        suspects = self._suspects(trainset)
        answers = {(row["task"], row["system"], row["id"]): row["prediction"] for row in predictions.to_pylist()}
        rows = [
            {"task": task.name, "category": task.category, "system": system, "n": len(task.instances)} | score
            for task in tasks_of(tasks)
            if task.instances
            for system in self.config.predictions.systems
            for score in self._scores(
                task, system, [answers[task.name, system, i.id] for i in task.instances], suspects
            )
        ]
        return pa.Table.from_pylist(rows, schema=TABLES["scores"])

    def _suspects(self, trainset: pa.Table) -> set[tuple[str, str]] | None:
        """(task, instance) that a pair alive and learned, or any example, overlaps; None if nobody looked.

        Examples count whatever was learned: prompted systems see them.
        """
        if self.config.trainset.decontaminate == "off":
            return None
        return {
            (row["task"], instance)
            for row in trainset.to_pylist()
            if row["system"] == "few_shot_tuned"
            or (row["drop_reason"] is None and row["system"] in self.config.predictions.tuned)
            for instance in row["suspects"] or ()
        }

    def _scores(
        self, task: Task, system: str, answers: list[str], suspects: set[tuple[str, str]] | None
    ) -> Iterator[dict[str, Any]]:
        references = [instance.references for instance in task.instances]
        clean = (
            [] if suspects is None else [n for n, i in enumerate(task.instances) if (task.name, i.id) not in suspects]
        )
        clean_n = None if suspects is None else len(clean)
        for name, metric in METRICS.items():
            values = [100 * metric(answer, right) for answer, right in zip(answers, references, strict=True)]
            # The resampled instances are the same for every system of a task, so that intervals can be compared.
            seed = row_seed(self.config.seed, task.name, "bootstrap")
            resamples = self.config.scores.bootstrap
            low, high = bootstrap_interval(values, resamples, seed) if resamples else (None, None)
            yield {
                "metric": name, "value": sum(values) / len(values), "low": low, "high": high,
                "clean_value": sum(values[n] for n in clean) / len(clean) if clean else None, "clean_n": clean_n,
            }  # fmt: skip
        if task.labels:
            cleaned = macro_f1([answers[n] for n in clean], [references[n] for n in clean]) if clean else None
            yield {
                "metric": "macro_f1", "value": 100 * macro_f1(answers, references),
                "clean_value": None if cleaned is None else 100 * cleaned, "clean_n": clean_n,
            }  # fmt: skip
