"""The engine of the base install: any causal LM of transformers, on CPU or GPU.

A prefix is computed once and its keys and values are copied to all rows that share it; rows of a batch may have
different prefixes. Rows that finish leave the batch. The batches of one call depend on its requests alone, so on one
build the same call gives the same text.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from selfguide_ray.config import Student
from selfguide_ray.engine import Completion, Request, SamplingParams
from selfguide_ray.engine.sampling import choose
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer, context_of, locate

COMPACT = 0.75  # a batch is compacted when no more than this share of its rows is still going
STOP_WINDOW = 24  # tokens at the end of a row in which a stop string is looked for

transformers_logging.disable_progress_bar()

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Row:
    """One completion under way."""

    request: int
    key: int
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish_reason: str = ""


class TransformersEngine:
    """See `engine.Engine`."""

    def __init__(self, student: Student, threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.student, self.rows = student, student.batch_rows
        self.dtype = resolve_dtype(student.dtype, self.device)
        self.tokenizer = StudentTokenizer(student)
        self.context = context_of(student)
        self.generated = self.prompted = 0
        self.adapted: torch.nn.Module | None = None  # what generates instead of the base, while an adapter is on
        self.fingerprint = (
            f"transformers {transformers.__version__} torch {torch.__version__} {self.device.type} {self.dtype} "
            f"rows {self.rows} threads {torch.get_num_threads()}"
        )

    @functools.cached_property
    def base(self) -> torch.nn.Module:
        """The student's weights, loaded when the first token is wanted: rendering and counting need none."""
        return self._load(locate(self.student))

    @functools.cached_property
    def eos_ids(self) -> set[int]:
        """Tokens that end a row: the tokenizer's and those the model names."""
        named = self.base.generation_config.eos_token_id
        return {self.tokenizer.hf.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}

    @property
    def model(self) -> torch.nn.Module:
        """What generates now."""
        return self.adapted or self.base

    def _load(self, location: str) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=self.dtype, use_safetensors=True, trust_remote_code=self.student.trust_remote_code
        )
        # Frozen from the start: with gradients off, torch may pick other kernels once peft has frozen the weights.
        return model.to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`. Requests are batched by adapter and parameters, then by prefix and length."""
        results: list[list[Completion]] = [[] for _ in requests]
        groups: dict[tuple[str, SamplingParams], list[int]] = {}
        for index, request in enumerate(requests):
            length = len(request.prefix) + len(request.suffix)
            self.prompted += length * request.params.n
            if length + 1 > self.context:
                results[index] = [Completion("", (), 0.0, "too_long")] * request.params.n
            else:
                groups.setdefault((request.adapter or "", request.params), []).append(index)
        for adapter in dict.fromkeys(adapter for adapter, _ in groups):
            with self._adapted(adapter):
                for (name, params), members in groups.items():
                    if name == adapter:
                        members.sort(key=lambda i: (requests[i].prefix, len(requests[i].suffix), i))
                        size = max(1, self.rows // params.n)
                        for start in range(0, len(members), size):
                            for row in self._batch(requests, members[start : start + size], params):
                                results[row.request].append(self._completion(row, params))
        return results

    @contextlib.contextmanager
    def _adapted(self, folder: str) -> Iterator[None]:
        """The base model, or for as long as the block lasts an adapter on it, or a tuned model in its place."""
        if not folder:
            yield
        elif (Path(folder) / "adapter_config.json").exists():
            from peft import PeftModel

            with_adapter = PeftModel.from_pretrained(self.base, folder).eval()
            self.adapted = with_adapter
            try:
                yield
            finally:
                self.adapted = None
                with_adapter.unload()
        else:
            self.adapted = self._load(folder)
            try:
                yield
            finally:
                self.adapted = None

    def _batch(self, requests: Sequence[Request], members: list[int], params: SamplingParams) -> list[Row]:
        """Prefill the members' suffixes behind their prefixes, then decode all samples until each has ended."""
        cache, mask, logits = self._prefill([requests[i] for i in members])
        repeat = torch.arange(len(members), device=self.device).repeat_interleave(params.n)
        cache.batch_select_indices(repeat)
        mask, logits = mask[repeat], logits[repeat]
        rows = [Row(i, row_seed(requests[i].seed, sample)) for i in members for sample in range(params.n)]
        lengths = [len(requests[i].prefix) + len(requests[i].suffix) for i in members for _ in range(params.n)]
        positions = torch.tensor(lengths, device=self.device)
        keys = torch.tensor([row.key for row in rows], device=self.device)
        going = list(range(len(rows)))  # the row that each place of the batch holds
        for step in range(params.max_new_tokens):
            tokens, logprobs = choose(logits, params, keys, torch.full_like(keys, step))
            for place, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
                row = rows[going[place]]
                if not row.finish_reason:
                    self._advance(row, token, logprob, params, lengths[going[place]])
            alive = [place for place, row in enumerate(going) if not rows[row].finish_reason]
            if not alive:
                break
            if len(alive) <= COMPACT * len(going):
                keep = torch.tensor(alive, device=self.device)
                cache.batch_select_indices(keep)
                mask, tokens, positions, keys = mask[keep], tokens[keep], positions[keep], keys[keep]
                going = [going[place] for place in alive]
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
            logits = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            positions = positions + 1
        return rows

    def _prefill(self, requests: list[Request]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Keys and values of prompts [rows, longest], the mask of real tokens, and the logits behind each prompt.

        A row is laid out as prefix, room, suffix: suffixes end in the same column, positions count real tokens only.
        """
        prefixes = {prefix: self._prefix(prefix) for prefix in dict.fromkeys(r.prefix for r in requests) if prefix}
        widest = max(len(r.prefix) for r in requests)
        longest = max(len(r.suffix) for r in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros(len(requests), widest + longest, dtype=torch.long)
        places = torch.zeros(len(requests), longest, dtype=torch.long)
        for i, r in enumerate(requests):
            room = longest - len(r.suffix)
            ids[i, room:] = torch.tensor(r.suffix)
            mask[i, : len(r.prefix)] = 1
            mask[i, widest + room :] = 1
            places[i, room:] = len(r.prefix) + torch.arange(len(r.suffix))
        cache = DynamicCache()
        for layer in range(len(next(iter(prefixes.values()), []))):
            shape = next(iter(prefixes.values()))[layer][0].shape
            pair = []
            for side in (0, 1):
                block = torch.zeros(len(requests), shape[1], widest, shape[3], dtype=self.dtype, device=self.device)
                for i, r in enumerate(requests):
                    if r.prefix:
                        block[i, :, : len(r.prefix)] = prefixes[r.prefix][layer][side][0]
                pair.append(block)
            cache.update(pair[0], pair[1], layer)
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=places.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, mask.to(self.device), output.logits[:, -1]

    def _prefix(self, prefix: tuple[int, ...]) -> KeysValues:
        """Keys and values [1, heads, tokens, width] of each layer."""
        cache = DynamicCache()
        self.model(
            input_ids=torch.tensor([prefix], device=self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _advance(self, row: Row, token: int, logprob: float, params: SamplingParams, prompt_length: int) -> None:
        """Add a token to a row, and end the row where it is due."""
        self.generated += 1
        row.logprob += logprob
        if token in self.eos_ids:
            row.finish_reason = "stop"
            return
        row.ids.append(token)
        if params.stops:
            tail = self.tokenizer.decode(row.ids[-STOP_WINDOW:])
            if any(stop in tail for stop in params.stops):
                row.finish_reason = "stop"
                return
        if len(row.ids) >= params.max_new_tokens or prompt_length + len(row.ids) >= self.context:
            row.finish_reason = "length"

    def _completion(self, row: Row, params: SamplingParams) -> Completion:
        text = self.tokenizer.decode(row.ids)
        cut = min([at for at in map(text.find, params.stops) if at >= 0], default=len(text))
        return Completion(text[:cut], tuple(row.ids), row.logprob, row.finish_reason)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format in force: bfloat16 on a GPU, float32 on a CPU, unless one is named."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
