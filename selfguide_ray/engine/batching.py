"""Continuous batching: rows that have ended leave at once, waiting ones take their place, memory stays under a bound.

Rows of many prefixes, settings and adapters decode in one forward pass. What else is in the batch changes a row's speed
and the last digits of its numbers; in strict mode it changes neither text nor digits, since all shapes are fixed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from selfguide_ray.engine import Counters
from selfguide_ray.engine.adapters import Adapters
from selfguide_ray.engine.attention import Pass, SharedPrefixAttention, Sharing, Store, forward, write
from selfguide_ray.engine.prefixes import Prefix, Prefixes
from selfguide_ray.engine.rows import Advance, Entry, Key, Row, next_tokens, score_labels

QUANTUM = 64  # the store grows by so many own tokens at least; strict mode sums keys in blocks of it
STRICT_PIECE, STRICT_STEP = 64, 16  # strict prefill: one row, pieces of so many tokens, the last padded to this step

Leave = Callable[[Row], None]  # takes a row that has ended


@dataclass(frozen=True)
class Bounds:
    """What a batch may take: rows, tokens whose keys and values are held, tokens of one prefill pass."""

    rows: int
    tokens: int
    prefill: int
    strict: bool


class Batch:
    """The rows at work and those waiting, on one model.

    `advance` adds a token to a row and sets its finish_reason where it ends; `leave` takes a row that has ended.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        attention: SharedPrefixAttention,
        adapters: Adapters | None,
        bounds: Bounds,
        counters: Counters,
        advance: Advance,
        leave: Leave,
    ) -> None:
        self.model, self.attention, self.adapters, self.bounds = model, attention, adapters, bounds
        self.counters, self.advance, self.leave = counters, advance, leave
        self.device = next(model.parameters()).device
        self.prefixes = Prefixes(min(128, bounds.prefill))
        self.store = Store(0, 0)
        self.rows: list[Row] = []  # row i lies in row i of the store
        self.waiting: dict[Key, list[Entry]] = {}

    @property
    def idle(self) -> bool:
        """Nothing at work and nothing waiting."""
        return not self.rows and not self.waiting

    def add(self, rows: Sequence[Row]) -> None:
        """Let the samples of a request wait, beside those of its prefix."""
        for start in range(0, len(rows), self.bounds.rows):
            entry = Entry(list(rows[start : start + self.bounds.rows]))
            self.waiting.setdefault(entry.key, []).append(entry)

    def sort(self) -> None:
        """Waiting entries of a prefix by length, so that those in a prefill pass need little padding."""
        for queue in self.waiting.values():
            queue.sort(key=lambda entry: len(entry.own))

    def step(self) -> None:
        """Let rows in if there is room for several, and advance all by a token."""
        free = self.bounds.rows - len(self.rows)
        # One at a time would be short products; a quarter of the batch costs little occupancy.
        if self.waiting and (not self.rows or free >= max(1, self.bounds.rows // 4)):
            wave: list[Entry] = []
            while (entry := self._next(wave)) is not None:
                wave.append(entry)
            if wave:
                rows = len(self.rows) + sum(len(entry.rows) for entry in wave)
                self._reserve(rows, self._tokens(wave))
                self._prefill(wave)
        if self.rows:
            self._decode()

    # --- who comes in

    def _next(self, wave: list[Entry]) -> Entry | None:
        """The next waiting entry for which there is room, its prefix and adapter at hand; None if there is none."""
        while self.waiting:
            key, queue = next(iter(self.waiting.items()))
            entry = queue[0]
            present = [*self.rows, *(row for other in wave for row in other.rows)]
            if self.bounds.strict and present and Entry(present[:1]).key != key:
                return None
            rows, tokens = len(present) + len(entry.rows), self._tokens([*wave, entry])
            if not self._make_room(key, rows, tokens) or not self._acquire(entry):
                if present:
                    return None
                self._give_up(queue)
                if not queue:
                    del self.waiting[key]
                continue
            queue.pop(0)
            if not queue:
                del self.waiting[key]
            return entry
        return None

    def _tokens(self, wave: Sequence[Entry]) -> int:
        """Own tokens that the store must hold for the rows at work and those of the wave."""
        return max([row.own + 1 for row in self.rows] + [self._room(entry) for entry in wave])

    def _room(self, entry: Entry) -> int:
        """Own tokens to have room for when an entry comes in: in strict mode all it may ever need, else a first stretch."""
        new = 0 if entry.scored else entry.params.max_new_tokens - len(entry.rows[0].ids)
        need = len(entry.columns) + (new if self.bounds.strict else min(new, QUANTUM)) + 1
        return -(-max(need, strict_length(len(entry.columns)) if self.bounds.strict else 0) // QUANTUM) * QUANTUM

    def _make_room(self, key: Key, rows: int, tokens: int) -> bool:
        """Whether so many rows fit beside the prefixes in use and this one; drops prefixes that nobody uses."""
        if rows > self.bounds.rows:
            return False
        room = self.bounds.tokens - (self.bounds.rows if self.bounds.strict else rows) * tokens
        kept = self.prefixes.kept.get(key)
        if self.prefixes.needed + (0 if kept and kept.users else len(key[1])) > room:
            return False
        self.prefixes.shrink(room - (0 if kept else len(key[1])), spare=key)
        return True

    def _give_up(self, queue: list[Entry]) -> None:
        """An entry does not fit the empty batch: half of its samples may, and one that does not is `too_long`."""
        entry = queue.pop(0)
        half = len(entry.rows) // 2
        if half:
            queue[:0] = [Entry(entry.rows[:half]), Entry(entry.rows[half:])]
            return
        entry.rows[0].finish_reason = "too_long" if not entry.rows[0].ids else "length"
        self.leave(entry.rows[0])

    def _acquire(self, entry: Entry) -> bool:
        """Have the entry's adapter and prefix ready; False if all places for adapters are in use."""
        adapter, ids = entry.key
        if adapter and self.adapters is not None:
            in_use = {name for (name, _), prefix in self.prefixes.kept.items() if prefix.users}
            dropped = self.adapters.load(adapter, in_use)
            if dropped is None:
                return False
            for name in dropped:
                self.prefixes.forget(name)
        prefix, computed = self.prefixes.get(
            adapter, ids, self.device, lambda tokens, now: self._compute(tokens, now, [adapter] * len(tokens), None)
        )
        prefix.users += len(entry.rows)
        for i, row in enumerate(entry.rows):
            row.prefix = prefix
            if not row.ids:
                mine = computed + len(row.request.suffix) if i == 0 else int(not entry.scored)
                row.cached = max(0, len(ids) + len(row.request.suffix) - mine)
        return True

    def _reserve(self, rows: int, tokens: int) -> None:
        """A store of at least this size. One that is larger stays, unless the memory is wanted for prefixes."""
        rows = self.bounds.rows if self.bounds.strict else rows
        enough = self.store.rows >= rows and self.store.tokens >= tokens
        if not enough or self.store.rows * self.store.tokens + self.prefixes.tokens > self.bounds.tokens:
            self.store.resize(rows, tokens, len(self.rows))

    # --- passes

    def _compute(
        self, ids: Sequence[int], now: Pass, adapters: Sequence[str], keep: Sequence[int] | None
    ) -> torch.Tensor | None:
        """Logits [kept, vocabulary] of a pass over packed tokens and the adapter of each; None if none are wanted."""
        with self.adapters.use(adapters) if self.adapters else contextlib.nullcontext():
            if keep is None:
                return write(self.attention, self.model, self._tensor(ids), now)
            return forward(self.attention, self.model, self._tensor(ids), now, self._tensor(keep))

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _prefill(self, wave: list[Entry]) -> None:
        """Keys and values of the entries' own tokens but the last, which decoding computes; scores of labels."""
        first = len(self.rows)
        wave.sort(key=lambda entry: (entry.scored is None, len(entry.columns)))
        for numbers in self._packs(wave):
            self._prefill_pack(first, numbers, wave)
        for entry in wave:
            for row in entry.rows:
                row.own, row.began = len(entry.own) - 1, time.monotonic()
        sources = [first + i for i, entry in enumerate(wave) for _ in entry.rows[1:]]
        self.rows += [entry.rows[0] for entry in wave] + [row for entry in wave for row in entry.rows[1:]]
        if sources:
            targets = range(first + len(wave), len(self.rows))
            self.store.copy(sources, targets, max(self.rows[i].own for i in sources))
        self._part()

    def _packs(self, wave: list[Entry]) -> Iterator[range]:
        """Entries of the wave, by number, that are prefilled in one pass; in strict mode each alone.

        Those whose labels are scored have passes of their own; those with a single token need none.
        """
        start = 0
        while start < len(wave):
            stop = start + 1
            while (
                not self.bounds.strict
                and stop < len(wave)
                and (wave[start].scored is None) == (wave[stop].scored is None)
                and (stop + 1 - start) * len(wave[stop].columns) <= self.bounds.prefill
            ):
                stop += 1
            if wave[stop - 1].columns:
                yield range(start, stop)
            start = stop

    def _prefill_pack(self, first: int, numbers: range, wave: list[Entry]) -> None:
        """Prefill some entries side by side, a long one alone and in pieces; label those that are scored."""
        entries = [wave[i] for i in numbers]
        longest = max(len(entry.columns) for entry in entries)
        piece = STRICT_PIECE if self.bounds.strict else max(self.bounds.prefill, 1)
        total = strict_length(longest) if self.bounds.strict else longest
        hidden = torch.stack([self._hidden(entry, total) for entry in entries])
        position = torch.stack([self._positions(entry, total) for entry in entries])
        found: list[list[torch.Tensor]] = [[] for _ in entries]
        for start in range(0, total, piece):
            stop = min(start + piece, total)
            columns = [[*entry.columns, *([0] * (total - longest))][start:stop] for entry in entries]
            row = [i for i, tokens in enumerate(columns) for _ in tokens]
            column = [c for tokens in columns for c in range(len(tokens))]
            slots = self._tensor(column) + start
            rows = self._tensor(row)
            adapters = [entries[i].key[0] for i in row]
            wanted = [  # behind its own tokens, and behind each inner node of the tree
                at for at, (i, c) in enumerate(zip(row, column, strict=True))
                if entries[i].scored and len(entries[i].own) - 1 <= start + c < len(entries[i].columns)
            ]  # fmt: skip
            now = Pass(
                store=self.store,
                first=first + numbers.start,
                row=rows,
                slot=slots,
                hidden=hidden[:, start:stop, :stop],
                position=position[rows, slots],
                own_position=position,
                column=self._tensor(column),
                sharing=self._sharing([entries[i].rows[0].prefix for i in row]),
                block=QUANTUM if self.bounds.strict else None,
            )
            logits = self._compute([t for tokens in columns for t in tokens], now, adapters, wanted or None)
            if logits is not None:
                for at, line in zip(wanted, logits, strict=True):
                    found[row[at]].append(line)
        for entry, lines in zip(entries, found, strict=True):
            if entry.scored:
                score_labels(entry.rows, entry.scored, torch.stack(lines), self.advance)

    def _hidden(self, entry: Entry, total: int) -> torch.Tensor:
        """Which of an entry's tokens [total, total] do not attend to which: later ones, and other branches of the tree."""
        places = torch.arange(total, device=self.device)
        hidden = places > places[:, None]
        if entry.scored and len(entry.columns) > len(entry.own):
            tree = slice(len(entry.own), len(entry.columns))
            hidden[tree, tree] = ~entry.scored.related.to(self.device)
        return hidden

    def _positions(self, entry: Entry, total: int) -> torch.Tensor:
        """Positions [total] of an entry's tokens in its sequence; the nodes of the tree count from its root."""
        start = len(entry.key[1])
        positions = torch.arange(start, start + total, device=self.device)
        if entry.scored and len(entry.columns) > len(entry.own):
            depths = self._tensor(entry.scored.depths[1:])
            positions[len(entry.own) : len(entry.columns)] = start + len(entry.own) - 1 + depths
        return positions

    def _sharing(self, prefixes: Sequence[Prefix | None]) -> Sharing | None:
        """Which tokens of a pass, given the prefix of each, attend to which prefix."""
        return Sharing.of(
            [prefix.store if prefix is not None and prefix.ids else None for prefix in prefixes], self.device
        )

    def _decode(self) -> None:
        """Another token for every row."""
        self._grow()
        rows, idle = self.rows, 0
        if self.bounds.strict:
            idle = self.store.rows - len(rows)
        shown = [*rows, *rows[:1] * idle]  # rows that are not there compute what the first computes, unseen
        own = self._tensor([row.own for row in shown])
        start = self._tensor([len(row.request.prefix) for row in shown])
        seen = -(-(max(row.own for row in rows) + 1) // 16) * 16
        seen = min(-(-seen // QUANTUM) * QUANTUM if self.bounds.strict else seen, self.store.tokens)
        places = torch.arange(seen, device=self.device)
        now = Pass(
            store=self.store,
            first=0,
            row=torch.arange(len(shown), device=self.device),
            slot=own,
            hidden=(places > own[:, None])[:, None],
            position=start + own,
            own_position=start[:, None] + places,
            sharing=self._sharing([row.prefix for row in shown]),
            block=QUANTUM if self.bounds.strict else None,
        )
        adapters = [row.request.adapter or "" for row in shown]
        logits = self._compute([row.last for row in shown], now, adapters, range(len(shown)))
        assert logits is not None
        for row in rows:
            row.own += 1
        self.counters.steps += 1
        self.counters.rows += len(rows)
        self.counters.places += self.bounds.rows
        next_tokens(rows, logits[: len(rows)], self.advance)
        self._part()

    def _grow(self) -> None:
        """Have room for another token of every row. Where memory ends, rows go back to waiting, keeping what they have."""
        need = max(row.own for row in self.rows) + 1
        if need <= self.store.tokens:
            return
        least = -(-need // QUANTUM) * QUANTUM
        while True:
            room = self.bounds.tokens - self.prefixes.needed
            fitting = [n for n in (-(-need * 3 // 2 // QUANTUM) * QUANTUM, least) if len(self.rows) * n <= room]
            if fitting:
                break
            row = self.rows[-1]
            if len(self.rows) == 1:  # alone, and still too long: the memory is its context
                row.finish_reason = "length"
                self._part()
                return
            self.rows.pop()
            self._release(row)
            entry = Entry([row])
            self.waiting[entry.key] = [entry, *self.waiting.get(entry.key, [])]
            need = max(row.own for row in self.rows) + 1
            if need <= self.store.tokens:
                return
            least = -(-need // QUANTUM) * QUANTUM
        self.prefixes.shrink(self.bounds.tokens - len(self.rows) * fitting[0])
        self.store.resize(len(self.rows), fitting[0], len(self.rows))

    def _part(self) -> None:
        """Let rows go that have ended; the last ones move into their places."""
        ended = [i for i, row in enumerate(self.rows) if row.finish_reason]
        if not ended:
            return
        gone = [self.rows[i] for i in ended]
        left = len(self.rows) - len(ended)
        holes = [i for i in ended if i < left]
        movers = [i for i in range(left, len(self.rows)) if not self.rows[i].finish_reason]
        if holes:
            self.store.copy(movers, holes, max(self.rows[i].own for i in movers))
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[left:]
        for row in gone:
            self._release(row)
            self.leave(row)

    def _release(self, row: Row) -> None:
        if row.prefix is not None:
            row.prefix.users -= 1
            row.prefix = None


def strict_length(tokens: int) -> int:
    """The tokens that strict mode prefills for so many."""
    return -(-tokens // STRICT_STEP) * STRICT_STEP
