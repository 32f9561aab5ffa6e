"""The vocabulary: a task and its parts, the Arrow schema of each table, and how a row's identity becomes its seed."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
    languages: tuple[str, ...] = field(default=(), compare=False)
    sources: tuple[str, ...] = field(default=(), compare=False)


class Tokenizer(Protocol):
    """What rendering needs of a tokenizer."""

    bos: str  # what the model expects at the start of plain text; "" for most
    eos: str
    special_tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens written in the text become their ids, none is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """The messages in the model's own chat format up to the assistant's header; None if it has no such format."""


ITEM = "ITEM:"  # stands before every item in both prompts, so a student may echo it

EXAMPLE = pa.struct([("input", pa.string()), ("output", pa.string())])
INSTANCE = pa.struct([("id", pa.string()), ("input", pa.string()), ("references", pa.list_(pa.string()))])
# An answer; its probability is that of its label among the task's labels, where the student was held to them.
CANDIDATE = pa.struct(
    [
        ("output", pa.string()),
        ("logprob", pa.float64()),
        ("finish_reason", pa.string()),
        ("probability", pa.float64()),
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
            ("instances", pa.list_(INSTANCE)),
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
            ("clean_value", pa.float64()),  # without the instances that what was learned or shown overlaps
            ("clean_n", pa.int32()),  # those that are left; null: overlaps were not looked for
        ]
    ),
}

# What the stages that make training data may see of a task: never its held-out instances. (One exception: `trainset`
# reads their inputs to keep pairs apart from them.)
TASK_COLUMNS = tuple(name for name in TABLES["tasks"].names if name != "instances")

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def check_task_name(name: str) -> str:
    """The name itself, once it is safe as a file name (design, invariant 7)."""
    if not TASK_NAME.fullmatch(name):
        raise SelfGuideError(
            f"{name!r} cannot be a task's name.",
            "A task's name becomes a folder: up to 200 letters, digits, '.', '_' and '-', the first a letter or digit.",
            "Rename the task's file.",
        )
    return name


def row_seed(run_seed: int, *identity: str | int) -> int:
    """63 bits that depend on what a row is and on nothing else: not on its batch, its actor or its attempt."""
    text = json.dumps([run_seed, *identity], ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


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
            "instances": [vars(i) | {"references": list(i.references)} for i in task.instances],
        }
        for task in tasks
    ]
    return pa.Table.from_pylist(rows, schema=TABLES["tasks"])


def tasks_of(table: pa.Table) -> list[Task]:
    """Rows of `tasks` as tasks; read without the column `instances`, a task has none."""
    return [
        Task(
            name=row["task"],
            instruction=row["instruction"],
            examples=tuple(Example(**example) for example in row["examples"]),
            labels=tuple(row["labels"]),
            category=row["category"],
            metric=row["metric"],
            noise_words=tuple(row["noise_words"]),
            instances=tuple(Instance(i["id"], i["input"], tuple(i["references"])) for i in row.get("instances", ())),
        )
        for row in table.to_pylist()
    ]
