"""A student without a model: fast, deterministic, and imperfect enough to meet every verdict. For tests of the plumbing.

It obeys the protocols to the letter: text depends on prompt and seed alone, adapters change its answers. What it writes is
made of the words of its prompt. SELFGUIDE_SCRIPTED_DELAY (seconds a call) makes it slow enough to be killed at work.
"""

import json
import os
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

from selfguide_ray.config import Student
from selfguide_ray.engine import Completion, Counters, Request
from selfguide_ray.schema import row_seed

MEMORY = "memory.json"


class ByteTokenizer:
    """UTF-8 bytes as token ids, without a chat format."""

    bos, eos = "", "\x04"
    special_tokens = ("\x04",)

    def encode(self, text: str) -> list[int]:
        """Bytes."""
        return list(text.encode())

    def special_spans(self, text: str) -> list[tuple[int, int]]:
        """Where EOS stands."""
        return [(place, place + len(token)) for token in self.special_tokens for place in _places(text, token)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text, without EOS."""
        return bytes(ids).decode(errors="replace").replace(self.eos, "")

    def chat(self, messages: list[dict[str, str]]) -> str | None:
        """None: prompts are plain text."""
        return None


def _places(text: str, token: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(token), text)]


class ScriptedEngine:
    """See `engine.Engine`."""

    def __init__(self, student: Student) -> None:
        self.tokenizer = ByteTokenizer()
        self.context = 1 << 16
        self.fingerprint = "scripted"
        self.counters = Counters()
        self.delay = float(os.environ.get("SELFGUIDE_SCRIPTED_DELAY", "0"))

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """See `engine.Engine`."""
        time.sleep(self.delay)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> list[Completion]:
        prompt = self.tokenizer.decode(request.prefix + request.suffix)
        speak = write_item if prompt.endswith("ITEM:") else answer_item
        memory = json.loads((Path(request.adapter) / MEMORY).read_text()) if request.adapter else {}
        completions = []
        for sample in range(request.params.n):
            rng = random.Random(row_seed(request.seed, sample, prompt))
            labels = [self.tokenizer.decode(label) for label in request.params.labels]
            text = speak(prompt, rng, memory)[: request.params.max_new_tokens]
            if labels and text.strip() not in [label.strip() for label in labels]:
                text = rng.choice(labels)
            ids = tuple(text.encode())
            known = {}
            if labels and request.params.label_mode == "score":
                shares = label_shares(prompt, labels)
                chosen = [label.strip() for label in labels].index(text.strip())
                known = {"probability": shares[chosen], "label_probabilities": shares}
            elif labels:
                known = {"probability": 1 / len(labels)}
            completions.append(
                Completion(
                    text, ids, -rng.random() * len(text), "stop", len(prompt), generated_tokens=len(ids), **known
                )
            )
            self.counters.generated_tokens += len(ids)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(prompt) * request.params.n
        return completions


def write_item(prompt: str, rng: random.Random, memory: dict[str, str]) -> str:
    """A new item out of the words of the items shown; now and then empty, chatty, too long or a repetition."""
    items = re.findall(r"^ITEM: (.+)$", prompt, re.MULTILINE)
    words = [word for item in items for word in item.split()]
    draw = rng.random()
    if draw < 0.03:
        return "  "
    if draw < 0.08:
        return f' "{rng.choice(items)}"'
    text = " ".join(rng.choice(words) for _ in rng.choice(items).split())
    if draw < 0.12:
        return f"Sure, {text}"
    return f" {text} {text} {text}" if draw < 0.16 else f" {text}"


def label_shares(prompt: str, labels: Sequence[str]) -> tuple[float, ...]:
    """What the labels get of the probability; as with a model, it hangs on the prompt and on no seed."""
    rng = random.Random(row_seed(0, "labels", prompt))
    weights = [rng.random() + 1e-6 for _ in labels]
    return tuple(weight / sum(weights) for weight in weights)


def answer_item(prompt: str, rng: random.Random, memory: dict[str, str]) -> str:
    """One of the answers shown, the same for the same item four times out of five; an adapter knows what it was taught."""
    answers = re.findall(r"^ASSISTANT: (.+)$", prompt, re.MULTILINE)[1:] or ["unknown"]
    item = prompt.rsplit("ITEM: ", 1)[-1].rstrip().removesuffix("\nASSISTANT:")
    if memory:
        return memory.get(item) or max(sorted(set(memory.values())), key=list(memory.values()).count)
    return " " + (answers[row_seed(0, item) % len(answers)] if rng.random() < 0.8 else rng.choice(answers))
