"""Answers become training pairs: votes, label clean-up, filters, balance (spec §1.4, §1.5). No model speaks here.

All thresholds on answers live in this section, so changing one makes this table and later ones anew, and generates nothing.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray.config import Config
from selfguide_ray.config import Trainset as Settings
from selfguide_ray.contamination import HeldOut
from selfguide_ray.engine import Engine
from selfguide_ray.filters import Rules, Verdict, find_label, judge, length_bounds, noise_pattern
from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Example, Task, row_seed, tasks_of
from selfguide_ray.similarity import nearest_earlier


class Trainset:
    """tasks, outputs → trainset."""

    writes: ClassVar = "trainset"
    # Held-out instances are read for one purpose: to find, and never to make, pairs that overlap them.
    reads: ClassVar = {"tasks": None, "outputs": None}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, limit = config, config.student.max_prompt_tokens
        self.prompts = Prompts.within(engine.tokenizer, limit, engine.context, config.outputs.max_new_tokens)
        self.longest = min(config.trainset.max_tokens, engine.context)

    def __call__(self, tasks: pa.Table, outputs: pa.Table) -> pa.Table:
        """The rows of `trainset` for a shard: one for each row of `outputs`, and one for each example of a task."""
        rows = []
        answered = outputs.to_pylist()
        for task in tasks_of(tasks):
            votes = Votes(task, self.config.trainset)
            mine = [self._pair(task, row, votes) for row in answered if row["task"] == task.name]
            examples = [self._example(task, index) for index in range(len(task.examples))]
            sift(task, mine, examples, self.config.trainset)
            if task.labels and self.config.trainset.balance:
                balance(mine, row_seed(self.config.seed, task.name, "balance"))
            rows += [row | {"system": "selfguide"} for row in mine]
            rows += [row | {"system": "few_shot_tuned"} for row in examples]
        return pa.Table.from_pylist(rows, schema=TABLES["trainset"])

    def _pair(self, task: Task, row: dict[str, Any], votes: "Votes") -> dict[str, Any]:
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
            pair.update(vars(Verdict("too_long", float(len(prompt.ids)), f"{self.prompts.max_tokens} tokens")))
        elif tokens > self.longest:
            pair.update(vars(Verdict("too_long", float(tokens), f"{self.longest} tokens")))
        return pair


def elect(
    task: Task, candidates: list[dict[str, Any]], settings: Settings, votes: "Votes | None" = None
) -> tuple[str | None, dict[str, Any]]:
    """The answer that wins the vote, and the columns that tell how; None and a drop reason if none does.

    The `keep` likeliest candidates pass the filters and vote (statements 13-16): most votes, then shortest, then first.
    `votes` are the task's, for all its rows.
    """
    votes = Votes(task, settings) if votes is None else votes
    improbable = [-candidate["logprob"] for candidate in candidates]
    likeliest = sorted(range(len(candidates)), key=improbable.__getitem__)[: settings.keep]  # of equals the first
    verdicts: list[str | None] = ["not_kept"] * len(candidates)
    by_probability = settings.vote_weight == "probability"
    ballots: list[str] = []
    weights: dict[str, float] = {}
    for index in sorted(likeliest):
        vote = votes[candidates[index]["output"]]
        if isinstance(vote, Verdict):
            verdicts[index] = vote.drop_reason
        else:
            verdicts[index] = None
            ballots.append(vote)
            weights[vote] = weights.get(vote, 0) + (_probability(candidates[index]) if by_probability else 1)
    told: dict[str, Any] = {"verdicts": verdicts, "voters": len(ballots), "votes": 0}
    if not ballots:
        # Nobody votes: the commonest reason among the candidates is the row's.
        reasons = Counter(verdict for verdict in verdicts if verdict != "not_kept")
        return None, told | vars(Verdict(reasons.most_common(1)[0][0] or "empty", 0.0, "at least 1 vote"))
    winner = min(weights, key=lambda text: (-weights[text], len(text)))  # of equals the first that was cast
    told["votes"] = ballots.count(winner)
    if settings.vote_among == "survivors":
        whole = sum(weights.values())
    else:
        whole = sum(_probability(candidates[index]) for index in likeliest) if by_probability else len(likeliest)
    share = weights[winner] / whole if whole else 0.0
    if share < settings.min_frequency:
        return None, told | vars(Verdict("no_majority", share, f"at least {settings.min_frequency:g} of the votes"))
    return winner, told


def _probability(candidate: dict[str, Any]) -> float:
    """What a candidate's vote weighs; 1 where the student was not held to labels."""
    return 1 if candidate["probability"] is None else candidate["probability"]


class Votes(dict[str, str | Verdict]):
    """What `cast_vote` says of each answer to a task: students repeat themselves, and equal answers are judged once."""

    def __init__(self, task: Task, settings: Settings) -> None:
        self.task, self.settings, self.rules = task, settings, answer_rules(task, settings)

    def __missing__(self, text: str) -> str | Verdict:
        vote = self[text] = cast_vote(text, self.task, self.rules, self.settings)
        return vote


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


def sift(task: Task, pairs: list[dict[str, Any]], examples: list[dict[str, Any]], settings: Settings) -> None:
    """Mark the surviving pairs that overlap held-out instances, are too like others, or are of extreme length.

    In this order, so that no pair is dropped for being like one that overlaps. Examples are marked and never dropped.
    """
    if settings.decontaminate != "off":
        held_out = HeldOut(task, settings.overlap_words, settings.overlap_rouge)
        looked_at = [*_alive(pairs), *examples]
        texts = [row["input"] for row in looked_at]
        dropping = len(texts) - len(examples) if settings.decontaminate == "drop" else 0
        for place, found in enumerate(held_out.overlaps(texts, [rouge_tokens(text) for text in texts])):
            looked_at[place].update(suspects=list(found.suspects) if found else [], overlap=found and found.kind)
            if found and place < dropping:
                looked_at[place].update(vars(found.verdict))
    if settings.novelty is not None:
        keep_novel(task, pairs, settings.novelty)
    if settings.middle_lengths is not None:
        keep_middle(pairs, settings.middle_lengths)


def _alive(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("drop_reason") is None]


def keep_novel(task: Task, rows: list[dict[str, Any]], most: float) -> None:
    """Mark pairs `too_similar` whose input is too like an example's, or that of a surviving pair before."""
    alive = _alive(rows)
    ids = [*(f"example{index}" for index in range(len(task.examples))), *(row["id"] for row in alive)]
    shown = [rouge_tokens(example.input) for example in task.examples]
    found = nearest_earlier([rouge_tokens(row["input"]) for row in alive], most, shown)
    for row, neighbour in zip(alive, found, strict=True):
        if neighbour is not None:
            place, value = neighbour
            row.update(vars(Verdict("too_similar", value, f"ROUGE-L up to {most:g}", ids[place])))


def keep_middle(rows: list[dict[str, Any]], share: float) -> None:
    """Mark the surviving pairs with the shortest and the longest inputs `not_middle` (spec §7, F43).

    As many at either end; of equally long ones the earlier rows count as shorter.
    """
    alive = sorted(_alive(rows), key=lambda row: len(row["input"]))
    cut = int(len(alive) * (1 - share) / 2 + 1e-9)  # a tenth of ten is one, whatever floats make of it
    kept = alive[cut : len(alive) - cut]
    for row in alive[:cut] + alive[len(alive) - cut :]:
        bound = f"the middle {share:g}, {len(kept[0]['input'])} to {len(kept[-1]['input'])} characters"
        row.update(vars(Verdict("not_middle", float(len(row["input"])), bound)))


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
