"""What both ways of training have of torch: the student as they load it, the optimiser, and when training has failed."""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM

from selfguide_ray.config import Config, Models
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.student import locate


def training_device() -> torch.device:
    """The GPU that this process was given, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(config: Config, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The student's weights in a number format, or in four bits where `models.quantize` asks for it (QLoRA).

    Raises SelfGuideError where four bits cannot be had.
    """
    student = config.student
    more: dict[str, Any] = {}
    if config.models.quantize == "nf4":
        more = _four_bits(config, device, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        locate(student), dtype=dtype, use_safetensors=True, trust_remote_code=student.trust_remote_code, **more
    )
    return model if more else model.to(device)


def make_optimizer(
    parameters: Iterable[Any], settings: Models, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW as in spec §2, over parameters or groups of them; fused, so without temporaries of the weights' size."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.peak_rate,
        betas=betas,
        eps=1e-8,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def over_ranks(values: torch.Tensor, world: int) -> list[float]:
    """Sums over the ranks of a group, the same on all of them; `values` is changed."""
    if world > 1:
        torch.distributed.all_reduce(values)
    return values.tolist()


def diverged(task: str, sign: str) -> SelfGuideError:
    """What a user is told of a training in which a number is not finite; `sign` says which."""
    return SelfGuideError(
        f"{task}: {sign}.",
        "Training has diverged, and its weights would be worthless.",
        "Lower models.learning_rate, or set student.dtype=float32.",
    )


def _four_bits(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if config.models.method == "full":
        why = "Four-bit weights are frozen: only an adapter can be trained on them."
    elif device.type != "cuda":
        why = "Four-bit weights are computed by a GPU, and this worker has none."
    elif find_spec("bitsandbytes") is None:
        why = "They are made by the package bitsandbytes, which is not installed."
    else:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
        return {"quantization_config": quantization, "device_map": {"": device}}
    raise SelfGuideError("models.quantize: nf4 cannot be had here.", why, "Set models.quantize=none, or see to that.")
