"""Prefixes whose keys and values are kept, as long as memory allows: each is computed once for all rows that share it.

A new prefix takes over what it has in common with one that is already there. Prefixes are computed in chunks of one
size from the start, and taken over in whole chunks, so their numbers are the same whether or not that was possible.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from selfguide_ray.engine.attention import Pass, Store

Compute = Callable[[Sequence[int], Pass], object]


class Prefix:
    """A prefix under an adapter. `users` rows need it; it is not dropped while there are any."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids, self.users = ids, 0
        self.store = Store(1, len(ids))


class Prefixes:
    """The prefixes in memory, the one used longest ago first."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.kept: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()

    @property
    def tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return sum(len(prefix.ids) for prefix in self.kept.values())

    @property
    def needed(self) -> int:
        """Tokens of prefixes that rows are using."""
        return sum(len(prefix.ids) for prefix in self.kept.values() if prefix.users)

    def has(self, adapter: str, ids: tuple[int, ...]) -> bool:
        """Whether nothing would have to be computed."""
        return (adapter, ids) in self.kept

    def shrink(self, room: int, spare: tuple[str, tuple[int, ...]] | None = None) -> None:
        """Drop unused prefixes, the one used longest ago first, until at most `room` tokens are held; `spare` stays."""
        excess = self.tokens - room
        for key in list(self.kept):
            if excess <= 0:
                return
            if not self.kept[key].users and key != spare:
                excess -= len(self.kept.pop(key).ids)

    def forget(self, adapter: str) -> None:
        """Drop what an adapter computed."""
        for key in [key for key in self.kept if key[0] == adapter]:
            del self.kept[key]

    def get(self, adapter: str, ids: tuple[int, ...], device: torch.device, compute: Compute) -> tuple[Prefix, int]:
        """The prefix, and how many of its tokens had to be computed."""
        key = (adapter, ids)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key], 0
        prefix = Prefix(ids)
        done = self._take_over(adapter, prefix)
        computed = len(ids) - done
        for start in range(done, len(ids), self.chunk):
            stop = min(start + self.chunk, len(ids))
            places = torch.arange(stop, device=device)
            mine = places[start:]
            now = Pass(
                store=prefix.store,
                first=0,
                row=torch.zeros_like(mine),
                slot=mine,
                hidden=(places > mine[:, None])[None],
                position=mine,
                own_position=places[None],
                column=mine - start,
            )
            compute(ids[start:stop], now)
        self.kept[key] = prefix
        return prefix, computed

    def _take_over(self, adapter: str, prefix: Prefix) -> int:
        """Copy the longest head, in whole chunks, that a kept prefix shares; returns its tokens."""
        best, source = 0, None
        for (name, ids), other in self.kept.items():
            if name != adapter:
                continue
            limit, length = min(len(ids), len(prefix.ids)), 0
            while length + self.chunk <= limit and (
                ids[length : length + self.chunk] == prefix.ids[length : length + self.chunk]
            ):
                length += self.chunk
            if length > best:
                best, source = length, other
        if source is not None:
            for index, pair in source.store.layers.items():
                new = tuple(x.new_zeros(1, x.shape[1], len(prefix.ids), x.shape[3]) for x in pair)
                for x, y in zip(pair, new, strict=True):
                    y[:, :, :best] = x[:, :, :best]
                prefix.store.layers[index] = new
        return best
