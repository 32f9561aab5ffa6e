"""Made-up texts to filter: words by Zipf's law, rows of a task, and answers that agree as a student's do."""

import random
from itertools import accumulate
from typing import Any

from selfguide_ray.schema import Example, Task

WORDS = 37  # of a row, on average
VOCABULARY, STREAM = 5000, 500_000
ENDINGS = ("", "", "s", "ed", "ing", "er", "ly")  # for the stemmer to take off


class Language:
    """Endless texts over a vocabulary, decided by the seed."""

    def __init__(self, seed: int, words: int = VOCABULARY) -> None:
        self.chance = chance = random.Random(seed)
        self.words = [
            "".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(chance.randint(1, 4)))
            + chance.choice(ENDINGS)
            for _ in range(words)
        ]
        weights = list(accumulate(1 / place for place in range(1, words + 1)))
        self.stream = chance.choices(self.words, cum_weights=weights, k=STREAM)

    def text(self, words: int = WORDS) -> str:
        """A text of about so many words; they vary by a quarter."""
        count = max(1, round(self.chance.gauss(words, words / 4)))
        start = int(self.chance.random() * (STREAM - 4 * words))
        return " ".join(self.stream[start : start + count])

    def texts(self, count: int) -> list[str]:
        """Rows of a task. One in ten is an earlier one with a few other words."""
        rows: list[str] = []
        for _ in range(count):
            if rows and self.chance.random() < 0.1:
                words = self.chance.choice(rows).split()
                for _ in range(max(1, len(words) // 10)):
                    words[self.chance.randrange(len(words))] = self.chance.choice(self.words)
                rows.append(" ".join(words))
            else:
                rows.append(self.text())
        return rows

    def task(self, number: int) -> Task:
        """A task with three examples; every other one has two to five labels."""
        labels = tuple(self.words[10 * number % 4000 + 500 + n].capitalize() for n in range(2 + number // 2 % 4))
        labels = labels if number % 2 else ()
        # As long as the length filters need to let most rows pass.
        inputs, outputs = [self.text(WORDS * n // 3) for n in (2, 3, 4)], [self.text(n) for n in (4, 8, 12)]
        examples = tuple(Example(inputs[n], labels[n % len(labels)] if labels else outputs[n]) for n in range(3))
        return Task(f"task{number:04}", self.text(), examples, labels)

    def invented(self, count: int) -> list[str]:
        """What a student says when it is asked for inputs: some quoted, keyed, empty, talking, or said before."""
        said: list[str] = []
        for _ in range(count):
            kind, text = self.chance.random(), self.text()
            if kind < 0.1 and said:
                text = self.chance.choice(said)
            elif kind < 0.15:
                text = f'"{text}"'
            elif kind < 0.2:
                text = f"ITEM: {text}\n"
            elif kind < 0.22:
                text = " "
            elif kind < 0.25:
                text = f"Sure, {text}"
            elif kind < 0.27:
                text = f"{text}\n\n{text}"
            said.append(text)
        return said

    def answers(self, task: Task, samples: int) -> list[dict[str, Any]]:
        """Sampled answers to an input: most agree; some of a classification task are wordy, vague or no label."""
        common = self._answer(task)
        texts = [common if self.chance.random() < 0.7 else self._answer(task) for _ in range(samples)]
        return [
            {"output": text, "logprob": -10 * self.chance.random(), "finish_reason": "stop", "probability": None}
            for text in texts
        ]

    def _answer(self, task: Task) -> str:
        if not task.labels:
            return self.text(8)
        kind, label = self.chance.random(), self.chance.choice(task.labels)
        if kind < 0.7:
            return label
        return (
            f"The answer is {label.lower()}." if kind < 0.85 else f"{label} or {task.labels[0]}" if kind < 0.9 else "?"
        )
