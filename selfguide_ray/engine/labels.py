"""Answers from a fixed set: the tree of the labels' tokens, to walk it while decoding or to score it in one pass."""

import functools
from collections.abc import Sequence

import torch

from selfguide_ray.engine.sampling import gumbel


class LabelTree:
    """The labels' token ids as a tree. State 0 is the prompt's end; other states are inner nodes, parents first.

    `children[state]` maps a token to the state behind it, or to -1 - i where label i ends with it.
    """

    def __init__(self, labels: Sequence[tuple[int, ...]]) -> None:
        self.labels = labels
        self.children: list[dict[int, int]] = [{}]
        self.tokens: list[int] = [-1]
        self.parents: list[int] = [-1]
        self.depths: list[int] = [0]
        self.paths: list[list[int]] = []  # of each label, the states it passes
        for index, label in enumerate(labels):
            state, path = 0, [0]
            for token in label[:-1]:
                if token not in self.children[state]:
                    self.children[state][token] = len(self.children)
                    self.children.append({})
                    self.tokens.append(token)
                    self.parents.append(state)
                    self.depths.append(self.depths[state] + 1)
                state = self.children[state][token]
                path.append(state)
            self.children[state][label[-1]] = -1 - index
            self.paths.append(path)

    @functools.cached_property
    def related(self) -> torch.Tensor:
        """Which inner nodes (rows, from state 1 on) attend to which: themselves and the nodes on their way. [m, m] bool."""
        table = torch.eye(len(self.tokens) - 1, dtype=torch.bool)
        for state in range(1, len(self.tokens)):
            if self.parents[state] > 0:
                table[state - 1] |= table[self.parents[state] - 1]
        return table

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability [labels] of each label, given the logits [states, vocabulary] behind each state."""
        logprobs = logits.float().log_softmax(-1)
        states = torch.tensor([state for path in self.paths for state in path], device=logits.device)
        tokens = torch.tensor([token for label in self.labels for token in label], device=logits.device)
        owner = torch.tensor([i for i, label in enumerate(self.labels) for _ in label], device=logits.device)
        found = logprobs[states, tokens].double()
        return torch.zeros(len(self.labels), dtype=torch.double, device=logits.device).index_add_(0, owner, found)


@functools.lru_cache(maxsize=256)
def label_tree(labels: tuple[tuple[int, ...], ...]) -> LabelTree:
    """The labels' tree, built once."""
    return LabelTree(labels)


def draw_label(scores: torch.Tensor, temperature: float, key: int) -> int:
    """The likeliest label at temperature 0, else one drawn by its probability under the row's key."""
    if temperature == 0:
        return int(scores.argmax())
    numbers = torch.arange(len(scores), device=scores.device)[None]
    zero = torch.zeros(1, dtype=torch.long, device=scores.device)
    noise = gumbel(torch.tensor([key], device=scores.device), zero, numbers)[0]
    return int((scores / temperature + noise).argmax())
