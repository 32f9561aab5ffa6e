"""What training with DeepSpeed has come to, as files that do not depend on how many workers wrote them.

Each trainable parameter and its two moments are gathered whole, in float32, one after the other; rank r of w writes the
parameters r, r + w, r + 2w …, so no worker holds more than its share. All ranks call every method together.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load, save

from selfguide_ray.tuning import Memory, from_first_rank
from selfguide_ray.tuning.zero import gathered, is_partitioned, size_of

LATEST = "latest.json"  # written last: it says which folder is whole
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
PIECE = 1 << 26  # elements of parameters in a file; files are written and read as a whole


class ShardedState:
    """The state of a DeepSpeed engine around torch's AdamW, in a part of a memory that `prefix` names."""

    def __init__(
        self, engine: Any, optimizer: torch.optim.Optimizer, memory: Memory, prefix: str, rank: int, world: int
    ) -> None:
        self.engine, self.optimizer, self.memory, self.prefix = engine, optimizer, memory, prefix
        self.rank, self.world = rank, world
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]

    @property
    def finite(self) -> bool:
        """Whether all weights that this rank holds are finite numbers."""
        return all(bool(self._held(parameter).isfinite().all()) for parameter in self.parameters)

    # --- all of it

    def remember(self, step: int, about: dict[str, Any]) -> None:
        """Keep weights, moments and `about` (anything JSON holds) as of a step, and forget what was kept before."""
        folder = f"step-{step}"
        applied = max((float(state["step"]) for state in self.optimizer.state.values() if "step" in state), default=0.0)
        self.put(folder, (WEIGHT, *MOMENTS) if applied else (WEIGHT,))
        if self.rank == 0:
            before = self._latest()
            note = {"step": step, "world": self.world, "applied": applied, "names": self.names, "about": about}
            scaler = getattr(self.engine.optimizer, "loss_scaler", None)
            note["scaler"] = {k: v for k, v in vars(scaler).items() if type(v) in (int, float, bool)} if scaler else {}
            self.memory.put(f"{self.prefix}/{LATEST}", json.dumps(note).encode())
            if before is not None and before["step"] != step:
                self.memory.remove(f"{self.prefix}/step-{before['step']}")

    def recall(self, steps: int) -> dict[str, Any] | None:
        """Put weights and moments back; returns the `about` of what was kept, None if nothing of so many steps was."""
        note = from_first_rank(self._latest() if self.rank == 0 else None, self.world)
        if note is None or note["names"] != self.names or note["about"]["steps"] != steps:
            return None
        applied = note["applied"]
        if applied:
            self._prepare_moments(applied)
        self.get(f"step-{note['step']}", note["world"], (WEIGHT, *MOMENTS) if applied else (WEIGHT,))
        for name, value in note["scaler"].items():
            setattr(self.engine.optimizer.loss_scaler, name, value)
        return note["about"]

    def _latest(self) -> dict[str, Any] | None:
        data = self.memory.get(f"{self.prefix}/{LATEST}")
        return None if data is None else json.loads(data)

    # --- a folder of it

    def put(self, folder: str, parts: tuple[str, ...] = (WEIGHT,)) -> None:
        """Write the parts of all parameters; when this returns, every rank has written."""
        ends = {members[-1]: name for name, members in self._files(self.world) if members[0] % self.world == self.rank}
        mine: dict[str, torch.Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            for part in self._of(parameter, parts):
                value = self._whole(parameter, part)
                if i % self.world == self.rank:
                    mine[f"{part}/{self.names[i]}"] = value.detach().cpu().contiguous()
            if i in ends:
                self.memory.put(f"{self.prefix}/{folder}/{ends[i]}", save(mine))
                mine = {}
        if self.world > 1:
            torch.distributed.barrier()

    def get(self, folder: str, world: int, parts: tuple[str, ...] = (WEIGHT,)) -> None:
        """Read the parts of all parameters that `world` workers have written."""
        for name, members in self._files(world):
            data = self.memory.get(f"{self.prefix}/{folder}/{name}")
            assert data is not None, f"{self.prefix}/{folder}/{name} is gone"
            tensors = load(data)
            del data
            for i in members:
                for part in self._of(self.parameters[i], parts):
                    self._set(self.parameters[i], part, tensors.pop(f"{part}/{self.names[i]}"))

    def forget(self, folder: str) -> None:
        """Remove a folder."""
        if self.rank == 0:
            self.memory.remove(f"{self.prefix}/{folder}")

    def _files(self, world: int) -> Iterator[tuple[str, list[int]]]:
        """(name, which parameters) of every file that `world` workers write."""
        for rank in range(world):
            pieces: list[list[int]] = []
            room = 0
            for i in range(rank, len(self.parameters), world):
                size = size_of(self.parameters[i])
                if size > room:
                    pieces.append([])
                    room = PIECE
                pieces[-1].append(i)
                room -= size
            for number, members in enumerate(pieces):
                yield f"{rank}-of-{world}-{number}.safetensors", members

    # --- one parameter of it

    def _of(self, parameter: torch.nn.Parameter, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the parts that a parameter has: not every optimiser keeps both moments of all."""
        state = self.optimizer.state.get(parameter)
        return parts if not state else tuple(part for part in parts if part == WEIGHT or part in state)

    def _held(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What this rank has of a weight; where the ranks do not divide it, the last ones' pieces end in no numbers."""
        if not is_partitioned(parameter):
            return parameter
        piece = parameter.ds_tensor
        return piece[: max(0, parameter.ds_numel - self.rank * piece.numel())]

    def _whole(self, parameter: torch.nn.Parameter, part: str) -> torch.Tensor:
        """A parameter's weight or moment as optimiser steps go on from it: whole, and in float32."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not is_partitioned(parameter) and not hasattr(parameter, "_hp_mapping"):
            return parameter if part == WEIGHT else self.optimizer.state[parameter][part]
        if part == WEIGHT:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, part)

    def _set(self, parameter: torch.nn.Parameter, part: str, value: torch.Tensor) -> None:
        """Put back what `_whole` gave."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(parameter.device)
        if part == WEIGHT:  # the weight that the model computes with; below, the one that the optimiser updates
            with torch.no_grad(), gathered(parameter, changed=True):
                parameter.copy_(value)
        if is_partitioned(parameter):
            # DeepSpeed's own function reads past the end where the workers do not divide the parameter.
            size = parameter.ds_tensor.numel()
            piece = value.new_zeros(size * self.world)
            piece[: value.numel()] = value.flatten()
            piece = piece.narrow(0, size * self.rank, size)
            self.engine.optimizer.set_local_hp_param(piece, parameter, None if part == WEIGHT else part)
        elif hasattr(parameter, "_hp_mapping"):
            if part == WEIGHT:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, part)
        elif part != WEIGHT:
            self.optimizer.state[parameter][part].copy_(value)

    def _prepare_moments(self, applied: float) -> None:
        """Give the optimiser the moments that it would make in its first step."""
        outer = self.engine.optimizer
        updated = getattr(outer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 shows its groups to torch one at a time
        if updated is None:
            updated = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in updated:
            # torch's fused AdamW counts on the parameter's device.
            self.optimizer.state[parameter] = {
                "step": torch.tensor(applied, dtype=torch.float32, device=parameter.device),
                **{
                    name: torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    for name in getattr(self.optimizer, "moments", lambda _: MOMENTS)(parameter)
                },
            }
        link = getattr(outer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
