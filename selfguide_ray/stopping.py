"""A job at work: it holds the runs that it writes, and when it is told to stop, finishes what it has in hand.

The first Ctrl-C or SIGTERM (which `ray job stop` sends) is passed on to the workers through the leases: they begin no further
shard or pack. The second one leaves at once. A thread renews the leases, so that a busy main thread is not taken for dead.
"""

import contextlib
import functools
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from selfguide_ray import progress
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught
from selfguide_ray.lease import RENEW, STALE, Lease, goes_on
from selfguide_ray.run import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP, END = "stop", "end"


class UsedUp(KeyboardInterrupt):
    """A job stops since its budget is used up; the text tells which."""


class Work:
    """A block in which a job holds runs. The block ends in KeyboardInterrupt when it was stopped.

    `drain_seconds` bounds how long what is in hand may take after the first signal.
    """

    def __init__(self, drain_seconds: float, renew: float = RENEW, stale: float = STALE) -> None:
        self.token = uuid.uuid4().hex
        self.drain_seconds, self.pause, self.stale = drain_seconds, renew, stale
        self.stopping, self.over = False, False
        self.lost: SelfGuideError | None = None
        self.used_up: str | None = None
        self.accounts: dict[str, Callable[[], str | None]] = {}  # by the run's root
        self.leases: dict[str, Lease] = {}
        self.calls: queue.SimpleQueue[str] = queue.SimpleQueue()  # a signal's handler may put into it at any moment
        self.keeper = threading.Thread(target=self._keep, daemon=True)
        self.handlers: dict[int, Any] = {}

    def hold(self, run: Run) -> None:
        """Take the lease on a run, for as long as the block lasts; raises SelfGuideError if another job has it."""
        if run.root in self.leases:
            return
        lease = Lease(run, self.token, self.pause, self.stale)
        before = lease.take()
        self.leases = self.leases | {run.root: lease}
        if before is not None:
            progress.event("taken_over", run=run.uri, owner=before)
            progress.say(f"{run.uri}: taken over from {before}, which has ended without a word")

    def watch(self, run: Run, account: Callable[[], str | None]) -> None:
        """Ask with each sign of life whether a run's budget is used up, and by what; then stop as after a signal."""
        self.accounts = self.accounts | {run.root: account}

    def permit(self, run: Run) -> Callable[[], bool]:
        """What workers ask before they begin a shard or pack; it goes to other processes."""
        return functools.partial(goes_on, run, self.token)

    def check(self) -> None:
        """Between two pieces of work: ends the block if the job was told to stop, or lost its lease."""
        self.stopping = self._spent() or self.stopping
        self._renew()
        if self.lost is not None:
            raise self.lost
        if self.stopping:
            raise self._interruption()

    def __enter__(self) -> "Work":
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        self.keeper.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        self.calls.put(END)
        self.keeper.join()
        try:
            for lease in self.leases.values():
                lease.release()
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if self.lost is not None and error is not None:
            raise self.lost from None

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        if self.stopping:
            raise self._interruption()
        self.stopping = True
        self.calls.put(STOP)

    def _interruption(self) -> KeyboardInterrupt:
        return KeyboardInterrupt() if self.used_up is None else UsedUp(self.used_up)

    def _keep(self) -> None:
        """The thread: signs of life, and what follows from a signal."""
        due, late = time.monotonic() + self.pause, float("inf")
        while True:
            call = None
            with contextlib.suppress(queue.Empty):
                call = self.calls.get(timeout=max(0.0, min(due, late) - time.monotonic()))
            if call == END:
                return
            if call == STOP:
                late = time.monotonic() + self.drain_seconds
            with caught() as ended:  # a store that does not answer is asked again
                if not self.stopping and self._spent():
                    self.stopping, call = True, STOP
                    late = time.monotonic() + self.drain_seconds
                self._renew()
            due = time.monotonic() + (self.pause if ended.error is None else min(1.0, self.pause))
            if call == STOP:
                what = "" if self.used_up is None else f"{self.used_up}; "
                what += f"finishing what is in hand, for {self.drain_seconds:g} s at most; once more to leave at once"
                progress.event("stopping", what=what)
                progress.say(f": {what}", lead="stopping")
            if self.lost is not None or time.monotonic() >= late:
                self.stopping = True
                if self.handlers and not self.over:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _spent(self) -> bool:
        """Have the accounts written; whether a budget is used up."""
        for account in self.accounts.values():
            self.used_up = account() or self.used_up
        return self.used_up is not None

    def _renew(self) -> None:
        for lease in list(self.leases.values()):
            if not lease.renew(self.stopping):
                self.lost = lease.lost()
