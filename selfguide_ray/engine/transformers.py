"""The engine of the base install: any causal LM of transformers, on CPU or GPU, several times faster than `generate`.

Prefixes are computed once and shared, finished rows leave and waiting ones take their place (`batching`), and LoRA
adapters of many tasks decode side by side (`adapters`). A check at the start compares this with the model's own forward
pass; a model that fails it, because its attention is of another kind, is served over transformers' cache (`cached`).
"""

import functools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from selfguide_ray.config import Student
from selfguide_ray.engine import Completion, Counters, Request, SamplingParams, before_stop
from selfguide_ray.engine.adapters import Adapters
from selfguide_ray.engine.attention import SharedPrefixAttention
from selfguide_ray.engine.batching import Batch, Bounds
from selfguide_ray.engine.cached import CachedBatches
from selfguide_ray.engine.rows import Row
from selfguide_ray.engine.trial import Ceiling, Probe, measure_ceiling, probe, tokens_that_fit
from selfguide_ray.engine.turns import Turns
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import caught
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer, context_of, locate

STOP_WINDOW = 24  # tokens at the end of a row in which a stop string is looked for, at least
PREFILL = {"cpu": 1024, "cuda": 8192}  # tokens of one prefill pass

transformers_logging.disable_progress_bar()


@dataclass(eq=False)
class Call:
    """One call of `generate`: its completions, and how many are still to come."""

    completions: list[list[Completion | None]]
    left: int
    failed: bool = False


class StepFailed(RuntimeError):
    """A step failed that several calls took together; what was met is its context."""


class TransformersEngine:
    """See `engine.Engine`."""

    def __init__(self, student: Student, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student = student
        self.dtype = resolve_dtype(student.dtype, self.device)
        self.tokenizer = StudentTokenizer(student)
        self.context = context_of(student)
        self.counters = Counters()
        self.attention = SharedPrefixAttention()
        self.attention_name = f"selfguide_shared_prefix_{id(self)}"
        AttentionInterface.register(self.attention_name, self.attention)
        self.turn = Turns()
        self.alone = False  # whether a call has the engine to itself
        self.complete = False  # whether a call has got all its completions, and its thread may wait to hear of it
        self.arriving: deque[list[Row]] = deque()
        self.calls: set[Call] = set()
        self.waiting: dict[str, list[list[Row]]] = {}  # samples of requests, by the model that they need
        self.loaded = ""  # the model that the batch runs on: empty is the base, with any number of adapters
        self.batch: Batch | CachedBatches | None = None
        self.params: dict[SamplingParams, SamplingParams] = {}
        self.fingerprint = (
            f"transformers {transformers.__version__} torch {torch.__version__} {self.device.type} {self.dtype} "
            f"rows {student.batch_rows} threads {torch.get_num_threads()}{' strict' if student.strict else ''}"
        )

    # --- the model

    @functools.cached_property
    def base(self) -> torch.nn.Module:
        """The student's weights, loaded when the first token is wanted: rendering and counting need none."""
        return self._load(locate(self.student))

    @functools.cached_property
    def probe(self) -> Probe:
        """What the trial says of the base, which then has our attention if that suits it."""
        found = probe(self.base, self.attention, self.attention_name)
        if self.student.strict and not found.shared:
            raise SelfGuideError(
                f"student.strict: {self.student.model} cannot keep it.",
                "Its attention is served in padded batches, where the last digits of a row depend on its neighbours.",
                "Set student.strict=false; the rows' texts then depend on the batch where two tokens are about even.",
            )
        return found

    @functools.cached_property
    def bounds(self) -> Bounds:
        """What a batch may take on this machine."""
        student = self.student
        tokens = tokens_that_fit(self.probe.bytes_per_token, student.kv_memory_gib, self.device)
        prefill = min(PREFILL[self.device.type], self.context - 1)
        return Bounds(student.batch_rows, tokens, prefill, student.strict)

    @functools.cached_property
    def ceiling(self) -> Ceiling:
        """What the bare model takes for a token in full batches."""
        attention = self.attention if self.probe.shared else None
        return measure_ceiling(self.base, attention, self.bounds.rows, self.bounds.prefill)

    @functools.cached_property
    def adapters(self) -> Adapters | None:
        """The LoRA adapters that run side by side."""
        return Adapters(self.base, self.student.max_adapters) if self.probe.shared else None

    @property
    def broken(self) -> bool:
        """Whether the process has to be started anew: an error inside a GPU's kernel is met by all that come after."""
        with caught() as ended:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return ended.error is not None

    @functools.cached_property
    def eos_ids(self) -> set[int]:
        """Tokens that end a row: the tokenizer's and those the model names."""
        named = self.base.generation_config.eos_token_id
        return self.tokenizer.eos_ids(named)

    def _load(self, location: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=self.dtype, use_safetensors=True, trust_remote_code=self.student.trust_remote_code
        )
        # Frozen from the start: with gradients off, torch may pick other kernels once peft has frozen the weights.
        return model.to(self.device).eval().requires_grad_(False)

    def _open(self, folder: str) -> Batch | CachedBatches:
        """An empty batch on the base, on a base with an adapter that has to run alone, or on a tuned model."""
        self._close()
        shared = self.probe.shared
        if not folder:
            model = self.base
        elif (Path(folder) / "adapter_config.json").exists():
            from peft import PeftModel

            model = PeftModel.from_pretrained(self.base, folder).eval()
            self.unload = model.unload
        else:
            model = self._load(folder)
            if shared:
                model.set_attn_implementation(self.attention_name)
        self.loaded = folder
        if not shared:
            return CachedBatches(model, self.bounds, self.counters, self._advance, self._leave)
        adapters = None if folder else self.adapters
        return Batch(model, self.attention, adapters, self.bounds, self.counters, self._advance, self._leave)

    def _close(self) -> None:
        """Take an adapter that ran alone off the base again."""
        self.batch = None
        if unload := self.__dict__.pop("unload", None):
            unload()

    def _model_of(self, adapter: str | None) -> str:
        """What to load for a request: nothing but the base where its adapter can run beside others."""
        if not adapter or (self.adapters is not None and self.adapters.stackable(adapter)):
            return ""
        return adapter

    # --- calls

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`. One of the threads that are in here advances the rows of all.

        When a step fails, nobody knows whose row was to blame: the calls that were in it begin again, one by one, and
        the one that fails alone raises what it met.
        """
        try:
            return self._answer(requests, alone=False)
        except StepFailed:
            return self._answer(requests, alone=True)

    def _answer(self, requests: Sequence[Request], alone: bool) -> list[list[Completion]]:
        call = Call([[None] * request.params.n for request in requests], sum(r.params.n for r in requests))
        groups = [self._rows(call, index, request) for index, request in enumerate(requests)]
        with self.turn:
            self.turn.wait_for(lambda: not self.alone and not (alone and self.calls))
            self.alone = alone
            self.counters.requests += len(requests)
            self.calls.add(call)
            self.arriving.extend(groups)
            try:
                self.turn.advance(lambda: not call.left or call.failed, lambda: self._lead(call))
            finally:
                self.calls.discard(call)
                self.alone = False if alone else self.alone
                self.turn.notify_all()
        if call.failed:
            raise StepFailed
        return [[c for c in completions if c is not None] for completions in call.completions]

    def _rows(self, call: Call, index: int, request: Request) -> list[Row]:
        params = self.params.setdefault(request.params, request.params)
        return [Row(request, params, row_seed(request.seed, i), (call, index, i)) for i in range(params.n)]

    @torch.inference_mode()
    def _lead(self, call: Call) -> None:
        """Step until the call is complete, taking in what other threads ask meanwhile."""
        fine = False
        # Weights of far keys are denormal numbers, with which a CPU is slow, and which weigh nothing. Set for a thread.
        torch.set_flush_denormal(True)
        try:
            while call.left:
                started = time.perf_counter()
                self._take_in()
                if self.batch is None or self.batch.idle:
                    name = next(iter(self.waiting), None)
                    if name is None:
                        break  # all that arrived was too long
                    if self.batch is None or name != self.loaded:
                        self.batch = self._open(name)
                self._feed()
                self.batch.step()
                self.counters.busy_seconds += time.perf_counter() - started
                if self.complete:
                    with self.turn:
                        self.complete = False
                        self.turn.notify_all()
            fine = True
        finally:
            torch.set_flush_denormal(False)
            if not fine:  # what is in the batch cannot be trusted: the next step begins anew
                self._close()
                with self.turn:
                    self.waiting.clear()
                    self.arriving.clear()
                    others = self.calls - {call}
                    for other in others:
                        other.failed = True
                if others:
                    raise StepFailed

    def _take_in(self) -> None:
        """Sort what has arrived by the model it needs; a prompt that leaves no room in the context ends here."""
        while self.arriving:
            rows = self.arriving.popleft()
            if rows and rows[0].prompt_tokens + 1 > self.context:
                for row in rows:
                    row.finish_reason = "too_long"
                    self._leave(row)
            elif rows:
                self.waiting.setdefault(self._model_of(rows[0].request.adapter), []).append(rows)

    def _feed(self) -> None:
        """Give the batch what waits for its model."""
        assert self.batch is not None
        groups = self.waiting.pop(self.loaded, None)
        if groups:
            for rows in groups:
                self.batch.add(rows)
            self.batch.sort()

    def _advance(self, row: Row, token: int) -> None:
        """Add a token to a row, and end the row where it is due."""
        if token in self.eos_ids:
            row.finish_reason = "stop"
            return
        row.ids.append(token)
        params = row.params
        if params.stops and not params.labels:
            window = max(STOP_WINDOW, 4 * max(map(len, params.stops)))
            tail = self.tokenizer.decode(row.ids[-window:])
            if any(stop in tail for stop in params.stops):
                row.finish_reason = "stop"
                return
        if len(row.ids) >= params.max_new_tokens or row.prompt_tokens + len(row.ids) >= self.context:
            row.finish_reason = "length"
        elif self.student.request_seconds and time.monotonic() - row.began > self.student.request_seconds:
            row.finish_reason = "timed_out"

    def _leave(self, row: Row) -> None:
        """Put a row that has ended into its call."""
        call, index, sample = row.home
        if row.finish_reason == "timed_out":  # how far it came depends on the machine
            row.ids, row.logprob, row.logprobs, row.probability = [], 0.0, [], None
        call.completions[index][sample] = Completion(
            text=before_stop(self.tokenizer.decode(row.ids), () if row.params.labels else row.params.stops),
            ids=tuple(row.ids),
            logprob=row.logprob,
            finish_reason=row.finish_reason,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached,
            generated_tokens=row.generated,
            logprobs=tuple(row.logprobs),
            probability=row.probability,
            label_probabilities=row.label_probabilities,
        )
        counters = self.counters
        counters.prompt_tokens += row.prompt_tokens
        counters.cached_tokens += row.cached
        counters.generated_tokens += row.generated
        if row.finish_reason != "too_long":
            counters.ideal_seconds += (row.prompt_tokens - row.cached) * self.ceiling.prompt_token
            counters.ideal_seconds += row.generated * self.ceiling.new_token
        call.left -= 1
        self.complete |= not call.left


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format in force: bfloat16 on a GPU, float32 on a CPU, unless one is named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
