"""What each worker does to train a student: rows of tokens through DeepSpeed, from where the last checkpoint ends."""

import io
import json
import math
import time
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from selfguide_ray.config import Models
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.models import Unfinished
from selfguide_ray.pretraining import Recipe, Shape
from selfguide_ray.pretraining.corpus import SPECIAL_TOKENS, at_least, written
from selfguide_ray.pretraining.muon import Muon, split
from selfguide_ray.run import Run
from selfguide_ray.schema import row_seed
from selfguide_ray.tuning.base import diverged, make_optimizer, over_ranks, training_device
from selfguide_ray.tuning.sharded_state import ShardedState
from selfguide_ray.tuning.zero import Zero, gathered, is_partitioned, keep_memory

WORK = "work"
PRIMER, ROWS, HELD_OUT = f"{WORK}/primer.npy", f"{WORK}/rows.npy", 64  # of the rows, the last are never learned
WEIGHTS, TOLD, CURVE = f"{WORK}/trained", "told.json", f"{WORK}/curve.json"
START = f"{WORK}/start.safetensors"  # the weights of the student that the recipe goes on from
BETAS = (0.9, 0.95)
POINT = 50  # steps of a point of the loss curve


def make_model(shape: Shape) -> torch.nn.Module:
    """The model with its first weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


class Losses(torch.nn.Module):
    """The model with what training asks of it: rows of ids [rows, tokens] in, the loss of each next token out, in nats."""

    def __init__(self, student: torch.nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.student, self.mixed = student, recipe.dtype == "mixed"
        if recipe.compile:
            # Compiled queries are views; on a CPU torch's attention is a third slower with them than with a copy.
            AttentionInterface.register("dense", dense_attention)
            student.set_attn_implementation("dense")
            self.compile()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, float32 [rows, tokens - 1]."""
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.mixed):
            logits = self.student(input_ids=ids[:, :-1], use_cache=False).logits
        each = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1)


def dense_attention(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention over contiguous copies: q, k and v are [rows, heads, tokens, size]."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def optimizer_of(model: torch.nn.Module, recipe: Recipe, settings: Models) -> torch.optim.Optimizer:
    """The optimiser that the recipe asks for, over all of the model."""
    if recipe.optimizer == "adamw":
        return make_optimizer(model.parameters(), settings, BETAS)
    dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return Muon(*split(model), dtype=dtype, lr=rate, betas=BETAS, weight_decay=decay, fused=True)


def learn(recipe: Recipe, rank: int, world: int) -> None:
    """Train, and leave the weights in the run; all `world` workers call it together."""
    torch.set_num_threads(max(1, int(recipe.cpus_per_worker)))
    keep_memory()
    torch.set_flush_denormal(True)  # second moments get there, and a CPU is slow with them
    Learning(recipe, rank, world).run()


class Learning:
    """A worker's part of the training."""

    def __init__(self, recipe: Recipe, rank: int, world: int) -> None:
        self.recipe, self.rank, self.world = recipe, rank, world
        self.storage = Run(recipe.output)
        self.primer, rows = (np.load(io.BytesIO(self._read(name))) for name in (PRIMER, ROWS))
        self.rows, self.held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
        settings = Models(
            method="full",
            batch_size=recipe.batch_rows,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            zero_stage=recipe.zero_stage,
        )
        self.device = training_device()
        dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        torch.manual_seed(recipe.seed)
        student = make_model(recipe.shape)
        if recipe.start:
            student.load_state_dict(load(self._read(START)), strict=False)  # the output layer is the embedding
        model = Losses(student, recipe).to(self.device, dtype)
        self.engine, self.optimizer = Zero(settings, dtype, world).start(model, optimizer_of(model, recipe, settings))
        self.state = ShardedState(
            self.engine, self.optimizer, Unfinished(self.storage, "student"), "student", rank, world
        )
        self.orders: dict[int, np.ndarray] = {}
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []  # [tokens seen, loss since the point before]
        self.since = [0.0, 0.0]  # loss and weight summed since the last point
        about = self.state.recall(0)  # whatever the number of steps was to be
        if about is not None:
            self.step, self.seconds, self.curve, self.since = (about[k] for k in ("step", "seconds", "curve", "since"))
            if about["of"] != recipe.steps and self.step > (1 - recipe.decay) * min(about["of"], recipe.steps):
                raise SelfGuideError(
                    f"tokens: {recipe.tokens} is another number than the training was begun with.",
                    f"Its learning rate falls already, at step {self.step} of {about['of']}.",
                    "Give the former number, or another output.",
                )

    def _read(self, name: str) -> bytes:
        data = self.storage.get(name)
        assert data is not None, f"{self.recipe.output}/{name} is gone"
        return data

    def run(self) -> None:
        """All steps from where the state ends, then the weights."""
        saved = time.monotonic()
        started = saved - self.seconds
        while self.step < self.recipe.steps:
            loss, weight = self._learn()
            self.since = [self.since[0] + loss, self.since[1] + weight]
            self.step += 1
            self.seconds = time.monotonic() - started
            if self.step % POINT == 0 or self.step == self.recipe.steps:
                self._point()
            due = self.rank == 0 and time.monotonic() - saved >= self.recipe.checkpoint_seconds
            if self._over_ranks(float(due)):
                self._remember()
                saved = time.monotonic()
        self._save()

    def _learn(self) -> tuple[float, float]:
        """One optimiser step; returns the loss summed over its tokens, weighted, and their weight."""
        recipe = self.recipe
        batch = self._batch()
        weights = weights_of(batch, recipe.user_weight, recipe.least_turn)
        total = float(weights.sum())
        mine = list(range(self.rank, len(batch), self.world))
        passes = math.ceil(math.ceil(len(batch) / self.world) / recipe.rows_per_pass)
        self.engine.train()
        loss = torch.zeros((), device=self.device)
        for number in range(passes):
            self.engine.set_gradient_accumulation_boundary(number == passes - 1)
            some = mine[number * recipe.rows_per_pass : (number + 1) * recipe.rows_per_pass]
            # A rank without rows left takes part with one that weighs nothing.
            part = self._loss(batch[some or [0]], weights[some] if some else np.zeros_like(weights[:1]))
            self.engine.backward(part * self.world / total, scale_wrt_gas=False)  # DeepSpeed averages over ranks
            loss += part.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        self.engine.step()
        summed = self._over_ranks(loss.item())
        if not math.isfinite(summed):
            raise diverged("the student", f"the loss is {summed} at step {self.step + 1} of {recipe.steps}")
        return summed, total

    def _batch(self) -> np.ndarray:
        """The rows of this step: the primer's, then every pass over the corpus in a new order."""
        first = self.step * self.recipe.batch_rows - len(self.primer)
        places = range(first, first + self.recipe.batch_rows)
        return np.stack([self._row(*divmod(at, len(self.rows))) if at >= 0 else self.primer[at] for at in places])

    def _row(self, epoch: int, at: int) -> np.ndarray:
        return self.rows[self._order(epoch)[at]]

    def _order(self, epoch: int) -> np.ndarray:
        """The order of the rows in a pass over the corpus."""
        if epoch not in self.orders:
            made = np.random.default_rng(row_seed(self.recipe.seed, "rows", epoch)).permutation(len(self.rows))
            # A step touches two passes at most, the one behind it and the one ahead.
            self.orders = {kept: order for kept, order in self.orders.items() if kept == epoch - 1} | {epoch: made}
        return self.orders[epoch]

    def _loss(self, rows: np.ndarray, weights: np.ndarray) -> torch.Tensor:
        """Cross-entropy in nats, summed with the weights."""
        ids = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        return (self.engine(ids) * torch.from_numpy(weights).to(self.device)).sum()

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss of a written token of the rows held out; every rank computes all of it."""
        self.engine.eval()
        loss = weight = 0.0
        for start in range(0, len(self.held_out), self.recipe.rows_per_pass):
            rows = self.held_out[start : start + self.recipe.rows_per_pass]
            weights = weights_of(rows, 0.0)
            loss += self._loss(rows, weights).item()
            weight += float(weights.sum())
        return loss / weight

    def _over_ranks(self, value: float) -> float:
        return over_ranks(torch.tensor([value], dtype=torch.float64, device=self.device), self.world)[0]

    # --- what it leaves

    def _point(self) -> None:
        loss, weight = self.since
        self.curve.append([self.step * self.recipe.batch_rows * self.recipe.shape.context, round(loss / weight, 4)])
        self.since = [0.0, 0.0]
        if self.rank == 0:
            told = {"step": self.step, "steps": self.recipe.steps, "seconds": self.seconds, "curve": self.curve}
            self.storage.put(CURVE, json.dumps(told).encode())

    def _remember(self) -> None:
        about = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "since": self.since}
        self.state.remember(self.step, about | {"steps": 0, "of": self.recipe.steps})

    def _save(self) -> None:
        """The weights in bfloat16, and what is told of them."""
        validation = self._validate()
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.engine.module.student.named_parameters():
            with gathered(parameter):
                if self.rank == 0:
                    weights[name] = parameter.detach().to("cpu", torch.bfloat16, copy=is_partitioned(parameter))
        if self.rank:
            return
        model = make_model(self.recipe.shape).to(torch.bfloat16)
        model.load_state_dict(weights, strict=False)  # the output layer is the embedding, and named once
        told: dict[str, Any] = {
            "validation_loss": round(validation, 4),  # nats a written token
            "tokens": self.recipe.steps * self.recipe.batch_rows * self.recipe.shape.context,
            "seconds": round(self.seconds),
            "workers": self.world,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "curve": self.curve,
        }
        with self.storage.scratch(WORK) as folder:
            model.save_pretrained(folder)
            (folder / TOLD).write_text(json.dumps(told))
            self.storage.publish(folder, WEIGHTS, TOLD)


def weights_of(rows: np.ndarray, user_weight: float, least_turn: int = 1) -> np.ndarray:
    """What each predicted token weighs: float32 [rows, context]; 1 or more where the student writes, 0 in padding."""
    weights = np.maximum(at_least(written(rows), least_turn), np.float32(user_weight))
    return (weights * (rows != SPECIAL_TOKENS.index("<|pad|>")))[:, 1:]
