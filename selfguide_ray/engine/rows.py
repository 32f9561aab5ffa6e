"""Completions under way, and how their next tokens are chosen from the model's logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from selfguide_ray.engine import Request, SamplingParams
from selfguide_ray.engine.labels import LabelTree, draw_label, label_tree
from selfguide_ray.engine.prefixes import Prefix
from selfguide_ray.engine.sampling import choose, choose_among, likeliest

Key = tuple[str, tuple[int, ...]]  # adapter and prefix: what rows must share to share keys and values


@dataclass(eq=False)
class Row:
    """One completion under way."""

    request: Request
    params: SamplingParams  # the request's, one object for all that are equal
    key: int  # of the sampler
    home: Any = None  # whose row it is
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    finish_reason: str = ""
    generated: int = 0
    cached: int = 0
    logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    probability: float | None = None
    label_probabilities: tuple[float, ...] = ()
    state: int = 0  # in the tree of its labels
    own: int = 0  # its tokens in the store
    prefix: Prefix | None = None
    began: float = 0.0  # when it last began to decode, by the monotonic clock

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return len(self.request.prefix) + len(self.request.suffix)

    @property
    def last(self) -> int:
        """Its last token, which has no keys and values yet."""
        return (self.ids or self.request.suffix)[-1]


Advance = Callable[[Row, int], None]  # adds a token to a row; sets its finish_reason where it ends


@dataclass(eq=False)
class Entry:
    """Rows of one request that wait: its samples, or one that had to give up its memory and goes on where it was."""

    rows: list[Row]

    def __post_init__(self) -> None:
        request = self.rows[0].request
        self.params = self.rows[0].params
        self.key: Key = (request.adapter or "", request.prefix)
        self.own = [*request.suffix, *self.rows[0].ids]  # the tokens behind the prefix
        self.scored: LabelTree | None = None
        if self.params.labels and self.params.label_mode == "score":
            self.scored = label_tree(self.params.labels)

    @property
    def columns(self) -> list[int]:
        """The tokens to prefill: its own but the last; or all, and the inner nodes of the tree of labels to be scored."""
        return [*self.own, *self.scored.tokens[1:]] if self.scored else self.own[:-1]


def next_tokens(rows: Sequence[Row], logits: torch.Tensor, advance: Advance) -> None:
    """Choose the next token of each row from logits [rows, vocabulary]."""
    kinds: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(id(row.params), []).append(place)
    for places in kinds.values():
        mine = logits if len(kinds) == 1 else logits[torch.tensor(places, device=logits.device)]
        _next_of_a_kind([rows[place] for place in places], mine, advance)


def _next_of_a_kind(rows: list[Row], logits: torch.Tensor, advance: Advance) -> None:
    """`next_tokens` for rows with the same parameters."""
    params = rows[0].params
    keys = torch.tensor([row.key for row in rows], device=logits.device)
    steps = torch.tensor([len(row.ids) for row in rows], device=logits.device)
    tree, shares = None, None
    if params.labels:
        tree = label_tree(params.labels)
        allowed = [list(tree.children[row.state]) for row in rows]
        tokens, logprobs, among = choose_among(logits, allowed, params.temperature, keys, steps)
        shares = among.tolist()
    else:
        tokens, logprobs = choose(logits, params, keys, steps)
    tops = likeliest(logits, params.logprobs) if params.logprobs else None
    for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)):
        row.logprob += logprob
        row.generated += 1
        if tops is not None:
            row.logprobs.append(tops[i])
        advance(row, token)
        if tree is not None and shares is not None:
            row.probability = shares[i] * (1.0 if row.probability is None else row.probability)
            row.state = tree.children[row.state][token]
            if row.state < 0:
                row.finish_reason = "stop"


def score_labels(rows: Sequence[Row], tree: LabelTree, logits: torch.Tensor, advance: Advance) -> None:
    """Every sample's label by the scores of all, given logits [states, vocabulary]. The rows have then ended."""
    scores = tree.scores(logits)
    shares = scores.softmax(-1)
    for row in rows:
        chosen = draw_label(scores, row.params.temperature, row.key)
        for token in tree.labels[chosen]:
            advance(row, token)
        row.logprob, row.probability = scores[chosen].item(), shares[chosen].item()
        row.label_probabilities = tuple(shares.tolist())
        row.finish_reason = "stop"
