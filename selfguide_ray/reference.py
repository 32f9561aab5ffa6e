"""`method: reference`: what the reference code does where it runs, so that its figures can be reproduced (spec §1-§3).

Gathered here is whatever differs from our own behaviour: length rule, noise words, duplicates, the ends of prompts, and
the two metrics. Election, balance and loss mask are the same in both. Not imitated are faults that keep the code from
running (B1, B2, B11), those of other versions than the paper's (B6: the word None behind the last demonstration came
after its searches), and those that carry one task's state into the next (B7). Prompts are in our own words, and so are
the chat phrases among the noise words; a demonstration's output is whole even where it holds a quote (B23).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfguide_ray import filters, votes
from selfguide_ray.config import Config
from selfguide_ray.config import Inputs as InputSettings
from selfguide_ray.config import Trainset as TrainsetSettings
from selfguide_ray.engine import Engine
from selfguide_ray.filters import FILTERS, Finding, Rules, Verdict
from selfguide_ray.metrics import f_measure, normalize
from selfguide_ray.prompts import Prompts
from selfguide_ray.schema import Instance, Task

# Noise besides the settings' words (spec §1.2.3): in every task, in classification, and in the tasks of the paper.
ALWAYS = ("\n\n", r"\_\_")
CLASSIFICATION = ("therefore", "Therefore", "Hence")
ADDED = {"task1612": (r"\_",), "task1529": ("The premise", "The hypothesis")}
WITHOUT_HENCE = ("task199", "task738")


# --- filters ---------------------------------------------------------------------------------------------------------


def length_bounds(texts: Sequence[str], sigmas: float) -> tuple[int, int]:
    """The shortest and longest legal length: int(μ − sigmas·σ) ≤ length < int(μ + sigmas·σ), statements 7 and 8.

    `int` truncates towards zero, the lower end may be negative, and the texts themselves may be outside.
    """
    lengths = [len(text) for text in texts]
    mean, reach = np.mean(lengths), sigmas * np.std(lengths)
    return int(mean - reach), int(mean + reach) - 1


def noise_words(task: Task, words: Iterable[str]) -> tuple[str, ...]:
    """All texts that are noise in a task; what its examples hold is no exception."""
    number = task.name.split("_")[0]
    ours = [word for word in CLASSIFICATION if word != "Hence" or number not in WITHOUT_HENCE] if task.labels else []
    found = (*words, *task.noise_words, *ALWAYS, *ours, *ADDED.get(number, ()))
    return tuple(word for word in dict.fromkeys(found) if word)


def _rules(task: Task, shown: Sequence[str] | None, sigmas: float, words: Iterable[str]) -> Rules:
    """Bounds from the examples' texts, None for any length; a word counts anywhere in a text, in its own case."""
    banned = "|".join(map(re.escape, noise_words(task, words)))
    return Rules(None if shown is None else length_bounds(shown, sigmas), re.compile(banned))


def input_rules(task: Task, settings: InputSettings) -> Rules:
    """The filters' bounds for inputs."""
    shown = [example.input for example in task.examples] if settings.length_filter else None
    return _rules(task, shown, settings.length_sigmas, settings.noise_words)


def answer_rules(task: Task, settings: TrainsetSettings) -> Rules:
    """The filters' bounds for answers; classification has no bound on length, whatever the setting (statement 15)."""
    bounded = settings.length_filter.generation and not task.labels
    shown = [example.output for example in task.examples] if bounded else None
    return _rules(task, shown, settings.length_sigmas, settings.noise_words)


def empty(text: str, rules: Rules) -> Finding | None:
    """No character at all; white space is a text."""
    return None if text else (0.0, "at least 1 character")


def judge(text: str, rules: Rules) -> Verdict | None:
    """The verdict on a text as it was generated, white space included."""
    return filters.judge(text, rules, FILTERS | {"empty": empty})


class Seen:
    """The duplicate filter: a generated text against the stripped texts of the pool (B9), examples not among them."""

    def __init__(self) -> None:
        self._rows: dict[str, str] = {}

    def judge(self, text: str) -> Verdict | None:
        """`duplicate` with the id of the text it repeats."""
        neighbour = self._rows.get(text)
        return Verdict("duplicate", 1.0, "no equal text", neighbour) if neighbour is not None else None

    def add(self, row: str, text: str) -> None:
        """Remember a text, stripped, under the id of its row."""
        self._rows.setdefault(text.strip(), row)


class InputFilters(NamedTuple):
    """How the reference judges the inputs of a task."""

    clean: Callable[[str], str]
    judge: Callable[[str, Rules], Verdict | None]
    rules: Rules
    seen: Seen


def input_filters(task: Task, settings: InputSettings) -> InputFilters:
    """The filters of a task's inputs: texts are judged as they come, and keep their quotes (B10)."""
    return InputFilters(str, judge, input_rules(task, settings), Seen())


# --- prompts ---------------------------------------------------------------------------------------------------------


class HeaderAndNewline(Prompts):
    """Prompts of training and evaluation: a newline follows the header, and the answer follows that (B17).

    Nothing but EOS or the longest answer ends a text (B24).
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.lead, self.answer_stops, self.item_stops, self.role_words = "", (), (), ()

    def headed(self, text: str) -> str:
        """The header and a newline, which some chat formats have there anyway."""
        return text.rstrip() + "\n"


class Stripped(HeaderAndNewline):
    """Prompts of annotation, which end in the bare header."""

    def headed(self, text: str) -> str:
        """Without white space at either end."""
        return text.strip()


# The part of a generated answer that is a prediction: the reference scores all of it.
SAID: dict[str, Callable[[str], str]] = {"selfguide": str.strip, "reference": str}
RULES: dict[str, votes.MakeRules] = {"selfguide": votes.answer_rules, "reference": answer_rules}
PROMPTS: dict[str, type[Prompts]] = {"selfguide": Prompts, "reference": HeaderAndNewline}
ANNOTATION: dict[str, type[Prompts]] = {"selfguide": Prompts, "reference": Stripped}


# --- metrics ---------------------------------------------------------------------------------------------------------


def reference_match(prediction: str, gold: str, labels: Sequence[str]) -> float:
    """1.0 if the last label that occurs in the prediction equals the gold after normalisation, else 0.0 (statement 21).

    Occurrences do not overlap, are in the label's case and may be parts of words; the first of the labels that fits at a
    place is taken there.
    """
    found = re.findall("|".join(map(re.escape, labels)), prediction)
    return float(bool(found) and normalize(found[-1]) == normalize(gold))


def character_rouge(prediction: str, gold: str) -> float:
    """F-measure of the longest common subsequence of characters, texts as they are (statement 22)."""
    return f_measure(prediction, gold)


METRICS = {"classification": "reference_match", "generation": "character_rouge"}


class Scoring:
    """A task's scores as the reference has them: one metric, one reference output, and not all instances (spec §3).

    An instance is left out if its prompt with all demonstrations is over the limit, or its gold longer than an answer.
    """

    def __init__(self, config: Config, engine: Engine) -> None:
        self.longest = config.outputs.max_new_tokens
        limit = config.student.max_prompt_tokens
        self.prompts = HeaderAndNewline.within(engine.tokenizer, limit, engine.context, self.longest)
        self._latest: tuple[Task, list[int]] | None = None

    def __call__(self, task: Task, answers: Sequence[str]) -> dict[str, list[float]]:
        """{metric: values, 0-100} over the counted instances, given an answer to each; empty if none is counted."""
        places = self._counted(task)
        if not places:
            return {}
        gold = [task.instances[i].references[0].strip() for i in places]
        if not task.labels:
            values = [character_rouge(answers[i], right) for i, right in zip(places, gold, strict=True)]
            return {METRICS["generation"]: [100 * value for value in values]}
        labels = list(dict.fromkeys(gold))
        values = [reference_match(answers[i], right, labels) for i, right in zip(places, gold, strict=True)]
        return {METRICS["classification"]: [100 * value for value in values]}

    def _counted(self, task: Task) -> list[int]:
        """The places of the instances that count; all systems of a task are asked about one after the other."""
        latest = self._latest
        if latest is None or latest[0] is not task:
            latest = task, [i for i, instance in enumerate(task.instances) if self._fits(task, instance)]
            self._latest = latest
        return latest[1]

    def _fits(self, task: Task, instance: Instance) -> bool:
        prompt = self.prompts.answering(task, instance.input)
        whole = prompt.examples == len(task.examples)
        return whole and len(self.prompts.tokenizer.encode(instance.references[0].strip())) <= self.longest


def scoring(config: Config, engine: Engine) -> Callable[[Task, Sequence[str]], dict[str, list[float]]]:
    """What a run's method adds to the standard metrics."""
    return Scoring(config, engine) if config.method == "reference" else lambda task, answers: {}
