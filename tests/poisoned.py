"""An engine that some requests kill, hang or fail; and processes that make shards and are started again when they die."""

import faulthandler
import multiprocessing
import os
import resource
import signal
import threading
import time
from dataclasses import dataclass, field

from selfguide_ray.config import Student
from selfguide_ray.engine.scripted import ScriptedEngine
from selfguide_ray.executor import ShardWorker
from selfguide_ray.failures import failures

FORK = multiprocessing.get_context("fork")


def hang():
    while True:
        time.sleep(1)


def fail():
    raise RuntimeError("a kernel met a row that it cannot bear")


MANNERS = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the kernel does when memory ends
    "SIGSEGV": lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSEGV),
    "abort": os.abort,
    "hang": hang,
    "exception": fail,
}


class PoisonedEngine(ScriptedEngine):
    """The scripted engine. `poison` says how it ends at a request: by its seed, or by words that its prompt holds."""

    def __init__(self, poison, seconds=0.0, broken=False, lost_at=None):
        super().__init__(Student(engine="scripted"))
        self.poison, self.delay, self.fragile, self.broken = poison, seconds, broken, False
        self.calls, self.lost_at = [], lost_at

    def generate(self, requests):
        self.calls.append(len(requests))
        completions = super().generate(requests)  # it has come some way
        if len(self.calls) == self.lost_at:
            MANNERS["SIGKILL"]()
        for request in requests:
            text = self.tokenizer.decode(request.suffix)
            for sign, manner in self.poison.items():
                if sign == request.seed or (isinstance(sign, str) and sign in text):
                    self.broken = self.fragile
                    MANNERS[manner]()
        if self.broken:
            raise RuntimeError("it has failed before")
        return completions


@dataclass(frozen=True)
class Poisons:
    """Makes engines, in this process or another."""

    poison: dict = field(default_factory=dict)
    seconds: float = 0.0
    broken: bool = False
    lost_at: int | None = None  # the machine is lost while so many calls of the engine are made

    def __call__(self):
        return PoisonedEngine(self.poison, self.seconds, self.broken, self.lost_at)


def make(config, stages, engine, shards, threads=1):
    """All shards through all stages, by one worker in so many threads."""
    worker = ShardWorker(config, stages, engine)
    several = [
        threading.Thread(target=lambda mine: [list(worker.work(s)) for s in mine], args=(shards[i::threads],))
        for i in range(threads)
    ]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()


def quietly(*arguments):
    """`make` in a process whose death leaves no core and no traceback: many of them would take long."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make(*arguments)


def supervised(config, stages, engines, run, threads=1):
    """`make` in processes, with another of the engines or the last, until one ends by itself; how many died."""
    engines, deaths = list(engines), 0
    while True:
        engine = engines.pop(0) if len(engines) > 1 else engines[0]
        process = FORK.Process(target=quietly, args=(config, stages, engine, run.shards("tasks"), threads))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        if process.exitcode == 0:
            return deaths
        deaths += 1
        assert deaths < 200, failures(run)
