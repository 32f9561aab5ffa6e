"""Many small tasks at once: the adapters of a pack learn in one batch over one frozen base.

Each task keeps its own order of pairs, rate, gradient norm, optimiser state, number of steps and end, so what it learns
is what it would learn alone, but for rounding. What is gained are the launches and thin products that a small batch
costs a model; where a task's own batch fills the device, nothing is.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

from selfguide_ray.config import Config
from selfguide_ray.engine.transformers import resolve_dtype
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer, context_of
from selfguide_ray.tuning import Lesson, Memory, Told
from selfguide_ray.tuning.adapter_stack import AdapterStack, targeted
from selfguide_ray.tuning.base import diverged, load_base, make_optimizer, training_device
from selfguide_ray.tuning.last_layer import LastColumns, release, take
from selfguide_ray.tuning.layout import lay_out, suits
from selfguide_ray.tuning.pairs import Pair, Stopping, batches, hold_out, in_passes, mute, rate_factor, read_pairs

STATE = "state.safetensors"


@dataclass
class Learner:
    """One task of a pack: its pairs, its plan, and how far it is."""

    lesson: Lesson
    seed: int
    pairs: list[Pair]
    validation: list[Pair]
    plan: list[tuple[int, list[int]]]
    stopping: Stopping
    losses: list[float] = field(default_factory=list)  # of each epoch, mean over answer tokens
    error: SelfGuideError | None = None
    ended: int | None = None  # steps taken, once it has enough

    def last_of_epoch(self, step: int) -> bool:
        """Whether a step is the last of its epoch."""
        return step + 1 == len(self.plan) or self.plan[step + 1][0] != self.plan[step][0]

    def going(self, step: int) -> bool:
        """Whether the task still learns at a step."""
        return step < len(self.plan) and self.ended is None and self.error is None


class SideBySide:
    """A worker's resident student, see `tuning.Tuner`."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config, self.settings = config, config.models
        self.device = training_device()
        self.tokenizer = StudentTokenizer(config.student)
        self.context = context_of(config.student)
        self.base: torch.nn.Module | None = None
        self.last: LastColumns | None = None
        self.alone: Any = None  # trains what cannot be packed

    def _start(self) -> None:
        """Load the student, and see what of it gets adapters."""
        student = self.config.student
        base = load_base(self.config, self.device, resolve_dtype(student.dtype, self.device))
        base.requires_grad_(False).eval()  # no dropout in the base: what a task learns is its own
        self.shapes = targeted(base, self.settings, student.model)
        if self.shapes is None or not suits(base):
            from selfguide_ray.tuning.data_parallel import DataParallel

            self.alone = DataParallel(self.config, 0, 1, base)
        else:
            self.last = take(base)
            if self.last is not None and not suits(base, self.last):
                release(base, self.last)
                self.last = None
        self.base = base

    def train(self, pack: Sequence[Lesson], memory: Memory) -> dict[str, Told | SelfGuideError]:
        """See `tuning.Tuner`. A task whose loss is not finite fails, and the others go on."""
        if self.base is None:
            self._start()
        if self.alone is not None:
            return {task: told for lesson in pack for task, told in self.alone.train([lesson], memory).items()}
        started = time.monotonic()
        failed: dict[str, Told | SelfGuideError] = {}
        learners = []
        for lesson in pack:
            try:
                learners.append(self._learner(lesson))
            except SelfGuideError as error:
                failed[lesson.task] = error
        if not learners:
            return failed
        # Those with the most steps first: the batch shrinks from its end as tasks are through.
        learners.sort(key=lambda learner: (-len(learner.plan), learner.lesson.task))
        fitting = Fitting(self, learners, memory)
        fitting.run()
        told = fitting.finish(time.monotonic() - started)
        return failed | told

    def _learner(self, lesson: Lesson) -> Learner:
        seed = row_seed(self.config.seed, lesson.task, "train")
        pairs = read_pairs(lesson.task, lesson.rows, self.tokenizer, self.context)
        learned, validation = hold_out(pairs, self.settings.validation, seed)
        plan = list(batches(len(learned), self.settings, seed))
        return Learner(lesson, seed, learned, validation, plan, Stopping(self.settings.patience))


class Fitting:
    """The training of one pack."""

    def __init__(self, tuner: SideBySide, learners: list[Learner], memory: Memory) -> None:
        assert tuner.base is not None
        assert tuner.shapes is not None
        self.tuner, self.settings, self.learners, self.memory = tuner, tuner.settings, learners, memory
        self.base, self.device = tuner.base, tuner.device
        self.dtype = next(tuner.base.parameters()).dtype
        self.stack = AdapterStack(tuner.shapes, self.settings, [one.seed for one in learners], self.device)
        self.best = torch.zeros_like(self.stack.values) if self.settings.validation else None
        self.optimizer = make_optimizer([{"params": [row]} for row in self.stack.rows], self.settings)
        self.summed = torch.zeros(len(learners), self.settings.epochs, device=self.device)
        self.step, self.steps = 0, max(len(one.plan) for one in learners)
        self.saved = time.monotonic()
        self._recall()

    def run(self) -> None:
        """All steps from where the memory ends."""
        leaves: dict[str, Any] = {}
        count = 0
        while self.step < self.steps:
            going = [one.going(self.step) for one in self.learners]
            if not any(going):
                break
            if count != (needed := len(going) - going[::-1].index(True)):
                count = needed
                leaves = self.stack.leaves(count)
            self._learn(leaves, count, going)
            self.step += 1
            self._end_epochs(going)
            if time.monotonic() - self.saved >= self.tuner.config.cluster.checkpoint_seconds:
                self._remember()

    def _learn(self, leaves: dict[str, Any], count: int, going: list[bool]) -> None:
        """One optimiser step of the first `count` tasks, those that have ended along with them but without effect."""
        parts = []
        for one in self.learners[:count]:
            epoch, members = one.plan[min(self.step, len(one.plan) - 1)]
            parts.append((epoch, [one.pairs[i] for i in members] if one.going(self.step) else [mute(one.pairs[0])]))
        tokens = torch.tensor([[sum(len(pair.completion) for pair in pairs)] for _, pairs in parts], device=self.device)
        with self.stack.on(self.base, leaves):
            for micro in self._micro_batches([pairs for _, pairs in parts]):
                losses = lay_out(micro, self.device, self.dtype).losses(self.base, self.tuner.last)
                self.stack.add_gradients((losses / tokens[:, 0]).sum(), leaves)
                for n, (epoch, _) in enumerate(parts):
                    if going[n]:
                        self.summed[n, epoch] += losses[n].detach()
        self.stack.clip(count, self.settings.clip)
        for n, group in enumerate(self.optimizer.param_groups):
            row = self.stack.rows[n]
            row.grad = self.stack.gradients[n] if going[n] else None
            one = self.learners[n]
            group["lr"] = self.settings.peak_rate * rate_factor(self.step, len(one.plan), self.settings)
        self.optimizer.step()
        self.stack.gradients.zero_()

    def _micro_batches(self, batches: list[list[Pair]]) -> list[list[list[Pair]]]:
        """The tasks' batches in passes of a bounded number of tokens; a task without pairs left repeats one, unlearned."""
        room = max(1, self.tuner.config.cluster.tokens_per_pass // len(batches))
        pieces = [in_passes(batch, room) for batch in batches]
        passes = max(map(len, pieces))
        return [[mine[i] if i < len(mine) else [mute(mine[0][0])] for mine in pieces] for i in range(passes)]

    def _end_epochs(self, going: list[bool]) -> None:
        """After a step: note the loss of tasks whose epoch is over, validate them, and end those that have enough."""
        over = [n for n, one in enumerate(self.learners) if going[n] and one.last_of_epoch(self.step - 1)]
        for n in over:
            one = self.learners[n]
            epoch = one.plan[self.step - 1][0]
            tokens = sum(len(one.pairs[i].completion) for e, members in one.plan if e == epoch for i in members)
            loss = self.summed[n, epoch].item() / tokens
            one.losses.append(loss)
            if not math.isfinite(loss):
                one.error = diverged(one.lesson.task, f"the loss is {loss} in epoch {epoch + 1}")
        if self.best is not None and (checked := [n for n in over if self.learners[n].validation]):
            values = self.stack.values[checked]
            with self.stack.on(self.base, self.stack.matrices(values)), torch.no_grad():
                losses = self._validate(checked)
            for n, loss in zip(checked, losses, strict=True):
                one = self.learners[n]
                one.stopping.losses.append(loss if math.isfinite(loss) else math.inf)
                if one.stopping.best == len(one.stopping.losses) - 1:
                    self.best[n] = self.stack.values[n]
                if one.stopping.over:
                    one.ended = self.step

    def _validate(self, checked: list[int]) -> list[float]:
        """Mean loss a token of some tasks on the pairs held out of them."""
        sums = torch.zeros(len(checked), device=self.device)
        for micro in self._micro_batches([self.learners[n].validation for n in checked]):
            sums += lay_out(micro, self.device, self.dtype).losses(self.base, self.tuner.last)
        tokens = [sum(len(pair.completion) for pair in self.learners[n].validation) for n in checked]
        return [total / count for total, count in zip(sums.tolist(), tokens, strict=True)]

    def finish(self, seconds: float) -> dict[str, Told | SelfGuideError]:
        """Save what was learned; returns what is told of each task."""
        weights = [sum(map(len, one.pairs)) for one in self.learners]
        answers: dict[str, Told | SelfGuideError] = {}
        for n, one in enumerate(self.learners):
            if one.error is not None:
                answers[one.lesson.task] = one.error
                continue
            chosen = self.stack.values[n]
            kept = len(one.losses) - 1
            if self.settings.keep != "last" and self.best is not None and one.stopping.losses:
                chosen, kept = self.best[n], one.stopping.best
            if not chosen.isfinite().all():  # of a last step that went wrong
                answers[one.lesson.task] = diverged(one.lesson.task, "some of its weights are not finite")
                continue
            if one.lesson.folder is not None:
                self.stack.save(n, chosen, self.settings, self.tuner.config.student.model, one.lesson.folder)
            answers[one.lesson.task] = {
                "pairs": len(one.pairs) + len(one.validation),
                "steps": len(one.plan) if one.ended is None else one.ended,
                "losses": one.losses,  # mean over answer tokens (nats), an epoch each
                "validation_losses": one.stopping.losses,
                "epoch": kept + 1,  # whose weights these are
                "seconds": seconds * weights[n] / sum(weights),
                "side_by_side": len(self.learners),
            }
        return answers

    # --- what a new process goes on from

    def _remember(self) -> None:
        """Keep the whole state, so that the steps behind it are not taken again."""
        states = [self.optimizer.state[row] for row in self.stack.rows]
        tensors = {
            "values": self.stack.values,
            "summed": self.summed,
            **({"best": self.best} if self.best is not None else {}),
            **{f"{name}.{n}": state[name] for n, state in enumerate(states) for name in state},
        }
        notes = [
            {
                "task": one.lesson.task,
                "losses": one.losses,
                "validation": one.stopping.losses,
                "ended": one.ended,
                "error": None if one.error is None else [one.error.what, one.error.why, one.error.instead],
            }
            for one in self.learners
        ]
        about = {"step": str(self.step), "learners": json.dumps(notes)}
        self.memory.put(STATE, save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, about))
        self.saved = time.monotonic()

    def _recall(self) -> None:
        """Go on from what was kept, if it is of these tasks."""
        data = self.memory.get(STATE)
        if data is None:
            return
        about = described(data)
        notes = json.loads(about["learners"])
        if [note["task"] for note in notes] != [one.lesson.task for one in self.learners]:
            return
        tensors = load(data)
        self.step = int(about["step"])
        self.stack.values.copy_(tensors["values"])
        self.summed.copy_(tensors["summed"])
        if self.best is not None:
            self.best.copy_(tensors["best"])
        for n, (one, note) in enumerate(zip(self.learners, notes, strict=True)):
            one.losses, one.stopping.losses, one.ended = note["losses"], note["validation"], note["ended"]
            one.error = SelfGuideError(*note["error"]) if note["error"] else None
            state = {
                name: tensors[f"{name}.{n}"] for name in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{n}" in tensors
            }
            if state:
                step = state.pop("step")
                self.optimizer.state[self.stack.rows[n]] = {
                    "step": step.to(self.device),
                    **{name: x.to(self.device) for name, x in state.items()},
                }


def described(state: bytes) -> dict[str, str]:
    """What a safetensors file says of itself besides its tensors."""
    length = int.from_bytes(state[:8], "little")
    return json.loads(state[8 : 8 + length])["__metadata__"]
