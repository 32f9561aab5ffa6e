"""The steps of SELF-GUIDE over a run, in the order of the paper's figure, and how a job goes through them.

Every step does what is missing and no more, so a job that died is continued by starting it again.
"""

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfguide_ray import guarding, models, progress, student
from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.engine import check_engine, make_engine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught, settle
from selfguide_ray.inputs import Inputs
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.report import headline, write_report
from selfguide_ray.run import Run, model_of
from selfguide_ray.scores import Scores
from selfguide_ray.spending import Spending
from selfguide_ray.status import left_behind
from selfguide_ray.stopping import UsedUp, Work
from selfguide_ray.tasks import plan as plan_tasks
from selfguide_ray.trainset import Trainset


@dataclass
class Job:
    """A run with its settings and its plan."""

    config: Config
    run: Run
    work: Work | None = None  # which holds the run; without it nothing is stopped but by force
    spending: Spending | None = None
    planned: dict[str, Any] = field(default_factory=dict)
    failed: int = 0

    def take(self, work: Work) -> None:
        """Hold the run from now on, and keep its account."""
        self.work = work
        work.hold(self.run)
        self.spending = Spending(self.run, self.config.budget)
        work.watch(self.run, self.spending.used_up)

    def check(self) -> None:
        """Between two pieces of work: goes no further if the job was told to stop, or another has the run."""
        if self.work is not None:
            self.work.check()

    def permit(self) -> dict[str, Any]:
        """For those who give work out: what is asked before a piece begins."""
        return {} if self.work is None else {"permit": self.work.permit(self.run)}

    def holding(self, units: int) -> contextlib.AbstractContextManager[None]:
        """A block in which the job has so many engines or training workers."""
        return contextlib.nullcontext() if self.spending is None else self.spending.holding(units)


Step = Callable[[Job], None]


def plan(job: Job) -> None:
    """Read the tasks and cut them into shards. Bad settings, a missing student or unusable tasks end here."""
    check_engine(job.config.student)
    facts = student.facts(job.config.student)
    _check_guide(job.config)
    job.planned = plan_tasks(job.run, job.config, facts)
    if job.work is not None:  # nobody else is at work on what is half-written
        job.run.sweep()
        guarding.sweep(job.run)
        settle(job.run)
    job.config = located(job.config)
    told = {k: v for k, v in job.planned.items() if k not in ("refused", "costs")}
    progress.event("plan", run=job.run.uri, **told)
    progress.say(f": {job.planned['tasks']} tasks in {job.planned['shards']} shards", lead=job.run.uri)


def _check_guide(config: Config) -> None:
    guide = config.outputs.guided_by
    if guide is None:
        return
    itself = Run(guide).root == Run(config.run).root
    if itself or not Run(guide).trained():
        raise SelfGuideError(
            f"outputs.guided_by: {guide} is {'this run itself' if itself else 'no run with models'}.",
            "The answers are given by the tuned models of a run that has ended.",
            "Give the folder of such a run over the same tasks, and this run another one.",
        )


def located(config: Config) -> Config:
    """The settings with absolute paths: Ray's workers have working directories of their own."""
    model = config.student.model
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    guide = config.outputs.guided_by
    return config.model_copy(
        update={
            "run": _absolute(config.run),
            "student": config.student.model_copy(update={"model": model}),
            "outputs": config.outputs.model_copy(update={"guided_by": guide and _absolute(guide)}),
        }
    )


def _absolute(uri: str) -> str:
    run = Run(uri)
    return run.root if run.local else run.uri


def synthesize(job: Job, shards: Sequence[str] | None = None) -> None:
    """The student writes inputs, answers them, and the pairs are filtered: inputs → outputs → trainset."""
    _stages(job, [Inputs, Outputs, Trainset], lambda shard: shards is None or shard in shards)


def train(job: Job, shards: Sequence[str] | None = None) -> None:
    """The same student is fine-tuned on each task's pairs; on all shards, or some."""
    due = models.untrained(job.run, job.config, shards)
    if not due:
        if shards is None:
            models.tidy(job.run)
        return
    done = len(job.run.trained())
    _count_failures(job, progress.follow(_train(job, due, shards), {"models": done + len(due)}, {"models": done}))


def _train(job: Job, due: dict[str, models.Work], shards: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for task, work in due.items():
        if not work.pairs:
            models.publish_untrained(job.run, task)
            yield models.receipt(job.run, task)
    packs = models.packs(job.run, job.config, shards)
    if packs:
        from selfguide_ray.executor import connect
        from selfguide_ray.trainer import train_packs

        connect()
        cluster = job.config.cluster
        workers = cluster.workers if isinstance(cluster.workers, int) else cluster.workers[-1]
        with job.holding(min(cluster.groups, len(packs)) * workers):
            for task, well in train_packs(job.config, packs, **job.permit()):
                yield models.receipt(job.run, task) if well else {"table": "models", "shard": task, "failed": True}


def evaluate(job: Job, shards: Sequence[str] | None = None) -> None:
    """Every system answers the held-out instances, and the answers are scored; on all shards, or some."""
    trained = set(job.run.trained())

    def ready(shard: str) -> bool:
        """Without all models of its tasks, a tuned system would be missing from a finished shard for good."""
        return (shards is None or shard in shards) and set(_models(job, shard)) <= trained

    _stages(job, [Predictions, Scores], ready)
    if not job.config.models.weights_stay:
        for shard in job.run.shards("predictions"):
            models.discard(job.run, _models(job, shard))


def train_and_evaluate(job: Job) -> None:
    """Both for all tasks; where weights do not stay, for so many at a time that the disk never holds more."""
    if job.config.models.weights_stay:
        train(job)
        evaluate(job)
        return
    waves: list[list[str]] = []
    load = 0
    for shard in job.run.shards("tasks"):
        tasks = len(_tasks(job, shard))
        if not waves or load + tasks > job.config.cluster.models_on_disk:
            waves.append([])
            load = 0
        waves[-1].append(shard)
        load += tasks
    for wave in waves:
        train(job, wave)
        evaluate(job, wave)
    if not models.untrained(job.run, job.config):
        models.tidy(job.run)


def _tasks(job: Job, shard: str) -> list[str]:
    return job.run.read("tasks", shard, ["task"])["task"].to_pylist()


def _models(job: Job, shard: str) -> list[str]:
    """The models that the predictions of a shard want."""
    systems = job.config.predictions.tuned
    return [model_of(task, system) for task in _tasks(job, shard) for system in systems]


def report(job: Job) -> None:
    """The report, and its headline on the terminal."""
    path = write_report(job.run, job.config)
    progress.event("report", path=path)
    progress.out.print(headline(job.run))
    progress.out.print(f"report: {progress.plain(path)}", soft_wrap=True, markup=False)


SELFGUIDE: tuple[Step, ...] = (plan, synthesize, train_and_evaluate, report)


def _stages(job: Job, stages: list[Any], ready: Callable[[str], bool]) -> None:
    tables = [stage.writes for stage in stages]
    shards = [shard for shard in job.run.missing(*tables) if ready(shard)]
    if not shards:
        return
    costs = job.planned.get("costs", {})
    shards.sort(key=lambda shard: -costs.get(shard, 0))  # so that no long one is left for the end
    from selfguide_ray.executor import connect, map_shards

    connect()
    engine = functools.partial(make_engine, job.config.student, job.config.cluster)
    totals = dict.fromkeys(tables, job.planned["shards"])
    done = {table: len(job.run.shards(table)) for table in totals}
    receipts = map_shards(job.config, shards, stages, engine, **job.permit())
    with job.holding(min(job.config.cluster.engines, len(shards))):
        _count_failures(job, progress.follow(receipts, totals, done))
    guarding.sweep(job.run)


def _count_failures(job: Job, receipts: Iterator[dict[str, Any]]) -> None:
    job.check()
    job.failed += sum(bool(receipt.get("failed")) for receipt in receipts)
    job.check()  # what was told to stop has not made all


def perform(config: Config, steps: Sequence[Step]) -> int:
    """Go through the steps; returns the exit code: 0, or 1 if a task, a shard or a task file was left behind.

    Raises SelfGuideError if another job works on the run; only a report is written beside it.
    """
    job = Job(config, Run(config.run))
    started = time.monotonic()
    with contextlib.ExitStack() as ends:
        if not {plan, report}.issuperset(steps):
            job.take(ends.enter_context(Work(config.cluster.drain_seconds)))
        for step in steps:
            job.check()
            step(job)
    left = left_behind(job.run)
    tell_left(left)
    progress.event("end", seconds=round(time.monotonic() - started, 1), left_behind=len(left))
    return 1 if left or job.failed else 0


def tell_left(left: Sequence[str]) -> None:
    """Say what was left behind."""
    for what in left:
        progress.event("left_behind", what=what)
        progress.say(f" {what}", lead="left behind", style="red")


def main(usage: str | None, steps: Sequence[Step]) -> None:
    """An entry script of jobs/ that goes through steps."""
    entry(usage, lambda arguments: perform(load(arguments[0], arguments[1:]), steps))


def entry(usage: str | None, command: Callable[[Sequence[str]], int]) -> None:
    """An entry script of jobs/: CONFIG [key=value …] on the command line, the exit code at the end."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        sys.exit(0 if arguments else 2)
    sys.exit(guarded(lambda: command(arguments)))


def guarded(action: Callable[[], int]) -> int:
    """Run a command; a user's error is printed in its three parts and becomes exit code 2, any other one becomes 1.

    A disk or store that fails is told in three parts below where it did.
    What is printed of an error holds no secret (`redaction`).
    """
    try:
        with caught() as ended:
            return action()
    except UsedUp as used:
        print(
            f"stopped: {used}; what is finished is kept, and with a larger budget it goes on from there",
            file=sys.stderr,
        )
        return 3
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    if isinstance(ended.error, SelfGuideError):
        print(progress.plain(f"error: {ended.error}"), file=sys.stderr)
        return 2
    print(progress.plain("".join(traceback.format_exception(ended.error))), end="", file=sys.stderr)
    if type(ended.error) in (OSError, PermissionError):  # others of their kind are of other services
        print(progress.plain(f"error: {_failed_storage(ended.error)}"), file=sys.stderr)
    return 1


def _failed_storage(error: Exception) -> SelfGuideError:
    return SelfGuideError(
        " ".join(str(error).split()),
        "A disk or an object store did not do what it was asked to, and the run has nowhere else to go.",
        "See that it can be reached, has room and lets you in; the same command goes on from what is there.",
    )
