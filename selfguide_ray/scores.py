"""Predictions become scores: a task, a system, a metric (0-100), with a 95 % bootstrap interval."""

from collections.abc import Iterator
from statistics import fmean
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
    """tasks, predictions, trainset → scores. Every instance counts, answered or not; a task without any has no scores.

    Each score is told a second time without the suspects: instances that a learned pair, or an example, overlaps.
    """

    writes: ClassVar = "scores"

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config = config
        self.reads: dict[str, tuple[str, ...] | None] = {"tasks": None, "predictions": None}
        looked = config.trainset.decontaminate != "off" and config.predictions.instances == "held_out"
        if looked and config.predictions.tuned:
            self.reads["trainset"] = ("task", "system", "drop_reason", "suspects")
        self.of_method = reference.scoring(config, engine)

    def __call__(self, tasks: pa.Table, predictions: pa.Table, trainset: pa.Table | None = None) -> pa.Table:
        """The rows of `scores` for a shard."""
        suspects = self._suspects(trainset) if trainset is not None and "trainset" in self.reads else None
        answers = {(row["task"], row["system"], row["id"]): row["prediction"] for row in predictions.to_pylist()}
        rows = [
            {"task": task.name, "category": task.category, "system": system, "n": len(task.instances)} | score
            for task in evaluated(tasks_of(tasks), self.config.predictions.instances)
            if task.instances
            for system in self.config.predictions.systems
            for score in self._scores(
                task, system, [answers[task.name, system, i.id] for i in task.instances], suspects
            )
        ]
        self._pair(rows)
        return pa.Table.from_pylist(rows, schema=TABLES["scores"])

    def _suspects(self, trainset: pa.Table) -> set[tuple[str, str]]:
        """(task, instance) that a pair alive and learned, or any example, overlaps.

        Examples count whatever was learned: prompted systems see them.
        """
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
        places = [n for n, i in enumerate(task.instances) if (task.name, i.id) not in (suspects or ())]
        looked = {} if suspects is None else {"clean_n": len(places)}
        columns = {
            name: [100 * metric(answer, right) for answer, right in zip(answers, references, strict=True)]
            for name, metric in METRICS.items()
        }
        for name, values in columns.items():
            clean = {"clean_value": fmean(values[n] for n in places)} if looked and places else {}
            yield {"metric": name} | self._mean(task, values) | looked | clean
        for name, values in self.of_method(task, answers).items():
            yield {"metric": name} | self._mean(task, values)
        if task.labels:
            clean = {}
            if looked and places:
                clean["clean_value"] = 100 * macro_f1([answers[n] for n in places], [references[n] for n in places])
            yield {"metric": "macro_f1", "value": 100 * macro_f1(answers, references)} | looked | clean

    def _mean(self, task: Task, values: list[float]) -> dict[str, Any]:
        """A metric's mean over the instances with its interval, and the values themselves."""
        # The resampled instances are the same for every system of a task, so that intervals can be compared.
        seed = row_seed(self.config.seed, task.name, "bootstrap")
        resamples = self.config.scores.bootstrap
        low, high = bootstrap_interval(values, resamples, seed) if resamples else (None, None)
        return {"n": len(values), "value": sum(values) / len(values), "low": low, "high": high, "values": values}

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
