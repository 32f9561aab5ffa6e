"""Fine-tuning on a few Ray Train groups: each is one run whose workers load the student once and walk a share of the tasks.

Never one run a task: starting a run costs tens of seconds. A group that dies starts again with what is left of its share.
"""

import functools
import uuid
from collections.abc import Callable, Iterator

import ray
import ray.train
import ray.train.torch
import torch.distributed
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfguide_ray.config import Config
from selfguide_ray.executor import process_environment
from selfguide_ray.failures import clear, noted
from selfguide_ray.run import Run

RESTARTS = 3  # of a group whose worker dies
POLL_SECONDS = 0.5
HIDDEN = ".train"  # Ray Train's own files, inside the run

Share = list[tuple[str, str]]
# (config, share, rank, world, barrier): trains a share and publishes each task when it is done.
Learner = Callable[[Config, Share, int, int, Callable[[], None]], None]


def train_shares(config: Config, shares: list[Share], learn: Learner) -> Iterator[tuple[str, bool]]:
    """Train the shares, each on a group of its own; yields (task, done) as tasks are published or their groups have ended."""
    run = Run(config.run)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    launch = ray.remote(num_cpus=0, max_retries=0)(train_group).options(scheduling_strategy=here)
    groups = [launch.remote(config, number, share, learn) for number, share in enumerate(shares)]
    expected = {task for share in shares for task, _ in share}
    while expected:
        # Whether all groups have ended is asked before the listing, so that the last look misses nothing.
        _, running = ray.wait(groups, num_returns=len(groups), timeout=POLL_SECONDS)
        published = sorted(expected & set(run.trained()))
        yield from ((task, True) for task in published)
        expected -= set(published)
        if not running:
            yield from ((task, False) for task in sorted(expected))
            break
    ray.get(groups)
    run.remove(HIDDEN)


def train_group(config: Config, number: int, share: Share, learn: Learner) -> None:
    """One Ray Train run over its share of the tasks. It has a process of its own, since `fit` wants a main thread."""
    cluster, run = config.cluster, Run(config.run)
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        functools.partial(worker, config, share, learn),
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


def worker(config: Config, share: Share, learn: Learner) -> None:
    """What each worker of a group does."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    learn(config, share, rank, world, torch.distributed.barrier if world > 1 else lambda: None)
