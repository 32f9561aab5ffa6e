"""Answers become training pairs: votes, label clean-up, filters, balance (spec §1.4, §1.5). No model speaks here.

All thresholds on answers live in this section, so changing one makes this table and later ones anew, and generates nothing.
"""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.baselines import taught
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine
from selfguide_ray.filters import Verdict
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, TASK_COLUMNS, Example, Task, row_seed, tasks_of
from selfguide_ray.sifting import held_out, mark, sift
from selfguide_ray.votes import Votes, elect


class Trainset:
    """tasks, outputs → trainset."""

    writes: ClassVar = "trainset"
    # Held-out instances are read for one purpose: to find, and never to make, pairs that overlap them.
    reads: ClassVar = {"tasks": (*TASK_COLUMNS, "instances", "gold"), "outputs": None}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, limit = config, config.student.max_prompt_tokens
        self.prompts = reference.PROMPTS[config.method].within(
            engine.tokenizer, limit, engine.context, config.outputs.max_new_tokens
        )
        self.rules = reference.RULES[config.method]
        self.longest = min(config.trainset.max_tokens, engine.context)

    def __call__(self, tasks: pa.Table, outputs: pa.Table) -> pa.Table:
        """The rows of `trainset` for a shard: one for each row of `outputs`, and those of the tuned baselines."""
        rows = []
        answered = outputs.to_pylist()
        for task in tasks_of(tasks):
            settings = self.config.trainset
            votes, apart = Votes(task, settings, self.rules), held_out(task, settings)
            theirs = [row for row in answered if row["task"] == task.name]
            mine = [self._pair(task, row, votes) for row in theirs]
            sift(task, mine, apart, settings)
            if task.labels and settings.balance:
                balance(mine, row_seed(self.config.seed, task.name, "balance"))
            rows += [row | {"system": "selfguide"} for row in mine]
            for system in self.config.predictions.taught:
                learned = [
                    self._rendered(
                        {"task": task.name, "system": system, "id": one.id, "input": one.input},
                        task,
                        one.output,
                        one.shown,
                    )
                    for one in taught(system, task, mine, theirs, self.config)
                ]
                mark(learned, apart)
                rows += learned
        return pa.Table.from_pylist(rows, schema=TABLES["trainset"])

    def _pair(self, task: Task, row: dict[str, Any], votes: Votes) -> dict[str, Any]:
        """One input with its elected answer, rendered as the model will see it."""
        pair = {key: row[key] for key in ("task", "id", "label", "input", "drop_reason")}
        if row["drop_reason"] is not None:
            return pair
        output, election = elect(task, row["candidates"], self.config.trainset, votes)
        pair.update(election)
        if task.labels and self.config.trainset.answer != "voted":
            output = self._held_to_wanted(pair, output)
        return pair if output is None else self._rendered(pair, task, output, task.examples)

    def _held_to_wanted(self, pair: dict[str, Any], output: str | None) -> str | None:
        """The label that the input was asked for; None, with a verdict, if the vote has to agree and does not."""
        if self.config.trainset.answer == "wanted":
            pair.update(dict.fromkeys(("drop_reason", "measured", "bound", "neighbour")))
            return pair["label"]
        if output is not None and output != pair["label"]:
            pair.update(vars(Verdict("disagreed", None, f"the label asked for, {pair['label']}")), output=output)
            return None
        return output

    def _rendered(self, pair: dict[str, Any], task: Task, output: str, shown: Sequence[Example]) -> dict[str, Any]:
        """The pair with its prompt and completion, and its verdict if they are too long."""
        prompt = self.prompts.answering(task, pair["input"], shown)
        completion = self.prompts.completion(output)
        tokens = len(prompt.ids) + len(self.prompts.tokenizer.encode(completion))
        pair.update(output=output, prompt=prompt.text, completion=completion, tokens=tokens)
        if prompt.too_long:
            pair.update(vars(Verdict("too_long", float(len(prompt.ids)), f"{self.prompts.max_tokens} tokens")))
        elif tokens > self.longest:
            pair.update(vars(Verdict("too_long", float(tokens), f"{self.longest} tokens")))
        return pair


def balance(rows: list[dict[str, Any]], seed: int) -> None:
    """Mark pairs of the commoner labels `imbalanced`, at random, until each present label has as many as the rarest.

    A label without any pair is not balanced against; the report names it (decision on B14, statement 17).
    """
    alive: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("drop_reason") is None:
            alive.setdefault(row["output"], []).append(row)
    rarest = min(map(len, alive.values()), default=0)
    rng = random.Random(seed)
    for label in sorted(alive):
        for row in rng.sample(alive[label], len(alive[label]) - rarest):
            row.update(vars(Verdict("imbalanced", float(len(alive[label])), f"{rarest} of each label")))
