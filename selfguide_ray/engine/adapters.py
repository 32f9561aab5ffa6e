"""LoRA adapters of many tasks over one base, in one batch: each row's layers add its own adapter's product.

The adapters' matrices lie stacked, so that a layer needs two batched products whatever the number of adapters. What is
not plain LoRA on linear layers is left to peft, one adapter at a time.
"""

import contextlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"
PLAIN = {  # settings of peft whose other values change what is computed
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
}
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module → A [rank, in], scaled B [out, rank]


def is_plain_lora(folder: Path, modules: dict[str, torch.nn.Module]) -> bool:
    """Whether an adapter is nothing but LoRA on linear layers of the model."""
    if not (folder / WEIGHTS).exists():
        return False
    settings = json.loads((folder / "adapter_config.json").read_text())
    if any(settings.get(name, usual[0]) not in usual for name, usual in PLAIN.items()):
        return False
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        parts = [_part(name) for name in tensors.keys()]  # noqa: SIM118 - no dict
    return all(kind in ("lora_A", "lora_B") and type(modules.get(name)) is torch.nn.Linear for name, kind in parts)


def read_plain_lora(folder: Path) -> Matrices:
    """The adapter's matrices by module."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        module, kind = _part(name)
        halves.setdefault(module, {})[kind] = tensor
    matrices = {}
    for module, pair in halves.items():
        rank = pair["lora_A"].shape[0]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        matrices[module] = (pair["lora_A"], pair["lora_B"] * scale)
    return matrices


def _part(name: str) -> tuple[str, str]:
    """Module and half of a tensor's name in the file."""
    module, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return module, kind


@dataclass
class Mix:
    """Which tokens of a pass use which adapters.

    `tokens` [adapters, most] is padded; `places` [n] are those of its elements that are not, and `targets` [n] the tokens
    that stand there.
    """

    chosen: tuple[int, ...]
    tokens: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor


class Adapters:
    """The adapters in memory, at most `most` of them; hooks on the linear layers add their products."""

    def __init__(self, model: torch.nn.Module, most: int) -> None:
        # The head sees other tokens than the layers do: an adapter on it runs alone.
        head = model.get_output_embeddings()
        self.modules = {name: module for name, module in model.named_modules() if module is not head}
        self.most = most
        self.places: OrderedDict[str, int] = OrderedDict()  # folder → place in the stacks, longest unused first
        self.plain: dict[str, bool] = {}
        self.stacks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.picked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.picked_for: tuple[int, ...] = ()
        self.mix: Mix | None = None

    def stackable(self, folder: str) -> bool:
        """Whether rows of the adapter can run beside others. A folder's content is taken to stay as it is."""
        if folder not in self.plain:
            has_adapter = (Path(folder) / "adapter_config.json").exists()
            self.plain[folder] = has_adapter and is_plain_lora(Path(folder), self.modules)
        return self.plain[folder]

    def load(self, folder: str, in_use: set[str]) -> list[str] | None:
        """Bring an adapter into the stacks. Returns those dropped for it, or None if all places are in use."""
        if folder in self.places:
            self.places.move_to_end(folder)
            return []
        dropped = []
        if len(self.places) >= self.most:
            dropped = [name for name in self.places if name not in in_use][:1]
            if not dropped:
                return None
        matrices = read_plain_lora(Path(folder))
        for name in dropped:
            del self.places[name]
        place = min(set(range(self.most)) - set(self.places.values()))
        for name in {**self.stacks, **matrices}:
            self._place(name, place, *matrices.get(name, (None, None)))
        self.places[folder] = place
        self.picked_for = ()
        return dropped

    def _place(self, name: str, place: int, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """Write one module's matrices, if the adapter has any; stacks grow with the adapters and with their ranks."""
        weight, old = self.modules[name].weight, self.stacks.get(name)
        if old is None:
            self.modules[name].register_forward_hook(self._hook(name))
            old = weight.new_zeros(0, 0, weight.shape[1]), weight.new_zeros(0, weight.shape[0], 0)
        count, rank = max(place + 1, len(old[0])), max(0 if a is None else len(a), old[0].shape[1])
        if (count, rank) != old[0].shape[:2]:
            new = weight.new_zeros(count, rank, weight.shape[1]), weight.new_zeros(count, weight.shape[0], rank)
            new[0][: len(old[0]), : old[0].shape[1]] = old[0]
            new[1][: len(old[1]), :, : old[1].shape[2]] = old[1]
            old = new
        for stack in old:
            stack[place] = 0
        if a is not None and b is not None:
            old[0][place, : len(a)] = a
            old[1][place, :, : b.shape[1]] = b
        self.stacks[name] = old

    @contextlib.contextmanager
    def use(self, folders: Sequence[str]) -> Iterator[None]:
        """For one pass, the adapter of each token; an empty name is the base."""
        if any(folders):
            self._blend(folders)
        try:
            yield
        finally:
            self.mix = None

    def _blend(self, folders: Sequence[str]) -> None:
        # In the order of their places, which rows that come and go do not change: what was picked for them stays good.
        chosen = sorted({folder for folder in folders if folder}, key=self.places.__getitem__)
        tokens = [[i for i, folder in enumerate(folders) if folder == name] for name in chosen]
        most, device = max(map(len, tokens)), next(iter(self.stacks.values()))[0].device
        places = tuple(self.places[name] for name in chosen)
        self.mix = Mix(
            places,
            torch.tensor([row + [0] * (most - len(row)) for row in tokens], device=device),
            torch.tensor([i * most + j for i, row in enumerate(tokens) for j in range(len(row))], device=device),
            torch.tensor([token for row in tokens for token in row], device=device),
        )
        if places != self.picked_for:
            self.picked, self.picked_for = {}, places

    def _hook(self, name: str):  # noqa: ANN202 - a hook of torch
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            mix = self.mix
            if mix is None:
                return output
            if name not in self.picked:
                self.picked[name] = tuple(stack[list(mix.chosen)].transpose(1, 2) for stack in self.stacks[name])
            a, b = self.picked[name]
            product = torch.bmm(torch.bmm(inputs[0][0][mix.tokens], a), b)
            output[0].index_add_(0, mix.targets, product.flatten(0, 1)[mix.places])
            return output

        return add
