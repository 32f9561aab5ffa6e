"""The generation engine: what is asked, what comes back, and which engines there are.

Engines get token ids and never text. A request's ids are split into a prefix, which other requests of the task share,
and a suffix of its own; the split changes the cost and not the result.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

from selfguide_ray.config import Cluster, Student
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import Tokenizer

CPU_KV_GIB = 1.0  # what `student.kv_memory_gib` is on a CPU unless it is given


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in.

    `labels` are the only continuations allowed, as token ids, none the beginning of another: so each holds its end,
    EOS or a line break. They are drawn token by token from what the labels leave open (`decode`), or all are scored
    and one is drawn from the scores (`score`), in both ways at `temperature`; top_k, top_p and stops do not apply.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 500
    stops: tuple[str, ...] = ()
    logprobs: int = 0  # how many of the likeliest tokens to report at each position
    labels: tuple[tuple[int, ...], ...] = ()
    label_mode: Literal["decode", "score"] = "decode"

    def __post_init__(self) -> None:
        """Raises ValueError if a label is empty or begins another: then its end could not be told."""
        ordered = sorted(self.labels)
        if any(b[: len(a)] == a for a, b in zip(((), *ordered), ordered, strict=False) if a or not b):
            raise ValueError(f"no label may be empty or begin another: {self.labels}")


@dataclass(frozen=True)
class Request:
    """One prompt to continue `params.n` times; `seed` decides the text together with the prompt (design, invariant 5)."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    adapter: str | None = None  # local folder of a PEFT adapter or of tuned weights


@dataclass(frozen=True)
class Completion:
    """One continuation: its text up to the stop, its tokens without EOS, and why it ended.

    finish_reason is `stop` (end of sequence, a stop string, a label's end), `length` (max_new_tokens or the context),
    or, where there is no text, `too_long` (the prompt finds no room in the context or in the engine's memory),
    `engine_error` (the engine failed at this request and not at others), `killed_engine` (its process died of it), or
    `timed_out` (it took longer than it may).
    """

    text: str
    ids: tuple[int, ...]
    logprob: float  # sum over the generated tokens, EOS included; the model's own: untempered, whole vocabulary
    finish_reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens whose keys and values another request had already paid for
    generated_tokens: int = 0  # EOS included
    logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # at each position the likeliest (token, log-probability)
    # Of the label that was chosen, among the labels: its share of the scores of all, or when it was decoded the product
    # of its tokens' shares among those that the labels left open.
    probability: float | None = None
    label_probabilities: tuple[float, ...] = ()  # of all labels, in order, summing to 1; of `score` alone


VERDICTS = ("too_long", "engine_error", "killed_engine", "timed_out")  # finish reasons of rows without text


def verdict(completions: Sequence[Completion]) -> str | None:
    """The verdict on a request: of its completions all have a text, or it has none."""
    return next((c.finish_reason for c in completions if c.finish_reason in VERDICTS), None)


@dataclass
class Counters:
    """What an engine has done since it started; differences of two copies tell of the time between."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0  # decoding steps
    rows: int = 0  # rows decoded, summed over the steps
    places: int = 0  # rows that could have been decoded, summed over the steps
    busy_seconds: float = 0.0
    ideal_seconds: float = 0.0  # what the same tokens cost at the measured ceiling, the bare model in full batches

    def copy(self) -> "Counters":
        """The state now."""
        return dataclasses.replace(self)

    def since(self, before: "Counters") -> "Counters":
        """What was done after `before`."""
        return Counters(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)))


class Engine(Protocol):
    """Continues prompts with one student."""

    tokenizer: Tokenizer
    context: int  # tokens that prompt and completion may take together
    fingerprint: str  # all that can change a row besides request and model: versions, device, number format, geometry
    counters: Counters

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """For each request its n completions, in order. Several threads may call; their requests share batches."""


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min([at for at in map(text.find, stops) if at >= 0], default=len(text))]


def common_head(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with."""
    first, last = min(texts), max(texts)
    limit = min(len(first), len(last))
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def share_prefix(prompts: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each prompt split behind the longest prefix common to all; every suffix keeps at least one token."""
    if not prompts:
        return []
    length = min(common_head(prompts), min(map(len, prompts)) - 1)
    return [(prompt[:length], prompt[length:]) for prompt in prompts]


def check_engine(student: Student) -> None:
    """Raise SelfGuideError if the engine that the settings name is not installed."""
    if student.engine == "vllm" and find_spec("vllm") is None:
        raise no_vllm("there is no module vllm")


def no_vllm(why: str) -> SelfGuideError:
    """What a user is told of a vLLM that cannot be imported."""
    return SelfGuideError(
        f"student.engine: vllm is not installed: {why}.",
        "It is an extra, since it ties the version of torch.",
        "pip install 'selfguide_ray[vllm]', or take student.engine: transformers.",
    )


def make_engine(student: Student, cluster: Cluster) -> Engine:
    """The engine that the settings name."""
    if student.engine == "scripted":
        from selfguide_ray.engine.scripted import ScriptedEngine

        return ScriptedEngine(student)
    if student.engine == "vllm":
        from selfguide_ray.engine.vllm import VllmEngine

        return VllmEngine(student, cluster)
    from selfguide_ray.engine.transformers import TransformersEngine

    return TransformersEngine(student, threads=max(1, int(cluster.cpus_per_engine)))
