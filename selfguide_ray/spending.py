"""What a run has cost so far, over all its submissions, and whether the budget has more to give.

Hours are those in which a job has engines or training workers, or waits for them, each counted. They are kept in the run as
they are spent, so a job that dies takes a few seconds of its account with it and no more.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator

from selfguide_ray.config import Budget
from selfguide_ray.run import Run

ACCOUNT = "_spent.json"


class Spending:
    """The account of a run, which one job keeps. Threads may use it."""

    def __init__(self, run: Run, budget: Budget) -> None:
        self.run, self.budget = run, budget
        self.seconds = float((run.get_json(ACCOUNT, dict) or {}).get("seconds", 0.0))
        self.written = self.seconds
        self.units, self.since = 0, time.monotonic()
        self.lock = threading.Lock()

    @property
    def hours(self) -> float:
        """Hours of an engine or a worker so far."""
        with self.lock:
            self._count()
            return self.seconds / 3600

    @contextlib.contextmanager
    def holding(self, units: int) -> Iterator[None]:
        """A block in which the job has so many engines or workers."""
        self._hold(units)
        try:
            yield
        finally:
            self._hold(-units)

    def used_up(self) -> str | None:
        """Write the account, and tell which part of the budget is used up; None as long as there is more."""
        hours = self.hours
        if self.seconds != self.written:  # a job that has done nothing leaves nothing
            self.run.put(ACCOUNT, json.dumps({"seconds": round(self.seconds, 1)}).encode())
            self.written = self.seconds
        budget = self.budget
        if budget.hours is not None and hours >= budget.hours:
            return f"budget.hours: {hours:.4g} of {budget.hours:g} hours are used up"
        if budget.money is not None and hours * (budget.price or 0.0) >= budget.money:
            return f"budget.money: {hours * (budget.price or 0.0):.4g} of {budget.money:g} is used up"
        return None

    def _hold(self, units: int) -> None:
        with self.lock:
            self._count()
            self.units += units

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds += self.units * (now - self.since)
        self.since = now
