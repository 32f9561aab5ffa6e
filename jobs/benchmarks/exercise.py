"""Tasks of made-up pairs to fine-tune on, and the usual peft loop that ours is compared with; all decided by seeds."""

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.workload import WORDS
from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.models import Pack
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Task, row_seed, task_rows
from selfguide_ray.student import StudentTokenizer, context_of, locate
from selfguide_ray.tuning import Lesson
from selfguide_ray.tuning.adapter_stack import lora_config
from selfguide_ray.tuning.data_parallel import collate
from selfguide_ray.tuning.pairs import batches, first_a, rate_factor, read_pairs

NANO = "embedded/nano"
SHORT, MIDDLE, LONG = (1, 3), (20, 24), (110, 120)  # words of an input; the instruction and the format are added


@dataclass(frozen=True)
class Exercise:
    """Tasks to learn: pairs of made-up words, decided by the seed."""

    tasks: int = 16
    pairs: int = 64
    words: tuple[int, int] = SHORT

    def write(self, folder: Path, model: str, *overrides: str) -> Config:
        """A run whose training pairs are there."""
        config = load(
            None, [f"run={folder}", f"student.model={model}", "student.dtype=float32", "models.epochs=1", *overrides]
        )
        tokenizer = StudentTokenizer(config.student)
        prompts = Prompts.within(tokenizer, config.student.max_prompt_tokens, context_of(config.student), 8)
        tasks, rows = [], []
        for name in (f"task{n:02}" for n in range(self.tasks)):
            draw = _words(random.Random(f"{config.seed} {name}"), model)
            task = Task(name, f"Say {next(draw)} {next(draw)} of the item.", ())
            for i in range(self.pairs):
                count = random.Random(f"{name} {i}").randint(*self.words)
                words = list(itertools.islice(draw, count))
                prompt, completion = prompts.answering(task, " ".join(words)), prompts.completion(words[0])
                rows.append(
                    {
                        "task": name, "system": "selfguide", "id": f"{name}-{i}", "input": " ".join(words), "output": words[0],
                        "prompt": prompt.text, "completion": completion,
                        "tokens": len(prompt.ids) + len(tokenizer.encode(completion)),
                    }
                )  # fmt: skip
            tasks.append(task)
        run, schema = Run(config.run), TABLES["trainset"]
        run.write("tasks", "00000", task_rows(tasks), {})
        run.write("trainset", "00000", schema.empty_table().from_pylist(rows, schema), {})
        return config


def _words(chance: random.Random, model: str) -> Iterator[str]:
    """Endless words that the student's tokenizer knows: syllables, or those of the random models."""
    while True:
        if model == NANO:
            yield "".join(chance.choice("bdfgklmnprst") + chance.choice("aeiou") for _ in range(chance.randint(2, 3)))
        else:
            yield f"w{chance.randrange(WORDS, 512)}"


def lessons_of(config: Config, pack: Pack, folder: Path) -> list[Lesson]:
    rows = Run(config.run).read_all("trainset")
    lessons = [Lesson(task, rows.filter(pc.equal(rows["task"], task)), folder / task) for task, _ in pack.tasks]
    for lesson in lessons:
        lesson.folder.mkdir()
    return lessons


def mean_tokens(config: Config) -> int:
    return round(pc.mean(Run(config.run).read_all("trainset")["tokens"]).as_py())


def described(config: Config) -> str:
    tasks, models = Run(config.run).read_all("tasks"), config.models
    pairs = Run(config.run).read_all("trainset").num_rows // len(tasks)
    return (
        f"{len(tasks)} tasks × {pairs} pairs of {mean_tokens(config)} tokens on average, {models.epochs} epoch(s), batch "
        f"{models.batch_size}, LoRA rank {models.rank} on {models.target_modules}, {Path(config.student.model).name}, "
        "float32, 1 thread"
    )


def difference(one: Path, other: Path) -> float:
    """The largest difference of two adapters' matrices, in shares of the norm."""
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert first.keys() == second.keys()
    return max(((first[name] - second[name]).norm() / second[name].norm()).item() for name in first)


class Forgetful:
    """A `tuning.Memory` that keeps nothing."""

    def get(self, name: str) -> None:
        """See `tuning.Memory`."""

    def put(self, name: str, data: bytes) -> None:
        """See `tuning.Memory`."""

    def remove(self, name: str) -> None:
        """See `tuning.Memory`."""

    def clear(self) -> None:
        """See `tuning.Memory`."""


class PlainPeft:
    """The usual loop on a resident base, with the first values, order and rates of ours."""

    def __init__(self, config: Config) -> None:
        self.config, self.tokenizer = config, StudentTokenizer(config.student)
        self.base = AutoModelForCausalLM.from_pretrained(locate(config.student), dtype=torch.float32).eval()

    def train(self, lesson: Lesson) -> float:
        """Train and save one adapter; returns the mean loss a token of the last epoch."""
        settings, seed = self.config.models, row_seed(self.config.seed, lesson.task, "train")
        pairs = read_pairs(lesson.task, lesson.rows, self.tokenizer, sys.maxsize)
        model = get_peft_model(self.base, lora_config(settings))
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                weight = layer.lora_A["default"].weight
                weight.data = first_a(name.removeprefix("base_model.model."), tuple(weight.shape), seed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=settings.weight_decay, fused=True)
        plan, total, tokens = list(batches(len(pairs), settings, seed)), torch.zeros(()), 0
        for step, (epoch, members) in enumerate(plan):
            optimizer.param_groups[0]["lr"] = settings.peak_rate * rate_factor(step, len(plan), settings)
            ids, mask, labels = collate([pairs[i] for i in members], 0)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            if epoch == settings.epochs - 1:
                count = sum(len(pairs[i].completion) for i in members)
                total, tokens = total + loss.detach() * count, tokens + count
        model.save_pretrained(lesson.folder)
        model.unload()
        return total.item() / tokens
