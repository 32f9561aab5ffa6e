"""Fine-tuning (spec §2): a pack of tasks in, an adapter or weights for each out, on a student that stays loaded.

Many small tasks are trained side by side over one frozen base (`side_by_side`); a task or model that needs several
workers or ZeRO is trained by all of a group together (`data_parallel`). Both see the same batches in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from selfguide_ray.config import Config
from selfguide_ray.errors import SelfGuideError

Told = dict[str, Any]  # what `model.json` will say of a task


@dataclass(frozen=True)
class Lesson:
    """A task to learn: its rows of `trainset`, and the folder its model goes to, None where it is not to be saved."""

    task: str
    rows: pa.Table
    folder: Path | None


class Memory(Protocol):
    """Where a pack's unfinished state is kept, so that a new process goes on from there."""

    def get(self, name: str) -> bytes | None:
        """What was put under the name, None if nothing was."""

    def put(self, name: str, data: bytes) -> None:
        """Keep it; whole or not at all."""

    def remove(self, name: str) -> None:
        """Forget a file, or a folder of them, if it is there."""

    def clear(self) -> None:
        """Forget everything."""


class Tuner(Protocol):
    """Trains one pack after the other on a student that stays loaded."""

    def train(self, pack: Sequence[Lesson], memory: Memory) -> dict[str, Told | SelfGuideError]:
        """Learn the pack's tasks and leave the models in their folders; returns by task what was done or why it failed.

        All ranks of a group call it together. Whatever concerns the pack as a whole is raised.
        """


def from_first_rank(what: Any, world: int) -> Any:
    """What rank 0 has, on all ranks of a group that runs; the others' own is not looked at."""
    if world == 1:
        return what
    import torch.distributed

    box = [what]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def packs_tasks(config: Config) -> bool:
    """Whether a worker may train several tasks side by side: plain LoRA on one worker, whose batch no other shares."""
    models = config.models
    return (
        config.cluster.tasks_per_batch > 1
        and models.method == "lora"
        and models.dropout == 0
        and models.zero_stage == 0
        and not models.deepspeed
        and not models.gradient_checkpointing
        and config.cluster.workers in (1, (1, 1))
        and config.student.engine != "scripted"
    )


def make_tuner(config: Config, rank: int, world: int) -> Tuner:
    """The tuner that the settings ask for."""
    if config.student.engine == "scripted":
        from selfguide_ray.tuning.scripted import ScriptedTuner

        return ScriptedTuner()
    if packs_tasks(config):
        from selfguide_ray.tuning.side_by_side import SideBySide

        return SideBySide(config)
    from selfguide_ray.tuning.data_parallel import DataParallel

    return DataParallel(config, rank, world)
