"""Verdicts over texts: the rule filters of SELF-GUIDE (spec §1.2, §1.4), with our decisions on its bugs.

A filter is a function of a text and the task's rules; it returns None to let the text pass, or what it measured and the
bound it held that against. Its name in FILTERS is the drop reason; the first that speaks decides (statement 11).
"""

import functools
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from selfguide_ray.schema import ITEM

QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "`": "`"}  # opening → closing
BLANK_LINE = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Rules:
    """The bounds of one task. Built anew for each task, so that nothing leaks into the next (statement 10)."""

    lengths: tuple[float, float] | None  # characters, both ends inclusive; None: any length
    noise: re.Pattern[str] | None
    prefix: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Verdict:
    """Why a row is dropped."""

    drop_reason: str
    measured: float | None = None
    bound: str | None = None
    neighbour: str | None = None


Finding = tuple[float | None, str | None]


def clean(text: str) -> str:
    """Outer white space, an echoed item key and quotes around the whole text removed (decisions on B8, B10)."""
    text = _without_key(text)
    opening, inner = text[:1], text[1:-1]
    closing = QUOTES.get(opening)
    quoted = closing is not None and len(text) >= 2 and text[-1] == closing
    return _without_key(inner) if quoted and opening not in inner and closing not in inner else text


def _without_key(text: str) -> str:
    return text.strip().removeprefix(ITEM).strip()


def identity(text: str) -> str:
    """What two texts share that count as one (decision on B9): NFKC, case, white space and outer quotes set aside."""
    composed = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return clean(" ".join(composed.casefold().split()))


def length_bounds(texts: Sequence[str], sigmas: float, slack: float) -> tuple[float, float]:
    """mean ± sigmas population standard deviations of the lengths in characters (statements 7, 8).

    Both ends count, a negative end is 0, each of the texts is inside, and `slack` means widen both ends (decision on B12).
    """
    lengths = [len(text) for text in texts]
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    reach = sigmas * deviation + slack * mean
    return min(max(0, int(mean - reach)), min(lengths)), max(int(mean + reach), max(lengths))


def noise_pattern(words: Iterable[str], shown: Sequence[str]) -> re.Pattern[str]:
    """Matches a blank line or one of the words, as a whole word and in its case (decision on B8).

    A word or blank line that the task's own examples (`shown`) hold is no noise in this task. Every alternative begins
    with a character, and looks behind it only at its end: so `re` tries them at those characters, not at each place.
    """
    words = [word for word in words if word]
    patterns = [re.escape(w) + rf"(?<!\w{re.escape(w)})" * (w[:1].isalnum()) + _end(w) for w in words]
    candidates = [BLANK_LINE.pattern, *patterns]
    banned = [pattern for pattern in candidates if not any(re.search(pattern, text) for text in shown)]
    return re.compile("|".join(banned) or r"(?!)")


def prefix_pattern(prefixes: Iterable[str], shown: Sequence[str]) -> re.Pattern[str]:
    """Matches a text that begins with one of the words, as a whole word in any case (a part of F43).

    A word that begins one of the task's own examples (`shown`) is no reason in this task.
    """
    candidates = [re.escape(p) + _end(p) for p in map(str.strip, prefixes) if p]
    banned = [pattern for pattern in candidates if not any(re.match(pattern, text, re.IGNORECASE) for text in shown)]
    return re.compile("|".join(banned) or r"(?!)", re.IGNORECASE)


def _end(word: str) -> str:
    """What follows a word's pattern, so that it does not end inside a longer one."""
    return r"(?!\w)" * (word[-1:].isalnum())


def empty(text: str, rules: Rules) -> Finding | None:
    """Nothing but white space."""
    return None if text.strip() else (0.0, "at least 1 character")


def length(text: str, rules: Rules) -> Finding | None:
    """Outside the range of the examples' lengths."""
    if rules.lengths is None or rules.lengths[0] <= len(text) <= rules.lengths[1]:
        return None
    return float(len(text)), f"{rules.lengths[0]:g} to {rules.lengths[1]:g} characters"


def noise(text: str, rules: Rules) -> Finding | None:
    """Talk about the text, a second item, or a new turn."""
    found = rules.noise.search(text) if rules.noise else None
    return (float(found.start()), f"no {found.group().strip() or 'blank line'!r}") if found else None


def prefix(text: str, rules: Rules) -> Finding | None:
    """A beginning that is not wanted."""
    found = rules.prefix.match(text) if rules.prefix else None
    return (None, f"does not begin with {found.group()!r}") if found else None


FILTERS: dict[str, Callable[[str, Rules], Finding | None]] = {
    "empty": empty,
    "length": length,
    "noise": noise,
    "prefix": prefix,
}


def judge(
    text: str, rules: Rules, filters: dict[str, Callable[[str, Rules], Finding | None]] = FILTERS
) -> Verdict | None:
    """The verdict of the first filter that speaks, None if the text passes them all."""
    for name, rule in filters.items():
        finding = rule(text, rules)
        if finding is not None:
            return Verdict(name, *finding)
    return None


class Seen:
    """Texts met so far, by identity: the duplicate filter."""

    def __init__(self, known: Iterable[tuple[str, str]] = ()) -> None:
        self._ids = {identity(text): row for row, text in reversed(list(known))}
        self._identity = functools.lru_cache(maxsize=1)(identity)  # a text that is judged novel is then added

    def judge(self, text: str) -> Verdict | None:
        """`duplicate` with the id of the text it repeats."""
        neighbour = self._ids.get(self._identity(text))
        return Verdict("duplicate", 1.0, "no equal text", neighbour) if neighbour is not None else None

    def add(self, row: str, text: str) -> None:
        """Remember a text under the id of its row."""
        self._ids.setdefault(self._identity(text), row)


def find_label(text: str, labels: Sequence[str]) -> str | Verdict:
    """The label that an answer is, or the only one it names as a whole word (decision on B5, statement 16).

    Case is set aside only where no two labels differ by case alone. A label inside a longer label that is named at
    the same place does not count.
    """
    text = text.strip()
    if text in labels:
        return text
    fold, names = _label_names(tuple(labels))
    folded = fold(text)
    spans = [
        (m.start(), m.end(), label)
        for name, pattern, label in names
        if name in folded
        for m in pattern.finditer(folded)
    ]
    named = {
        label
        for start, end, label in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    }
    if len(named) == 1:
        return named.pop()
    return Verdict("ambiguous_label" if named else "no_label", float(len(named)), "names exactly 1 label")


@functools.lru_cache(maxsize=64)  # tasks are filtered one after another
def _label_names(labels: tuple[str, ...]) -> tuple[Callable[[str], str], list[tuple[str, re.Pattern[str], str]]]:
    """How case is set aside, and for each label its name, the pattern that finds it as a whole word, and itself."""
    fold = str.casefold if len({label.casefold() for label in labels}) == len(labels) else str
    # A final dot is no part of a label's name ("Yes."), unless the label is nothing else or two labels differ by it.
    bare = [fold(label.rstrip(".")) or fold(label) for label in labels]
    names = bare if len(set(bare)) == len(bare) else [fold(label) for label in labels]
    patterns = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)") for name in names]
    return fold, list(zip(names, patterns, labels, strict=True))
