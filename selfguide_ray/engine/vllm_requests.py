"""What to ask of vLLM for a request, and the completions that its answers make. vLLM itself is imported when it is used.

Labels are never told by their text: a list of choices would let any tokens through that spell it. To `decode`, a grammar
of token ids constrains the draw; it is llguidance's, since xgrammar 0.2.8 takes one compiled grammar for all token grammars
of the same shape. vLLM's log-probabilities of such a draw are those under the grammar, so the model's own come from
requests beside it, as they do to `score`: one for each token of the labels' tree, whose one new token is fixed beforehand.
Measured, that is a fifth of the work of log-probabilities of the prompt, for which vLLM reads no cached prefix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from selfguide_ray.engine import Completion, Request, SamplingParams, before_stop
from selfguide_ray.engine.labels import LabelTree, draw_label, label_tree
from selfguide_ray.schema import row_seed
from selfguide_ray.student import StudentTokenizer

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm import SamplingParams as VllmSampling

VERDICTS = ("too_long", "engine_error")

Branch = tuple[int, int]  # a state of the labels' tree and a token behind it


@dataclass(frozen=True)
class Answer:
    """What vLLM made of one prompt."""

    finish_reason: str
    ids: tuple[int, ...] = ()
    chosen: tuple[float, ...] = ()  # log-probability of each
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached: int = 0


@dataclass(frozen=True)
class Question:
    """One prompt for vLLM, with the fields of its sampling parameters."""

    prompt: list[int]
    sampling: dict[str, Any]

    def parameters(self, room: int) -> "VllmSampling":
        """vLLM's sampling parameters if there is room for so many new tokens. Raises ValueError for impossible ones."""
        from vllm import SamplingParams as VllmSampling
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        fields = {"detokenize": False} | self.sampling | {"max_tokens": min(room, self.sampling["max_tokens"])}
        if grammar := fields.pop("grammar", None):
            fields["structured_outputs"] = StructuredOutputsParams(grammar=grammar)
        return VllmSampling(output_kind=RequestOutputKind.FINAL_ONLY, **fields)


def questions(request: Request, eos_ids: set[int]) -> list[Question]:
    """What to ask for a request: its samples, unless they are drawn from scores, then the tokens of its labels' tree."""
    params, prompt = request.params, [*request.prefix, *request.suffix]
    drawn = 0 if params.labels and params.label_mode == "score" else params.n
    asked = [Question(prompt, _sampling(params, row_seed(request.seed, i), eos_ids)) for i in range(drawn)]
    if params.labels:
        tree = label_tree(params.labels)
        common = {"max_tokens": 1, "temperature": 0.0, "logprobs": params.logprobs}
        for state, token in branches(tree):
            asked.append(Question(prompt + way_to(tree, state), common | {"allowed_token_ids": [token]}))
    return asked


def _sampling(params: SamplingParams, seed: int, eos_ids: set[int]) -> dict[str, Any]:
    common = {"temperature": params.temperature, "seed": seed, "logprobs": params.logprobs}
    if not params.labels:
        return common | {
            "max_tokens": params.max_new_tokens,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "stop": list(params.stops),
            "stop_token_ids": sorted(eos_ids),
            "detokenize": bool(params.stops),
        }
    inner = {token for label in params.labels for token in label[:-1]}
    return common | {
        "max_tokens": min(params.max_new_tokens, max(map(len, params.labels))),
        "stop_token_ids": sorted({label[-1] for label in params.labels} - inner),
        "ignore_eos": True,
        "grammar": "start: " + " | ".join(" ".join(f"<[{token}]>" for token in label) for label in params.labels),
    }


def branches(tree: LabelTree) -> list[Branch]:
    """All branches of the tree."""
    return [(state, token) for state, children in enumerate(tree.children) for token in children]


def way_to(tree: LabelTree, state: int) -> list[int]:
    """The tokens from the tree's root to a state."""
    return [*way_to(tree, tree.parents[state]), tree.tokens[state]] if state > 0 else []


def read(output: "RequestOutput") -> Answer:
    """vLLM's output without its objects."""
    completion = output.outputs[0]
    if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
        return Answer("engine_error")
    ids, positions = tuple(completion.token_ids), completion.logprobs or []
    ranked = [sorted(position.items(), key=lambda entry: entry[1].rank) for position in positions]
    return Answer(
        finish_reason=completion.finish_reason,
        ids=ids,
        chosen=tuple(position[token].logprob for position, token in zip(positions, ids, strict=True)),
        likeliest=tuple(tuple((token, entry.logprob) for token, entry in position) for position in ranked),
        cached=output.num_cached_tokens or 0,
    )


def complete(
    request: Request, answers: Sequence[Answer], tokenizer: StudentTokenizer, eos_ids: set[int]
) -> list[Completion]:
    """The request's completions, of the answers to its `questions`; a verdict on one of these is one on its labels."""
    maker = _Completions(request, tokenizer, eos_ids)
    if not request.params.labels:
        return [maker.free(answer) for answer in answers]
    verdict = next((answer for answer in answers if answer.finish_reason in VERDICTS), None)
    if verdict:
        return [maker.verdict(verdict)] * request.params.n
    tree = label_tree(request.params.labels)
    pairs = branches(tree)
    drawn = answers[: len(answers) - len(pairs)]
    found = dict(zip(pairs, answers[len(drawn) :], strict=True))
    if request.params.label_mode == "score":
        return maker.scored(tree, found)
    return [maker.decoded(tree, found, answer) for answer in drawn]


@dataclass(frozen=True)
class _Completions:
    """Makes completions of one request."""

    request: Request
    tokenizer: StudentTokenizer
    eos_ids: set[int]

    def verdict(self, answer: Answer) -> Completion:
        """Nothing was generated."""
        return self._of((), 0.0, answer.finish_reason)

    def free(self, answer: Answer) -> Completion:
        """A sample without labels; vLLM stops at a stop string, and what it ends with is cut off."""
        if answer.finish_reason in VERDICTS:
            return self.verdict(answer)
        return self._of(
            answer.ids,
            sum(answer.chosen),
            answer.finish_reason,
            stops=self.request.params.stops,
            cached_tokens=answer.cached,
            generated_tokens=len(answer.ids),
            logprobs=self._shown(answer.likeliest),
        )

    def decoded(self, tree: LabelTree, found: dict[Branch, Answer], answer: Answer) -> Completion:
        """A sample that the grammar kept on the tree; its probability is the product of its share at every fork."""
        state, taken, probability = 0, [], 1.0
        for token in answer.ids:
            if state < 0:
                break
            if token not in tree.children[state]:
                return self.verdict(Answer("engine_error"))
            values = {other: found[state, other].chosen[0] for other in tree.children[state]}
            probability /= sum(math.exp(value - values[token]) for value in values.values())
            taken.append(found[state, token])
            state = tree.children[state][token]
        return self._of(
            answer.ids[: len(taken)],
            sum(a.chosen[0] for a in taken),
            "stop" if state < 0 else "length",
            cached_tokens=answer.cached,
            generated_tokens=len(taken),
            logprobs=self._shown([a.likeliest[0] for a in taken]),
            probability=probability,
        )

    def scored(self, tree: LabelTree, found: dict[Branch, Answer]) -> list[Completion]:
        """A label for each sample, by the log-probabilities of whole labels."""
        ways = [zip(path, label, strict=True) for path, label in zip(tree.paths, tree.labels, strict=True)]
        scores = torch.tensor([sum(found[b].chosen[0] for b in way) for way in ways], dtype=torch.double)
        shares = tuple(scores.softmax(-1).tolist())
        completions = []
        for sample in range(self.request.params.n):
            chosen = draw_label(scores, self.request.params.temperature, row_seed(self.request.seed, sample))
            completion = self._of(
                tree.labels[chosen],
                scores[chosen].item(),
                "stop",
                cached_tokens=self.tokens if sample else next(iter(found.values())).cached,
                probability=shares[chosen],
                label_probabilities=shares,
            )
            completions.append(completion)
        return completions

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prefix) + len(self.request.suffix)

    def _shown(self, likeliest: Sequence[tuple[tuple[int, float], ...]]) -> tuple[tuple[tuple[int, float], ...], ...]:
        """As many of the likeliest tokens as were asked for: vLLM adds the chosen one."""
        count = self.request.params.logprobs
        return tuple(position[:count] for position in likeliest) if count else ()

    def _of(
        self, ids: tuple[int, ...], logprob: float, finish_reason: str, stops: tuple[str, ...] = (), **more: Any
    ) -> Completion:
        """A completion whose ids may still hold an EOS and whose text a stop string."""
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        text = before_stop(self.tokenizer.decode(ids), stops)
        return Completion(text, ids, logprob, finish_reason, self.tokens, **more)
