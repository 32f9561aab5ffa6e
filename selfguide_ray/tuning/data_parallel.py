"""One task at a time by all workers of a group: DeepSpeed, ZeRO, an adapter or all weights (spec §2).

One process or several in step: every rank sees the whole batch order and takes its slice, so the number of workers does
not change what is learned. Loss lies on answer and EOS only, and each optimiser step is the mean over its tokens.
"""

import contextlib
import gc
import math
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from selfguide_ray.config import Config
from selfguide_ray.engine.transformers import resolve_dtype
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer, context_of
from selfguide_ray.tuning import Lesson, Memory, Told
from selfguide_ray.tuning.adapter_stack import fits_no_module, lora_config
from selfguide_ray.tuning.base import diverged, load_base, over_ranks, training_device
from selfguide_ray.tuning.layout import lay_out, suits
from selfguide_ray.tuning.pairs import (
    IGNORED,
    Pair,
    Stopping,
    batches,
    first_a,
    hold_out,
    in_passes,
    mute,
    rate_factor,
    read_pairs,
)
from selfguide_ray.tuning.sharded_state import ShardedState
from selfguide_ray.tuning.zero import Zero, gathered, is_partitioned, return_memory

ADAPTER = "default"  # the name under which peft saves without a subfolder


def collate(pairs: Sequence[Pair], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, attention mask and labels [pairs, longest], padded on the right; labels hold answer and EOS only (statement 19).

    Padding is told by position, never by token: where pad = EOS, the EOS is learned all the same.
    """
    width = max(map(len, pairs))
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair)
        ids[row, :end] = torch.tensor(pair.prompt + pair.completion)
        mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(pair.completion)
    return ids, mask, labels


def passes(batch: Sequence[Pair], world: int, room: int) -> list[list[list[Pair]]]:
    """A batch as passes: of each pass, the pairs of every rank, about `room` tokens at most each.

    All ranks take part in all passes; one that has no pair left for a pass has an empty list there.
    """
    ranks = [in_passes(batch[rank::world], room) for rank in range(world)]
    return [[mine[i] if i < len(mine) else [] for mine in ranks] for i in range(max(map(len, ranks)))]


class DataParallel:
    """A worker's resident student, see `tuning.Tuner`; `rank` of `world` workers that train each task together."""

    def __init__(self, config: Config, rank: int, world: int, base: torch.nn.Module | None = None) -> None:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config, self.settings, self.rank, self.world = config, config.models, rank, world
        self.device = training_device()
        self.tokenizer = StudentTokenizer(config.student)
        self.context = context_of(config.student)
        self.dtype = resolve_dtype(config.student.dtype, self.device)
        self.zero = Zero(config.models, self.dtype, world)
        self.packs: bool | None = None  # whether passes are laid out without needless tokens; known with the first task
        self._base = base
        if self.zero.stage == 3 and self.device.type == "cpu":
            return_memory()

    def train(self, pack: Sequence[Lesson], memory: Memory) -> dict[str, Told | SelfGuideError]:
        """See `tuning.Tuner`. A loss that is not finite fails the task."""
        told: dict[str, Told | SelfGuideError] = {}
        for lesson in pack:
            try:
                told[lesson.task] = self._train(lesson, memory)
            except SelfGuideError as error:
                told[lesson.task] = error
        return told

    def _train(self, lesson: Lesson, memory: Memory) -> Told:
        seed = row_seed(self.config.seed, lesson.task, "train")
        pairs = read_pairs(lesson.task, lesson.rows, self.tokenizer, self.context)
        started = time.monotonic()
        with self._trainable(seed) as model:
            fitting = Fitting(self, lesson, model, pairs, seed, memory)
            try:
                told = fitting.run()
            finally:
                fitting.engine.destroy()
                fitting.optimizer.state.clear()  # ZeRO-3's parameters refer to it as long as they live
                del fitting
                gc.collect()
            self._save(model, lesson)
        return told | {"seconds": time.monotonic() - started}

    # --- the model

    @contextlib.contextmanager
    def _trainable(self, seed: int) -> Iterator[torch.nn.Module]:
        """The base with a fresh adapter, or a fresh copy of the base; the base itself stays loaded and untouched."""
        if self.settings.method == "full":
            yield self._load()
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
            yield model
        finally:
            self._base = model.unload()

    def _load(self) -> torch.nn.Module:
        """The student; under ZeRO-3 every worker keeps only its part, from the first byte on."""
        with self.zero.in_parts():
            return load_base(self.config, self.device, self.dtype)

    def _save(self, model: torch.nn.Module, lesson: Lesson) -> None:
        """Adapter or weights as safetensors. Rank 0 has them whole, and only the others' parts one after the other."""
        full, state = self.settings.method == "full", {}
        whole: dict[int, torch.Tensor] = {}  # tied weights stay one, and are written once
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not full and not tensor.requires_grad:
                continue
            with gathered(tensor):
                if lesson.folder is not None:
                    if id(tensor) not in whole:
                        whole[id(tensor)] = tensor.detach().to("cpu", copy=is_partitioned(tensor))
                    state[name] = whole[id(tensor)]
        if lesson.folder is not None:
            model.save_pretrained(lesson.folder, state_dict=state)
            if full:
                self.tokenizer.hf.save_pretrained(lesson.folder)


class Fitting:
    """The training of one task."""

    def __init__(
        self, tuner: DataParallel, lesson: Lesson, model: torch.nn.Module, pairs: list[Pair], seed: int, memory: Memory
    ) -> None:
        self.tuner, self.settings, self.task, self.seed = tuner, tuner.settings, lesson.task, seed
        self.rank, self.world, self.device = tuner.rank, tuner.world, tuner.device
        self.pairs, self.validation = hold_out(pairs, self.settings.validation, seed)
        self.plan = list(batches(len(self.pairs), self.settings, seed))
        self.stopping = Stopping(self.settings.patience)
        self.losses: list[float] = []  # of each epoch, mean over answer tokens
        self.summed, self.step = 0.0, 0
        if self.settings.gradient_checkpointing:
            model.enable_input_require_grads()
            # ZeRO-3 lets go of weights in between, which torch's newer way takes for a change of the graph.
            model.gradient_checkpointing_enable({"use_reentrant": tuner.zero.stage == 3})
        self.engine, self.optimizer = tuner.zero.start(model)
        self.state = ShardedState(self.engine, self.optimizer, memory, lesson.task, self.rank, self.world)
        self.best_world = self.world  # of the workers that wrote the best weights
        self.kept_best: int | None = None  # the epoch whose weights the last checkpoint counts on
        self.saved = time.monotonic()
        if tuner.packs is None:
            tuner.packs = self._suits_packing()
        self._recall()

    def run(self) -> Told:
        """All steps from where the memory ends; returns what is told of the task."""
        while self.step < len(self.plan) and not self.stopping.over:
            self._learn()
        self._check_weights()
        kept = len(self.losses) - 1
        if self.settings.keep != "last" and self.validation:
            kept = self.stopping.best
            if kept != len(self.losses) - 1:
                self.state.get(f"best-{kept}", self.best_world)
        return {
            "pairs": len(self.pairs) + len(self.validation),
            "steps": self.step,
            "losses": self.losses,
            "validation_losses": self.stopping.losses,
            "epoch": kept + 1,  # whose weights these are
        }

    def _learn(self) -> None:
        """One optimiser step, and what follows from it."""
        epoch, members = self.plan[self.step]
        batch = [self.pairs[i] for i in members]
        tokens = sum(len(pair.completion) for pair in batch)
        # Dropout must not depend on what was drawn before a death.
        torch.manual_seed(row_seed(self.seed, "step", self.step, self.rank))
        self.engine.train()
        loss = torch.zeros((), device=self.device)
        todo = passes(batch, self.world, self.tuner.config.cluster.tokens_per_pass)
        for number, parts in enumerate(todo):
            self.engine.set_gradient_accumulation_boundary(number == len(todo) - 1)
            part = self._loss(parts[self.rank], batch[0])
            # DeepSpeed averages over ranks; this makes it the mean a token.
            self.engine.backward(part * self.world / tokens, scale_wrt_gas=False)
            loss += part.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.peak_rate * rate_factor(self.step, len(self.plan), self.settings)
        self.engine.step()
        self.step += 1
        due = time.monotonic() - self.saved >= self.tuner.config.cluster.checkpoint_seconds
        total, due = over_ranks(torch.stack([loss, loss.new_tensor(float(due and self.rank == 0))]), self.world)
        self.summed += total
        if not math.isfinite(total):
            raise diverged(self.task, f"the loss is {total} at step {self.step} of {len(self.plan)}")
        if not self.engine.was_step_applied() and not self.engine.fp16_enabled():  # which skips steps to find its scale
            raise diverged(self.task, f"the gradient is not finite at step {self.step} of {len(self.plan)}")
        if self.step == len(self.plan) or self.plan[self.step][0] != epoch:
            self._end_epoch(epoch)
        if due:
            self._remember()

    def _end_epoch(self, epoch: int) -> None:
        """Note the epoch's loss, validate, and keep the weights if they are the best so far."""
        learned = sum(len(self.pairs[i].completion) for e, members in self.plan if e == epoch for i in members)
        self.losses.append(self.summed / learned)
        self.summed = 0.0
        if not self.validation:
            return
        before = self.stopping.best if self.stopping.losses else None
        loss = self._validate()
        self.stopping.losses.append(loss if math.isfinite(loss) else math.inf)
        if self.stopping.best == epoch and self.settings.keep != "last":
            self.state.put(f"best-{epoch}")
            self.best_world = self.world
            if before not in (None, self.kept_best):
                self.state.forget(f"best-{before}")

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss a token of the pairs held out."""
        self.engine.eval()
        loss = torch.zeros((), device=self.device)
        for parts in passes(self.validation, self.world, self.tuner.config.cluster.tokens_per_pass):
            loss += self._loss(parts[self.rank], self.validation[0])
        return over_ranks(loss[None], self.world)[0] / sum(len(pair.completion) for pair in self.validation)

    def _loss(self, pairs: list[Pair], filler: Pair) -> torch.Tensor:
        """Summed cross-entropy of a pass; one without pairs goes through the model with nothing to learn."""
        if self.tuner.packs:
            some = pairs or [mute(filler)]
            return lay_out([some], self.device, self.tuner.dtype).losses(self.engine).sum()
        ids, mask, labels = collate(pairs or [filler], self.tuner.tokenizer.hf.pad_token_id or 0)
        if not pairs:
            labels.fill_(IGNORED)
        logits = self.engine(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).logits
        return cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten().to(self.device),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def _check_weights(self) -> None:
        """A last step that went wrong shows in the weights alone."""
        wrong = torch.tensor([float(not self.state.finite)], device=self.device)
        if over_ranks(wrong, self.world)[0]:
            raise diverged(self.task, "some of its weights are not finite")

    def _suits_packing(self) -> bool:
        """Whether every rank finds that the student computes the same from a packed layout."""
        self.engine.eval()
        fits = suits(self.engine.module)
        return over_ranks(torch.tensor([float(fits)], device=self.device), self.world)[0] == self.world

    # --- what a new group goes on from

    def _remember(self) -> None:
        before, self.kept_best = self.kept_best, self.stopping.best if self.stopping.losses else None
        about = {
            "steps": len(self.plan),
            "summed": self.summed,
            "losses": self.losses,
            "validation": self.stopping.losses,
            "best_world": self.best_world,
        }
        self.state.remember(self.step, {"step": self.step} | about)
        if before not in (None, self.kept_best):
            self.state.forget(f"best-{before}")
        self.saved = time.monotonic()

    def _recall(self) -> None:
        about = self.state.recall(len(self.plan))
        if about is None:
            return
        self.step, self.summed, self.losses = about["step"], about["summed"], about["losses"]
        self.stopping.losses, self.best_world = about["validation"], about["best_world"]
        self.kept_best = self.stopping.best if self.stopping.losses else None
