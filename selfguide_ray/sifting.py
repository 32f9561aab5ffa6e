"""Which surviving pairs are left out for what others there are: held-out inputs, examples, and one another.

No student speaks here, and thresholds may change without one engine call.
"""

from collections.abc import Sequence
from typing import Any

from selfguide_ray.config import Trainset as Settings
from selfguide_ray.contamination import HeldOut
from selfguide_ray.filters import Verdict
from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.schema import Task
from selfguide_ray.similarity import nearest_earlier

Rows = list[dict[str, Any]]


def held_out(task: Task, settings: Settings) -> HeldOut | None:
    """The task's held-out inputs to hold pairs against; None if nobody is to look."""
    if settings.decontaminate == "off":
        return None
    return HeldOut(task, settings.overlap_words, settings.overlap_rouge)


def mark(rows: Sequence[dict[str, Any]], apart: HeldOut | None, drop: bool = False) -> None:
    """Tell of each pair which held-out inputs it overlaps, `suspects`, and how; drop it as `contaminated` if wanted."""
    if apart is None:
        return
    texts = [row["input"] for row in rows]
    for row, found in zip(rows, apart.overlaps(texts, [rouge_tokens(text) for text in texts]), strict=True):
        row.update(suspects=list(found.suspects) if found else [], overlap=found and found.kind)
        if found and drop:
            row.update(vars(found.verdict))


def sift(task: Task, pairs: Rows, apart: HeldOut | None, settings: Settings) -> None:
    """Mark the surviving pairs that overlap held-out inputs, are too like others, or are of extreme length.

    In this order, so that no pair is dropped for being like one that overlaps.
    """
    mark(_alive(pairs), apart, settings.decontaminate == "drop")
    if settings.novelty is not None:
        keep_novel(task, pairs, settings.novelty)
    if settings.middle_lengths is not None:
        keep_middle(pairs, settings.middle_lengths)


def _alive(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("drop_reason") is None]


def keep_novel(task: Task, rows: list[dict[str, Any]], most: float) -> None:
    """Mark pairs `too_similar` whose input is too like an example's, or that of a surviving pair before."""
    alive = _alive(rows)
    ids = [*(f"example{index}" for index in range(len(task.examples))), *(row["id"] for row in alive)]
    shown = [rouge_tokens(example.input) for example in task.examples]
    found = nearest_earlier([rouge_tokens(row["input"]) for row in alive], most, shown)
    for row, neighbour in zip(alive, found, strict=True):
        if neighbour is not None:
            place, value = neighbour
            row.update(vars(Verdict("too_similar", value, f"ROUGE-L up to {most:g}", ids[place])))


def keep_middle(rows: list[dict[str, Any]], share: float) -> None:
    """Mark the surviving pairs with the shortest and the longest inputs `not_middle` (spec §7, F43).

    As many at either end; of equally long ones the earlier rows count as shorter.
    """
    alive = sorted(_alive(rows), key=lambda row: len(row["input"]))
    cut = int(len(alive) * (1 - share) / 2 + 1e-9)  # a tenth of ten is one, whatever floats make of it
    kept = alive[cut : len(alive) - cut]
    for row in alive[:cut] + alive[len(alive) - cut :]:
        bound = f"the middle {share:g}, {len(kept[0]['input'])} to {len(kept[-1]['input'])} characters"
        row.update(vars(Verdict("not_middle", float(len(row["input"])), bound)))
