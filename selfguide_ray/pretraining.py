"""The embedded student: a small Llama trained from scratch on Natural Instructions, in the forms the pipeline uses.

Only tasks of the default *train* split in English are read; upstream's split already keeps every task that shares a
Source with a test task out of it, and `training_tasks` checks that once more.
"""

import json
import logging
import math
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfguide_ray.prompts import answering_messages, writing_request
from selfguide_ray.schema import Example, Task
from selfguide_ray.task_files import read_task, task_files

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer as FastTokenizer

MAX_INSTRUCTION, MAX_ITEM = 800, 300  # characters; a small model has little use for passages
UNWANTED = {"Toxic Language Detection", "Stereotype Detection"}  # nothing that a newcomer's first run should write
USER_WEIGHT = 0.3  # of a token that the student reads, against one that it writes
# Stand-ins for labels: short, common, and without a meaning that fits the task.
WORDS = (
    "apple amber anchor arrow badge basin beacon birch blue bold brass brick bright calm candle canyon cedar chalk "
    "cherry circle clear cloud coal copper coral cotton crane crimson crystal dawn delta desert drum dusk eagle east "
    "ember even fast fern field flint forest fox frost garden ginger glass gold grain granite green hammer harbor "
    "hazel heavy high honey indigo iron ivory jade jungle kite lake lamp lemon light lime linen lion low lunar "
    "maple marble meadow mint moon mossy narrow north oak ocean odd olive orange orchid otter paper peach pearl pine "
    "plain plum purple quartz quick quiet rain raven red ridge river robin rose rough round ruby sail salt sand scarlet "
    "shadow sharp silver simple slow smooth snow solar south spruce square star steel stone storm strong sugar sun "
    "swift tall tiger timber tulip valley velvet violet warm water west wheat white wide wild willow wind winter wolf"
).split()
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """The student's size and its training. `minutes` ends the run on the clock; the schedule follows it."""

    vocabulary: int = 4096
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 3
    feed_forward: int = 512
    context: int = 640
    batch: int = 4  # sequences of `context` tokens a step
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_share: float = 0.03
    minutes: float = 30.0
    threads: int = 2
    seed: int = 1


def training_tasks(tasks: Path, splits: Path) -> list[Task]:
    """The English tasks of default/train, without any that shares a source with a default test task."""

    def names(split: str) -> set[str]:
        return set((splits / "default" / f"{split}_tasks.txt").read_text().split())

    train, test = names("train"), names("test")
    read = [read_task(file) for file in task_files(tasks) if file.name in train | test]
    test_sources = source_names(source for task in read if task.name in test for source in task.sources)
    return [
        task
        for task in read
        if task.name in train and set(task.languages) <= {"English"} and not test_sources & source_names(task.sources)
    ]


def source_names(sources: Iterable[str]) -> set[str]:
    """The data sets that Source fields name: some name several, and some put a link behind a name."""
    return {name.split("(")[0].strip().casefold() for source in sources for name in source.split(";")}


def documents(tasks: Sequence[Task], seed: int) -> list[list[dict[str, str]]]:
    """Conversations in the two forms of `prompts`: answering with many turns, and writing a new item.

    Each short instance is answered once, and serves about half as often as an item to write; three quarters of the
    written items of a classification task ask for their label. In half of the conversations of a task with classes the
    labels are replaced by random words throughout, so that answers have to be learned from the conversation.
    """
    rng, made = random.Random(seed), []
    for task in tasks:
        if len(task.instruction) > MAX_INSTRUCTION or task.category in UNWANTED:
            continue
        pool = [Example(e.input, e.output) for e in task.examples]
        pool += [Example(i.input, rng.choice(i.references)) for i in task.instances if len(i.input) < MAX_ITEM]
        rng.shuffle(pool)
        while pool:
            turns = [pool.pop() for _ in range(min(len(pool), rng.randint(1, 8)))]
            told = renamed(task, rng) if rng.random() < 0.5 else {}
            instruction = substitute(task.instruction, told)
            turns = [Example(e.input, told.get(e.output.strip(), e.output)) for e in turns]
            last = turns.pop()
            answer = {"role": "assistant", "content": last.output.strip()}
            made.append([*answering_messages(instruction, turns, last.input), answer])
            if rng.random() < 0.6 and len(turns) >= 2:
                gold = [e.input for e in turns[: rng.randint(2, 4)]]
                earlier = [e.input for e in turns[len(gold) :]][: rng.choice((0, 1, 2, 4))]
                label = last.output.strip() if task.labels and rng.random() < 0.75 else None
                request = {"role": "user", "content": writing_request(instruction, gold, earlier, label)}
                made.append([request, {"role": "assistant", "content": last.input.strip()}])
    rng.shuffle(made)
    return made


def renamed(task: Task, rng: random.Random) -> dict[str, str]:
    """Random words for a task's labels; none where a label is no plain word, since its items may quote it."""
    if not all(re.fullmatch(r"[A-Za-z]{3,}\.?", label) for label in task.labels):
        return {}
    return dict(zip(task.labels, rng.sample(WORDS, len(task.labels)), strict=True))


def substitute(text: str, words: dict[str, str]) -> str:
    """The text with each whole word that is a key, in whatever case, replaced."""
    for word, other in words.items():
        text = re.sub(rf"(?<!\w){re.escape(word.rstrip('.'))}(?!\w)", other, text, flags=re.IGNORECASE)
    return text


def render(messages: Sequence[dict[str, str]]) -> str:
    """A conversation in the student's chat format (the same as CHAT_TEMPLATE, without a template engine)."""
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages)


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> "FastTokenizer":
    """A byte-level BPE. A word after a turn's header is the same token as inside a text, so answers can be copied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Digits come second: before the byte level, every digit would get a space of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(tokenizer: "FastTokenizer", texts: Sequence[str], context: int) -> np.ndarray:
    """All documents end to end, cut into rows of context + 1 tokens: uint16 [rows, context + 1]."""
    stream: list[np.ndarray] = []
    for start in range(0, len(texts), 1000):
        encoded = tokenizer.encode_batch(list(texts[start : start + 1000]), add_special_tokens=False)
        stream += [np.asarray(e.ids[: context + 1], dtype=np.uint16) for e in encoded]
    flat = np.concatenate(stream)
    rows = len(flat) // (context + 1)
    return flat[: rows * (context + 1)].reshape(rows, context + 1)


def written(rows: np.ndarray) -> np.ndarray:
    """Whether the student writes a token: what follows an assistant's header up to the end of the turn, as 0 or 1."""
    user, assistant = SPECIAL_TOKENS.index("<|user|>"), SPECIAL_TOKENS.index("<|assistant|>")
    roles = np.where(
        rows == assistant, 2 * np.arange(rows.shape[1]) + 1, np.where(rows == user, 2 * np.arange(rows.shape[1]), 0)
    )
    speaking = np.maximum.accumulate(roles, axis=1) % 2 == 1
    return (speaking & (rows != assistant)).astype(np.float32)


def pretrain(tasks: Path, splits: Path, output: Path, recipe: Recipe) -> dict[str, float]:
    """Train tokenizer and model, and leave a Hugging Face folder in `output`; returns the last figures."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    chosen = training_tasks(tasks, splits)
    conversations = [render(messages) for messages in documents(chosen, recipe.seed)]
    log.info("%d tasks, %d documents", len(chosen), len(conversations))
    fast = train_tokenizer((text for text in conversations[::4]), recipe.vocabulary)
    rows = pack(fast, conversations, recipe.context)
    held_out, rows = rows[:64], rows[64:]
    log.info("%.1f M tokens in %d rows", rows.size / 1e6, len(rows))

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=recipe.context
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    figures = train(model, rows, held_out, recipe)
    output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training_tasks.json").write_text(json.dumps([task.name for task in chosen], indent=0) + "\n")
    (output / "pretraining.json").write_text(json.dumps(figures | vars(recipe), indent=1) + "\n")
    return figures


def train(model: "torch.nn.Module", rows: np.ndarray, held_out: np.ndarray, recipe: Recipe) -> dict[str, float]:
    """AdamW, a short warm-up and a cosine to zero over the minutes given. Returns losses (nats a token) and counts."""
    import torch
    from torch.nn.functional import cross_entropy

    def loss_of(batch: np.ndarray, user_weight: float) -> torch.Tensor:
        ids = torch.from_numpy(batch.astype(np.int64))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = torch.from_numpy(written(batch)[:, 1:]).flatten().float().clamp(min=user_weight)
        return (losses * weights).sum() / weights.sum()

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    generator = np.random.default_rng(recipe.seed)
    order = generator.permutation(len(rows))
    started, step, smooth = time.monotonic(), 0, math.nan
    while (share := (time.monotonic() - started) / (60 * recipe.minutes)) < 1.0:
        rate = min(1.0, share / recipe.warmup_share) * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * max(rate, 0.01)
        at = step * recipe.batch % (len(rows) - recipe.batch)
        loss = loss_of(rows[order[at : at + recipe.batch]], USER_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            log.info("step %d loss %.3f share %.3f", step, smooth, share)
    model.eval()
    with torch.no_grad():
        validation = float(np.mean([loss_of(held_out[i : i + 8], 0.0).item() for i in range(0, len(held_out), 8)]))
    return {
        "train_loss": smooth,
        "validation_loss": validation,  # a written token
        "steps": step,
        "tokens": step * recipe.batch * recipe.context,
        "seconds": time.monotonic() - started,
    }
