"""What a student is trained on: task files as conversations in the pipeline's own forms, and these as rows of tokens.

Only tasks of the default *train* split in English are read, none that shares a Source with a test task, and of the tasks
that the package brings along as examples there is none: these are the project's own.
"""

import bisect
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfguide_ray.pretraining.made_up import WORDS, made_up_task
from selfguide_ray.prompts import answering_messages, writing_request
from selfguide_ray.schema import Example, Task, row_seed
from selfguide_ray.task_files import read_task, task_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

MAX_INSTRUCTION, MAX_DOCUMENT = 1000, 3000  # characters; a small model has little use for passages
UNWANTED = {"Toxic Language Detection", "Stereotype Detection"}  # nothing that a newcomer's first run should write
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def training_tasks(tasks: Path, splits: Path) -> list[Task]:
    """The English tasks of default/train that a newcomer may read, without any that shares a source with a test task."""

    def names(split: str) -> set[str]:
        return set((splits / "default" / f"{split}_tasks.txt").read_text().split())

    train, test = names("train"), names("test")
    read = [read_task(file) for file in task_files(tasks) if file.name in train | test]
    test_sources = source_names(source for task in read if task.name in test for source in task.sources)
    return [
        task
        for task in read
        if task.name in train
        and set(task.languages) <= {"English"}
        and task.category not in UNWANTED
        and not test_sources & source_names(task.sources)
    ]


def source_names(sources: Iterable[str]) -> set[str]:
    """The data sets that Source fields name: some name several, and some put a link behind a name."""
    return {name.split("(")[0].strip().casefold() for source in sources for name in source.split(";")}


def development_tasks(tasks: Sequence[Task], count: int, seed: int) -> set[str]:
    """Names of about `count` tasks to leave out: whole families, of which none shares a source with a task that stays."""
    home: dict[str, str] = {}  # source → the source that stands for its family

    def root(source: str) -> str:
        while home.setdefault(source, source) != source:
            source = home[source]
        return source

    sources = {task.name: sorted(source_names(task.sources)) or [task.name] for task in tasks}
    for names in sources.values():
        for other in names[1:]:
            home[root(other)] = root(names[0])
    families: dict[str, list[str]] = {}
    for name, names in sources.items():
        families.setdefault(root(names[0]), []).append(name)
    order = sorted(families)
    random.Random(row_seed(seed, "development")).shuffle(order)
    chosen: set[str] = set()
    for family in order:  # small ones only: a large one would take much of what there is to learn
        if len(families[family]) <= max(1, count // 8) and len(chosen) + len(families[family]) <= count:
            chosen |= set(families[family])
    return chosen


def documents(
    tasks: Sequence[Task],
    seed: int,
    made_up: float = 0.0,
    most: int | None = None,
    rounds: int = 1,
    renamed: float = 0.5,
    turns: int = 8,
    names: str = "words",
    longest: int = 1000,
) -> list[list[dict[str, str]]]:
    """Conversations in the two forms of `prompts`, answering with many turns and writing a new item, in random order.

    In each of the rounds every instance serves once, in other company. `made_up` is the share of the conversations whose
    task the project makes up; `most` bounds them all: a task with many instances then has no more than its part.
    `renamed` is the share of the conversations with classes that have random words for labels, from where `names` says;
    `turns` the most examples before a conversation's last answer. `longest` bounds an input, in characters.
    """
    rng, found = random.Random(seed), []
    naming = Naming(vocabulary(tasks) if names == "texts" else None)
    learnable = [task for task in tasks if len(task.instruction) <= MAX_INSTRUCTION]
    part = None if most is None else max(1, round((1 - made_up) * most / len(learnable)))
    for task in learnable:
        pool = [Example(e.input, e.output) for e in task.examples]
        pool += [Example(i.input, rng.choice(i.references)) for i in task.instances if len(i.input) <= longest]
        mine = [
            made
            for _ in range(rounds)
            for made in _conversations(task, rng.sample(pool, len(pool)), rng, renamed, turns, naming)
        ]
        found += mine[:part]
    for _ in range(round(len(found) * made_up / (1 - made_up))):
        task = made_up_task(rng, rng.randint(3, 10))
        found += _conversations(task, list(task.examples), rng, renamed, turns, naming)[:1]
    rng.shuffle(found)
    return found


def primer(tasks: Sequence[Task], seed: int) -> Iterator[list[dict[str, str]]]:
    """Conversations without end in which random words of the tasks are repeated, or found again by the word before.

    On language alone a small student takes thousands of steps to discover copying, and until then no example helps it.
    """
    rng = random.Random(row_seed(seed, "primer"))
    words = vocabulary(tasks)
    while True:
        if rng.random() < 0.7:
            instruction = "Write the given words again, exactly as they are."
            turns = [
                Example(text, text) for text in (" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in "12345")
            ]
        else:
            instruction = (
                "The text is a list of words with a word for each. Write the word that belongs to the last one."
            )
            turns = []
            for _ in range(5):
                known = dict(zip(rng.sample(words, 8), rng.sample(words, 8), strict=True))
                asked = rng.choice(list(known))
                turns.append(Example(" ".join(f"{a} {b}" for a, b in known.items()) + f" {asked}", known[asked]))
        last = turns.pop()
        answer = {"role": "assistant", "content": last.output}
        yield [*answering_messages(instruction, turns, last.input), answer]


def _conversations(
    task: Task, pool: list[Example], rng: random.Random, renamed: float, most: int, naming: "Naming"
) -> list[list[dict[str, str]]]:
    """Conversations from a task's examples, each of which is answered once.

    About half also serve to ask for an item; three quarters of the items of a classification task are asked for by their
    label. Where labels are renamed they are random words throughout a conversation, so that answers have to be learned
    from it.
    """
    made = []
    while pool:
        turns, room = [pool.pop()], MAX_DOCUMENT - len(task.instruction)
        for _ in range(rng.randint(0, most)):
            room -= len(turns[-1].input) + len(turns[-1].output)
            if not pool or room < len(pool[-1].input) + len(pool[-1].output):
                break
            turns.append(pool.pop())
        told = naming(task, rng) if rng.random() < renamed else {}
        instruction = substitute(task.instruction, told)
        turns = [Example(e.input, told.get(e.output.strip(), e.output)) for e in turns]
        last = turns.pop()
        answer = {"role": "assistant", "content": last.output.strip()}
        made.append([*answering_messages(instruction, turns, last.input), answer])
        if rng.random() < 0.6 and len(turns) >= 2:
            gold = [e.input for e in turns[: rng.randint(2, 4)]]
            earlier = [e.input for e in turns[len(gold) :]][: rng.choice((0, 1, 2, 4, 8))]
            label = last.output.strip() if task.labels and rng.random() < 0.75 else None
            request = {"role": "user", "content": writing_request(instruction, gold, earlier, label)}
            made.append([request, {"role": "assistant", "content": last.input.strip()}])
    return made


def vocabulary(tasks: Sequence[Task]) -> list[str]:
    """The words of the tasks' inputs, each once, in order."""
    texts = (item.input for task in tasks for item in (*task.examples, *task.instances))
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]{2,12}", text)})


class Naming:
    """Random names for a task's labels: words of the made-up tasks, or one to three words of a vocabulary.

    A student that meets few names learns to answer with these; of many it learns to look the name up.
    """

    STYLES = (str.lower, str.lower, str.capitalize, str.title, str.upper)

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = words

    def __call__(self, task: Task, rng: random.Random) -> dict[str, str]:
        """A name for each label; none where a label is no plain word or words, since its items may quote it."""
        plain = r"[A-Za-z]{3,}\.?" if self.words is None else r"[A-Za-z]{3,}([ /-][A-Za-z]{2,}){0,3}\.?"
        if not all(re.fullmatch(plain, label) for label in task.labels):
            return {}
        return dict(zip(task.labels, self._draw(len(task.labels), rng), strict=True))

    def _draw(self, count: int, rng: random.Random) -> list[str]:
        if self.words is None:
            return rng.sample(WORDS, count)
        style, end = rng.choice(self.STYLES), "." * (rng.random() < 0.1)
        names: set[str] = set()
        while len(names) < count:
            names.add(style(" ".join(rng.choices(self.words, k=rng.choice((1, 1, 1, 2, 2, 3))))) + end)
        return rng.sample(sorted(names), count)


def substitute(text: str, words: dict[str, str]) -> str:
    """The text with each whole word that is a key, in whatever case, replaced."""
    if not words:
        return text
    told = {word.rstrip(".").casefold(): other for word, other in words.items()}
    longest_first = sorted(told, key=len, reverse=True)  # "not true" is no "true"
    either = "|".join(re.escape(word) for word in longest_first)
    return re.sub(rf"(?<!\w)(?:{either})(?!\w)", lambda found: told[found[0].casefold()], text, flags=re.IGNORECASE)


def render(messages: Sequence[dict[str, str]]) -> str:
    """A conversation in the student's chat format (the same as CHAT_TEMPLATE, without a template engine)."""
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> "FastTokenizer":
    """A byte-level BPE. A word after a turn's header is the same token as inside a text, so answers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits come second: before the byte level, every digit would get a space of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: "FastTokenizer", texts: Sequence[str], context: int, seed: int = 0) -> np.ndarray:
    """Documents side by side in rows of context + 1 tokens, in random order: uint16 [rows, context + 1].

    No document is cut but one that is longer than a row: its end would be learned without its instruction. Each goes, the
    longest first, where it leaves the least room (best fit decreasing); what remains of a row is padding, token 0.
    """
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        encoded = tokenizer.encode_batch(list(texts[start : start + 1000]), add_special_tokens=False)
        ids += [np.asarray(e.ids[: context + 1], dtype=np.uint16) for e in encoded]
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        size = len(ids[document])
        at = bisect.bisect_left(rooms, (size, 0))
        if at == len(rooms):
            left, row = context + 1, len(rows)
            rows.append([])
        else:
            left, row = rooms.pop(at)
        rows[row].append(document)
        bisect.insort(rooms, (left - size, row))
    made = np.zeros((len(rows), context + 1), dtype=np.uint16)
    for place, row in enumerate(random.Random(row_seed(seed, "pack")).sample(rows, len(rows))):
        flat = np.concatenate([ids[document] for document in row])
        made[place, : len(flat)] = flat
    return made


def stream(tokenizer: "FastTokenizer", texts: Iterator[str], context: int, count: int) -> np.ndarray:
    """The first documents end to end, cut into `count` rows of context + 1 tokens: uint16 [count, context + 1]."""
    ids: list[int] = []
    while len(ids) < count * (context + 1):
        encoded = tokenizer.encode_batch(list(itertools.islice(texts, 1000)), add_special_tokens=False)
        ids += [token for one in encoded for token in one.ids]
    return np.array(ids[: count * (context + 1)], dtype=np.uint16).reshape(count, context + 1)


def written(rows: np.ndarray) -> np.ndarray:
    """Whether the student writes a token: what follows an assistant's header up to the end of the turn, as 0 or 1."""
    user, assistant = SPECIAL_TOKENS.index("<|user|>"), SPECIAL_TOKENS.index("<|assistant|>")
    roles = np.where(
        rows == assistant, 2 * np.arange(rows.shape[1]) + 1, np.where(rows == user, 2 * np.arange(rows.shape[1]), 0)
    )
    speaking = np.maximum.accumulate(roles, axis=1) % 2 == 1
    return (speaking & (rows != assistant)).astype(np.float32)


def at_least(weights: np.ndarray, least: int) -> np.ndarray:
    """The weights with those of each run of ones raised until they sum to `least`: float32 [rows, tokens]."""
    flat = np.pad(weights, ((0, 0), (1, 0))).ravel()  # a zero between rows parts their runs
    edges = np.flatnonzero(np.diff(flat, append=0))
    for start, end in zip(edges[::2] + 1, edges[1::2] + 1, strict=True):
        flat[start:end] = max(1.0, least / (end - start))
    return flat.reshape(len(weights), -1)[:, 1:]
