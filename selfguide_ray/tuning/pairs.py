"""What every way of training shares: pairs as ids, the order of batches, the rate at a step, an adapter's first values."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from selfguide_ray.config import Models
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100  # cross_entropy's label for "no loss here"


@dataclass(frozen=True)
class Pair:
    """A training pair as ids; the completion ends in EOS."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def read_pairs(task: str, rows: pa.Table, tokenizer: StudentTokenizer, context: int) -> list[Pair]:
    """A task's rows of `trainset` as ids.

    Raises SelfGuideError if there is none, or one that the student's context cannot hold: an answer is never cut.
    """
    pairs = [
        Pair(tuple(tokenizer.encode(row["prompt"])), tuple(tokenizer.encode(row["completion"])))
        for row in rows.select(["prompt", "completion"]).to_pylist()
    ]
    if not pairs:
        raise SelfGuideError(
            f"{task}: there is no pair to learn from.",
            "All its rows of trainset have a drop_reason.",
            "Loosen the thresholds of trainset, or ask for more inputs.",
        )
    longest = max(map(len, pairs))
    if longest > context:
        raise SelfGuideError(
            f"{task}: a pair has {longest} tokens, and the student's context holds {context}.",
            "Answers are never cut.",
            "Lower student.max_prompt_tokens or outputs.max_new_tokens.",
        )
    return pairs


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(pairs to learn, pairs to validate on), by the seed; at least one of each where a share is asked for."""
    if not share or len(pairs) < 2:
        return list(pairs), []
    count = min(len(pairs) - 1, max(1, round(share * len(pairs))))
    chosen = set(random.Random(row_seed(seed, "validation")).sample(range(len(pairs)), count))
    return [p for i, p in enumerate(pairs) if i not in chosen], [p for i, p in enumerate(pairs) if i in chosen]


def mute(pair: Pair) -> Pair:
    """A pair that fills a task's place in a pass, with nothing to learn."""
    return Pair(pair.prompt[-1:], (IGNORED,))


def in_passes(pairs: Sequence[Pair], room: int) -> list[list[Pair]]:
    """The pairs in order, in passes of at most `room` tokens; one that is longer has a pass to itself."""
    cut: list[list[Pair]] = []
    tokens = room
    for pair in pairs:
        if tokens + len(pair) > room:
            cut.append([])
            tokens = 0
        cut[-1].append(pair)
        tokens += len(pair)
    return cut


def batches(count: int, settings: Models, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, indices of the pairs) of every optimiser step: each epoch in a new order that the seed decides."""
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(row_seed(seed, "epoch", epoch)).shuffle(order)
        for start in range(0, count, settings.batch_size):
            yield epoch, order[start : start + settings.batch_size]


def rate_factor(step: int, steps: int, settings: Models) -> float:
    """The share of the peak learning rate in force at a step: linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, (steps - step) / max(1, steps - settings.warmup_steps))


def first_a(module: str, shape: tuple[int, int], seed: int) -> "torch.Tensor":
    """The A matrix [rank, in] that a fresh adapter has on a module; B is zero. Uniform as in peft, by seed and module."""
    import torch

    generator = torch.Generator().manual_seed(row_seed(seed, "lora", module))
    bound = shape[1] ** -0.5  # what kaiming_uniform with a = sqrt(5) comes to
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Stopping:
    """When a task has had enough: its validation losses so far, the best of them, and whether to go on."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.losses: list[float] = []

    @property
    def best(self) -> int:
        """The epoch (from 0) with the lowest loss, the first of equals."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    @property
    def over(self) -> bool:
        """Whether `patience` epochs in a row brought no better loss; a patience of 0 never ends."""
        return bool(self.patience and self.losses) and len(self.losses) - 1 - self.best >= self.patience
