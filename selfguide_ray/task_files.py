"""Task files as they occur in the wild: Natural Instructions V2 and its older forms, and a user's own YAML or JSON.

Every oddity of the official files that this module survives is listed in Wang et al. 2022's repository as data, not as
a rule: a bare `NaN`, two Definitions, instances without ids, labels with a final dot, text with NUL or U+2028.
"""

import bz2
import gzip
import lzma
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from selfguide_ray.documents import read_json, read_yaml, shown
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import Example, Instance, Task, check_task_name

SUFFIXES = (".json", ".yaml", ".yml")
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
MAX_FILE_BYTES = 1 << 28  # files of the suite have a megabyte, and whole ones tens of them
UNPACKERS: dict[bytes, Callable[[Path], IO[bytes]]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}

# The official metric of the twelve evaluation categories (Wang et al. 2022; upstream's eval/leaderboard).
CATEGORY_METRICS = {
    "Textual Entailment": "exact_match",
    "Coreference Resolution": "exact_match",
    "Answerability Classification": "exact_match",
    "Word Analogy": "exact_match",
    "Cause Effect Classification": "exact_match",
    "Dialogue Act Recognition": "exact_match",
    "Title Generation": "rouge_l",
    "Question Rewriting": "rouge_l",
    "Data to Text": "rouge_l",
    "Keyword Tagging": "rouge_l",
    "Overlap Extraction": "rouge_l",
    "Grammar Error Correction": "rouge_l",
}
MAX_LABELS = 14  # upstream's own test for "this task has classes": fewer than 15 distinct outputs
OWN_KEYS = ("instruction", "examples", "labels", "instances", "category", "metric", "noise_words")


@dataclass(frozen=True)
class TaskFile:
    """A file that should hold one task: the task's name, where it lies (for messages), and its bytes.

    `refusal` says why there are none: the file is too large, or may not be read.
    """

    name: str
    origin: str
    data: bytes
    refusal: SelfGuideError | None = None


def task_files(source: Path) -> Iterator[TaskFile]:
    """Every task file of a directory, an archive or a single file; directories in the order of their names."""
    if not source.exists():
        raise SelfGuideError(
            f"tasks.source: {source} does not exist.",
            "There is nothing to read tasks from.",
            "Give a directory of task files, a tar archive of them, one file, or embedded/tasks.",
        )
    if source.is_dir():
        for path in sorted(source.iterdir()):
            if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
                yield _task_file(path, str(path), path.stat().st_size, path.read_bytes)
    elif source.name.endswith(ARCHIVES):
        yield from _archive_files(source)
    elif source.suffix in SUFFIXES:
        yield _task_file(source, str(source), source.stat().st_size, source.read_bytes)
    else:
        raise SelfGuideError(
            f"tasks.source: {source} is neither a directory, an archive nor a task file.",
            f"Task files end in {', '.join(SUFFIXES)} and archives in {', '.join(ARCHIVES)}.",
            "Point tasks.source at one of these.",
        )


def _task_file(path: Path, origin: str, size: int, read: Callable[[], bytes]) -> TaskFile:
    """The file with its bytes, or with the reason why it has none."""
    name, origin = path.name.removesuffix(path.suffix), origin.encode(errors="replace").decode()
    if size > MAX_FILE_BYTES:
        told = f"{origin}: has {size:,} bytes.", f"No task file has more than {MAX_FILE_BYTES:,}.", "Take it out."
        return TaskFile(name, origin, b"", SelfGuideError(*told))
    try:
        return TaskFile(name, origin, read())
    except PermissionError as error:
        told = f"{origin}: cannot be read.", f"{error.strerror}.", "Allow it, or take the file out of tasks.source."
        return TaskFile(name, origin, b"", SelfGuideError(*told))


class _Reads:
    """An archive's bytes for tarfile, which by itself reads a name or header of any length that the archive tells."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.tell = file, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_FILE_BYTES:
            raise tarfile.ReadError(f"a part of {size:,} bytes")
        return self.file.read(size)

    def seek(self, place: int) -> int:
        if place < 0:
            raise tarfile.ReadError(f"a part at {place:,}")
        return self.file.seek(place)


def _opened(source: Path) -> IO[bytes]:
    with source.open("rb") as file:
        start = file.read(8)
    return next((opener for mark, opener in UNPACKERS.items() if start.startswith(mark)), _plain)(source)


def _plain(source: Path) -> IO[bytes]:
    return source.open("rb")


def _archive_files(source: Path) -> Iterator[TaskFile]:
    """The archive's task files by their bare names; links and devices are passed over, and nothing is unpacked."""
    try:
        with _opened(source) as file, tarfile.open(fileobj=_Reads(file), mode="r:") as archive:
            for member in archive:  # streamed: the whole suite never lies in memory
                path = Path(member.name)
                if member.isreg() and path.suffix in SUFFIXES and not path.name.startswith("."):
                    handle = archive.extractfile(member)
                    yield _task_file(path, f"{source}:{member.name}", member.size, handle.read)
                archive.members = []  # tarfile keeps what it has passed
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError) as error:
        raise SelfGuideError(
            f"tasks.source: {source} cannot be read to its end: {error}.",
            "The archive is damaged or not a tar archive.",
            "Fetch it again, or unpack it and give the directory.",
        ) from error


def read_task(file: TaskFile) -> Task:
    """One task with all its instances, whatever the schema; a file that is no task is refused by name.

    Raises SelfGuideError for text that does not parse, an unknown schema, or a field of the wrong type.
    """
    if file.refusal is not None:
        raise file.refusal
    document = _parse(file)
    reader = Reader(file.origin, check_task_name(file.name))
    if "Definition" in document:
        return reader.natural_instructions(document)
    if "instruction" in document:
        return reader.own(document)
    raise SelfGuideError(
        f"{file.origin}: not in a task schema we know; its keys are {_listed(document) or 'none'}.",
        "A Natural Instructions task has the key Definition, a task of your own has the key instruction.",
        "See 'Your own task' in the README, or take the file out of tasks.source.",
    )


def _listed(document: dict[Any, Any]) -> str:
    """The first keys, each cut where it is long."""
    keys = [key if isinstance(key, str) and len(key) <= 80 else shown(key) for key in islice(document, 12)]
    return ", ".join([*keys, *(["…"] if len(document) > len(keys) else [])]).encode(errors="replace").decode()


def _parse(file: TaskFile) -> dict[str, Any]:
    try:
        text = file.data.decode("utf-8-sig")
        # Python's json takes the bare NaN that 99 official files hold; a YAML parser would be far slower on these.
        document = read_json(text) if file.origin.endswith(".json") else read_yaml(text)
    except ValueError as error:  # also bad UTF-8 and impossible dates
        reason = " ".join(str(error).split())
        raise SelfGuideError(
            f"{file.origin}: cannot be parsed: {reason}.",
            "The file is cut off or not valid JSON or YAML in UTF-8.",
            "Fetch or save the file again.",
        ) from error
    if not isinstance(document, dict):
        raise SelfGuideError(
            f"{file.origin}: holds a {type(document).__name__}, not a mapping of keys.",
            "A task file is one JSON or YAML object.",
            "See 'Your own task' in the README.",
        )
    return document


@dataclass(frozen=True)
class Reader:
    """The checks that all schemas share, and one method a schema."""

    origin: str
    name: str

    def natural_instructions(self, document: dict[str, Any]) -> Task:
        """Natural Instructions V2; early V2 (no ids, Definition a string); V1 (Examples nested); third-party subsets."""
        older = document.get("Examples")
        positive = older.get("Positive Examples") if isinstance(older, dict) else document.get("Positive Examples")
        definition = self._strings(document["Definition"], "Definition")
        if not definition or not definition[0].strip():
            self._refuse("Definition is empty", "It is the instruction that the student follows", "Fill it in")
        # Two Definitions occur once (task288): upstream's reader takes the first. V1 keeps advice in fields of its own.
        advice = [document.get(key, "") for key in ("Emphasis & Caution", "Things to Avoid")]
        texts = (definition[0], *(self._string(t, "advice") for t in advice if isinstance(t, str)))
        instruction = "\n".join(t.strip() for t in texts if t.strip(" -\n"))
        category = (self._strings(document.get("Categories", []), "Categories") or [""])[0]
        instances = self._instances(document.get("Instances", []), "Instances")
        labels = label_set(instances)
        return Task(
            name=self.name,
            instruction=instruction,
            examples=self._examples(positive or [], "Positive Examples"),
            labels=labels,
            category=category,
            metric=CATEGORY_METRICS.get(category, "exact_match" if labels else "rouge_l"),
            instances=instances,
            languages=tuple(
                language
                for key in ("Input_language", "Output_language")
                for language in self._strings(document.get(key, []), key)
            ),
            sources=tuple(self._strings(document.get("Source", []), "Source")),
        )

    def own(self, document: dict[str, Any]) -> Task:
        """A user's own task: instruction and examples, and if wanted labels, instances, category, metric, noise_words."""
        unknown = [key for key in document if key not in OWN_KEYS]
        if unknown:
            self._refuse(
                f"{shown(unknown[0])} is not a key of a task",
                f"The keys are {', '.join(OWN_KEYS)}",
                "Rename or drop it",
            )
        labels = tuple(label.strip() for label in self._strings(document.get("labels") or [], "labels"))
        if len(labels) == 1 or len(set(labels)) < len(labels):
            self._refuse(
                f"labels are {shown(list(labels))}",
                "A classification task has two or more distinct labels",
                "Correct the list",
            )
        metric = document.get("metric") or ("exact_match" if labels else "rouge_l")
        if metric not in ("exact_match", "rouge_l"):
            self._refuse(f"metric is {shown(metric)}", "The metrics are exact_match and rouge_l", "Choose one of them")
        return Task(
            name=self.name,
            instruction=self._string(document["instruction"], "instruction").strip(),
            examples=self._examples(document.get("examples") or [], "examples"),
            labels=labels,
            category=self._string(document.get("category") or "", "category"),
            metric=metric,
            noise_words=tuple(self._strings(document.get("noise_words") or [], "noise_words")),
            instances=self._instances(document.get("instances") or [], "instances"),
        )

    def _examples(self, value: Any, key: str) -> tuple[Example, ...]:
        examples = []
        for index, item in enumerate(self._list(value, key)):
            where = f"{key}[{index}]"
            output = self._field(item, "output", where)
            output = output[0] if isinstance(output, list) and output else output
            examples.append(
                Example(self._string(self._field(item, "input", where), where), self._string(output, where))
            )
        return tuple(examples)

    def _instances(self, value: Any, key: str) -> tuple[Instance, ...]:
        instances = []
        for index, item in enumerate(self._list(value, key)):
            where = f"{key}[{index}]"
            output = item.get("output", item.get("references")) if isinstance(item, dict) else None
            references = tuple(self._strings(output, f"{where}.output")) if output is not None else ()
            if not references:
                self._refuse(
                    f"{where} has no output",
                    "An answer can only be scored against a reference",
                    "Add it or drop the instance",
                )
            instance_id = self._string(item.get("id") or f"{self.name}-{index:05d}", f"{where}.id")
            instances.append(Instance(instance_id, self._string(self._field(item, "input", where), where), references))
        if len({instance.id for instance in instances}) < len(instances):
            self._refuse(
                f"two {key} have the same id",
                "An id names one row of the run",
                "Make the ids distinct or leave them out",
            )
        return tuple(instances)

    def _field(self, item: Any, field: str, where: str) -> Any:
        if not isinstance(item, dict) or field not in item:
            self._refuse(f"{where} has no {field!r}", "Each item is a mapping with input and output", "Complete it")
        return item[field]

    def _list(self, value: Any, key: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(f"{key} is a {type(value).__name__}", "It has to be a list", "Write it as a list")
        return value

    def _strings(self, value: Any, key: str) -> list[str]:
        """A list of strings; a single string counts as a list of one, the bare NaN of official files as nothing."""
        values = value if isinstance(value, list) else [value]
        return [self._string(v, key) for v in values if not (isinstance(v, float) and math.isnan(v))]

    def _string(self, value: Any, key: str) -> str:
        if isinstance(value, bool | int | float):  # YAML reads yes, 3 and 1.5 as other things than text
            self._refuse(
                f"{key} holds {shown(value)}, which is not text",
                "YAML reads bare yes, no and numbers as values",
                "Put it in quotes",
            )
        if not isinstance(value, str):
            self._refuse(f"{key} holds a {type(value).__name__}", "Text is wanted here", "Replace it by a string")
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # a lone surrogate has no UTF-8

    def _refuse(self, what: str, why: str, instead: str) -> None:
        raise SelfGuideError(f"{self.origin}: {what}.", f"{why}.", f"{instead}.")


def label_set(instances: Iterable[Instance]) -> tuple[str, ...]:
    """The labels of a task that has classes, in alphabetical order; empty for a generation task.

    A task has classes if its instances hold fewer than 15 distinct outputs (upstream's rule) and at least three
    instances to an output. Spellings that differ in case, outer space or a final dot are one label, written the way
    most instances write it. Labels that differ in inner punctuation or sign stay apart, and a task for which an empty
    answer is right has no label set. Only the names of the labels are taken: no input, no frequency.
    """
    spellings: dict[str, Counter[str]] = {}
    count = 0
    for instance in instances:
        count += 1
        for label in map(str.strip, instance.references):
            spellings.setdefault(label_key(label), Counter())[label] += 1
        if len(spellings) > MAX_LABELS:
            return ()
    if len(spellings) < 2 or count < 3 * len(spellings) or "" in spellings:
        return ()
    # Most frequent spelling first, then the alphabet, so that the choice does not depend on the order of instances.
    return tuple(sorted(min(c.items(), key=lambda item: (-item[1], item[0]))[0] for c in spellings.values()))


def label_key(label: str) -> str:
    """What makes two spellings one label."""
    folded = re.sub(r"\s+", " ", label).strip().casefold()
    return folded.rstrip(".").strip() or folded
