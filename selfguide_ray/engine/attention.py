"""Attention of many rows to a few shared prefixes, behind transformers' attention interface (Hydragen, arXiv:2402.05099).

A pass packs the new tokens of all rows into one sequence. A token attends to the prefix of its row, one matrix product
for all rows that share it, and to its row's own keys and values; the two softmaxes are merged exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Store:
    """Keys and values [rows, heads, tokens, width] of each layer. Layers appear when they are first written."""

    def __init__(self, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's tensors, made for keys and values [n, heads, width] where it is new."""
        if index not in self.layers:
            self.layers[index] = tuple(
                x.new_zeros(self.rows, x.shape[1], self.tokens, x.shape[2]) for x in (key, value)
            )
        return self.layers[index]

    def resize(self, rows: int, tokens: int, keep: int) -> None:
        """Room for other numbers of rows and tokens; the first `keep` rows stay."""
        shared = min(tokens, self.tokens)
        self.rows, self.tokens = rows, tokens
        if not keep:
            self.layers.clear()
        for index in list(self.layers):
            old = self.layers.pop(index)  # one layer at a time, so that the peak is one layer above the setting
            new = tuple(x.new_zeros(rows, x.shape[1], tokens, x.shape[3]) for x in old)
            for x, y in zip(old, new, strict=True):
                y[:keep, :, :shared] = x[:keep, :, :shared]
            self.layers[index] = new

    def copy(self, sources: Sequence[int], targets: Sequence[int], tokens: int) -> None:
        """Overwrite rows by others, up to a number of tokens."""
        for pair in self.layers.values():
            for x in pair:
                x[list(targets), :, :tokens] = x[list(sources), :, :tokens]


@dataclass
class Sharing:
    """Which tokens of a pass attend to which prefix: `groups` are prefixes (Stores of one row, or None) and how many tokens.

    They name the tokens one group after another, in `order` [n], or as the pass has them where that is None; token i is
    the `place[i]`-th of the order.
    """

    groups: list[tuple[Store | None, int]]
    order: torch.Tensor | None = None
    place: torch.Tensor | None = None

    @classmethod
    def of(cls, prefixes: Sequence[Store | None], device: torch.device) -> "Sharing | None":
        """Made of the prefix of each token; None where no token has one."""
        members: dict[int, list[int]] = {}
        for token, prefix in enumerate(prefixes):
            members.setdefault(id(prefix), []).append(token)
        groups = [(prefixes[tokens[0]], len(tokens)) for tokens in members.values()]
        if all(prefix is None for prefix, _ in groups):
            return None
        order = [token for tokens in members.values() for token in tokens]
        if order == list(range(len(order))):
            return cls(groups)
        index = torch.tensor(order, device=device)
        return cls(groups, index, index.argsort())


@dataclass
class Pass:
    """What the tokens of one forward pass attend to.

    The pass has n tokens of r rows, which lie in the store from row `first` on. Token i belongs to row `row[i]` (from 0),
    is the `column[i]`-th of its row in this pass, and is written at `slot[i]`; `hidden` [r, columns, own tokens]
    says which own tokens it does not attend to. `position` [n] is its position in the sequence, `own_position` [r, own tokens]
    that of the keys, which matters to layers with a window.
    """

    store: Store
    first: int
    row: torch.Tensor
    slot: torch.Tensor
    hidden: torch.Tensor
    position: torch.Tensor
    own_position: torch.Tensor
    column: torch.Tensor | None = None  # None: one token for each row, in order
    sharing: Sharing | None = None  # None: no token attends to a prefix
    block: int | None = None  # own keys summed at a time; None is all at once


# Attention in one kernel that also tells the logarithm of its sum of weights: half as long again as two products on a CPU.
FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

LOWEST = torch.finfo(torch.float32).min  # peak of a part without any key, so that its weights are 0 and not NaN

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weighted values, peak score and sum of weights of a softmax


@dataclass(frozen=True)
class Rules:
    """How a layer's scores become weights."""

    window: int | None
    softcap: float | None


class SharedPrefixAttention:
    """The attention function given to transformers; `now` is set around each forward pass by `forward`."""

    def __init__(self) -> None:
        self.now: Pass | None = None
        self.calls = 0
        self.last: int | None = None  # the number of the layer that attends last, once it is known
        self.writing = False  # whether a pass is over once its keys and values are written

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **ignored: object,
    ) -> tuple[torch.Tensor, None]:
        """query [1, query heads, n, width], key and value [1, heads, n, width] → [1, n, query heads, width]."""
        now = self.now
        if now is None:
            raise RuntimeError("a model with shared-prefix attention runs through `attention.forward` alone")
        self.calls += 1
        heads, tokens, width = key.shape[1], query.shape[2], query.shape[3]
        scale = width**-0.5 if scaling is None else scaling
        # Token-major: [n, heads, query heads of each, width].
        q = (query[0].transpose(0, 1) * scale).reshape(tokens, heads, -1, width)
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        rules = Rules(sliding_window, softcap)
        stored = _write(now, module.layer_idx, k, v)
        if self.writing and module.layer_idx == self.last:
            raise _Written
        out, peak, total = _own(now, q, *stored, rules, s_aux is not None)
        if now.sharing is not None:
            out, peak, total = _merge((out, peak, total), _shared(now, module.layer_idx, q, rules))
        if s_aux is not None:  # a learned score that takes weight and has no value
            total = total + torch.exp(s_aux.view(1, heads, -1, 1).float() - peak)
        return (out / total).to(query.dtype).reshape(1, tokens, -1, out.shape[-1]), None


def _weigh(scores: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None, rules: Rules) -> Part:
    """The part of a softmax over the last dimension of scores [..., m, keys], which are overwritten.

    What `hidden` marks, of a shape that broadcasts to theirs, weighs nothing.
    """
    dtype = scores.dtype
    scores = scores.float()
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
    weights = scores.sub_(peak).exp_()
    return torch.matmul(weights.to(dtype), value).float(), peak, weights.sum(-1, keepdim=True)


def _shared(now: Pass, layer: int, q: torch.Tensor, rules: Rules) -> Part:
    """Each token of q [n, heads, group, width] over its prefix; one without a prefix weighs nothing."""
    sharing, position, start = now.sharing, now.position, 0
    assert sharing is not None
    if sharing.order is not None:
        q, position = q.index_select(0, sharing.order), position.index_select(0, sharing.order)
    parts: list[Part] = []
    for prefix, count in sharing.groups:
        mine = q[start : start + count]
        if prefix is None:
            none = mine.new_zeros(*mine.shape[:-1], 1, dtype=torch.float32)
            parts.append((torch.zeros_like(mine, dtype=torch.float32), none + LOWEST, none))
        else:
            parts.append(_prefix(mine, *prefix.layers[layer], position[start : start + count], rules))
        start += count
    part = parts[0] if len(parts) == 1 else tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    if sharing.place is None:
        return part
    return tuple(x.index_select(0, sharing.place) for x in part)


def _prefix(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, rules: Rules) -> Part:
    """q [n, heads, group, width] over a prefix's keys and values [1, heads, tokens, width]."""
    n, heads, group, width = q.shape
    packed = q.transpose(0, 1).reshape(heads, n * group, width)
    if FUSED is not None and q.device.type == "cpu" and rules == Rules(None, None) and value.shape[-1] == width:
        # A whole softmax is a part whose weights sum to one at the logarithm of their sum.
        out, peak = FUSED(packed[None], key, value, scale=1.0)
        parts = out[0].float(), peak[0, :, :, None], torch.ones_like(peak[0, :, :, None])
        return tuple(x.view(heads, n, group, -1).transpose(0, 1) for x in parts)
    scores = torch.matmul(packed, key[0].transpose(-1, -2))
    hidden = None
    if rules.window is not None:
        far = torch.arange(key.shape[2], device=q.device) <= (position - rules.window)[:, None]
        hidden = far.repeat_interleave(group, 0)
    parts = _weigh(scores, value[0], hidden, rules)
    return tuple(x.view(heads, n, group, -1).transpose(0, 1) for x in parts)


def _write(now: Pass, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the tokens' keys and values [n, heads, width] to their rows; returns all that those rows hold."""
    keys, values = now.store.layer(layer, k, v)
    rows, row = now.hidden.shape[0], now.first + now.row
    keys[row, :, now.slot] = k
    values[row, :, now.slot] = v
    return keys[now.first : now.first + rows], values[now.first : now.first + rows]


def _own(now: Pass, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rules: Rules, sinks: bool) -> Part:
    """Each token of q [n, heads, group, width] over what it may see of its row's keys and values."""
    rows, columns, seen = now.hidden.shape
    _, heads, group, width = q.shape
    if now.column is None:
        padded = q
    else:
        padded = q.new_zeros(rows, columns, heads, group, width)
        padded[now.row, now.column] = q
        padded = padded.permute(0, 2, 3, 1, 4).reshape(rows, heads, group * columns, width)
    hidden = now.hidden
    if rules.window is not None:
        place = torch.zeros(rows, columns, dtype=torch.long, device=q.device)
        place[now.row, 0 if now.column is None else now.column] = now.position
        hidden = hidden | (now.own_position[:, None, :seen] <= place[:, :, None] - rules.window)
    if columns > 1:
        hidden = hidden.repeat(1, group, 1)
    hidden = hidden[:, None]  # [rows, 1, group * columns or 1, own tokens]
    if columns > 1 and now.sharing is None and not now.block and rules.softcap is None and not sinks:
        # Nothing to merge with: the fused kernel is quicker, and needs no weights in memory.
        fused = torch.nn.functional.scaled_dot_product_attention(
            padded, keys[:, :, :seen], values[:, :, :seen], attn_mask=~hidden, scale=1.0
        )
        out = fused.view(rows, heads, group, columns, -1).permute(0, 3, 1, 2, 4)[now.row, now.column].float()
        return out, out.new_zeros(*out.shape[:-1], 1), out.new_ones(*out.shape[:-1], 1)
    block = now.block or seen
    part: Part | None = None
    for start in range(0, seen, block):
        piece = slice(start, min(start + block, seen))
        scores = torch.matmul(padded, keys[:, :, piece].transpose(-1, -2))
        more = _weigh(scores, values[:, :, piece], hidden[..., piece], rules)
        part = more if part is None else _merge(part, more)
    assert part is not None
    if now.column is None:
        return part
    return tuple(x.view(rows, heads, group, columns, -1).permute(0, 3, 1, 2, 4)[now.row, now.column] for x in part)


def _merge(a: Part, b: Part) -> Part:
    """One softmax over the keys of both parts."""
    peak = torch.maximum(a[1], b[1])
    left, right = torch.exp(a[1] - peak), torch.exp(b[1] - peak)
    return a[0] * left + b[0] * right, peak, a[2] * left + b[2] * right


class _Written(Exception):
    """The last layer has its keys and values."""


def forward(
    attention: SharedPrefixAttention, model: torch.nn.Module, ids: torch.Tensor, now: Pass, keep: torch.Tensor | int
) -> torch.Tensor:
    """Logits [kept tokens, vocabulary] of a pass over packed token ids [n]; `keep` are the tokens wanted, 0 is all."""
    attention.now = now
    try:
        output = model(input_ids=ids[None], position_ids=now.position[None], use_cache=False, logits_to_keep=keep)
    finally:
        attention.now = None
    return output.logits[0]


def write(attention: SharedPrefixAttention, model: torch.nn.Module, ids: torch.Tensor, now: Pass) -> None:
    """A pass of which only keys and values are wanted: what the last layer does with them is left out."""
    attention.writing = True
    try:
        forward(attention, model, ids, now, 1)
    except _Written:
        pass
    finally:
        attention.writing = False
