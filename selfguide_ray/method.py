"""The steps of SELF-GUIDE over a run, in the order of the paper's figure, and how a job goes through them.

Every step does what is missing and no more, so a job that died is continued by starting it again.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfguide_ray import progress, student
from selfguide_ray.config import Config, load
from selfguide_ray.engine import make_engine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import failures
from selfguide_ray.inputs import Inputs
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.report import headline, write_report
from selfguide_ray.run import Run
from selfguide_ray.scores import Scores
from selfguide_ray.tasks import plan as plan_tasks
from selfguide_ray.trainset import Trainset


@dataclass
class Job:
    """A run with its settings and its plan."""

    config: Config
    run: Run
    planned: dict[str, Any] = field(default_factory=dict)


Step = Callable[[Job], None]


def plan(job: Job) -> None:
    """Read the tasks and cut them into shards. Bad settings, a missing student or unusable tasks end here."""
    facts = student.facts(job.config.student)
    job.planned = plan_tasks(job.run, job.config, facts)
    job.run.sweep()
    progress.event("plan", run=job.run.uri, **{k: v for k, v in job.planned.items() if k != "refused"})
    progress.say(f"[bold]{job.run.uri}[/bold]: {job.planned['tasks']} tasks in {job.planned['shards']} shards")


def synthesize(job: Job) -> None:
    """The student writes inputs, answers them, and the pairs are filtered: inputs → outputs → trainset."""
    _stages(job, [Inputs, Outputs, Trainset], job.run.missing("trainset"))


def train(job: Job) -> None:
    """The same student is fine-tuned on each task's pairs."""
    from selfguide_ray.trainer import fine_tune, untrained

    due = untrained(job.run)
    if due:
        with _ray():
            done = {"models": len(job.run.trained())}
            _exhaust(progress.follow(fine_tune(job.config), {"models": done["models"] + len(due)}, done))


def evaluate(job: Job) -> None:
    """Every system answers the held-out instances, and the answers are scored."""
    trained = set(job.run.trained()) if "selfguide" in job.config.predictions.systems else None
    shards = [
        shard
        for shard in job.run.missing("scores")
        if trained is None or set(job.run.read("tasks", shard, ["task"])["task"].to_pylist()) <= trained
    ]
    _stages(job, [Predictions, Scores], shards)


def report(job: Job) -> None:
    """The report, and its headline on the terminal."""
    path = write_report(job.run, job.config)
    progress.event("report", path=path)
    if progress.console.is_terminal:
        progress.console.print(headline(job.run))
        progress.say(f"report: {path}")


SELFGUIDE: tuple[Step, ...] = (plan, synthesize, train, evaluate, report)


def _stages(job: Job, stages: list[Any], shards: Sequence[str]) -> None:
    from selfguide_ray.executor import map_shards

    if not shards:
        return
    with _ray():
        engine = functools.partial(make_engine, job.config.student, job.config.cluster)
        total = job.planned["shards"]
        totals = {stage.writes: total for stage in stages}
        done = {stage.writes: len(job.run.shards(stage.writes)) for stage in stages}
        _exhaust(progress.follow(map_shards(job.config, shards, stages, engine), totals, done))


def _exhaust(receipts: Iterator[dict[str, Any]]) -> None:
    for _ in receipts:
        pass


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Connect once: to the cluster that a submitted job runs on, else to a local one that ends with this process."""
    import logging

    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if _alone() else None)
        logging.getLogger("ray").setLevel(logging.ERROR)
    yield


def _alone() -> bool:
    return not os.environ.get("RAY_ADDRESS")


def perform(config: Config, steps: Sequence[Step]) -> int:
    """Go through the steps; returns the exit code: 0, or 1 if a task, a shard or a task file was left behind."""
    job = Job(config, Run(config.run))
    started = time.monotonic()
    for step in steps:
        step(job)
    left = left_behind(job)
    for what in left:
        progress.event("left_behind", what=what)
        progress.say(f"[red]left behind[/red] {what}")
    progress.event("end", seconds=round(time.monotonic() - started, 1), left_behind=len(left))
    return 1 if left else 0


def left_behind(job: Job) -> list[str]:
    """What the run could not do: refused task files, and failures that stand."""
    refused = [refusal["what"] for refusal in job.planned.get("refused", [])]
    return refused + [f"{table}/{unit}: {line}" for table, unit, line in failures(job.run)]


def main(usage: str | None, steps: Sequence[Step]) -> None:
    """An entry script of jobs/: CONFIG [key=value …] on the command line, the exit code at the end."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        sys.exit(0 if arguments else 2)
    sys.exit(guarded(lambda: perform(load(arguments[0], arguments[1:]), steps)))


def guarded(action: Callable[[], int]) -> int:
    """Run a command; a user's error is printed in its three parts and becomes exit code 2."""
    try:
        return action()
    except SelfGuideError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
