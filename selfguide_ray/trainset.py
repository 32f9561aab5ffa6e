"""Answers become training pairs: votes, label clean-up, filters, balance (spec §1.4, §1.5). No model speaks here.

All thresholds on answers live in this section, so changing one makes this table and later ones anew, and generates nothing.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.config import Trainset as Settings
from selfguide_ray.engine import Engine
from selfguide_ray.filters import Rules, Verdict, find_label, judge, length_bounds, noise_pattern
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, TASK_COLUMNS, Example, Task, row_seed, tasks_of


class Trainset:
    """tasks, outputs → trainset."""

    writes: ClassVar = "trainset"
    reads: ClassVar = {"tasks": TASK_COLUMNS, "outputs": None}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, limit = config, config.student.max_prompt_tokens
        self.prompts = reference.PROMPTS[config.method].within(
            engine.tokenizer, limit, engine.context, config.outputs.max_new_tokens
        )
        self.rules = {"selfguide": answer_rules, "reference": reference.answer_rules}[config.method]
        self.longest = min(config.trainset.max_tokens, engine.context)

    def __call__(self, tasks: pa.Table, outputs: pa.Table) -> pa.Table:
        """The rows of `trainset` for a shard: one for each row of `outputs`, and one for each example of a task."""
        rows = []
        answered = outputs.to_pylist()
        for task in tasks_of(tasks):
            mine = [self._pair(task, row) for row in answered if row["task"] == task.name]
            if task.labels and self.config.trainset.balance:
                balance(mine, row_seed(self.config.seed, task.name, "balance"))
            rows += [row | {"system": "selfguide"} for row in mine]
            rows += [self._example(task, index) | {"system": "few_shot_tuned"} for index in range(len(task.examples))]
        return pa.Table.from_pylist(rows, schema=TABLES["trainset"])

    def _pair(self, task: Task, row: dict[str, Any]) -> dict[str, Any]:
        """One input with its elected answer, rendered as the model will see it."""
        pair = {key: row[key] for key in ("task", "id", "label", "input", "drop_reason")}
        if row["drop_reason"] is not None:
            return pair
        output, election = elect(task, row["candidates"], self.config.trainset, self.rules)
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
            pair.update(asdict(Verdict("disagreed", None, f"the label asked for, {pair['label']}")), output=output)
            return None
        return output

    def _example(self, task: Task, index: int) -> dict[str, Any]:
        """One of the task's examples as a pair; its prompt shows the others, so that the answer is not in it."""
        example = task.examples[index]
        pair = {"task": task.name, "id": f"example{index}", "input": example.input.strip()}
        return self._rendered(pair, task, example.output.strip(), task.examples[:index] + task.examples[index + 1 :])

    def _rendered(self, pair: dict[str, Any], task: Task, output: str, shown: Sequence[Example]) -> dict[str, Any]:
        """The pair with its prompt and completion, and its verdict if they are too long."""
        prompt = self.prompts.answering(task, pair["input"], shown)
        completion = self.prompts.completion(output)
        tokens = len(prompt.ids) + len(self.prompts.tokenizer.encode(completion))
        pair.update(output=output, prompt=prompt.text, completion=completion, tokens=tokens)
        if prompt.too_long:
            pair.update(asdict(Verdict("too_long", float(len(prompt.ids)), f"{self.prompts.max_tokens} tokens")))
        elif tokens > self.longest:
            pair.update(asdict(Verdict("too_long", float(tokens), f"{self.longest} tokens")))
        return pair


def elect(
    task: Task,
    candidates: list[dict[str, Any]],
    settings: Settings,
    make_rules: Callable[[Task, Settings], Rules] | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """The answer that wins the vote, and the columns that tell how; None and a drop reason if none does.

    The `keep` likeliest candidates pass the filters and vote (statements 13-16): most votes, then shortest, then first.
    """
    likeliest = sorted(range(len(candidates)), key=lambda i: (-candidates[i]["logprob"], i))[: settings.keep]
    rules = (make_rules or answer_rules)(task, settings)

    def weight(candidate: dict[str, Any]) -> float:
        known = settings.vote_weight == "probability" and candidate["probability"] is not None
        return candidate["probability"] if known else 1

    verdicts: list[str | None] = ["not_kept"] * len(candidates)
    ballots: list[str] = []
    weights: Counter[str] = Counter()
    for index in sorted(likeliest):
        vote = cast_vote(candidates[index]["output"], task, rules, settings)
        verdicts[index] = vote.drop_reason if isinstance(vote, Verdict) else None
        if not isinstance(vote, Verdict):
            ballots.append(vote)
            weights[vote] += weight(candidates[index])
    told: dict[str, Any] = {"verdicts": verdicts, "voters": len(ballots), "votes": 0}
    if not ballots:
        # Nobody votes: the commonest reason among the candidates is the row's.
        reasons = Counter(verdict for verdict in verdicts if verdict != "not_kept")
        return None, told | asdict(Verdict(reasons.most_common(1)[0][0] or "empty", 0.0, "at least 1 vote"))
    winner = min(weights, key=lambda text: (-weights[text], len(text), ballots.index(text)))
    told["votes"] = ballots.count(winner)
    voting = weights.total() if settings.vote_among == "survivors" else sum(weight(candidates[i]) for i in likeliest)
    share = weights[winner] / voting if voting else 0.0
    if share < settings.min_frequency:
        return None, told | asdict(Verdict("no_majority", share, f"at least {settings.min_frequency:g} of the votes"))
    return winner, told


def answer_rules(task: Task, settings: Settings) -> Rules:
    """The filters' bounds for answers, from the examples' outputs."""
    shown = [example.output.strip() for example in task.examples]
    lengths = length_bounds(shown, settings.length_sigmas, settings.length_slack)
    wanted = settings.length_filter.of(task.labels)
    return Rules(
        lengths if wanted else None, noise_pattern((*settings.noise_words, *task.noise_words), [*shown, *task.labels])
    )


def cast_vote(text: str, task: Task, rules: Rules, settings: Settings) -> str | Verdict:
    """A candidate's vote, or why it has none."""
    text = text.strip()
    verdict = judge(text, rules)
    if verdict is not None or not task.labels:
        return verdict or text
    if settings.extract_labels:
        return find_label(text, task.labels)
    return text if text in task.labels else Verdict("no_label")


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
            row.update(asdict(Verdict("imbalanced", float(len(alive[label])), f"{rarest} of each label")))
