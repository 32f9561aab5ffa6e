"""Callers of one engine take turns: one of them advances the work of all, the others wait for theirs."""

import threading
from collections.abc import Callable


class Turns(threading.Condition):
    """A condition whose holders have the engine advanced by one thread at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.leading = False  # whether a thread is at work on the engine

    def advance(self, done: Callable[[], bool], lead: Callable[[], None]) -> None:
        """Return when `done`, by this thread's `lead` or by another's. To be called with the lock, free during `lead`."""
        while not done():
            if self.leading:
                self.wait()
                continue
            self.leading = True
            self.release()
            try:
                lead()
            finally:
                self.acquire()
                self.leading = False
                self.notify_all()
