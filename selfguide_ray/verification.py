"""The student checks what it wrote: is a text a proper item of the task? (F42, which the reference left unused.)

The check reads nothing but the task and the text, so a text has one answer, and is asked about once.
"""

from collections.abc import Iterable, Sequence

from selfguide_ray.engine import Completion, Request, SamplingParams, share_prefix, verdict
from selfguide_ray.filters import Verdict, identity
from selfguide_ray.prompts import Prompts
from selfguide_ray.schema import Task, row_seed

ANSWERS = ("yes", "no")


class Verification:
    """One task's checks. A text passes if the probability of yes, among yes and no, reaches `bound`.

    A text whose check finds no room, or kills the engine, cannot be vouched for, and bears that verdict.
    """

    def __init__(self, task: Task, prompts: Prompts, bound: float, seed: int) -> None:
        self.task, self.prompts, self.bound, self.seed = task, prompts, bound, seed
        self.params = SamplingParams(labels=prompts.choices(ANSWERS), label_mode="score")
        self.verdicts: dict[str, Verdict | None] = {}  # by identity of the text
        self.asked: list[str] = []

    def ask(self, texts: Iterable[str]) -> list[Request]:
        """The checks of those texts that were not checked before."""
        self.asked, drawn = [], []
        for text in texts:
            key = identity(text)
            if key in self.verdicts or key in self.asked:
                continue
            prompt = self.prompts.checking(self.task, text)
            if prompt.too_long:
                bound = f"{self.prompts.max_tokens} tokens"
                self.verdicts[key] = Verdict("too_long", float(len(prompt.ids)), bound)
            else:
                self.asked.append(key)
                drawn.append(prompt.ids)
        return [
            Request(prefix, suffix, self.params, row_seed(self.seed, self.task.name, "check", key))
            for key, (prefix, suffix) in zip(self.asked, share_prefix(drawn), strict=True)
        ]

    def hear(self, answers: Sequence[Completion]) -> None:
        """Take the answers to what was asked; one that the engine could not give is no yes."""
        for key, answer in zip(self.asked, answers, strict=True):
            if (reason := verdict([answer])) is not None:
                self.verdicts[key] = Verdict(reason)
                continue
            yes = answer.label_probabilities[0] if answer.label_probabilities else None
            passed = yes is not None and yes >= self.bound
            self.verdicts[key] = None if passed else Verdict("unverified", yes, f"yes with at least {self.bound:g}")
        self.asked = []

    def judge(self, text: str) -> Verdict | None:
        """`unverified` or the engine's verdict, None if the text passed; it has to have been asked about."""
        return self.verdicts[identity(text)]
