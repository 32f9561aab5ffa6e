"""vLLM behind the same protocol, for GPUs: paged memory, automatic prefix caching, LoRA adapters side by side.

It runs inside this process, one in each, so that it ends with it and schedules reproducibly; one of the threads that call
advances the requests of all. Every sample is a request of its own, seeded by the row's identity: vLLM's own `n` numbers
the samples' seeds one by one, so those of two rows collide.

What fails, fails as small as it can:

- A request that vLLM refuses, or whose adapter cannot be read, is the row verdict `engine_error`.
- An exception out of a step leaves vLLM in an unknown state, and on a GPU often the whole process: all calls raise, and
  so does every later one. Whoever supervises the process has to start another.
"""

import functools
import gc
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, GenerationConfig

from selfguide_ray.config import Cluster, Student
from selfguide_ray.engine import Completion, Counters, Request, no_vllm
from selfguide_ray.engine.turns import Turns
from selfguide_ray.engine.vllm_requests import Answer, Question, complete, questions, read
from selfguide_ray.engine.vllm_settings import RANKS, arguments, check_settings, dtype_of, parallel_of, set_environment
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.student import StudentTokenizer, context_of, locate

if TYPE_CHECKING:
    from vllm import LLMEngine

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Call:
    """One call of `generate`: how many of its jobs are still to be answered."""

    left: int
    failed: bool = False


@dataclass(frozen=True)
class Weights:
    """What answers a request: the weights in a folder, and the adapter on them unless `rank` is 0."""

    location: str
    version: int = 0  # of tuned weights; the base is 0
    rank: int = 0  # the highest that vLLM has to be ready for
    adapter: str = ""
    number: int = 0  # of the adapter's content: under a number it had before, vLLM would keep the old weights


@dataclass(eq=False)
class Job:
    """One request to vLLM."""

    call: Call
    weights: Weights | None  # None if they cannot be read
    question: Question
    answer: Answer | None = None


class VllmEngine:
    """See `engine.Engine`. Raises SelfGuideError if vLLM is not installed or does not know a name in `student.vllm`.

    Weights are loaded when the first token is wanted, and once more, ready for adapters, when the first adapter is or one
    of a higher rank. Tuned weights take the place of the base for as long as requests want them.
    """

    def __init__(self, student: Student, cluster: Cluster) -> None:
        set_environment(student)
        torch.set_num_threads(max(1, int(cluster.cpus_per_engine)))  # in one process, vLLM binds no threads to cores
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise no_vllm(str(error)) from error
        self.device = current_platform.device_type
        self.student, self.cluster = student, cluster
        check_settings(student, self.device)
        self.location = locate(student)
        self.tokenizer = StudentTokenizer(student)
        limit = student.vllm.get("max_model_len") or -1  # -1 leaves it to the memory
        self.context = min(context_of(student), limit) if limit > 0 else context_of(student)
        self.counters = Counters()
        self.turn = Turns()
        self.broken = False
        self.calls: set[Call] = set()
        self.arriving: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self.names = map(str, itertools.count())
        self.engine: LLMEngine | None = None
        self.weights = Weights("")  # those of the engine
        self.highest_rank = 0
        self.adapters: set[int] = set()  # numbers of those that vLLM has read
        self.versions: dict[Any, int] = {}
        self.fingerprint = (
            f"vllm {vllm.__version__} torch {torch.__version__} {self.device} {dtype_of(student, self.device)} "
            f"rows {student.batch_rows} tensor parallel {parallel_of(cluster)}"
            f"{' strict' if student.strict else ''}{f' {student.vllm}' if student.vllm else ''}"
        )

    @functools.cached_property
    def eos_ids(self) -> set[int]:
        """Tokens that end a row: the tokenizer's and those the model names."""
        trust = self.student.trust_remote_code
        try:
            named = GenerationConfig.from_pretrained(self.location).eos_token_id
        except OSError:  # without such a file, the model's own settings hold it
            named = AutoConfig.from_pretrained(self.location, trust_remote_code=trust).get_text_config().eos_token_id
        return self.tokenizer.eos_ids(named)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`. Requests of an adapter and a prefix go in together, so that they find it cached."""
        weights = {adapter: self._weights(adapter) for adapter in dict.fromkeys(r.adapter for r in requests)}
        call = Call(0)
        jobs = [
            [Job(call, weights[request.adapter], question) for question in questions(request, self.eos_ids)]
            for request in requests
        ]
        call.left = sum(map(len, jobs))
        order = sorted(range(len(requests)), key=lambda i: (requests[i].adapter or "", requests[i].prefix))
        with self.turn:
            self.calls.add(call)
            self.arriving.extend(job for i in order for job in jobs[i])
            try:
                self._wait(call)
            finally:
                self.calls.discard(call)
            answers = [[job.answer for job in mine if job.answer] for mine in jobs]
            completions = [
                complete(request, mine, self.tokenizer, self.eos_ids)
                for request, mine in zip(requests, answers, strict=True)
            ]
            self.counters.requests += len(requests)
            for completion in itertools.chain(*completions):
                self.counters.prompt_tokens += completion.prompt_tokens
                self.counters.cached_tokens += completion.cached_tokens
                self.counters.generated_tokens += completion.generated_tokens
        return completions

    def _weights(self, adapter: str | None) -> Weights | None:
        """What answers requests with this adapter; None if it cannot be read."""
        if not adapter:
            return Weights(self.location)
        folder = Path(adapter).resolve()
        try:
            states = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
            content = (folder, *((name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for name, s in states))
            with self.turn:
                version = self.versions.setdefault(content, len(self.versions) + 1)
            if not (folder / "adapter_config.json").exists():
                (folder / "config.json").stat()
                return Weights(str(folder), version)
            settings = json.loads((folder / "adapter_config.json").read_text())
            rank = max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 1)
            return Weights(self.location, 0, min(r for r in RANKS if r >= rank), str(folder), version)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s: no adapter and no model: %s", adapter, error)
            return None

    # --- vLLM at work

    def _wait(self, call: Call) -> None:
        """Return when the call is answered, by this thread's work or another's. To be called with `turn`."""
        self.turn.advance(lambda: not call.left or call.failed, lambda: self._lead(call))
        if call.failed:
            raise RuntimeError("vLLM failed at work for another call")

    def _lead(self, call: Call) -> None:
        """Advance vLLM until the call is answered, taking in what other threads ask meanwhile."""
        if self.broken:
            raise RuntimeError("vLLM has failed before; its process has to be started anew")
        fine = False
        try:
            while call.left:
                self._admit()
                if self.running:
                    self._step()
            fine = True
        finally:
            if not fine:
                with self.turn:
                    self.arriving.clear()
                    self.running.clear()
                    for other in self.calls - {call}:
                        other.failed = True

    def _admit(self) -> None:
        """Hand over, in order, the jobs that the loaded weights serve; load others when these have no more to do."""
        while self.arriving:
            job, wanted = self.arriving[0], self.arriving[0].weights
            if wanted is not None and not self._serves(wanted):
                if self.running:
                    return
                self._start(wanted)
            self.arriving.popleft()
            if wanted is None:
                self._answered(job, Answer("engine_error"))
            else:
                self._submit(job, wanted)

    def _serves(self, wanted: Weights) -> bool:
        same = (wanted.location, wanted.version) == (self.weights.location, self.weights.version)
        return self.engine is not None and same and wanted.rank <= self.weights.rank

    def _submit(self, job: Job, weights: Weights) -> None:
        from safetensors import SafetensorError
        from vllm import TokensPrompt
        from vllm.exceptions import VLLMClientError
        from vllm.lora.request import LoRARequest

        assert self.engine is not None
        prompt = job.question.prompt
        room = min(self.context, self.engine.model_config.max_model_len) - len(prompt)
        if room < 1:
            self._answered(job, Answer("too_long"))
            return
        name = next(self.names)
        try:
            adapter = LoRARequest(str(weights.number), weights.number, weights.adapter) if weights.rank else None
            if adapter and weights.number not in self.adapters:
                self.engine.add_lora(adapter)  # now, since inside a step its failure would be everybody's
                self.adapters.add(weights.number)
            sampling = job.question.parameters(room)
            self.engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling, lora_request=adapter)
            self.running[name] = job
        except (ValueError, TypeError, KeyError, OSError, RuntimeError, VLLMClientError, SafetensorError) as error:
            log.warning("vLLM refuses a request: %s", error)
            self.engine.abort_request([name])
            self._answered(job, Answer("engine_error"))

    def _step(self) -> None:
        assert self.engine is not None
        started, fine = time.perf_counter(), False
        try:
            outputs = self.engine.step()
            fine = True
        finally:
            self.broken = not fine
        for output in outputs:
            if job := self.running.pop(output.request_id, None):
                answer = read(output)
                self.counters.rows += len(answer.ids)  # a row decoded in a step is a token
                self._answered(job, answer)
        self.counters.busy_seconds += time.perf_counter() - started
        self.counters.steps += 1
        self.counters.places += self.student.batch_rows

    def _answered(self, job: Job, answer: Answer) -> None:
        job.answer = answer
        job.call.left -= 1
        if not job.call.left:
            with self.turn:
                self.turn.notify_all()

    # --- starting and ending vLLM

    def _start(self, wanted: Weights) -> None:
        """Load weights in place of those that are loaded. Raises SelfGuideError if vLLM does not take the settings.

        vLLM's `reload_weights` would be quicker, but measured it left a head tied to the embeddings as it was (0.32).
        """
        from vllm import EngineArgs, LLMEngine
        from vllm.exceptions import VLLMClientError
        from vllm.usage.usage_lib import UsageContext

        self.close()
        self.highest_rank = max(self.highest_rank, wanted.rank)
        rank = 0 if wanted.version else self.highest_rank
        try:
            settings = EngineArgs(**arguments(self.student, self.cluster, self.device, wanted.location, rank))
            self.engine = LLMEngine.from_engine_args(settings, usage_context=UsageContext.LLM_CLASS)
        except (ValueError, VLLMClientError) as error:
            raise SelfGuideError(
                f"student.vllm: vLLM does not start on {wanted.location}: {' '.join(str(error).split())}.",
                "The model, the memory and the settings do not fit together.",
                "See student.kv_memory_gib, student.dtype and student.vllm.",
            ) from error
        self.weights = Weights(wanted.location, wanted.version, rank)

    def close(self) -> None:
        """Give back what vLLM holds in this process; the next request starts it again."""
        if self.engine is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        self.engine = None
        self.adapters.clear()
        gc.collect()
        cleanup_dist_env_and_memory()
