"""The generation engine: what is asked, what comes back, and which engines there are.

Engines get token ids and never text. A request's ids are split into a prefix, which other requests of the task share,
and a suffix of its own; the split changes the cost and not the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from selfguide_ray.config import Cluster, Student
from selfguide_ray.schema import Tokenizer


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 500
    stops: tuple[str, ...] = ()


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
    """One continuation: its text up to the stop, summed log-probability (untempered), and why it ended.

    finish_reason is `stop` (end of sequence or a stop string), `length` (max_new_tokens) or `too_long`
    (the prompt leaves no room in the context: nothing was generated).
    """

    text: str
    ids: tuple[int, ...]
    logprob: float
    finish_reason: str


class Engine(Protocol):
    """Continues prompts with one student."""

    tokenizer: Tokenizer
    context: int  # tokens that prompt and completion may take together
    fingerprint: str  # all that can change a row besides request and model: versions, device, number format, geometry
    generated: int  # tokens generated since the engine started
    prompted: int  # prompt tokens of the requests since then, prefixes counted for each

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """For each request its n completions, in order."""


def share_prefix(prompts: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each prompt split behind the longest prefix common to all; every suffix keeps at least one token."""
    if not prompts:
        return []
    first, last = min(prompts), max(prompts)
    length, limit = 0, min(map(len, prompts)) - 1
    while length < limit and first[length] == last[length]:
        length += 1
    return [(prompt[:length], prompt[length:]) for prompt in prompts]


def make_engine(student: Student, cluster: Cluster) -> Engine:
    """The engine that the settings name."""
    if student.engine == "scripted":
        from selfguide_ray.engine.scripted import ScriptedEngine

        return ScriptedEngine(student)
    from selfguide_ray.engine.transformers import TransformersEngine

    return TransformersEngine(student, threads=max(1, int(cluster.cpus_per_engine)))
