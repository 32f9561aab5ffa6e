"""DeepSpeed as this project sets it up: its configuration, its engine around a model, and weights kept in parts."""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import ValidationError

from selfguide_ray.config import Models
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.tuning.base import make_optimizer

SLICES = 16  # of the weights, of which ZeRO-3 has about one whole at a time


class Zero:
    """DeepSpeed under some settings: `world` workers with weights in one number format."""

    def __init__(self, settings: Models, dtype: torch.dtype, world: int) -> None:
        self.settings, self.dtype, self.world = settings, dtype, world

    @property
    def stage(self) -> int:
        """How far optimiser, gradients and weights are sharded: 0 to 3."""
        return self.configuration()["zero_optimization"].get("stage", 0)

    def configuration(self) -> dict[str, Any]:
        """DeepSpeed's configuration: the user's keys over ours, those inside a section likewise."""
        half, stage = self.dtype != torch.float32, self.settings.zero_stage
        ours: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": math.ceil(self.settings.batch_size / self.world),
            "gradient_accumulation_steps": 1,  # we say ourselves which pass is a step's last
            "gradient_clipping": self.settings.clip,
            # Half precision needs float32 copies to learn; those of stage 1 can be read and put back.
            "zero_optimization": {"stage": max(stage, 1) if half else stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            "fp16": {"enabled": self.dtype == torch.float16},
            "steps_per_print": 1 << 30,
        }
        for key, value in self.settings.deepspeed.items():
            both = isinstance(value, dict) and isinstance(ours.get(key), dict)
            ours[key] = {**ours[key], **value} if both else value
        return ours

    @contextlib.contextmanager
    def in_parts(self) -> Iterator[None]:
        """Of a model that is loaded within the block, every worker keeps only its part, if the stage is 3."""
        if self.world == 1 or self.stage != 3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        import_deepspeed()
        known = HfDeepSpeedConfig(self.configuration())  # transformers looks for it while it loads
        try:
            with self._refused():
                yield
        finally:
            unset_hf_deepspeed_config()
            del known

    def start(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> tuple[Any, torch.optim.Optimizer]:
        """A DeepSpeed engine around the trainable parameters, and the optimiser inside it, AdamW unless another is given."""
        deepspeed = import_deepspeed()
        if optimizer is None:
            optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], self.settings)
        settings = self.configuration()
        if self.stage == 3:
            settings["zero_optimization"] = slices(model) | settings["zero_optimization"]
        with self._refused():
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if self.stage == 3:
            drop_copies(engine.optimizer)
        return engine, optimizer

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        """Explain what DeepSpeed says of settings that it does not accept."""
        deepspeed = import_deepspeed()
        try:
            yield
        except (ValidationError, deepspeed.DeepSpeedConfigError, AssertionError) as error:
            raise SelfGuideError(
                f"models.deepspeed: DeepSpeed does not accept {self.settings.deepspeed}.",
                " ".join(str(error).split())[:500],
                "See DeepSpeed's documentation of its configuration.",
            ) from error


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 keeps the parameter in pieces."""
    return hasattr(parameter, "ds_id")


def size_of(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


@contextlib.contextmanager
def gathered(tensor: torch.Tensor, changed: bool = False) -> Iterator[None]:
    """The tensor is whole for as long as the block lasts, also where ZeRO-3 keeps it in parts.

    What the block does to it is kept if it says so.
    """
    if not is_partitioned(tensor):
        yield
        return
    with import_deepspeed().zero.GatheredParameters([tensor], modifier_rank=0 if changed else None):
        yield


def import_deepspeed() -> Any:
    """DeepSpeed, kept from compiling its shared-memory extension in the middle of a run.

    That build takes minutes and looks like a hang; without it DeepSpeed falls back to torch's collectives.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def slices(model: torch.nn.Module) -> dict[str, int]:
    """Bounds (elements) of what ZeRO-3 has whole at a time.

    DeepSpeed's own are larger than many a student, which would be whole on every worker all the time.
    """
    size = min(max(4, sum(map(size_of, model.parameters())) // SLICES), 500_000_000)
    return {
        "reduce_bucket_size": size,
        "stage3_prefetch_bucket_size": size // 4,
        "stage3_max_live_parameters": size,
        "stage3_max_reuse_distance": size,
        "sub_group_size": size,
    }


def drop_copies(optimizer: Any) -> None:
    """Have ZeRO-3 update float32 weights where they are.

    It means to; but on a CPU it takes the weights for those of another device, and keeps a second copy of them.
    """
    for held, updated in zip(
        optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
    ):
        if held is not None and (held.dtype, held.device) == (updated.dtype, updated.device):
            updated.data = held.data


def return_memory() -> None:
    """Have this process give freed tensors back to the system at once, where the C library is glibc.

    ZeRO-3 allocates and frees weights for every layer; by default glibc keeps them, in an arena for each thread.
    """
    _mallopt((-3, 1 << 20), (-1, 1 << 20), (-8, 1))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX


def keep_memory() -> None:
    """Have this process keep freed tensors for those to come, where the C library is glibc.

    Large ones are otherwise new to the process every time, and clearing their pages is a seventh of a step on a CPU.
    """
    _mallopt((-4, 0), (-1, -1), (-8, 1))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX


def _mallopt(*options: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options:
            mallopt(option, value)
