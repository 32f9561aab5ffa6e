"""Stages over the shards that miss them, on a Ray Data actor pool: shards in, receipts out.

An actor loads the student once and takes a shard through all the stages given, so generation and annotation share one
load (statement 27). The driver sees receipts only, never rows.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.util.metrics
from ray.util.annotations import RayDeprecationWarning

from selfguide_ray import progress
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine
from selfguide_ray.failures import caught, clear, noted
from selfguide_ray.guarding import Guard, Guarded
from selfguide_ray.metering import TOKENS, Metered, rates
from selfguide_ray.run import Run

WAITED = 30.0  # seconds that nodes may take before something is said
UNNOTED = "unnoted"
RESTARTS = -1  # of an actor whose process dies: without bound, machines may be lost and rows may kill it (`guarding`)


def connect() -> None:
    """Connect once: to the cluster a submitted job runs on, else to a local one that ends with this process."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; unset it warns each time
    # Ray's core tells of every process that dies as of an error; here a death is expected, and `guarding` counts it.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    stopping = signal.getsignal(signal.SIGTERM)  # which Ray would replace by a handler that exits
    ray.init(
        log_to_driver=False,  # what goes wrong in a worker is in failures/, not in between the bars
        logging_level=logging.ERROR,
        include_dashboard=None if os.environ.get("RAY_ADDRESS") else False,
    )
    if callable(stopping) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stopping)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # `progress` draws them
    context.execution_options.preserve_order = False  # nothing depends on order, and order costs
    context.execution_no_progress_timeout_s = -1  # waiting for nodes is no failure


class Stage(Protocol):
    """Makes one table's shard out of the same shard of other tables."""

    writes: str
    reads: dict[str, tuple[str, ...] | None]  # table → columns, None for all

    def __call__(self, *tables: pa.Table) -> pa.Table:
        """The rows of `writes`, given the tables of `reads` in order."""


class StageType(Protocol):
    """A class of stages: what it makes is known before one is built."""

    writes: str

    def __call__(self, config: Config, run: Run, engine: Engine) -> Stage:
        """A stage on an engine."""


EngineFactory = Callable[[], Engine]
Permit = Callable[[], bool]  # whether another piece of work may begin, see `stopping`


def always() -> bool:
    """The permit of work that nobody stops."""
    return True


class ShardWorker:
    """What runs in an actor: stages over shards, `cluster.shards_in_flight` at a time in threads of their own."""

    def __init__(
        self, config: Config, stages: Sequence[StageType], make_engine: EngineFactory, permit: Permit = always
    ) -> None:
        self.config, self.run, self.kinds, self.make_engine = config, Run(config.run), stages, make_engine
        self.permit = permit
        self.guard = Guard(self.run, config.cluster.bad_rows, config.cluster.stall_seconds)
        self.made: dict[str, Stage] = {}
        self.starting = threading.Lock()

    @functools.cached_property
    def engine(self) -> Metered:
        """The engine, started with the first shard, so that a failure to start is noted like any other."""
        return Metered(Guarded(self.make_engine(), self.guard))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """A batch of shard names → receipts as JSON; what failed without a note, since the run cannot be reached, is one."""
        receipts: list[dict[str, Any]] = []
        with caught() as ended:
            for shard in batch["shard"]:
                receipts += self.work(str(shard))
        if isinstance(ended.error, OSError):  # Ray would hand on its text alone, among much else
            receipts.append({UNNOTED: str(ended.error)})
        elif ended.error is not None:
            raise ended.error
        return {"receipt": [json.dumps(receipt) for receipt in receipts]}

    def work(self, shard: str) -> Iterator[dict[str, Any]]:
        """Take a shard through the stages whose file is missing; a failure ends the shard's way and no other's."""
        for kind in self.kinds:
            if self.run.exists(f"{kind.writes}/{shard}.parquet"):
                continue
            if not self.permit():
                return
            receipt: dict[str, Any] = {"table": kind.writes, "shard": shard, "failed": True}
            with noted(self.run, kind.writes, shard), self.guard.making(kind.writes, shard):
                receipt = self._make(self._stage(kind), shard)
            yield receipt
            if receipt.get("failed"):
                return

    def _stage(self, kind: StageType) -> Stage:
        """The stage, built by the first thread that needs it."""
        with self.starting:
            if kind.writes not in self.made:
                self.made[kind.writes] = kind(self.config, self.run, self.engine)
            return self.made[kind.writes]

    def _make(self, stage: Stage, shard: str) -> dict[str, Any]:
        started, before = time.monotonic(), self.engine.counters.copy()
        self.engine.taken()
        rows = stage(*(self.run.read(table, shard, columns) for table, columns in stage.reads.items()))
        kept = rows.num_rows
        if "drop_reason" in rows.column_names:
            kept = rows["drop_reason"].null_count
        receipt = {
            "table": stage.writes,
            "shard": shard,
            "rows": rows.num_rows,
            "kept": kept,
            "seconds": round(time.monotonic() - started, 3),
            **self.engine.taken(),
            "engine_rates": rates(self.engine.counters.since(before)),
            "node": os.uname().nodename,
            "engine": self.engine.fingerprint,
        }
        self.run.write(stage.writes, shard, rows, receipt)
        meters().shard(receipt, rows)
        clear(self.run, stage.writes, shard)
        return receipt


class Meters:
    """What a process tells Prometheus, through Ray: shards, rows by verdict, tokens by kind, the share of known prefixes."""

    def __init__(self) -> None:
        count = ray.util.metrics.Counter
        self.shards = count("selfguide_shards", "Shards made.", ("table",))
        self.rows = count(
            "selfguide_rows", "Rows made, by the reason they were dropped for, or kept.", ("table", "verdict")
        )
        self.tokens = count(
            "selfguide_tokens", "Tokens: of prompts, of these cached, and generated.", ("table", "kind")
        )
        hits = "Share of the prompts' tokens that were there already, in the last shard."
        self.hits = ray.util.metrics.Gauge("selfguide_prefix_hit_rate", hits, ("table",))

    def shard(self, receipt: dict[str, Any], rows: pa.Table) -> None:
        """Count a shard."""
        table = receipt["table"]
        self.shards.inc(1, {"table": table})
        reasons = rows["drop_reason"].to_pylist() if "drop_reason" in rows.column_names else [None] * rows.num_rows
        for reason, number in Counter(reasons).items():
            self.rows.inc(number, {"table": table, "verdict": reason or "kept"})
        for kind in TOKENS:
            if receipt[kind]:
                self.tokens.inc(receipt[kind], {"table": table, "kind": kind.removesuffix("_tokens")})
        if (rate := receipt["engine_rates"]["prefix_hit_rate"]) is not None:
            self.hits.set(rate, {"table": table})


@functools.cache
def meters() -> Meters:
    """Those of this process."""
    return Meters()


def map_shards(
    config: Config,
    shards: Sequence[str],
    stages: Sequence[StageType],
    make_engine: EngineFactory,
    permit: Permit = always,
) -> Iterator[dict[str, Any]]:
    """Run the stages over the shards on `cluster.engines` actors; yields a receipt for each table shard made or failed.

    Without permit the actors let the shards pass that are left.
    Raises OSError where the run could not be reached, even to note that.
    """
    if not shards:
        return
    cluster, size = config.cluster, min(config.cluster.engines, len(shards))
    source = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        # Bounds on restarts have no named parameter in Ray 2.60; it deprecates the free form for 2.64 all the same.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = source.map_batches(
            ShardWorker,
            fn_constructor_kwargs={
                "config": config,
                "stages": list(stages),
                "make_engine": make_engine,
                "permit": permit,
            },
            batch_size=1,
            # Threads: while one shard waits for its slowest row, another keeps the engine full.
            compute=ray.data.ActorPoolStrategy(
                size=size,
                max_tasks_in_flight_per_actor=cluster.shards_in_flight,
                max_concurrent_calls_per_actor=cluster.shards_in_flight,
                enable_true_multi_threading=True,
            ),
            num_cpus=cluster.cpus_per_engine,
            num_gpus=cluster.gpus_per_engine or None,
            runtime_env={"env_vars": process_environment(cluster.cpus_per_engine, cluster.gpus_per_engine)},
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
    with waiting(size, cluster.cpus_per_engine, cluster.gpus_per_engine):
        for row in dataset.iter_rows():
            receipt = json.loads(row["receipt"])
            if UNNOTED in receipt:
                raise OSError(receipt[UNNOTED])
            yield receipt


@contextlib.contextmanager
def waiting(count: int, cpus: float, gpus: float, first: float = WAITED) -> Iterator[None]:
    """While the cluster lacks what so many processes ask for, say so: after `first` seconds, then ever more seldom."""
    wanted = {name: count * each for name, each in (("CPU", cpus), ("GPU", gpus)) if each}
    over, started = threading.Event(), time.monotonic()

    def watch() -> None:
        pause = first
        while not over.wait(pause):
            pause = min(2 * pause, 600.0)
            there = ray.cluster_resources()
            lacks = {name: number for name, number in wanted.items() if there.get(name, 0.0) < number}
            if lacks:
                seconds = round(time.monotonic() - started)
                has = {name: there.get(name, 0.0) for name in lacks}
                progress.event("waiting", asked=lacks, there=has, seconds=seconds)
                told = ", ".join(f"{has[name]:g} of {number:g} {name}" for name, number in lacks.items())
                progress.say(f" for nodes since {seconds} s: the cluster has {told}", lead="waiting")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def process_environment(cpus: float, gpus: float) -> dict[str, str]:
    """Environment of a worker process: spinning OpenMP threads would cost 2-9 times the work on a busy node."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, int(cpus))),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return environment if gpus else environment | {"DS_ACCELERATOR": "cpu"}
