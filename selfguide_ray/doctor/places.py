"""Checks of where a run reads and writes: the source of tasks, and the run's folder."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from selfguide_ray import tasks
from selfguide_ray.doctor import Finding, Patient
from selfguide_ray.embedded import resolve
from selfguide_ray.run import TEMPORARY, Run
from selfguide_ray.student import locate
from selfguide_ray.task_files import task_files

GIB = 1 << 30
ROW_BYTES = 2048  # of a row of inputs or outputs, over all tables, compressed
ADAPTER_SHARE = 0.02  # of the student's weights that an adapter of rank 16 takes


def source(patient: Patient) -> Iterator[Finding]:
    """The first task can be read."""
    task, refusals = patient.first
    where = patient.config.tasks.source
    if task is None:
        first = f" The first of {len(refusals)} that were refused: {refusals[0].what}" if refusals else ""
        yield Finding(
            "wrong",
            f"{where}: tasks.select={patient.config.tasks.select} leaves no task.{first}",
            refusals[0].instead if refusals else "Use names of tasks, or all.",
        )
        return
    if refusals:
        yield Finding(
            "warning",
            f"{where}: {len(refusals)} files before the first good one are refused: {refusals[0].what}",
            f"{refusals[0].instead} The run leaves them out, and its exit code is 1.",
        )
    yield Finding(
        "ok",
        f"{where}: the first task is {task.name}, {len(task.examples)} examples, {len(task.instances)} held-out instances.",
    )
    if not task.instances:
        yield Finding("warning", f"{task.name} has no held-out instance.", "Without one it is not scored.")


def settings(patient: Patient) -> Iterator[Finding]:
    """The run's folder is new, or was made by these settings."""
    there = patient.run.shards("tasks")
    patient.run.check(patient.config, patient.facts)
    if there:
        yield Finding("ok", f"{patient.run.uri} was made by these settings; the run goes on there.")
    else:
        yield Finding("ok", f"{patient.run.uri} holds no run yet.")


def writing(patient: Patient) -> Iterator[Finding]:
    """A file can be written where the run will lie, read back and removed."""
    run = patient.run
    place = Run(str(_standing(run))) if run.local else run
    name, data = f"{TEMPORARY}doctor-{uuid.uuid4().hex[:8]}", uuid.uuid4().bytes
    try:
        place.put(name, data)
        back = place.get(name)
    finally:
        place.remove(name)
    if back != data:
        yield Finding("wrong", f"{place.root} gives back other bytes than were written.", "Choose another run=DIR.")
    else:
        yield Finding("ok", f"{place.root} can be written, read and cleared.")


def disk(patient: Patient) -> Iterator[Finding]:
    """Room on the run's disk against a rough need: its rows, and the weights that are kept or made at a time."""
    config, run = patient.config, patient.run
    if not run.local:
        yield Finding("ok", "The run lies on an object store; its room is not looked at.")
        return
    free = shutil.disk_usage(_standing(run)).free
    wanted = tasks.Selection(config.tasks.select, tasks.find_splits(config))
    count = sum(wanted(file.name, None) is not False for file in task_files(resolve(config.tasks.source)))
    rounds = max(config.inputs.rounds.classification, config.inputs.rounds.generation)
    rows = rounds * config.inputs.prompts_per_round
    held = config.tasks.instances * len(config.predictions.systems)
    weights, models = _weights(patient), max(1, len(config.predictions.tuned))
    if config.models.method == "lora":
        weights = weights * ADAPTER_SHARE * config.models.rank / 16
    at_a_time = count if config.models.weights_stay else min(count, config.cluster.models_on_disk)
    need = count * (rows + held) * ROW_BYTES + at_a_time * models * weights
    told = f"{free / GIB:,.1f} GiB free, and up to {count} tasks need about {need / GIB:,.1f} GiB"
    if free < need:
        yield Finding(
            "wrong" if 2 * free < need else "warning", f"{told}.", "Choose another run=DIR, or clear the disk."
        )
    else:
        yield Finding("ok", f"{told}.")


def _weights(patient: Patient) -> int:
    """Bytes of the student's weights; 0 where they are not here."""
    student = patient.config.student
    place = None if student.engine == "scripted" else Path(locate(student))
    return sum(path.stat().st_size for path in place.glob("*.safetensors")) if place and place.is_dir() else 0


def _standing(run: Run) -> Path:
    """The run's folder, or the nearest one above it that is there."""
    folder = Path(run.root)
    return next(place for place in (folder, *folder.parents) if place.exists())
