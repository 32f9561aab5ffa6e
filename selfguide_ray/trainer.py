"""Fine-tuning on a few Ray Train groups: each is one run whose workers load the student once and train pack after pack.

Never one run a task: starting a run costs tens of seconds. The groups take packs from one list, the costliest first, so
that they end together; what a dying group had in hand goes back to the list, and to whoever takes it next.
"""

import functools
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.actor
import ray.train
import ray.train.torch
import torch.distributed
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfguide_ray.config import Cluster, Config
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.executor import Permit, always, process_environment, waiting
from selfguide_ray.failures import caught, clear, note, noted
from selfguide_ray.models import GROUP, HIDDEN, Pack, learn, tidy
from selfguide_ray.pretraining import Recipe
from selfguide_ray.run import Run
from selfguide_ray.tuning import from_first_rank

DEATHS = 3  # of its group, after which a pack is trained task by task, and a task not at all
STARTS = 3  # of a group in a row without a pack to show for
POLL_SECONDS = 0.5


class WorkList:
    """The packs that wait, and which group has which in hand."""

    def __init__(self, packs: Sequence[Pack], permit: Permit = always) -> None:
        self.waiting, self.permit = list(packs), permit
        self.in_hand: dict[int, Pack] = {}
        self.deaths: Counter[str] = Counter()
        self.starts: Counter[int] = Counter()
        self.workers: dict[int, int] = {}
        self.places: dict[int, PlacementGroup | None] = {}
        self.given_up: list[str] = []

    def begin(self, group: int, workers: int, place: PlacementGroup | None = None) -> bool:
        """A group starts: what it had in hand goes back. False if it should not go on starting.

        One that comes back with another number of workers was resized: nodes came or went, and its pack is not to blame.
        """
        died = workers == self.workers.get(group, workers)
        self.workers[group], self.places[group] = workers, place
        self.release(group, died)
        self.starts[group] += died
        return self.starts[group] <= STARTS

    def take(self, group: int) -> Pack | None:
        """The next pack for a group, which has done with the last; None if there is none, or none may begin."""
        if self.in_hand.pop(group, None) is not None:
            self.starts[group] = 1
        if not self.waiting or not self.permit():
            return None
        self.in_hand[group] = self.waiting.pop(0)
        return self.in_hand[group]

    def release(self, group: int, died: bool = True) -> None:
        """A group has ended: its pack waits again, task by task if groups have died of it several times."""
        pack = self.in_hand.pop(group, None)
        if pack is None:
            return
        self.deaths[pack.name] += died
        if self.deaths[pack.name] < DEATHS:
            self.waiting.insert(0, pack)
        elif len(pack.tasks) > 1:
            self.waiting += pack.split()
        else:
            self.given_up += [task for task, _ in pack.tasks]

    def place(self, group: int) -> PlacementGroup | None:
        """What a group holds of the cluster."""
        return self.places.get(group)

    def left(self) -> tuple[int, list[str]]:
        """How many packs wait for a group that has prospects, and the tasks given up."""
        stillborn = any(count > STARTS for count in self.starts.values())
        return 0 if stillborn else len(self.waiting), self.given_up


def train_packs(config: Config, packs: Sequence[Pack], permit: Permit = always) -> Iterator[tuple[str, bool]]:
    """Train the packs on groups; yields (task, done) as tasks are published, and in the end those that failed.

    Without permit no further pack is begun, and those that are left have not failed.
    """
    run = Run(config.run)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    works = ray.remote(num_cpus=0)(WorkList).options(scheduling_strategy=here).remote(list(packs), permit)
    launch = ray.remote(num_cpus=0, max_retries=0)(train_group).options(scheduling_strategy=here)
    groups = [launch.remote(config, number, works) for number in range(min(config.cluster.groups, len(packs)))]
    ended: set[int] = set()
    expected = {task for pack in packs for task, _ in pack.tasks} - set(run.trained())
    cluster, fewest = config.cluster, config.cluster.workers
    fewest = fewest if isinstance(fewest, int) else fewest[0]
    with waiting(len(groups) * fewest, cluster.cpus_per_worker, cluster.gpus_per_worker):
        while expected:
            # Which groups have ended is asked before the listing, so that the last look misses nothing.
            ready, running = ray.wait(groups, num_returns=len(groups), timeout=POLL_SECONDS)
            for number in {groups.index(group) for group in ready} - ended:
                ended.add(number)
                with noted(run, "models", f"{GROUP}{number}"):
                    ray.get(groups[number])
                # One that was killed could not do so. What it holds of the cluster Ray frees only where there is a dashboard.
                ray.get(works.release.remote(number))
                if (place := ray.get(works.place.remote(number))) is not None:
                    remove_placement_group(place)
            published = sorted(expected & set(run.trained()))
            yield from ((task, True) for task in published)
            expected -= set(published)
            if not running and expected and not permit():
                break
            if not running and expected:
                left, given_up = ray.get(works.left.remote())
                if not left or len(groups) >= DEATHS * len(packs) + config.cluster.groups:
                    for task in given_up:
                        note(run, "models", task, _deadly(task))
                    yield from ((task, False) for task in sorted(expected))
                    break
                groups.append(launch.remote(config, len(groups), works))  # takes over what the others left
    ray.wait(groups, num_returns=len(groups))
    ray.kill(works)
    run.remove(HIDDEN)
    if not expected:
        tidy(run)


def _deadly(task: str) -> SelfGuideError:
    return SelfGuideError(
        f"{task}: the workers that trained it have died {DEATHS} times.",
        "They were killed from outside, or ran out of memory.",
        "See the node's log; lower cluster.tokens_per_pass or models.batch_size, or give workers more memory.",
    )


def train_group(config: Config, number: int, works: ray.actor.ActorHandle) -> None:
    """One Ray Train run. It has a process of its own, since `fit` wants a main thread."""
    run, unit = Run(config.run), f"{GROUP}{number}"
    clear(run, "models", unit)
    with noted(run, "models", unit):
        fit(functools.partial(worker, config, number, works), config.cluster, run)


def fit(function: Callable[[], None], cluster: Cluster, run: Run, restarts: int = -1) -> None:
    """Ray Train in this process: the function in every worker of a group, started anew when one dies (-1: always)."""
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = ray.train.torch.TorchTrainer(
        function,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            # To grow costs what was learned since the state was kept: look for nodes no more often than that is done.
            elastic_resize_monitor_interval_s=max(60.0, cluster.checkpoint_seconds),
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=f"{run.root}/{HIDDEN}",
            storage_filesystem=run.fs,
            failure_config=ray.train.FailureConfig(max_failures=restarts),
            worker_runtime_env={"env_vars": process_environment(cluster.cpus_per_worker, cluster.gpus_per_worker)},
        ),
    )
    trainer.fit()


def pretrain(recipe: Recipe) -> None:
    """Train an embedded student's weights on a group of workers, see `pretraining.learning`."""
    cluster = Cluster(
        workers=recipe.workers, cpus_per_worker=recipe.cpus_per_worker, gpus_per_worker=recipe.gpus_per_worker
    )
    run = Run(recipe.output)
    fit(functools.partial(pretraining_worker, recipe), cluster, run, STARTS)
    run.remove(HIDDEN)


def pretraining_worker(recipe: Recipe) -> None:
    """What each worker of such a group does."""
    from selfguide_ray.pretraining.learning import learn as learn_rows

    context = ray.train.get_context()
    rank = context.get_world_rank()
    try:
        learn_rows(recipe, rank, context.get_world_size())
    except SelfGuideError as error:  # on all ranks, and would be again
        if rank == 0:
            note(Run(recipe.output), "student", "training", error)


def worker(config: Config, number: int, works: ray.actor.ActorHandle) -> None:
    """What each worker of a group does."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()

    def told(ask: Callable[[], Any]) -> Any:
        """Rank 0 asks, all ranks hear."""
        return from_first_rank(ask() if rank == 0 else None, world)

    def packs() -> Iterator[Pack]:
        while (pack := told(lambda: ray.get(works.take.remote(number)))) is not None:
            yield pack

    if told(lambda: ray.get(works.begin.remote(number, world, get_current_placement_group()))):
        learn(config, packs(), rank, world, torch.distributed.barrier if world > 1 else lambda: None)
    elif rank == 0:
        with caught():  # to raise anything would start the group once more, for ever where no note can be written
            note(Run(config.run), "models", f"{GROUP}{number}", _stillborn(number))


def _stillborn(number: int) -> SelfGuideError:
    return SelfGuideError(
        f"training group {number} has died {STARTS} times before it had trained anything.",
        "Its workers were killed from outside, or the student does not fit their memory.",
        "See the node's log; give workers more memory, or choose a smaller student.",
    )
