"""Whether a row is the same whatever it is generated with."""

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import Measured
from benchmarks.peers import Ids
from benchmarks.workload import SHAPES, Shape, Work, save_model
from selfguide_ray.config import Cluster, Student
from selfguide_ray.engine import Request, make_engine

# Short, so that there can be many: 10,240 rows.
ROWS = Work(tasks=160, requests=64, prefix=60, suffix=(5, 20), new_tokens=8)
FEW = replace(ROWS, tasks=16)  # 1,024 rows, where each is slow
CALLS = (1, 2000)  # requests of a call, least and most


def row_identity(
    temporary: Path,
    threads: int,
    work: Work = ROWS,
    shape: Shape = SHAPES["3M"],
    dtype: str = "float32",
    strict: bool = False,
) -> Measured:
    """Sampled rows in one call, in order, in batches of 64, against shuffled, in many calls, in batches of 32."""
    folder = save_model(temporary / f"identity_{shape.layers}_{shape.hidden}", shape)
    requests = sorted(work.draw(shape.words, seed=1, temperature=1.0), key=lambda request: request.prefix)
    chance = random.Random(2)
    order = list(range(len(requests)))
    chance.shuffle(order)
    started = time.perf_counter()

    def generate(rows: int, calls: Sequence[Sequence[Request]]) -> list[Ids]:
        student = Student(model=str(folder), batch_rows=rows, dtype=dtype, strict=strict)
        engine = make_engine(student, Cluster(cpus_per_engine=threads))
        return [completion.ids for call in calls for (completion,) in engine.generate(call)]

    in_order = generate(64, [requests])
    calls, start = [], 0
    while start < len(order):
        size = chance.randint(*CALLS)
        calls.append([requests[i] for i in order[start : start + size]])
        start += size
    shuffled = dict(zip(order, generate(32, calls), strict=True))
    pairs = [(ids, shuffled[i]) for i, ids in enumerate(in_order)]
    mode = f"{dtype}, strict" if strict else dtype
    return {
        "work": f"{work}, temperature 1, {mode}; {shape.layers} layers, hidden {shape.hidden}; {len(calls)} calls",
        "rows": len(pairs),
        "rows_differing": sum(a != b for a, b in pairs),
        "tokens": sum(map(len, in_order)),
        # All behind the first that differs follow from it: what counts is how often a token is the first.
        "tokens_behind_first_difference": sum(len(a) - _common(a, b) for a, b in pairs if a != b),
        "distinct_rows": len(set(in_order)),
        "seconds": round(time.perf_counter() - started),
    }


def _common(a: Ids, b: Ids) -> int:
    """How many tokens two rows begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
