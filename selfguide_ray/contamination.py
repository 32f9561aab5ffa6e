"""Which texts are too like the task's held-out inputs, by which they would be judged (spec §6.2, B25)."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from selfguide_ray.filters import Verdict, identity
from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.schema import Task
from selfguide_ray.similarity import Words, rouge_rows


@dataclass(frozen=True)
class Overlap:
    """What a text has in common with held-out instances."""

    suspects: tuple[str, ...]  # ids of all instances that it overlaps, in the task's order
    kind: str  # the strongest there is: exact, words or rouge_l
    verdict: Verdict  # with the first instance of that kind that is nearest


class HeldOut:
    """A task's held-out inputs, to hold texts against.

    A text overlaps an instance if their inputs are equal by `filters.identity`, or share a run of `run` words that
    neither the instruction nor an example holds, or have a ROUGE-L of at least `rouge`.
    """

    def __init__(self, task: Task, run: int, rouge: float) -> None:
        self.ids, self.run, self.rouge = [instance.id for instance in task.instances], run, rouge
        self.words = [rouge_tokens(instance.input) for instance in task.instances]
        self.equal: dict[str, list[int]] = {}
        for place, instance in enumerate(task.instances):
            self.equal.setdefault(identity(instance.input), []).append(place)
        self.shown = [rouge_tokens(task.instruction)]
        self.shown += [rouge_tokens(text) for example in task.examples for text in (example.input, example.output)]
        shown = _runs(self.shown, run)
        self.holders: dict[Words, list[int]] = {}
        for place, words in enumerate(self.words):
            for found in _runs([words], run) - shown:
                self.holders.setdefault(found, []).append(place)

    def overlaps(self, texts: Sequence[str], words: Sequence[Words]) -> list[Overlap | None]:
        """Each text's overlap, None where there is none; `words` are the texts' by `rouge_tokens`."""
        if not self.ids:
            return [None] * len(texts)
        return [
            self._overlap(text, mine, values)
            for text, mine, values in zip(texts, words, rouge_rows(words, self.words), strict=True)
        ]

    def _overlap(self, text: str, words: Words, values: np.ndarray) -> Overlap | None:
        equal = self.equal.get(identity(text), [])
        sharing = {place for found in _runs([words], self.run) for place in self.holders.get(found, ())}
        alike = np.flatnonzero(values >= self.rouge).tolist()
        suspects = tuple(self.ids[place] for place in sorted({*equal, *sharing, *alike}))
        if equal:
            return Overlap(suspects, "exact", Verdict("contaminated", 1.0, "no equal text", self.ids[equal[0]]))
        if sharing:
            lengths = {place: self._longest(words, self.words[place]) for place in sorted(sharing)}
            nearest = max(lengths, key=lambda place: lengths[place])
            bound = f"no run of {self.run} words"
            return Overlap(
                suspects, "words", Verdict("contaminated", float(lengths[nearest]), bound, self.ids[nearest])
            )
        if alike:
            nearest = int(values.argmax())
            bound = f"ROUGE-L below {self.rouge:g}"
            return Overlap(
                suspects, "rouge_l", Verdict("contaminated", float(values[nearest]), bound, self.ids[nearest])
            )
        return None

    def _longest(self, some: Words, others: Words) -> int:
        """Words in the longest run that two texts share and the task does not show; at least `run`."""
        length = self.run
        while _runs([some], length + 1) & _runs([others], length + 1) - _runs(self.shown, length + 1):
            length += 1
        return length


def _runs(texts: Iterable[Words], length: int) -> Collection[Words]:
    """All runs of so many words in the texts."""
    return {tuple(words[i : i + length]) for words in texts for i in range(len(words) - length + 1)}
