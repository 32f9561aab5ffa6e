"""Fine-tuning over the tasks that miss a model, on a few Ray Train groups.

A group is one Ray Train run: its workers load the student once and walk the group's tasks together. Never one run a
task: starting a run costs tens of seconds. A task is done when its `model.json` is published, so a group that dies
starts again with what is left.
"""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import ray
import ray.train
import ray.train.torch
import torch.distributed
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfguide_ray.config import Config
from selfguide_ray.executor import process_environment
from selfguide_ray.failures import clear, noted
from selfguide_ray.models import make_tuner, training_pairs, write_model_json
from selfguide_ray.run import Run

RESTARTS = 3  # of a group whose worker dies
POLL_SECONDS = 0.5
HIDDEN = ".train"  # Ray Train's own files, inside the run


def untrained(run: Run) -> dict[str, tuple[str, int]]:
    """Tasks without a model: task → (shard, training tokens), from the shards of `trainset` that are there."""
    done, due = set(run.trained()), {}
    for shard in run.shards("trainset"):
        names = run.read("tasks", shard, ["task"])["task"].to_pylist()
        if set(names) <= done:
            continue
        rows = run.read("trainset", shard, ["task", "tokens", "drop_reason"])
        alive = rows.filter(pc.is_null(rows["drop_reason"])).group_by("task").aggregate([("tokens", "sum")]).to_pylist()
        tokens = {row["task"]: row["tokens_sum"] for row in alive}
        due |= {name: (shard, tokens.get(name, 0)) for name in names if name not in done}
    return due


def divide(due: dict[str, tuple[str, int]], groups: int) -> list[list[tuple[str, str]]]:
    """(task, shard) lists of about equal cost, the largest tasks first; no list is empty."""
    shares: list[list[tuple[str, str]]] = [[] for _ in range(min(groups, len(due)))]
    loads = [0] * len(shares)
    for task, (shard, tokens) in sorted(due.items(), key=lambda item: (-item[1][1], item[0])):
        lightest = loads.index(min(loads))
        shares[lightest].append((task, shard))
        loads[lightest] += tokens + 1
    return shares


def fine_tune(config: Config) -> Iterator[dict[str, Any]]:
    """Train every task that is due; yields a receipt for each as it is published, or as failed once its group has ended."""
    run = Run(config.run)
    due = untrained(run)
    for task, (_, tokens) in due.items():
        if not tokens:  # nothing survived to learn from: the student stays as it is, and says so
            yield _publish_untrained(run, task)
    shares = divide({task: work for task, work in due.items() if work[1]}, config.cluster.groups)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    launch = ray.remote(num_cpus=0, max_retries=0)(train_group).options(scheduling_strategy=here)
    groups = [launch.remote(config, number, share) for number, share in enumerate(shares)]
    expected = {task for share in shares for task, _ in share}
    while expected:
        # Whether all groups have ended is asked before the listing, so that the last look misses nothing.
        _, running = ray.wait(groups, num_returns=len(groups), timeout=POLL_SECONDS)
        published = sorted(expected & set(run.trained()))
        yield from (receipt(run, task) for task in published)
        expected -= set(published)
        if not running:
            yield from ({"table": "models", "shard": task, "failed": True} for task in sorted(expected))
            break
    ray.get(groups)


def receipt(run: Run, task: str) -> dict[str, Any]:
    """A trained task as the other tables' receipts look."""
    told = run.get_json(f"models/{task}/model.json")
    return {
        "table": "models",
        "shard": task,
        "rows": told["pairs"],
        "kept": told["pairs"],
        "seconds": told.get("seconds", 0.0),
    }


def _publish_untrained(run: Run, task: str) -> dict[str, Any]:
    with run.staging(f"models/{task}", "model.json") as folder:
        write_model_json(folder, {"task": task, "trained": False, "pairs": 0, "reason": "no training pair survived"})
    return receipt(run, task)


def train_group(config: Config, number: int, share: list[tuple[str, str]]) -> None:
    """One Ray Train run over its share of the tasks. It has a process of its own, since `fit` wants a main thread."""
    cluster, run = config.cluster, Run(config.run)
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        walk,
        train_loop_config={"config": config, "share": share},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=f"{run.root}/{HIDDEN}",
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            worker_runtime_env={"env_vars": process_environment(cluster.cpus_per_worker, cluster.gpus_per_worker)},
        ),
    )
    unit = f"group-{number}"
    clear(run, "models", unit)
    with noted(run, "models", unit):
        trainer.fit()


def walk(given: dict[str, Any]) -> None:
    """What each worker of a group does: train the tasks one after the other, skipping those that are done."""
    config: Config = given["config"]
    run, context = Run(config.run), ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    tuner = make_tuner(config, rank, world)
    done = set(run.trained())
    _barrier(world)  # all ranks have listed before one publishes, so all skip the same tasks
    for task, shard in given["share"]:
        if task in done:
            continue
        with noted(run, "models", task), _place(run, task, rank) as folder:
            told = {"task": task, "trained": True}
            told |= tuner.train(task, training_pairs(run.read("trainset", shard), task), folder)
            if folder is not None:
                write_model_json(folder, told)
                clear(run, "models", task)
        _barrier(world)


def _place(run: Run, task: str, rank: int) -> contextlib.AbstractContextManager[Path | None]:
    """Where a task's model is put together; only rank 0 writes."""
    return run.staging(f"models/{task}", "model.json") if rank == 0 else contextlib.nullcontext()


def _barrier(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()
