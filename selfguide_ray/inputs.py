"""The heart of the paper: the student invents inputs, in rounds that feed on their own survivors (spec §1.1, §1.2)."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.engine import Completion, Engine, Request, SamplingParams, share_prefix
from selfguide_ray.engine import verdict as engine_verdict
from selfguide_ray.filters import Rules, Seen, Verdict, clean, judge, length_bounds, noise_pattern, prefix_pattern
from selfguide_ray.prompts import Prompt, Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, TASK_COLUMNS, Task, row_seed, tasks_of
from selfguide_ray.verification import Verification


class Inputs:
    """tasks → inputs. All tasks of a shard move forward together, so the engine always sees many prompts."""

    writes: ClassVar = "inputs"
    reads: ClassVar = {"tasks": TASK_COLUMNS}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, self.engine = config, engine
        limit = config.student.max_prompt_tokens
        prompts = reference.PROMPTS[config.method]
        self.prompts = prompts.within(engine.tokenizer, limit, engine.context, config.inputs.max_new_tokens)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """The rows of `inputs` for a shard's tasks: every text that was generated, with its verdict."""
        pools = [Pool(task, self.config, self.prompts) for task in tasks_of(tasks)]
        for number in itertools.count():
            at_work = [pool for pool in pools if pool.goes_on(number)]
            if not at_work:
                break
            asked = [pool.ask(number) for pool in at_work]
            written = self._generate(asked)
            checks = [pool.check(texts) for pool, texts in zip(at_work, written, strict=True)]
            for pool, texts, answers in zip(at_work, written, self._generate(checks), strict=True):
                pool.keep(texts, answers)
        return pa.Table.from_pylist([row for pool in pools for row in pool.rows], schema=TABLES["inputs"])

    def _generate(self, asked: list[list[Request]]) -> list[list[Completion]]:
        """The completions of each task's requests, out of one call of the engine."""
        requests = [request for mine in asked for request in mine]
        completions = iter(self.engine.generate(requests) if requests else ())
        return [[next(completions)[0] for _ in mine] for mine in asked]


class Pool:
    """One task's inputs: asks for a round of new ones, judges them, keeps the survivors.

    A round is `ask`, `check` if the student is to verify its texts, and `keep`.
    """

    def __init__(self, task: Task, config: Config, prompts: Prompts) -> None:
        settings = config.inputs
        self.task, self.settings, self.prompts, self.seed = task, settings, prompts, config.seed
        self.rounds, self.least = settings.rounds.of(task.labels), settings.least.of(task.labels)
        self.gold = [example.input for example in task.examples]
        self.params = SamplingParams(
            temperature=settings.temperature.of(task.labels),
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            stops=prompts.item_stops,
        )
        shown = [clean(text) for text in self.gold]
        bounds = length_bounds(shown, settings.length_sigmas, settings.length_slack)
        words = (*settings.noise_words, *task.noise_words)
        self.rules = Rules(
            bounds if settings.length_filter else None,
            noise_pattern(words, shown),
            prefix_pattern(settings.prefixes, shown),
        )
        self.seen = Seen((f"example{i}", text) for i, text in enumerate(self.gold))
        self.clean, self.judge = clean, judge
        if config.method == "reference":
            self.clean, self.judge, self.rules, self.seen = reference.input_filters(task, settings)
        verify = settings.verify
        self.verification = None if verify is None else Verification(task, prompts, verify, config.seed)
        self.accepted: list[str] = []
        self.survivors: Counter[str | None] = Counter()  # by the label that was asked for
        self.rows: list[dict[str, Any]] = []
        self.pending: list[dict[str, Any]] = []

    def goes_on(self, number: int) -> bool:
        """Whether there is a round of this number: an ordinary one, or an extra one while survivors lack (B14)."""
        return number < self.rounds or (number < self.rounds + self.settings.extra_rounds and bool(self.lacking()))

    def lacking(self) -> list[str | None]:
        """The labels with fewer survivors than wanted; of a generation task, None if the task has fewer."""
        return [label for label in self.task.labels or (None,) if self.survivors[label] < self.least]

    def ask(self, number: int) -> list[Request]:
        """The round's requests; all see the pool as it was before the round (statement 5)."""
        self.pending, drawn = [], []
        labels = self.lacking() if number >= self.rounds else self.task.labels
        for index in range(self.settings.prompts_per_round):
            row = {"task": self.task.name, "id": f"r{number:03d}i{index:03d}", "round": number, "label": None}
            rng = random.Random(row_seed(self.seed, self.task.name, "prompt", number, index))
            row["label"] = rng.choice(labels) if self.task.labels else None
            prompt = self._draw(rng, row["label"])
            if prompt.too_long:
                bound = f"{self.prompts.max_tokens} tokens"
                self._record(row, "", "", Verdict("too_long", float(len(prompt.ids)), bound))
            else:
                self.pending.append(row)
                drawn.append(prompt.ids)
        return [
            Request(prefix, suffix, self.params, row_seed(self.seed, self.task.name, "input", row["id"]))
            for row, (prefix, suffix) in zip(self.pending, share_prefix(drawn), strict=True)
        ]

    def _draw(self, rng: random.Random, label: str | None) -> Prompt:
        """A prompt with the examples' inputs in random order and 1 to max_earlier random survivors (statements 2-4)."""
        gold = rng.sample(self.gold, len(self.gold))
        most = min(len(self.accepted), self.settings.max_earlier)
        earlier = rng.sample(self.accepted, rng.randint(1, most)) if most else []
        return self.prompts.writing(self.task, gold, earlier, label)

    def check(self, completions: Sequence[Completion]) -> list[Request]:
        """The questions about those of the round's texts that nothing else speaks against; none unless they are verified."""
        if self.verification is None:
            return []
        return self.verification.ask(self.clean(c.text) for c in completions if self._judge(c) is None)

    def keep(self, completions: Sequence[Completion], answers: Sequence[Completion] = ()) -> None:
        """Judge the round's texts in order, given the answers to `check`; survivors join the pool."""
        if self.verification is not None:
            self.verification.hear(answers)
        for row, completion in zip(self.pending, completions, strict=True):
            text, verdict = self.clean(completion.text), self._judge(completion)
            if verdict is None and self.verification is not None:
                verdict = self.verification.judge(text)
            row["perplexity"] = perplexity(completion)
            self._record(row, text, completion.finish_reason, verdict)
            if verdict is None:
                self.seen.add(row["id"], text)
                self.accepted.append(text.strip())
                self.survivors[row["label"]] += 1

    def _judge(self, completion: Completion) -> Verdict | None:
        """The verdict that needs no further question: by the engine, the rules, as a duplicate, or by the perplexity."""
        if (reason := engine_verdict([completion])) is not None:
            return Verdict(reason)
        text, measured, bound = self.clean(completion.text), perplexity(completion), self.settings.max_perplexity
        verdict = self.judge(text, self.rules) or self.seen.judge(text)
        if verdict is None and bound is not None and measured is not None and measured > bound:
            return Verdict("incoherent", measured, f"perplexity of at most {bound:g}")
        return verdict

    def _record(self, row: dict[str, Any], text: str, finish_reason: str, verdict: Verdict | None) -> None:
        found = asdict(verdict) if verdict else {}
        self.rows.append({**row, "input": text.strip(), "finish_reason": finish_reason, **found})


def perplexity(completion: Completion) -> float | None:
    """exp of minus the mean log-probability of the generated tokens, EOS included; None if there are none."""
    if not completion.generated_tokens:
        return None
    return math.exp(min(700.0, -completion.logprob / completion.generated_tokens))  # e^710 is more than a float holds
