"""What the benchmarks of jobs/benchmark.py share: taking turns, and the form of their figures."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

Measured = dict[str, Any]


def alternate(candidates: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median rate of each candidate, taking turns, so that a noisy machine troubles all alike."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            rates[name].append(run())
    return {name: statistics.median(several) for name, several in rates.items()}


def figures(rates: Mapping[str, float]) -> Measured:
    """Our rate, the peers', and how many times theirs ours is."""
    peers = {name: rate for name, rate in rates.items() if name != "ours"}
    return {
        "ours": rates["ours"],
        "peers": peers,
        "ratio": {name: rates["ours"] / rate for name, rate in peers.items()},
    }
