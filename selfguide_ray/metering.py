"""What an engine was asked for and gave: counted for each shard, and how well it was used."""

import threading
from collections.abc import Sequence

from selfguide_ray.engine import Completion, Counters, Engine, Request

TOKENS = ("prompt_tokens", "cached_tokens", "generated_tokens")


class Metered:
    """An engine that counts what each thread got from it: shards in flight share an engine, and each has its receipt."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.mine = engine, threading.local()
        self.tokenizer, self.context, self.fingerprint = engine.tokenizer, engine.context, engine.fingerprint

    @property
    def counters(self) -> Counters:
        """Of the engine, for all threads."""
        return self.engine.counters

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`."""
        completions = self.engine.generate(requests)
        mine = self._counts()
        for name in TOKENS:
            mine[name] += sum(getattr(completion, name) for several in completions for completion in several)
        return completions

    def _counts(self) -> dict[str, int]:
        if not hasattr(self.mine, "counts"):
            self.mine.counts = dict.fromkeys(TOKENS, 0)
        return self.mine.counts

    def taken(self) -> dict[str, int]:
        """Tokens that this thread's requests took since the last time."""
        counts, self.mine.counts = self._counts(), dict.fromkeys(TOKENS, 0)
        return counts


def rates(done: Counters) -> dict[str, float | None]:
    """How well the engine was used while a shard was at work, other shards in flight included; None where unknown."""

    def share(part: float, whole: float) -> float | None:
        return round(part / whole, 4) if part and whole else None

    return {
        "prefix_hit_rate": share(done.cached_tokens, done.prompt_tokens),
        "occupancy": share(done.rows, done.places),
        "prompt_tokens_per_s": share(done.prompt_tokens, done.busy_seconds),
        "generated_tokens_per_s": share(done.generated_tokens, done.busy_seconds),
        "share_of_ceiling": share(done.ideal_seconds, done.busy_seconds),
    }
