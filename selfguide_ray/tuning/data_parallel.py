"""One task at a time by all workers of a group: DeepSpeed, ZeRO, an adapter or all weights (spec §2).

One process or several in step: every rank sees the whole batch order and takes its slice, so the number of workers does
not change what is learned. Loss lies on answer and EOS only, and each optimiser step is the mean over its tokens.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed
from peft import get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from selfguide_ray.config import Config
from selfguide_ray.engine.transformers import resolve_dtype
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer, context_of, locate
from selfguide_ray.tuning import Lesson, Memory, Told
from selfguide_ray.tuning.adapter_stack import fits_no_module, lora_config
from selfguide_ray.tuning.pairs import IGNORED, Pair, batches, first_a, rate_factor, read_pairs

ADAPTER = "default"  # the name under which peft saves without a subfolder


def collate(pairs: Sequence[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels [pairs, longest], padded on the right; labels hold answer and EOS only (statement 19).

    Padding is told by position, never by token: where pad = EOS, the EOS is learned all the same.
    """
    width = max(len(pair.prompt) + len(pair.completion) for pair in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.completion)
        ids[row, :end] = torch.tensor(pair.prompt + pair.completion)
        mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(pair.completion)
    return ids, mask, labels


class DataParallel:
    """A worker's resident student, see `tuning.Tuner`; `rank` of `world` workers that train each task together."""

    def __init__(self, config: Config, rank: int, world: int, base: torch.nn.Module | None = None) -> None:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config, self.settings, self.rank, self.world = config, config.models, rank, world
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.tokenizer = StudentTokenizer(config.student)
        self.context = context_of(config.student)
        self._dtype = resolve_dtype(config.student.dtype, self.device)
        self._load = lambda: AutoModelForCausalLM.from_pretrained(
            locate(config.student),
            dtype=self._dtype,
            use_safetensors=True,
            trust_remote_code=config.student.trust_remote_code,
        ).to(self.device)
        self._base = base

    def train(self, pack: Sequence[Lesson], memory: Memory) -> dict[str, Told | SelfGuideError]:
        """See `tuning.Tuner`. A loss that is not finite fails the task."""
        told: dict[str, Told | SelfGuideError] = {}
        for lesson in pack:
            try:
                told[lesson.task] = self._train(lesson.task, lesson.rows, lesson.folder)
            except SelfGuideError as error:
                told[lesson.task] = error
        return told

    def _train(self, task: str, rows: pa.Table, folder: Path | None) -> Told:

        seed = row_seed(self.config.seed, task, "train")
        pairs = read_pairs(task, rows, self.tokenizer, self.context)
        started = time.monotonic()
        torch.manual_seed(seed)
        with self._trainable(seed) as model:
            losses, steps = self._fit(task, model, pairs, seed)
            self._save(model, folder)
        return {
            "pairs": len(pairs),
            "steps": steps,
            "losses": losses,  # mean over answer tokens (nats), an epoch each
            "seconds": time.monotonic() - started,
        }

    @contextlib.contextmanager
    def _trainable(self, seed: int) -> Iterator[torch.nn.Module]:
        """The base with a fresh adapter, or a fresh copy of the base; the base itself stays loaded and untouched."""
        if self.settings.method == "full":
            yield self._load().train()
            return
        if self._base is None:
            self._base = self._load()

        try:
            model = get_peft_model(
                self._base, lora_config(self.settings), adapter_name=ADAPTER, autocast_adapter_dtype=False
            )
        except ValueError as error:
            raise fits_no_module(self.settings, self.config.student.model, error) from error
        with torch.no_grad():
            for name, layer in model.named_modules():
                if isinstance(getattr(layer, "lora_A", None), torch.nn.ModuleDict) and ADAPTER in layer.lora_A:
                    weight = layer.lora_A[ADAPTER].weight
                    weight.copy_(first_a(name.removeprefix("base_model.model."), tuple(weight.shape), seed))
        try:
            yield model.train()
        finally:
            self._base = model.unload()

    def _fit(self, task: str, model: torch.nn.Module, pairs: list[Pair], seed: int) -> tuple[list[float], int]:
        """Run all optimiser steps; returns each epoch's mean loss a token, and the number of steps."""

        plan = list(batches(len(pairs), self.settings, seed))
        engine = self._deepspeed(model, len(plan))
        summed = [[0.0, 0] for _ in range(self.settings.epochs)]
        pad = self.tokenizer.hf.pad_token_id or 0
        try:
            for step, (epoch, members) in enumerate(plan):
                tokens = sum(len(pairs[i].completion) for i in members)
                mine = [pairs[i] for i in members[self.rank :: self.world]]
                # A rank without a pair of its own still takes part in the step, with a row that carries no loss.
                ids, mask, labels = collate(mine or [pairs[members[0]]], pad)
                if not mine:
                    labels.fill_(IGNORED)
                loss = self._loss(engine, ids, mask, labels)
                engine.backward(
                    loss * self.world / tokens
                )  # DeepSpeed averages over ranks; this makes it the mean a token
                engine.step()
                total = self._over_ranks(loss.detach())
                if not math.isfinite(total):
                    raise SelfGuideError(
                        f"{task}: the loss is {total} at step {step + 1} of {len(plan)}.",
                        "Training has diverged, and its weights would be worthless.",
                        "Lower models.learning_rate, or set student.dtype=float32.",
                    )
                summed[epoch][0] += total
                summed[epoch][1] += tokens
        finally:
            engine.destroy()
        torch.manual_seed(seed)  # leave the generator where the next task does not depend on this one
        return [total / max(1, count) for total, count in summed], len(plan)

    def _loss(self, engine: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy of the labelled tokens."""
        from torch.nn.functional import cross_entropy

        logits = engine(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).logits
        return cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(self.device),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def _over_ranks(self, loss: torch.Tensor) -> float:
        if self.world > 1:
            torch.distributed.all_reduce(loss)
        return loss.item()

    def _deepspeed(self, model: torch.nn.Module, steps: int) -> Any:
        """A DeepSpeed engine around the trainable parameters."""

        deepspeed = import_deepspeed()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trainable,
            lr=self.settings.peak_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=self.settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, self.settings))
        settings = {
            "train_micro_batch_size_per_gpu": math.ceil(self.settings.batch_size / self.world),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.settings.clip,
            "zero_optimization": {"stage": self.settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            "fp16": {"enabled": self._dtype == torch.float16},
            "steps_per_print": 1 << 30,
            **self.settings.deepspeed,
        }
        try:
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        except (ValidationError, deepspeed.DeepSpeedConfigError, AssertionError) as error:
            raise SelfGuideError(
                f"models.deepspeed: DeepSpeed does not accept {self.settings.deepspeed}.",
                " ".join(str(error).split())[:500],
                "See DeepSpeed's documentation of its configuration.",
            ) from error
        return engine

    def _save(self, model: torch.nn.Module, folder: Path | None) -> None:
        """Adapter or weights as safetensors; sharded parameters are gathered on the way."""
        sharded = self.settings.zero_stage == 3
        gathered = contextlib.nullcontext()
        if sharded:
            parameters = [p for p in model.parameters() if p.requires_grad]
            gathered = import_deepspeed().zero.GatheredParameters(parameters, modifier_rank=None)
        with gathered:
            if folder is not None:
                model.save_pretrained(folder)
                if self.settings.method == "full":
                    self.tokenizer.hf.save_pretrained(folder)


def import_deepspeed() -> Any:
    """DeepSpeed, kept from compiling its shared-memory extension in the middle of a run.

    That build takes minutes and looks like a hang; without it DeepSpeed falls back to torch's collectives.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
