"""Every system answers the held-out instances of every task; nothing is left out (statement 24)."""

import contextlib
from dataclasses import replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from selfguide_ray import reference
from selfguide_ray.baselines import CHOICES, FLOORS, shown
from selfguide_ray.config import Config
from selfguide_ray.engine import Completion, Engine, Request, SamplingParams, share_prefix, verdict
from selfguide_ray.prompts import held_to_labels
from selfguide_ray.run import Run, model_of
from selfguide_ray.schema import TABLES, Example, Instance, Task, evaluated, row_seed, tasks_of
from selfguide_ray.student import facts
from selfguide_ray.tuned import weights
from selfguide_ray.votes import Votes, candidate


class Predictions:
    """tasks, models → predictions. Systems decode greedily from the annotator's own prompt, unless they choose of samples."""

    writes: ClassVar = "predictions"

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, self.run, self.engine = config, run, engine
        self.reads: dict[str, tuple[str, ...] | None] = {"tasks": None}
        if "self_icl" in config.predictions.systems:  # its prompts show pairs
            self.reads["trainset"] = ("task", "system", "input", "output", "drop_reason")
        self.student = facts(config.student)
        limit, new_tokens = config.student.max_prompt_tokens, config.outputs.max_new_tokens
        self.prompts = reference.PROMPTS[config.method].within(engine.tokenizer, limit, engine.context, new_tokens)
        self.annotation = reference.ANNOTATION[config.method].within(
            engine.tokenizer, limit, engine.context, new_tokens
        )
        self.said = reference.SAID[config.method]
        self.params = SamplingParams(max_new_tokens=new_tokens, stops=self.prompts.answer_stops)
        sampling = config.outputs
        self.sampled = replace(
            self.params,
            n=sampling.samples,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )

    def __call__(self, tasks: pa.Table, trainset: pa.Table | None = None) -> pa.Table:
        """The rows of `predictions` for a shard."""
        rows: list[dict[str, Any]] = []
        asked: list[tuple[Task, dict[str, Any]]] = []
        pairs = [] if trainset is None else _in_context(trainset)
        requests: list[Request] = []
        with contextlib.ExitStack() as stack:
            for task in evaluated(tasks_of(tasks), self.config.predictions.instances):
                mine = [Example(row["input"], row["output"]) for row in pairs if row["task"] == task.name]
                adapters = {
                    name: weights(self.run, model_of(task.name, name), self.student, stack)
                    for name in self.config.predictions.tuned
                }
                for system in self.config.predictions.systems:
                    theirs = [_row(task, instance, system) for instance in task.instances]
                    rows += theirs
                    if system in FLOORS:
                        for row, instance in zip(theirs, task.instances, strict=True):
                            row.update(prediction=FLOORS[system](task, instance), finish_reason="stop")
                    else:
                        examples = shown(system, task, mine, self.config.seed)
                        answered, wanted = self._ask(task, theirs, system, examples, adapters.get(system))
                        asked += [(task, row) for row in answered]
                        requests += wanted
            votes: dict[str, Votes] = {}
            for (task, row), completions in zip(asked, self.engine.generate(requests), strict=True):
                if row["system"] in CHOICES and task.name not in votes:
                    votes[task.name] = Votes(task, self.config.trainset, reference.RULES[self.config.method])
                if (reason := verdict(completions)) is not None:  # answered by nothing, which is wrong
                    row.update(prediction="", finish_reason=reason)
                    continue
                row.update(prediction=self._chosen(task, row["system"], completions, votes.get(task.name)))
                row.update(finish_reason=completions[0].finish_reason)
        return pa.Table.from_pylist(rows, schema=TABLES["predictions"])

    def _ask(
        self,
        task: Task,
        rows: list[dict[str, Any]],
        system: str,
        examples: tuple[Example, ...],
        adapter: str | None,
    ) -> tuple[list[dict[str, Any]], list[Request]]:
        """The rows that an engine answers and their requests; a prompt without room is answered by nothing, which is wrong."""
        renderer = self.annotation if system in CHOICES else self.prompts
        prompts = [renderer.answering(task, row["input"], examples) for row in rows]
        for row in rows:
            row.update(prediction="", finish_reason="too_long")
        asked = [(row, prompt.ids) for row, prompt in zip(rows, prompts, strict=True) if not prompt.too_long]
        answered = [row for row, _ in asked]
        split = share_prefix([ids for _, ids in asked])
        if system in CHOICES:  # samples like those of `outputs`, the same for both systems that choose of them
            params = held_to_labels(self.sampled, task, self.config.outputs.labels, self.prompts)
            seeds = [row_seed(self.config.seed, task.name, "sampled", row["id"]) for row in answered]
        else:
            params = held_to_labels(self.params, task, self.config.predictions.labels, self.prompts)
            seeds = [0] * len(answered)
        wanted = [Request(a, b, params, seed, adapter) for (a, b), seed in zip(split, seeds, strict=True)]
        return answered, wanted

    def _chosen(self, task: Task, system: str, completions: list[Completion], votes: Votes | None) -> str:
        """The answer of a system; nothing where no sample of several survives, which is wrong."""
        if system not in CHOICES:
            return self.said(completions[0].text)
        candidates = [candidate(completion) for completion in completions]
        return CHOICES[system](task, candidates, self.config.trainset, votes) or ""


def _in_context(trainset: pa.Table) -> list[dict[str, Any]]:
    """The pairs that `self_icl` shows; they are those that `self_icl_tuned` learns."""
    chosen = pc.and_(pc.equal(trainset["system"], "self_icl_tuned"), pc.is_null(trainset["drop_reason"]))
    return trainset.filter(chosen).to_pylist()


def _row(task: Task, instance: Instance, system: str) -> dict[str, Any]:
    return {
        "task": task.name,
        "id": instance.id,
        "system": system,
        "input": instance.input,
        "references": list(instance.references),
    }
