"""Predictions become scores: a task, a system, a metric (0-100), with a 95 % bootstrap interval."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine
from selfguide_ray.metrics import METRICS, bootstrap_interval, macro_f1, paired_bootstrap
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, evaluated, row_seed, tasks_of
from selfguide_ray.standings import learns


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
            for task in evaluated(tasks_of(tasks), self.config.predictions.instances)
            if task.instances
            for system in self.config.predictions.systems
            for score in self._scores(task, system, [answers[task.name, system, i.id] for i in task.instances])
        ]
        self._pair(rows)
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
            yield {"metric": name, "n": len(values), "value": mean, "low": low, "high": high, "values": values}
        if task.labels:
            yield {"metric": "macro_f1", "value": 100 * macro_f1(answers, references)}

    def _pair(self, rows: list[dict[str, Any]]) -> None:
        """Give each row `against`; its `values`, instance by instance, which no table keeps, are taken out."""
        values = {(r["task"], r["metric"], r["system"]): r.pop("values") for r in rows if "values" in r}
        for row in rows:
            task, metric, system = row["task"], row["metric"], row["system"]
            # macro-F1 has no values of instances, and so nothing to pair.
            ours = values.get((task, metric, system)) if learns(system) else None
            others = [name for name in self.config.predictions.systems if ours and not learns(name)]
            seed = row_seed(self.config.seed, task, "bootstrap")
            row["against"] = [
                {"system": name}
                | paired_bootstrap(ours, values[task, metric, name], self.config.scores.bootstrap, seed)._asdict()
                for name in others
            ]
