"""The batches of one or several tasks as one forward pass without needless tokens.

A task's batch is one sequence: the head that its prompts have in common once, the rest of each, and last the tokens
whose successors are learned, at the same columns for all tasks. A mask keeps the pairs apart, so that each sees what it
would see alone; positions count within the pair.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from selfguide_ray.engine import common_head
from selfguide_ray.tuning.last_layer import LastColumns
from selfguide_ray.tuning.pairs import IGNORED, Pair

HEAD, PADDING = -1, -2  # in place of a pair's number
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.05  # of logits against those of plain passes, relative


@dataclass(frozen=True)
class Layout:
    """n tasks of T tokens; the last K columns predict `targets` [n, K], IGNORED where there is nothing to learn."""

    ids: torch.Tensor  # [n, T]
    position: torch.Tensor  # [n, T]
    mask: torch.Tensor  # [n, 1, T, T], added to the scores
    targets: torch.Tensor  # [n, K]

    def logits(self, model: torch.nn.Module, last: LastColumns | None = None) -> torch.Tensor:
        """The model's logits [n, K, vocabulary] at the last columns; `last` is its last layer, where that is in hand."""
        with nullcontext() if last is None else last.only(self.targets.shape[1]):
            return model(
                input_ids=self.ids,
                position_ids=self.position,
                attention_mask=self.mask,
                use_cache=False,
                logits_to_keep=self.targets.shape[1],
            ).logits

    def losses(self, model: torch.nn.Module, last: LastColumns | None = None) -> torch.Tensor:
        """Summed cross-entropy [n] of the targets, in nats (statement 19)."""
        logits = self.logits(model, last)
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), self.targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return each.view(self.targets.shape).sum(1)


def lay_out(batches: Sequence[Sequence[Pair]], device: torch.device, dtype: torch.dtype) -> Layout:
    """The layout of the tasks' batches. Every batch has a pair, and every prompt a token."""
    contexts, wanted = [], []  # of each task: (id, position, pair) of its tokens, and (id, position, pair, target)
    for batch in batches:
        prompts = [pair.prompt[:-1] for pair in batch]
        head = common_head(prompts) if len(batch) > 1 else 0
        context = [(token, place, HEAD) for place, token in enumerate(prompts[0][:head])]
        last = []
        for number, (pair, prompt) in enumerate(zip(batch, prompts, strict=True)):
            context += [(token, place, number) for place, token in enumerate(prompt[head:], head)]
            sources = (pair.prompt[-1], *pair.completion[:-1])
            last += [
                (token, place, number, target)
                for place, (token, target) in enumerate(zip(sources, pair.completion, strict=True), len(prompt))
            ]
        contexts.append(context)
        wanted.append(last)
    before, behind = max(map(len, contexts)), max(map(len, wanted))
    rows = [
        [*context, *[(0, 0, PADDING)] * (before - len(context)), *(token[:3] for token in last)]
        + [(0, 0, PADDING)] * (behind - len(last))
        for context, last in zip(contexts, wanted, strict=True)
    ]
    ids, position, pair = torch.tensor(rows).unbind(-1)
    targets = torch.tensor([[token[3] for token in last] + [IGNORED] * (behind - len(last)) for last in wanted])
    seen = (pair[:, None, :] == pair[:, :, None]) | (pair[:, None, :] == HEAD)
    seen &= (position[:, None, :] <= position[:, :, None]) & (pair[:, None, :] != PADDING)
    seen |= torch.eye(before + behind, dtype=torch.bool)  # padding sees itself: a softmax over nothing is no number
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
    return Layout(*(x.to(device) for x in (ids.contiguous(), position.contiguous(), mask, targets)))


@torch.no_grad()
def suits(model: torch.nn.Module, last: LastColumns | None = None) -> bool:
    """Whether the model computes the same from a layout as from plain passes, with its last layer in hand or not.

    One that takes no mask or positions from outside, or sees only a window of its past, does not.
    """
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return False
    parameter = next(model.parameters())
    low, size = min(3, config.vocab_size - 1), config.vocab_size
    tokens = [low + 7 * i % (size - low) for i in range(24)]
    pairs = [
        Pair(tuple(tokens[:9]), tuple(tokens[9:12])),
        Pair((*tokens[:6], *tokens[12:17]), tuple(tokens[17:19])),
        Pair(tuple(tokens[19:22]), tuple(tokens[22:24])),
    ]
    try:
        found = lay_out([pairs[:2], pairs[2:]], parameter.device, parameter.dtype).logits(model, last).float()
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False
    plain = []
    for pair in pairs:
        ids = torch.tensor([pair.prompt + pair.completion[:-1]], device=parameter.device)
        plain.append(model(input_ids=ids, use_cache=False).logits[0, len(pair.prompt) - 1 :].float())
    expected = torch.cat(plain)
    found = torch.cat([found[0], found[1, : len(pairs[2].completion)]])
    exact = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
    return bool((found - expected).norm() <= (TOLERANCE if exact else HALF_TOLERANCE) * expected.norm())
