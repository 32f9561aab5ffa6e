"""Sampling from logits with a counter-based generator: a row's noise depends on its key and position alone.

Gumbel-max: adding Gumbel noise to scaled logits and taking the maximum samples from the softmax. The noise of a token is
a hash of (row key, position, token id), so it is the same whatever else is in the batch, and small differences of the
logits flip a choice only where two tokens were nearly level.
"""

from collections.abc import Sequence

import torch

from selfguide_ray.engine import SamplingParams

MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# The constants of splitmix64's finaliser (Steele et al. 2014), as signed 64-bit integers.
MIX_1, MIX_2, GOLDEN = (_signed(c) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & (MASK >> bits)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def gumbel(keys: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise [rows, m] for token ids [rows, m], row keys [rows] and positions [rows], all int64."""
    stream = _mix(keys + _mix(position * GOLDEN))
    bits = _mix(stream[:, None] + tokens * GOLDEN)
    uniform = (_shift(bits, 11).double() + 0.5) / (1 << 53)
    return -torch.log(-torch.log(uniform))


def choose(
    logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability, [rows] each.

    logits [rows, vocabulary]. The log-probability is the model's own: untempered, over the whole vocabulary.
    """
    logits = logits.float()
    if params.temperature == 0:
        chosen = logits.argmax(-1)
    else:
        k = min(params.top_k or logits.shape[-1], logits.shape[-1])
        # Without a cut the whole vocabulary takes part; top-p needs it in order.
        if k < logits.shape[-1] or params.top_p < 1:
            values, tokens = logits.topk(k, dim=-1)
        else:
            values, tokens = logits, torch.arange(k, device=logits.device).expand(len(logits), k)
        scaled = values.double() / params.temperature
        if params.top_p < 1:
            probability = scaled.softmax(-1)
            before = probability.cumsum(-1) - probability
            scaled = scaled.masked_fill(before >= params.top_p, -torch.inf)
        chosen = tokens.gather(-1, (scaled + gumbel(keys, position, tokens)).argmax(-1, keepdim=True)).squeeze(-1)
    logprob = logits.gather(-1, chosen[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return chosen, logprob


def choose_among(
    logits: torch.Tensor,
    allowed: Sequence[Sequence[int]],
    temperature: float,
    keys: torch.Tensor,
    position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The next token of each row among those allowed to it; its log-probability; its probability among the allowed.

    The log-probability is over the whole vocabulary, and both are untempered. [rows] each.
    """
    width = max(map(len, allowed))
    padded = torch.tensor([[*tokens, *([-1] * (width - len(tokens)))] for tokens in allowed], device=logits.device)
    tokens = padded.clamp(min=0)
    logits = logits.float()
    values = logits.gather(-1, tokens).masked_fill(padded < 0, -torch.inf)
    drawn = values.double()
    if temperature:
        drawn = drawn / temperature + gumbel(keys, position, tokens)
    place = drawn.argmax(-1, keepdim=True)
    logprob = values.gather(-1, place) - logits.logsumexp(-1, keepdim=True)
    probability = values.double().softmax(-1).gather(-1, place)
    return tokens.gather(-1, place).squeeze(-1), logprob.squeeze(-1), probability.squeeze(-1)


def likeliest(logits: torch.Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row with their log-probabilities, best first."""
    values, tokens = logits.float().log_softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
    return [tuple(zip(t, v, strict=True)) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)]
