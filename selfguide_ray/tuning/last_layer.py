"""A model whose last layer answers for the last columns of a pass alone.

Of a training pass only the tokens whose successors are learned matter behind the last attention; all others are there
for their keys and values. In a small student the last layer is a good part of the work, and answers are short.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "selfguide_last_columns"


class _Written(Exception):
    """The last layer has the keys and values of all columns."""


class LastColumns:
    """Takes a model's last layer in hand; `only` says for how long and how many columns."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.honest = layer.forward
        self.columns: int | None = None
        self.stored: tuple[torch.Tensor, torch.Tensor] | None = None
        layer.forward = self.forward
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, NAME, self)

    @contextmanager
    def only(self, columns: int) -> Iterator[None]:
        """Within the block the layer returns so many columns, the last ones."""
        self.columns = columns
        try:
            yield
        finally:
            self.columns = None

    def forward(self, hidden: torch.Tensor, *args: Any, **named: Any) -> Any:
        """The layer twice: up to its keys and values on hidden states [n, T, width], and whole on the last columns."""
        total = hidden.shape[1]
        if self.columns is None or self.columns >= total:
            return self.honest(hidden, *args, **named)
        try:
            self.honest(hidden, *args, **named)
        except _Written:
            cut = [_last(value, total, self.columns) for value in args]
            named = {name: _last(value, total, self.columns) for name, value in named.items()}
            return self.honest(hidden[:, -self.columns :], *cut, **named)
        finally:
            self.stored = None
        raise RuntimeError("the last layer has no attention function of transformers'")


def _last(value: Any, total: int, columns: int) -> Any:
    """What belongs to the last columns of something that a layer is given."""
    if isinstance(value, tuple):
        return tuple(_last(one, total, columns) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    place = {1: 0, 2: 1, 3: 1, 4: 2}.get(value.ndim)  # columns; positions [n, T] and [n, T, width]; a mask's rows
    if place is None or value.shape[place] != total:
        return value
    return value.narrow(place, total - columns, columns)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """torch's own attention; in a last layer that is in hand, to the keys and values of all columns."""
    last = getattr(module, NAME, None)
    if last is not None and last.columns is not None and attention_mask is not None:
        if last.stored is None:
            if query.shape[2] > last.columns:
                last.stored = key, value
                raise _Written
        else:
            key, value = last.stored
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def take(model: torch.nn.Module) -> LastColumns | None:
    """Take the model's last layer in hand, if it has layers in a row and lets its attention be exchanged.

    Whether it then still computes the same is to be seen, see `layout.suits`; `release` undoes it.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    rows = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if len(rows) != 1 or model.config._attn_implementation != "sdpa":
        return None
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError, ImportError):
        return None
    return LastColumns(rows[0][-1])


def release(model: torch.nn.Module, last: LastColumns) -> None:
    """Give the layer back."""
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if vars(module).get("forward") == last.forward:
            del module.forward
