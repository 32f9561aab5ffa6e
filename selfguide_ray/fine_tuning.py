"""How one task is learned (spec §2): a student that stays loaded, DeepSpeed, and an adapter or all weights.

One process or several in step: every rank sees the whole batch order and takes its slice, so the number of workers does
not change what is learned. Loss lies on answer and EOS only, and each optimiser step is the mean over its tokens.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from selfguide_ray.config import Config
from selfguide_ray.config import Models as Settings
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import row_seed

if TYPE_CHECKING:
    import torch

IGNORED = -100  # cross_entropy's label for "no loss here"
ADAPTER = "default"  # the name under which peft saves without a subfolder


@dataclass(frozen=True)
class Pair:
    """A training pair as ids; the completion ends in EOS."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def batches(count: int, settings: Settings, seed: int) -> Iterator[tuple[int, list[int]]]:
    """(epoch, indices of the pairs) of every optimiser step: each epoch in a new order that the seed decides."""
    for epoch in range(settings.epochs):
        order = list(range(count))
        random.Random(row_seed(seed, "epoch", epoch)).shuffle(order)
        for start in range(0, count, settings.batch_size):
            yield epoch, order[start : start + settings.batch_size]


def rate_factor(step: int, steps: int, settings: Settings) -> float:
    """The share of the peak learning rate in force at a step: linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, (steps - step) / max(1, steps - settings.warmup_steps))


def collate(pairs: Sequence[Pair], pad: int) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """ids, attention mask and labels [pairs, longest], padded on the right; labels hold answer and EOS only (statement 19).

    Padding is told by position, never by token: where pad = EOS, the EOS is learned all the same.
    """
    import torch

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


class FineTuner:
    """A worker's resident student, see `models.Tuner`; `rank` of `world` workers that train each task together."""

    def __init__(self, config: Config, rank: int, world: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from selfguide_ray.engine.transformers import resolve_dtype
        from selfguide_ray.student import StudentTokenizer, locate

        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config, self.settings, self.rank, self.world = config, config.models, rank, world
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self.tokenizer = StudentTokenizer(config.student)
        self._dtype = resolve_dtype(config.student.dtype, self.device)
        self._load = lambda: AutoModelForCausalLM.from_pretrained(
            locate(config.student),
            dtype=self._dtype,
            use_safetensors=True,
            trust_remote_code=config.student.trust_remote_code,
        ).to(self.device)
        self._base: torch.nn.Module | None = None

    def train(self, task: str, rows: pa.Table, folder: Path | None) -> dict[str, Any]:
        """Train on a task's rows of `trainset` and save adapter or weights into `folder`; returns what `model.json` tells.

        All ranks call it together; those without a folder write nothing. Raises SelfGuideError on a loss that is not finite.
        """
        import torch

        seed = row_seed(self.config.seed, task, "train")
        pairs = [
            Pair(tuple(self.tokenizer.encode(row["prompt"])), tuple(self.tokenizer.encode(row["completion"])))
            for row in rows.select(["prompt", "completion"]).to_pylist()
        ]
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
            "student": self.config.student.model,
            "settings": self.settings.model_dump(mode="json"),
        }

    @contextlib.contextmanager
    def _trainable(self, seed: int) -> Iterator["torch.nn.Module"]:
        """The base with a fresh adapter, or a fresh copy of the base; the base itself stays loaded and untouched."""
        if self.settings.method == "full":
            yield self._load().train()
            return
        if self._base is None:
            self._base = self._load()
        from peft import LoraConfig, get_peft_model

        targets = self.settings.target_modules
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        try:
            model = get_peft_model(self._base, adapter, adapter_name=ADAPTER, autocast_adapter_dtype=False)
        except ValueError as error:
            raise SelfGuideError(
                f"models.target_modules: {targets} fits no module of {self.config.student.model}.",
                str(error).split(". ")[0] + ".",
                "Name linear layers of the model, or all-linear.",
            ) from error
        try:
            yield model.train()
        finally:
            self._base = model.unload()

    def _fit(self, task: str, model: "torch.nn.Module", pairs: list[Pair], seed: int) -> tuple[list[float], int]:
        """Run all optimiser steps; returns each epoch's mean loss a token, and the number of steps."""
        import torch

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

    def _loss(self, engine: Any, ids: "torch.Tensor", mask: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        """Summed cross-entropy of the labelled tokens."""
        from torch.nn.functional import cross_entropy

        logits = engine(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).logits
        return cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(self.device),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def _over_ranks(self, loss: "torch.Tensor") -> float:
        if self.world > 1:
            import torch.distributed

            torch.distributed.all_reduce(loss)
        return loss.item()

    def _deepspeed(self, model: "torch.nn.Module", steps: int) -> Any:
        """A DeepSpeed engine around the trainable parameters."""
        import torch

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
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
        return engine

    def _save(self, model: "torch.nn.Module", folder: Path | None) -> None:
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
