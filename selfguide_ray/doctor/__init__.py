"""`selfguide doctor`: what would stop or mislead a run, looked for before it starts.

A check is a function from the patient to findings, and its line in `command.CHECKS`. None starts Ray or loads weights.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple

from selfguide_ray import student, tasks
from selfguide_ray.config import Config
from selfguide_ray.embedded import resolve
from selfguide_ray.estimate import reader
from selfguide_ray.run import Run
from selfguide_ray.schema import Task, Tokenizer
from selfguide_ray.task_files import read_task, task_files

Verdict = Literal["ok", "warning", "wrong"]


class Finding(NamedTuple):
    """What a check found, and what to do about it; nothing where all is well."""

    verdict: Verdict
    found: str
    advice: str = ""


class Patient:
    """A run that is looked at before it starts; what several checks want is read once."""

    def __init__(self, config: Config) -> None:
        self.config, self.run = config, Run(config.run)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What identifies the student. Raises SelfGuideError if it cannot be found."""
        return student.facts(self.config.student)

    @cached_property
    def reader(self) -> tuple[Tokenizer, int]:
        """The student's tokenizer and the tokens of its context."""
        return reader(self.config.student)

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's."""
        return self.reader[0]

    @cached_property
    def first(self) -> tuple[Task | None, list[tasks.Refusal]]:
        """The first task that is selected, None if there is none, and the files that were refused before it."""
        refusals: list[tasks.Refusal] = []
        return next(tasks.selected(self.config, refusals), None), refusals

    @cached_property
    def task(self) -> Task:
        """A task to render prompts of, the same whatever the source: one of the package's."""
        return read_task(next(task_files(resolve("embedded/tasks"))))


Look = Callable[[Patient], Iterable[Finding]]


class Check(NamedTuple):
    """A check by name; it is passed over where one of those that it needs found something wrong."""

    name: str
    look: Look
    needs: tuple[str, ...] = ()
