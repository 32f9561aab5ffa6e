"""The student answers its own inputs: several samples of the few-shot prompt for each (spec §1.3)."""

import contextlib
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine, Request, SamplingParams, share_prefix, verdict
from selfguide_ray.prompts import held_to_labels
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, TASK_COLUMNS, Task, row_seed, tasks_of
from selfguide_ray.student import facts
from selfguide_ray.tuned import weights
from selfguide_ray.votes import candidate


class Outputs:
    """tasks, inputs → outputs: one row for each accepted input, with all its answers. `trainset` judges them."""

    writes: ClassVar = "outputs"
    reads: ClassVar = {"tasks": TASK_COLUMNS, "inputs": ("task", "id", "label", "input", "drop_reason")}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, self.engine = config, engine
        guide = config.outputs.guided_by
        self.guide, self.student = (Run(guide), facts(config.student)) if guide is not None else (None, None)
        settings, limit = config.outputs, config.student.max_prompt_tokens
        self.prompts = reference.ANNOTATION[config.method].within(
            engine.tokenizer, limit, engine.context, settings.max_new_tokens
        )
        self.params = SamplingParams(
            n=settings.samples,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            stops=self.prompts.answer_stops,
        )

    def __call__(self, tasks: pa.Table, inputs: pa.Table) -> pa.Table:
        """The rows of `outputs` for a shard: the answers of all its tasks come out of one call of the engine."""
        alive = inputs.filter(pc.is_null(inputs["drop_reason"])).drop_columns("drop_reason").to_pylist()
        rows: list[dict[str, Any]] = []
        requests: list[Request] = []
        with contextlib.ExitStack() as stack:
            for task in tasks_of(tasks):
                mine = [row for row in alive if row["task"] == task.name]
                rows += mine
                guide = weights(self.guide, task.name, self.student, stack) if self.guide is not None else None
                requests += self._ask(task, mine, guide)
            completions = iter(self.engine.generate(requests))
        for row in rows:
            if "drop_reason" not in row:
                answers = next(completions)
                row["drop_reason"] = verdict(answers)
                row["candidates"] = [] if row["drop_reason"] else [candidate(completion) for completion in answers]
        return pa.Table.from_pylist(rows, schema=TABLES["outputs"])

    def _ask(self, task: Task, rows: list[dict[str, Any]], guide: str | None) -> list[Request]:
        """The annotation requests of a task's rows; a row whose prompt finds no room gets its verdict instead."""
        prompts = [self.prompts.answering(task, row["input"]) for row in rows]
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt.too_long:
                row.update(drop_reason="too_long", candidates=[])
        params = held_to_labels(self.params, task, self.config.outputs.labels, self.prompts)
        asked = [(row, prompt.ids) for row, prompt in zip(rows, prompts, strict=True) if not prompt.too_long]
        return [
            Request(prefix, suffix, params, row_seed(self.config.seed, task.name, "output", row["id"]), guide)
            for (row, _), (prefix, suffix) in zip(asked, share_prefix([ids for _, ids in asked]), strict=True)
        ]
