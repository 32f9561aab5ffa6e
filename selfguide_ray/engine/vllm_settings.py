"""What vLLM is told at its start: its environment, and its engine's arguments by the student's and cluster's settings."""

import atexit
import dataclasses
import difflib
import os
import shutil
import tempfile
from typing import Any

import torch

from selfguide_ray.config import Cluster, Student
from selfguide_ray.engine import CPU_KV_GIB
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.student import context_of, locate

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for the highest rank of an adapter
ADAPTERS_IN_A_STEP = 8  # each place costs memory and time in every step, used or not
GPU_SHARE = 0.9  # of the memory of the engine's share of a GPU: weights, activations, keys and values
FIXED = ("model", "tokenizer", "max_num_seqs", "enable_lora", "logprobs_mode", "structured_outputs_config")


def set_environment(student: Student) -> None:
    """What vLLM reads from the environment when it is imported and started."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available() and student.vllm.get("enforce_eager", True):
        os.environ.setdefault(
            "TORCHDYNAMO_DISABLE", "1"
        )  # or one small function of the sampler compiles for half a minute
    if student.strict:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if "VLLM_CACHE_ROOT" not in os.environ:  # engines of a node compile at the same time: each in a folder of its own
        folder = tempfile.mkdtemp(prefix="selfguide-vllm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["VLLM_CACHE_ROOT"] = folder


def check_settings(student: Student, device: str) -> None:
    """Raises SelfGuideError for settings that vLLM does not know, that are not open, or that the device cannot serve."""
    from vllm import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in student.vllm:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SelfGuideError(
                f"student.vllm: {name} is not an argument of vLLM's engine.",
                "An argument that it does not know would stop it at its start.",
                f"Did you mean {near[0]}?" if near else "See the fields of vllm.EngineArgs.",
            )
        if name in FIXED:
            raise SelfGuideError(
                f"student.vllm: {name} is not open.",
                "The engine and the other settings of the student decide it.",
                "Leave it out; there are student.model and student.batch_rows.",
            )
    if student.strict and device == "cpu":
        raise SelfGuideError(
            "student.strict: vLLM cannot be strict on a CPU.",
            "Its kernels whose numbers do not depend on the batch are for GPUs.",
            "Take student.engine: transformers, or strict: false.",
        )


def dtype_of(student: Student, device: str) -> str:
    """The number format in force: bfloat16 on a GPU, float32 on a CPU, unless one is named."""
    return ("float32" if device == "cpu" else "bfloat16") if student.dtype == "auto" else student.dtype


def parallel_of(cluster: Cluster) -> int:
    """GPUs over which each layer is split."""
    return max(1, int(cluster.gpus_per_engine))


def arguments(student: Student, cluster: Cluster, device: str, location: str, rank: int) -> dict[str, Any]:
    """The engine's arguments for the weights in a folder, with room for adapters unless the rank is 0.

    Those in `student.vllm` come last and win.
    """
    from vllm.config import StructuredOutputsConfig

    share = cluster.gpus_per_engine
    chosen: dict[str, Any] = {
        "model": location,
        "tokenizer": locate(student),
        "trust_remote_code": student.trust_remote_code,
        "dtype": dtype_of(student, device),
        "max_model_len": -1,  # the model's, or what fits into memory
        "max_num_seqs": student.batch_rows,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": -1,
        "structured_outputs_config": StructuredOutputsConfig(backend="guidance"),
        "tensor_parallel_size": parallel_of(cluster),
        "gpu_memory_utilization": GPU_SHARE * (share if 0 < share < 1 else 1),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if kv := student.kv_memory_gib or (CPU_KV_GIB if device == "cpu" else None):
        chosen["kv_cache_memory_bytes"] = int(kv * 2**30)
    if parallel_of(cluster) > 1:
        chosen["distributed_executor_backend"] = "mp"  # inside a Ray actor, vLLM might start actors of its own
    if device == "cpu":
        # There, a seeded request whose prompt comes in pieces fails (0.32: "CPU Generator does not use offset").
        whole = max(4096, context_of(student), student.batch_rows)
        chosen |= {"enable_chunked_prefill": False, "max_num_batched_tokens": whole}
        chosen |= {"block_size": 32, "enforce_eager": True}  # least is computed twice; no minutes of compiling
    if rank:
        most = min(student.max_adapters, ADAPTERS_IN_A_STEP)
        chosen |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": most, "max_cpu_loras": student.max_adapters}
    return chosen | student.vllm
