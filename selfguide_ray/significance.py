"""Which gains are more than chance: each task's gain over prompting with its test, what they come to, and what no test
could tell.

A gain is SELF-GUIDE's score less that of the family's better prompted system, paired by held-out instance. Its p-value
comes from the table `scores`; q-values are Benjamini and Hochberg's over all tasks of the run.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from selfguide_ray.charts import signed
from selfguide_ray.metrics import benjamini_hochberg, bootstrap_interval
from selfguide_ray.standings import FAMILIES, FEW_TASKS, RESAMPLES, TUNED, Board, rival_of

LEVEL = 0.05  # of p-values and q-values
# With n instances no p-value of two sides is below 2^(1-n): all answers changed for the better, against either sign.
FEWEST = next(n for n in itertools.count(1) if 2.0 ** (1 - n) <= LEVEL)
WIDE = 10.0  # points: a task with a wider reach cannot tell such a gain from nothing
SHOWN = 60  # a longer list of tasks shows its ends
ENDS = 20


@dataclass(frozen=True)
class Gain:
    """A task's gain over the rival, in points of its family's metric; low, high, p and q are None if not tested."""

    task: str
    category: str
    family: str
    metric: str
    rival: str
    n: int
    points: float
    low: float | None
    high: float | None
    p: float | None
    q: float | None = None

    @property
    def outcome(self) -> str | None:
        """win, loss or tie; None if not tested."""
        if self.q is None:
            return None
        return "tie" if self.q > LEVEL or not self.points else "win" if self.points > 0 else "loss"

    @property
    def reach(self) -> float | None:
        """The smallest gain, in points, that the task's interval could tell from nothing; None without an interval.

        It is half the interval's width, 1.96 standard errors of the paired differences. Where all differences are the
        same a bootstrap sees no spread: then it is the share of other differences that n instances may have missed
        with a probability of 5 %, at 100 points each (1 - 0.05^(1/n), the rule of three).
        """
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / 2 or 100 * (1 - LEVEL ** (1 / self.n))


def gains(board: Board) -> list[Gain]:
    """Every task that SELF-GUIDE and its rival both answered, the highest gain first."""
    found = []
    for family in FAMILIES:
        rival, metric = rival_of(board, family), board.metric(family)
        for task in board.family(family) if rival else ():
            ours, theirs = (board.value(task, metric, system) for system in (TUNED, rival))
            if ours is None or theirs is None:
                continue
            row = board.rows[task.name, metric, TUNED]
            tested = next((one for one in row.get("against") or () if one["system"] == rival), {})
            bounds = (tested.get(key) for key in ("low", "high", "p"))
            found.append(Gain(task.name, task.category, family, metric, rival, row["n"], ours - theirs, *bounds))
    q_values = benjamini_hochberg([gain.p for gain in found])
    told = [replace(gain, q=q) for gain, q in zip(found, q_values, strict=True)]
    return sorted(told, key=lambda gain: (-gain.points, gain.task))


def summary(several: Sequence[Gain]) -> dict[str, Any]:
    """The mean of some gains with its 95 % interval over tasks (None from one task), and how many won, tied and lost."""
    points = [gain.points for gain in sorted(several, key=lambda gain: gain.task)]
    low, high = bootstrap_interval(points, RESAMPLES, seed=0) if len(points) > 1 else (None, None)
    outcomes = [gain.outcome for gain in several]
    return {
        "tasks": len(points),
        "points": float(np.mean(points)),
        "low": low,
        "high": high,
        "up": sum(p > 0 for p in points),
        "down": sum(p < 0 for p in points),
        "wins": outcomes.count("win"),
        "ties": outcomes.count("tie"),
        "losses": outcomes.count("loss"),
        "untested": outcomes.count(None),
    }


def by_family(found: Sequence[Gain]) -> list[dict[str, Any]]:
    """The summary of each family and of its categories, those with the highest gain first."""
    families = []
    for family in FAMILIES:
        mine = [gain for gain in found if gain.family == family]
        if mine:
            names = dict.fromkeys(gain.category for gain in mine)
            categories = [{"name": name, **summary([gain for gain in mine if gain.category == name])} for name in names]
            categories.sort(key=lambda category: (-category["points"], category["name"]))
            families.append(
                {"name": family, "rival": mine[0].rival, "categories": categories, **summary(mine)},
            )
    return families


def too_few(found: Sequence[Gain]) -> list[str]:
    """Tasks with so few instances that not even all answers changed for the better would reach p ≤ 0.05."""
    return sorted(gain.task for gain in found if gain.n < FEWEST)


def too_wide(found: Sequence[Gain]) -> list[str]:
    """Other tasks that cannot tell a gain of 10 points from nothing."""
    return sorted(gain.task for gain in found if gain.n >= FEWEST and (gain.reach or 0) > WIDE)


def ends(found: Sequence[Gain]) -> list[Sequence[Gain]]:
    """All gains, or the highest and the lowest where they are many."""
    return [found] if len(found) <= SHOWN else [found[:ENDS], found[-ENDS:]]


def told(board: Board) -> dict[str, Any] | None:
    """What the report says of gains; None if SELF-GUIDE or its rivals were not run."""
    found = gains(board)
    if not found:
        return None
    families = by_family(found)
    categories = [category for family in families for category in family["categories"]]
    # Where each category is one task, or a family one category, they say nothing new.
    telling = len(categories) > len(families) and any(category["tasks"] > 1 for category in categories)
    tallies, shown = [*families, *(categories if telling else ())], ends(found)
    return {
        "families": families,
        "categories": len(categories) if telling else 0,
        "tasks": len(found),
        "scale": _scale([(gain.points, gain.low, gain.high) for several in shown for gain in several]),
        "tally_scale": _scale([(one["points"], one["low"], one["high"]) for one in tallies]),
        "untested": sum(gain.q is None for gain in found),
        "ends": shown,
        "too_few": too_few(found),
        "too_wide": too_wide(found),
        "few_tasks": FEW_TASKS,
        "fewest": FEWEST,
        "wide": WIDE,
        "level": LEVEL,
    }


def _scale(found: Sequence[tuple[float, float | None, float | None]]) -> tuple[float, float]:
    """From where to where a scale reaches, in tens of points, to hold zero and every gain with its interval."""
    there = [end for several in found for end in several if end is not None]
    return 10.0 * math.floor(min(0.0, *there) / 10), 10.0 * math.ceil(max(1.0, *there) / 10)


def line(family: dict[str, Any]) -> str:
    """A family in one line, for a terminal."""
    interval = "" if family["low"] is None else f" [{signed(family['low'])}, {signed(family['high'])}]"
    said = f"{family['name']}: {TUNED} {signed(family['points'])}{interval} over {family['rival']}; "
    if family["untested"]:
        return f"{said}{family['up']} up, {family['down']} down, not tested"
    counts = (_counted(family[key], one, key) for key, one in (("wins", "win"), ("ties", "tie"), ("losses", "loss")))
    return f"{said}{', '.join(counts)} (q ≤ {LEVEL})"


def _counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
