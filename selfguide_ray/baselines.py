"""What the systems that SELF-GUIDE is held against are shown, learn from and answer (spec §3, F40, F41, F45)."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from selfguide_ray.config import Config
from selfguide_ray.config import Trainset as Settings
from selfguide_ray.filters import Verdict
from selfguide_ray.schema import Example, Instance, Task, row_seed
from selfguide_ray.votes import Votes, elect, likeliest

# --- floors: no model


def majority(task: Task) -> str:
    """The commonest first reference of the task's instances; the first met wins a tie.

    It has seen them: an oracle that no constant answer beats.
    """
    return Counter(instance.references[0] for instance in task.instances).most_common(1)[0][0]


FLOORS: dict[str, Callable[[Task, Instance], str]] = {
    "copy": lambda task, instance: instance.input,
    "majority": lambda task, instance: majority(task),
}

# --- prompted: the examples that a system's prompt shows


def at_random(task: Task, seed: int) -> tuple[Example, ...]:
    """The examples with random labels; those of a generation task with each other's outputs (F41)."""
    rng = random.Random(row_seed(seed, task.name, "few_shot_random"))
    if task.labels:
        return tuple(replace(example, output=rng.choice(task.labels)) for example in task.examples)
    outputs = [example.output for example in task.examples]
    return tuple(replace(e, output=o) for e, o in zip(task.examples, outputs[1:] + outputs[:1], strict=True))


def shown(system: str, task: Task, pairs: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """The examples of a system's prompt. `pairs` are those that `self_icl` shows behind people's, as many as find room.

    What is tuned keeps the task's examples, as the paper's model does (spec §2).
    """
    if system == "zero_shot":
        return ()
    if system == "few_shot_random":
        return at_random(task, seed)
    return (*task.examples, *pairs) if system == "self_icl" else task.examples


# --- prompted, with several samples: how one answer is made of them


def first_survivor(task: Task, candidates: list[dict[str, Any]], settings: Settings, votes: Votes) -> str | None:
    """The likeliest answer that passes the filters, and for classification names a label (the reference's ICL + filters)."""
    cast = (votes[candidates[i]["output"]] for i in likeliest(candidates, settings))
    return next((vote for vote in cast if not isinstance(vote, Verdict)), None)


CHOICES: dict[str, Callable[[Task, list[dict[str, Any]], Settings, Votes], str | None]] = {
    "few_shot_vote": lambda *given: elect(*given)[0],  # the annotator itself
    "few_shot_filtered": first_survivor,
}

# --- tuned: the pairs that a system learns


class Pair(NamedTuple):
    """A pair to learn, and the examples that its prompt shows."""

    id: str
    input: str
    output: str
    shown: tuple[Example, ...]


class Material(NamedTuple):
    """What a task offers: its alive pairs of selfguide, and all rows of `outputs`."""

    task: Task
    pairs: list[dict[str, Any]]
    answered: list[dict[str, Any]]
    settings: Settings
    rng: random.Random


def from_examples(given: Material) -> list[Pair]:
    """Each of the examples; its prompt shows the others, so that the answer is not in it."""
    examples = given.task.examples
    return [
        Pair(f"example{i}", one.input.strip(), one.output.strip(), examples[:i] + examples[i + 1 :])
        for i, one in enumerate(examples)
    ]


def _learned(given: Material, rows: Sequence[dict[str, Any]]) -> list[Pair]:
    return [Pair(row["id"], row["input"], row["output"], given.task.examples) for row in rows]


def in_context(given: Material) -> list[Pair]:
    """As few of selfguide's pairs as a context holds, each label as often as the others."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in given.pairs:
        groups.setdefault(row["output"] if given.task.labels else "", []).append(row)
    each = max(1, given.settings.in_context // max(1, len(groups)))
    chosen = [row for name in sorted(groups) for row in given.rng.sample(groups[name], min(each, len(groups[name])))]
    given.rng.shuffle(chosen)
    return _learned(given, chosen)


def unfiltered(given: Material) -> list[Pair]:
    """As many pairs as selfguide has, of all inputs that were answered, each with its first sample as it came."""
    rows = [row | {"output": row["candidates"][0]["output"]} for row in given.answered if row["candidates"]]
    return _learned(given, given.rng.sample(rows, min(len(given.pairs), len(rows))))


def flipped(given: Material) -> list[Pair]:
    """Selfguide's pairs, a share of them with a wrong label; in a generation task with another pair's answer (F40)."""
    wrong = set(given.rng.sample(range(len(given.pairs)), round(given.settings.flipped * len(given.pairs))))
    rows = []
    for index, row in enumerate(given.pairs):
        others = given.task.labels or [other["output"] for other in given.pairs]
        choice = [other for other in dict.fromkeys(others) if other != row["output"]]
        rows.append(row | {"output": given.rng.choice(choice)} if index in wrong and choice else row)
    return _learned(given, rows)


def from_people(given: Material) -> list[Pair]:
    """Instances that people wrote and answered, tasks.gold of them: a ceiling."""
    return [Pair(i.id, i.input.strip(), i.references[0].strip(), given.task.examples) for i in given.task.gold]


TAUGHT: dict[str, Callable[[Material], list[Pair]]] = {
    "few_shot_tuned": from_examples,
    "self_icl_tuned": in_context,
    "unfiltered_tuned": unfiltered,
    "flipped_tuned": flipped,
    "gold_tuned": from_people,
}


def taught(
    system: str, task: Task, pairs: list[dict[str, Any]], answered: list[dict[str, Any]], config: Config
) -> list[Pair]:
    """What a tuned baseline learns. `pairs` are selfguide's rows of `trainset`, `answered` the task's rows of `outputs`."""
    alive = [row for row in pairs if row.get("drop_reason") is None]
    rng = random.Random(row_seed(config.seed, task.name, system))
    return TAUGHT[system](Material(task, alive, answered, config.trainset, rng))
