"""A row that the engine cannot bear costs itself and no other: it is found, gets its verdict, and the rest is answered.

Of an exception the guilty row is found by halving the call, in the same process. A process that dies tells nobody why, so
before each call what is in hand is noted in the run, and who takes up the shard again reads it. One death may be a lost
machine; after the second the call is made in groups of √n rows, one group at a time and nothing beside it, so a further
death tells the group. Its rows are then asked one by one, and one that was alone in the process when it died, twice, is
guilty: so a verdict costs five deaths, whatever the size of the call. Deaths from outside hardly meet a row alone twice,
the less as the second time other rows are answered before it. And a process that follows a dead one is first given a
harmless request: an engine that dies of that cannot start, and no row is suspected.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from selfguide_ray.engine import Completion, Counters, Engine, Request, SamplingParams
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught
from selfguide_ray.run import Run

FOLDER = "in_hand"
BETWEEN, WAITING = "", "waiting"  # instead of what is in hand: work of the stage's own, and a turn to wait for
HARMLESS = "harmless"  # in hand is no row of the shard
CALL, GROUP, ROW = 2, 1, 2  # deaths after which a call is cut, a group is cut, a row is guilty
OURS = 2  # how many deaths one counts for that the guard brought about itself: it was no lost machine
HARMLESS_DEATHS = 3  # more of a harmless request, one after the other: the shard fails
IDLE_DEATHS = 20  # more with nothing in hand, which other shards in flight may have brought about: the same
EXIT = 70  # of a process that the guard ends


@dataclass
class Note:
    """What is known of a shard that is being made, `in_hand/<table>/<shard>.json`; it outlives the process."""

    run: Run
    table: str
    shard: str
    hand: str = BETWEEN  # what the engine was given last
    cause: str | None = None  # why the guard ended the process
    idle_deaths: int = 0
    deaths: dict[str, int] = field(default_factory=dict)  # of what was in hand
    causes: dict[str, str] = field(default_factory=dict)  # of the last of these deaths
    verdicts: dict[str, dict[int, str]] = field(default_factory=dict)  # call → row → finish reason

    @property
    def path(self) -> str:
        """Its file in the run."""
        return f"{FOLDER}/{self.table}/{self.shard}.json"

    @property
    def bad_rows(self) -> int:
        """How many rows bear a verdict."""
        return sum(map(len, self.verdicts.values()))

    def read(self) -> None:
        """Take up what an earlier process left, and count its death."""
        told = self.run.get_json(self.path)
        if told is not None:
            told["verdicts"] = {
                call: {int(row): why for row, why in rows.items()} for call, rows in told["verdicts"].items()
            }
            vars(self).update(told)
            if self.hand == BETWEEN:
                self.idle_deaths += 1
            elif self.hand != WAITING:
                self.deaths[self.hand] = self.deaths.get(self.hand, 0) + (OURS if self.cause else 1)
                self.causes[self.hand] = self.cause or "killed_engine"
        self.hand, self.cause = BETWEEN, None
        self.write()

    def write(self) -> None:
        """Keep it."""
        told = {name: value for name, value in vars(self).items() if name not in ("run", "table", "shard")}
        self.run.put(self.path, json.dumps(told).encode())

    def take(self, what: str) -> None:
        """Note what the engine is given now."""
        self.hand = what
        self.write()

    def forget(self, what: str) -> None:
        """It was answered: what it was suspected of is void."""
        self.deaths.pop(what, None)
        self.causes.pop(what, None)

    def answered(self, call: str) -> None:
        """A call that was cut is answered: when it comes again, it comes whole, without the rows that bear verdicts."""
        for what in [what for what in self.deaths if what.startswith(f"{call}/")]:
            self.forget(what)
        self.take(BETWEEN)


def sweep(run: Run) -> None:
    """Remove the notes of shards that are made: their process died, or their store failed, after the last step but one."""
    for table in run.names(FOLDER):
        made = set(run.shards(table))
        for name in run.names(f"{FOLDER}/{table}"):
            if name.removesuffix(".json") in made:
                run.remove(f"{FOLDER}/{table}/{name}")


class Room:
    """Several calls may be in it, or one alone; one that wants to be alone is not kept waiting by later ones."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = self.wanting = 0
        self.closed = False

    @contextlib.contextmanager
    def entered(self, alone: bool, waiting: Callable[[], None]) -> Iterator[None]:
        """Be in the room for as long as the block lasts; `waiting` is called if that takes waiting for."""

        def free() -> bool:
            return not self.closed and not (self.inside if alone else self.wanting)

        with self.changed:
            if not free():
                waiting()
            self.wanting += alone
            self.changed.wait_for(free)
            self.wanting -= alone
            self.inside += 1
            self.closed = alone
        try:
            yield
        finally:
            with self.changed:
                self.inside -= 1
                self.closed = False
                self.changed.notify_all()


class Guard:
    """What the shards of one process share: who is in the engine, and the end of the process."""

    def __init__(
        self, run: Run, bad_rows: int, stall_seconds: float | None, end: Callable[[int], object] = os._exit
    ) -> None:
        self.run, self.bad_rows, self.stall_seconds, self.end = run, bad_rows, stall_seconds, end
        self.room = Room()
        self.mine = threading.local()  # the note and the calls so far of the shard that a thread makes
        self.in_hand: dict[int, Note] = {}  # by thread, those whose rows are in the engine
        self.proven = False  # whether the engine of this process has answered
        self.watch = threading.Lock()
        self.watching, self.given = False, 0  # whether a thread looks for progress; how often the engine was given rows

    @contextlib.contextmanager
    def making(self, table: str, shard: str) -> Iterator[None]:
        """Around all that makes a shard. Its note is gone afterwards, also when the shard failed: only deaths leave one.

        Raises SelfGuideError if the process has died too often of what no row can be blamed for.
        """
        note = Note(self.run, table, shard)
        self.mine.note, self.mine.calls = note, 0
        note.read()
        try:
            harmless = note.deaths.get(HARMLESS, 0)
            if harmless > HARMLESS_DEATHS or note.idle_deaths > IDLE_DEATHS:
                raise SelfGuideError(
                    f"{table}/{shard}: its process died {harmless + note.idle_deaths} times without a row in hand.",
                    "So it was no row that killed it: the engine cannot start, or memory ends elsewhere.",
                    "Look at the logs of Ray's workers, give the actors more memory, and submit again.",
                )
            yield
        finally:
            self.run.remove(note.path)

    def stop(self, cause: str) -> None:
        """End the process, having noted why; whoever supervises it starts another."""
        for note in list(self.in_hand.values()):
            note.cause = cause
            note.write()
        self.end(EXIT)

    @contextlib.contextmanager
    def watched(self, note: Note, what: str, engine: Engine) -> Iterator[None]:
        """Note what the engine is given, and end the process if it makes no progress with it for `stall_seconds`."""
        note.take(what)
        thread = threading.get_ident()
        with self.watch:
            self.in_hand[thread] = note
            self.given += 1
            if self.stall_seconds is not None and not self.watching:
                self.watching = True
                threading.Thread(target=self._watch, args=(engine, self.stall_seconds), daemon=True).start()
        try:
            yield
        finally:
            with self.watch:
                del self.in_hand[thread]

    def _watch(self, engine: Engine, bound: float) -> None:
        """Look now and then, until nothing is in hand."""
        seen: tuple[Counters, int] | None = None
        since = 0.0
        while True:
            now = engine.counters.copy(), self.given
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > bound:
                self.stop("timed_out")
                return
            time.sleep(min(5.0, bound / 4))
            with self.watch:
                if not self.in_hand:
                    self.watching = False
                    return


class Guarded:
    """An engine whose bad rows are found and left out. Threads call it within `Guard.making`; see `engine.Engine`."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        self.engine, self.guard = engine, guard
        self.tokenizer, self.context, self.fingerprint = engine.tokenizer, engine.context, engine.fingerprint

    @property
    def counters(self) -> Counters:
        """Of the engine, for all threads."""
        return self.engine.counters

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`. A row with a verdict is answered by nothing, `finish_reason` tells why.

        The number of a call in its shard and that of a row in its call are what is remembered of them: after a death
        a stage makes the same calls again.
        """
        mine = self.guard.mine
        number, mine.calls = mine.calls, mine.calls + 1
        return _Call(self, mine.note, str(number), requests).answered() if requests else []


class _Call:
    """One call of `Guarded.generate`."""

    def __init__(self, guarded: Guarded, note: Note, name: str, requests: Sequence[Request]) -> None:
        self.engine, self.guard, self.note, self.name, self.requests = (
            guarded.engine, guarded.guard, note, name, requests,
        )  # fmt: skip
        self.verdicts = note.verdicts.get(name, {})
        self.found: dict[int, list[Completion]] = {}
        self.error: Exception | None = None  # the last that a bad row met

    def answered(self) -> list[list[Completion]]:
        """All completions."""
        if self.note.deaths:
            self._prove()
        rows = range(len(self.requests))
        if self._deaths("all") < CALL:
            self._ask("all", rows, alone=False)
        else:
            self._cut(rows)
            self.note.answered(self.name)
        return [self.found[row] if row in self.found else self._nothing(row) for row in rows]

    def _prove(self) -> None:
        """Have the first token of a prompt continued by one, once in a process: that loads the engine and blames no row."""
        with self.guard.room.entered(True, lambda: self.note.take(WAITING)):
            if self.guard.proven:
                return
            first = self.requests[0]
            harmless = Request((), (first.prefix + first.suffix)[:1], SamplingParams(max_new_tokens=1))
            with self.guard.watched(self.note, HARMLESS, self.engine), caught():
                self.engine.generate([harmless])
            self.guard.proven = True
            self.note.forget(HARMLESS)

    def _cut(self, rows: range) -> None:
        """Ask group by group, those first that a death has met; row by row where it met the group.

        In a group the suspected rows come last: a process that answers the others is sound.
        """
        size = math.isqrt(len(rows) - 1) + 1
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        for group in sorted(groups, key=lambda group: not self._deaths(_span(group))):
            if size > 1 and self._deaths(_span(group)) < GROUP:
                self._ask(_span(group), group, alone=True)
                continue
            for row in sorted(group, key=lambda row: self._deaths(f"{row}")):
                if self._deaths(f"{row}") >= ROW:
                    self._condemn(row, self.note.causes[f"{self.name}/{row}"])
                else:
                    self._ask(f"{row}", [row], alone=True)

    def _deaths(self, what: str) -> int:
        return self.note.deaths.get(f"{self.name}/{what}", 0)

    def _ask(self, what: str, rows: Sequence[int], alone: bool) -> None:
        """Have rows answered that bear no verdict, beside other shards' or with the process to themselves."""
        rows = [row for row in rows if row not in self.verdicts]
        if not rows:
            return
        with (
            self.guard.room.entered(alone, lambda: self.note.take(WAITING)),
            self.guard.watched(self.note, f"{self.name}/{what}", self.engine),
        ):
            self._halve(rows)

    def _halve(self, rows: Sequence[int]) -> None:
        """Have rows answered; when the engine raises, each half for itself, until the guilty ones are alone."""
        with caught() as ended:
            answers = self.engine.generate([self.requests[row] for row in rows])
        if ended.error is None:
            self.found.update(zip(rows, answers, strict=True))
            return
        if isinstance(ended.error, SelfGuideError):  # of a setting
            raise ended.error
        if getattr(self.engine, "broken", False):
            self.guard.stop("engine_error")
            raise ended.error
        if len(rows) == 1:
            self.error = ended.error
            self._condemn(rows[0], "engine_error")
            return
        middle = len(rows) // 2
        self._halve(rows[:middle])
        self._halve(rows[middle:])

    def _condemn(self, row: int, reason: str) -> None:
        """Give a row its verdict. If there are too many, or all rows of a call bear one, the engine is to blame: raises."""
        if row in self.verdicts:
            return
        self.verdicts[row] = reason
        self.note.verdicts[self.name] = self.verdicts
        self.note.write()
        if self.note.bad_rows > self.guard.bad_rows or 1 < len(self.requests) == len(self.verdicts):
            raise self.error or SelfGuideError(
                f"{self.note.table}/{self.note.shard}: {self.note.bad_rows} rows, each alone, ended the engine's process.",
                "With so many, the engine is to blame and not the rows: memory, a driver, its installation.",
                "Look at the logs of Ray's workers; cluster.bad_rows says how many rows of a shard may be bad.",
            )

    def _nothing(self, row: int) -> list[Completion]:
        return [Completion("", (), 0.0, self.verdicts[row])] * self.requests[row].params.n


def _span(rows: range) -> str:
    return f"{rows.start}-{rows.stop}"
