"""The vocabulary: a task and its parts, the Arrow schema of each table, and how a row's identity becomes its seed."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import pyarrow as pa

from selfguide_ray.errors import SelfGuideError


@dataclass(frozen=True)
class Example:
    """A demonstration: one input of the task with its right output."""

    input: str
    output: str


@dataclass(frozen=True)
class Instance:
    """A held-out item: an input and every output that counts as right (an empty one is legal)."""

    id: str
    input: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What is known of a task before the student speaks. No labels means a generation task."""

    name: str
    instruction: str
    examples: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    category: str = ""
    metric: str = "rouge_l"
    noise_words: tuple[str, ...] = ()
    instances: tuple[Instance, ...] = ()
    validation: tuple[Instance, ...] = ()  # set apart to choose settings by
    gold: tuple[Instance, ...] = ()  # set apart for gold fine-tuning to learn from
    languages: tuple[str, ...] = field(default=(), compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)


class Tokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    bos: str  # what the model expects at the start of plain text; "" for most
    eos: str
    special_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text become their ids, none is added."""

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Where `encode` sees special tokens in a text: from and to which character, in any order."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """The messages in the model's own chat format up to the assistant's header; None if it has no such format."""


ITEM = "ITEM:"  # stands before every item in both prompts, so a student may echo it

EXAMPLE = pa.struct([("input", pa.string()), ("output", pa.string())])
INSTANCE = pa.struct([("id", pa.string()), ("input", pa.string()), ("references", pa.list_(pa.string()))])
PEOPLES = ("instances", "validation", "gold")  # columns of `tasks` with what people wrote beyond the examples
# An answer; its probability is that of its label among the task's labels, where the student was held to them.
CANDIDATE = pa.struct(
    [
        ("output", pa.string()),
        ("logprob", pa.float64()),
        ("finish_reason", pa.string()),
        ("probability", pa.float64()),
    ]
)

# What a system that learns gains over another one, paired by held-out instance: points, 95 % interval, p-value.
GAIN = pa.struct(
    [
        ("system", pa.string()),
        ("gain", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("p", pa.float64()),
    ]
)

# What the filter that spoke first measured, the bound it held that against, and the id of the row it found too near.
VERDICT = [
    ("drop_reason", pa.string()),
    ("measured", pa.float64()),
    ("bound", pa.string()),
    ("neighbour", pa.string()),
]

TABLES: dict[str, pa.Schema] = {
    "tasks": pa.schema(
        [
            ("task", pa.string()),
            ("instruction", pa.string()),
            ("examples", pa.list_(EXAMPLE)),
            ("labels", pa.list_(pa.string())),
            ("category", pa.string()),
            ("metric", pa.string()),
            ("noise_words", pa.list_(pa.string())),
            *((name, pa.list_(INSTANCE)) for name in PEOPLES),
        ]
    ),
    "inputs": pa.schema(
        [
            ("task", pa.string()),
            ("id", pa.string()),
            ("round", pa.int32()),
            ("label", pa.string()),
            ("input", pa.string()),
            ("finish_reason", pa.string()),
            ("perplexity", pa.float64()),  # a token's, under the student as it wrote the text; null: nothing written
            *VERDICT,
        ]
    ),
    "outputs": pa.schema(
        [
            ("task", pa.string()),
            ("id", pa.string()),
            ("label", pa.string()),
            ("input", pa.string()),
            ("candidates", pa.list_(CANDIDATE)),
            ("drop_reason", pa.string()),
        ]
    ),
    "trainset": pa.schema(
        [
            ("task", pa.string()),
            ("system", pa.string()),  # whose training pair it is: selfguide's, or a tuned baseline's
            ("id", pa.string()),
            ("label", pa.string()),
            ("input", pa.string()),
            ("output", pa.string()),
            ("votes", pa.int32()),
            ("voters", pa.int32()),
            ("verdicts", pa.list_(pa.string())),  # one a candidate, in the order of `outputs`; null means it voted
            ("prompt", pa.string()),
            ("completion", pa.string()),
            ("tokens", pa.int32()),
            ("suspects", pa.list_(pa.string())),  # ids of the held-out instances it overlaps; null: not looked for
            ("overlap", pa.string()),  # with the strongest of them: exact, words or rouge_l
            *VERDICT,
        ]
    ),
    "predictions": pa.schema(
        [
            ("task", pa.string()),
            ("id", pa.string()),
            ("system", pa.string()),
            ("input", pa.string()),
            ("references", pa.list_(pa.string())),
            ("prediction", pa.string()),
            ("finish_reason", pa.string()),
        ]
    ),
    "scores": pa.schema(
        [
            ("task", pa.string()),
            ("category", pa.string()),
            ("system", pa.string()),
            ("metric", pa.string()),
            ("value", pa.float64()),  # 0-100
            ("n", pa.int32()),
            ("low", pa.float64()),  # 95 % bootstrap interval
            ("high", pa.float64()),
            ("against", pa.list_(GAIN)),  # of a system that learns, over each prompted system and floor
            ("clean_value", pa.float64()),  # without the instances that what was learned or shown overlaps
            ("clean_n", pa.int32()),  # those that are left; null: overlaps were not looked for
        ]
    ),
}

# What the stages that make training data may see of a task: never its held-out instances. (One exception: `trainset`
# reads their inputs to keep pairs apart from them.)
TASK_COLUMNS = tuple(name for name in TABLES["tasks"].names if name not in PEOPLES)

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def check_task_name(name: str) -> str:
    """The name itself, once it is safe as a file name (design, invariant 7)."""
    if not TASK_NAME.fullmatch(name):
        raise SelfGuideError(
            f"{name[:240]!r} cannot be a task's name.",
            "A task's name becomes a folder: up to 200 letters, digits, '.', '_' and '-', the first a letter or digit.",
            "Rename the task's file.",
        )
    return name


def row_seed(run_seed: int, *identity: str | int) -> int:
    """63 bits that depend on what a row is and on nothing else: not on its batch, its actor or its attempt."""
    text = json.dumps([run_seed, *identity], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def evaluated(tasks: Iterable[Task], instances: str) -> list[Task]:
    """The tasks with what systems are judged by as their `instances`: those `held_out`, or those for `validation`."""
    return [replace(task, instances=task.validation) if instances == "validation" else task for task in tasks]


def task_rows(tasks: Iterable[Task]) -> pa.Table:
    """Tasks as rows of the table `tasks`."""
    rows = [
        {
            "task": task.name,
            "instruction": task.instruction,
            "examples": [vars(example) for example in task.examples],
            "labels": list(task.labels),
            "category": task.category,
            "metric": task.metric,
            "noise_words": list(task.noise_words),
            **{name: [vars(i) | {"references": list(i.references)} for i in getattr(task, name)] for name in PEOPLES},
        }
        for task in tasks
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["tasks"])


def tasks_of(table: pa.Table) -> list[Task]:
    """Rows of `tasks` as tasks; read without the columns of PEOPLES, a task has nothing there."""
    return [
        Task(
            name=row["task"],
            instruction=row["instruction"],
            examples=tuple(Example(**example) for example in row["examples"]),
            labels=tuple(row["labels"]),
            category=row["category"],
            metric=row["metric"],
            noise_words=tuple(row["noise_words"]),
            **{
                name: tuple(Instance(i["id"], i["input"], tuple(i["references"])) for i in row.get(name, ()))
                for name in PEOPLES
            },
        )
        for row in table.to_pylist()
    ]
