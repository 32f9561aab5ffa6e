"""The two prompts of SELF-GUIDE and that of a check, in our own words, and the one renderer of all stages (spec §1.7).

Annotation, training and every prompted system get the text of `Prompts.answering`, byte for byte (statement 18): it
ends in the bare assistant header, without trailing white space; `reference` has ends of its own. The text is the whole
truth, special tokens included, so BOS is decided here and nowhere else: engines and the trainer get `encode(text)` and
add nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from selfguide_ray.engine import SamplingParams
from selfguide_ray.schema import ITEM, Example, Task, Tokenizer
from selfguide_ray.voices import escaped, role_words

PREAMBLE = "You carry out one fixed text task. Answer each item with the bare result and nothing else."
ACKNOWLEDGEMENT = "Understood."


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt. `examples` says how many demonstrations found room; ids over the limit mean `too_long`."""

    text: str
    ids: tuple[int, ...]
    examples: int
    too_long: bool


class Prompts:
    """Renders prompts for one student.

    max_tokens bounds a prompt (the reference's 3,000, spec §1.1). A prompt over it loses earlier items, then
    demonstrations from the last on, and is `too_long` if that does not help (decision on bug B11).
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.has_chat = tokenizer.chat([{"role": "user", "content": "x"}]) is not None
        # Where a student has no end of turn of its own, its next turn is cut off (decision on bug B24).
        self.answer_stops = () if self.has_chat else ("\nUSER:", "\nASSISTANT:")
        self.item_stops = () if self.has_chat else ("\nITEM:", "\n###", *self.answer_stops)
        # What names a speaker without being a special token; in plain text that is a word at the start of a line.
        self.role_words = role_words(tokenizer) if self.has_chat else self.answer_stops
        self.lead = "" if self.has_chat else " "  # what stands between the header and an answer

    @classmethod
    def within(cls, tokenizer: Tokenizer, limit: int, context: int, new_tokens: int) -> "Prompts":
        """A renderer whose prompts leave room in the context for the new tokens, or at least for a quarter of it."""
        return cls(tokenizer, min(limit, context - min(new_tokens, context // 4)))

    def answering(self, task: Task, text: str, examples: Sequence[Example] | None = None) -> Prompt:
        """P2: the instruction, a turn for each demonstration (all of the task's unless given), and the new input."""
        shown = list(task.examples if examples is None else examples)
        while True:
            prompt = self._prompt(answering_messages(task.instruction, shown, text), len(shown), self.headed)
            if not prompt.too_long or not shown:
                return prompt
            shown.pop()

    def writing(self, task: Task, gold: Sequence[str], earlier: Sequence[str], label: str | None) -> Prompt:
        """P1: ask for one new input, given people's inputs, earlier generated ones and for a classification task a label."""
        gold, earlier = list(gold), list(earlier)
        while True:
            content = writing_request(task.instruction, gold, earlier, label)
            prompt = self._prompt([{"role": "user", "content": content}], len(gold))
            if not prompt.too_long or len(gold) <= 1:
                return prompt
            (earlier or gold).pop()

    def checking(self, task: Task, text: str) -> Prompt:
        """P3: ask if a text is a proper item of the task, given the inputs of its examples."""
        shown = [example.input for example in task.examples]
        while True:
            request = checking_request(task.instruction, shown, text)
            prompt = self._prompt([{"role": "user", "content": request}], len(shown))
            if not prompt.too_long or not shown:
                return prompt
            shown.pop()

    def headed(self, text: str) -> str:
        """How a prompt that wants an answer ends; here in the bare header that it was rendered with."""
        return text

    def completion(self, output: str) -> str:
        """What training teaches after the prompt: the answer and the end of the turn."""
        return self.lead + self._escaped(output.strip()) + self.tokenizer.eos

    def labels(self, task: Task) -> tuple[tuple[int, ...], ...]:
        """The task's labels as `choices`."""
        return self.choices(task.labels)

    def choices(self, answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Answers as token ids behind a prompt; where one begins another, each with the end of the turn."""
        texts = [self.lead + self._escaped(answer.strip()) for answer in dict.fromkeys(answers)]
        for end in ("", self.tokenizer.eos):
            ids = sorted(tuple(self.tokenizer.encode(text + end)) for text in texts)
            if all(b[: len(a)] != a for a, b in pairwise(ids)):
                break
        return tuple(dict.fromkeys(tuple(self.tokenizer.encode(text + end)) for text in texts))

    def _prompt(self, messages: list[dict[str, str]], examples: int, headed: Callable[[str], str] = str) -> Prompt:
        messages = [{"role": m["role"], "content": self._escaped(m["content"])} for m in messages]
        text = self.tokenizer.chat(messages)
        if text is None:
            text = self.tokenizer.bos + plain(messages)
        text = headed(text)
        ids = tuple(self.tokenizer.encode(text))
        return Prompt(text, ids, examples, len(ids) > self.max_tokens)

    def _escaped(self, text: str) -> str:
        """Data cannot speak in the format's voice."""
        return escaped(text, self.tokenizer, self.role_words)


def answering_messages(instruction: str, examples: Sequence[Example], text: str) -> list[dict[str, str]]:
    """P2 as chat messages. The preamble is part of the first user turn: not every chat format knows a system role."""
    turns = [f"{PREAMBLE}\nTask: {instruction}", ACKNOWLEDGEMENT]
    for example in examples:
        turns += [f"{ITEM} {example.input.strip()}", example.output.strip()]
    turns.append(f"{ITEM} {text.strip()}")
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def writing_request(instruction: str, gold: Sequence[str], earlier: Sequence[str], label: str | None) -> str:
    """P1 as text (spec §1.7): outputs are never shown, the wanted label stands twice, the item's key is the last line."""
    wanted = f"\nThe only right answer to it must be: {label}" if label is not None else ""
    reminder = f" Its answer must be: {label}" if label is not None else ""
    return (
        "Invent one more test item for the text task described here.\n\n"
        f"### Task\n{instruction}\n\n"
        f"### Items written by people (keep to their layout, reuse none of their content)\n{_items(gold)}\n\n"
        f"### Items proposed by a model (may be flawed, shown so that you do not repeat them)\n{_items(earlier)}\n\n"
        "### Wanted\nOne new item that the task can be applied to, varied and detailed, different from every item above."
        f"{wanted}\nWrite the item alone: no answer, no greeting, no explanation.{reminder}\n{ITEM}"
    )


def checking_request(instruction: str, examples: Sequence[str], text: str) -> str:
    """P3 as text: the instruction, proper items, the candidate, and the question; the answer's key is the last line."""
    return (
        "Judge whether a proposed item is fit for the text task described here.\n\n"
        f"### Task\n{instruction}\n\n"
        f"### Proper items\n{_items(examples)}\n\n"
        f"### Proposed item\n{_items([text])}\n\n"
        "### Question\nIs the proposed item complete and sensible, laid out like the proper items, and can the task be "
        "applied to it? Answer with yes or no alone.\nAnswer:"
    )


def _items(texts: Sequence[str]) -> str:
    return "\n\n".join(f"{ITEM} {text.strip()}" for text in texts) or "none"


def plain(messages: Sequence[dict[str, str]]) -> str:
    """The format for students without a chat format. A lone request is left as text to be continued."""
    if len(messages) == 1:
        return messages[0]["content"]
    speaker = {"user": "USER", "assistant": "ASSISTANT"}
    return "\n".join(f"{speaker[m['role']]}: {m['content']}" for m in messages) + "\nASSISTANT:"


def held_to_labels(
    params: SamplingParams, task: Task, mode: Literal["free", "decode", "score"], prompts: Prompts
) -> SamplingParams:
    """The parameters with the task's labels as the only answers, if the setting wants that and the task has labels."""
    if mode == "free" or not task.labels:
        return params
    return replace(params, labels=prompts.labels(task), label_mode=mode)
