"""Muon (Jordan et al. 2024), for the matrices inside a model, with AdamW for all other parameters.

A matrix moves along the nearest orthogonal matrix to its momentum, so all directions are learned at one pace; embeddings
and gains, for which that means nothing, are left to AdamW. Steps have the size of AdamW's (Liu et al. 2025, §2.2), so one
learning rate serves both.
"""

from collections.abc import Iterable
from typing import Any

import torch

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: five steps bring singular values to about 0.7-1.2
STEPS = 5
SIZE = 0.2  # root mean square of AdamW's steps


class Muon(torch.optim.AdamW):
    """Two kinds of groups in one optimiser; `matrices` get Muon's steps and keep their momentum as `exp_avg`."""

    def __init__(
        self,
        matrices: Iterable[torch.nn.Parameter],
        others: Iterable[torch.nn.Parameter],
        dtype: torch.dtype,
        **settings: Any,
    ) -> None:
        super().__init__(others, **settings)
        self.dtype = dtype  # of the products behind a direction; bfloat16 is precise enough for one
        self.add_param_group({"params": list(matrices)} | {"orthogonal": True})

    def moments(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        """The moments that are kept of a parameter."""
        matrices = (p for group in self.param_groups if group.get("orthogonal") for p in group["params"])
        return ("exp_avg",) if any(p is parameter for p in matrices) else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every parameter that has a gradient."""
        orthogonal = [group for group in self.param_groups if group.get("orthogonal")]
        kept = self.param_groups
        self.param_groups = [group for group in kept if not group.get("orthogonal")]
        try:
            super().step(closure)
        finally:
            self.param_groups = kept
        for group in orthogonal:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: torch.nn.Parameter, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(parameter.grad, 1 - MOMENTUM)
        direction = orthogonalized(parameter.grad.lerp(momentum, MOMENTUM), self.dtype)  # Nesterov's look ahead
        parameter.mul_(1 - rate * decay)
        parameter.add_(direction, alpha=-rate * SIZE * max(parameter.shape) ** 0.5)


def orthogonalized(matrix: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """About the orthogonal matrix nearest to it: its singular vectors, with singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T.contiguous() if turned else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return (x.T if turned else x).to(matrix.dtype)


def split(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices, others) among the trainable parameters; an embedding is no matrix in this sense."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in trainable if id(p) not in chosen]
