"""What generates in the benchmarks: our engine, and others behind the same call.

Each takes requests and gives each one's greedy token ids without EOS.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from benchmarks.workload import EOS, PAD, prompts
from selfguide_ray.config import Cluster, Student
from selfguide_ray.engine import Request, make_engine

Ids = tuple[int, ...]
PAGE = 64  # tokens that transformers' continuous batching shares at once; its default of 256 shares 512 of 600
STEP_TOKENS = 700  # of its prompts computed in one step: a whole prompt
# Blocks of 32 are the least that vLLM's CPU attention takes; its default of 128 shares 512 tokens of 600, at half the
# rate. Compiling gains nothing here.
VLLM_CPU: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 128, "block_size": 32, "enforce_eager": True,
    "enable_prefix_caching": True, "kv_cache_memory_bytes": 1 << 30,
}  # fmt: skip
VLLM_CPU_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # a second process would only take time from the first
PROBE = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"


class Peer(Protocol):
    """Something that generates."""

    settings: str

    def answer(self, requests: Sequence[Request]) -> list[Ids]:
        """The greedy continuations."""


class Ours:
    """The engine of this project in this process."""

    def __init__(self, folder: Path, rows: int, threads: int, **more: Any) -> None:
        student = Student(model=str(folder), batch_rows=rows, dtype="float32", **more)
        self.engine = make_engine(student, Cluster(cpus_per_engine=threads))
        self.settings = f"batch_rows {rows}"

    def answer(self, requests: Sequence[Request]) -> list[Ids]:
        """See Peer."""
        return [completion.ids for (completion,) in self.engine.generate(requests)]


class Generate:
    """`model.generate` in left-padded batches."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self.model, self.batch = model, batch
        self.settings = f"left-padded batches of {batch}"

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[Ids]:
        """See Peer."""
        texts, answers = prompts(requests), []
        for start in range(0, len(texts), self.batch):
            part = texts[start : start + self.batch]
            longest = max(map(len, part))
            ids = torch.tensor([[PAD] * (longest - len(text)) + text for text in part])
            mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in part])
            new = self.model.generate(ids, attention_mask=mask, generation_config=_greedy(requests))[:, longest:]
            answers += [before_eos(row) for row in new.tolist()]
        return answers


class Continuous:
    """transformers' continuous batching with shared prefixes."""

    def __init__(self, model: PreTrainedModel, in_flight: int) -> None:
        self.model, self.in_flight = model, in_flight
        self.settings = f"{in_flight} requests in flight, pages of {PAGE}, {STEP_TOKENS} tokens a step, block sharing"

    def answer(self, requests: Sequence[Request]) -> list[Ids]:
        """See Peer."""
        texts = prompts(requests)
        pages = -(-(max(map(len, texts)) + requests[0].params.max_new_tokens) // PAGE) + 1
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages * (self.in_flight + len({request.prefix for request in requests})),
            max_requests_per_batch=self.in_flight,
            max_batch_tokens=STEP_TOKENS,
        )
        outputs = self.model.generate_batch(
            texts, generation_config=_greedy(requests), continuous_batching_config=config, progress_bar=False
        )
        return [before_eos(output.generated_tokens) for output in outputs.values()]


class Vllm:
    """vLLM with automatic prefix caching in an interpreter of its own; see vllm_peer.py."""

    def __init__(
        self, python: str, log: Path, settings: dict[str, Any], environment: dict[str, str], eos: int = EOS
    ) -> None:
        """`settings` are the arguments of vllm.LLM; `log` gets what it prints. Raises RuntimeError if it fails."""
        script = Path(__file__).with_name("vllm_peer.py")
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | environment,
            )  # fmt: skip
        self.log, self.eos = log, eos
        version = self._ask({"load": settings})["ready"]
        shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "model")
        self.settings = f"vLLM {version}, {shown}"

    def answer(self, requests: Sequence[Request]) -> list[Ids]:
        """See Peer."""
        asked = {"prompts": prompts(requests), "max_new_tokens": requests[0].params.max_new_tokens}
        return [before_eos(ids, self.eos) for ids in self._ask(asked)["ids"]]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died; why stands in the log
        line = self.process.stdout.readline()
        if not line:
            told = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise RuntimeError(f"vLLM ended: {told[-1] if told else 'without a word'}")
        return json.loads(line)


def vllm_python(named: str | None) -> tuple[str | None, str]:
    """(the interpreter that has vLLM, "") or (None, why there is none): --vllm, the environment's, or this one."""
    python = named or os.environ.get("SELFGUIDE_VLLM_PYTHON")
    if not python:
        if importlib.util.find_spec("vllm"):
            return sys.executable, ""
        return None, "no interpreter with vLLM was named by --vllm or SELFGUIDE_VLLM_PYTHON, and this one has none"
    try:
        found = subprocess.run([python, "-c", PROBE], check=False, capture_output=True).returncode == 0
    except OSError as error:
        return None, f"{Path(python).name} cannot be run: {error.strerror}"
    return (python, "") if found else (None, f"{Path(python).name} was named, and has no module vllm")


def _greedy(requests: Sequence[Request]) -> GenerationConfig:
    tokens = requests[0].params.max_new_tokens
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=EOS, pad_token_id=PAD)


def before_eos(ids: Sequence[int], eos: int = EOS) -> Ids:
    return tuple(ids[: ids.index(eos)] if eos in ids else ids)
