"""LoRA adapters of several tasks, stacked over one frozen base so that a batch trains all of them at once."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from selfguide_ray.config import Models
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.tuning.pairs import first_a

Shapes = dict[str, tuple[int, int]]  # module → (inputs, outputs)


def lora_config(settings: Models) -> LoraConfig:
    """The adapter as peft describes it."""
    targets = settings.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def fits_no_module(settings: Models, model: str, error: Exception) -> SelfGuideError:
    """What a user is told of target modules that the model lacks."""
    return SelfGuideError(
        f"models.target_modules: {settings.target_modules} fits no module of {model}.",
        str(error).split(". ")[0] + ".",
        "Name linear layers of the model, or all-linear.",
    )


def targeted(base: torch.nn.Module, settings: Models, name: str) -> Shapes | None:
    """The modules that peft would give an adapter; None if there are others than linear layers among them.

    Raises SelfGuideError if there is none at all. The base is left as it was.
    """
    try:
        wrapped = get_peft_model(base, lora_config(settings), autocast_adapter_dtype=False)
    except ValueError as error:
        raise fits_no_module(settings, name, error) from error
    names = [
        module.removeprefix("base_model.model.")
        for module, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    ]
    plain = wrapped.unload()
    plain.requires_grad_(False)
    layers = {module: plain.get_submodule(module) for module in names}
    if not all(isinstance(layer, torch.nn.Linear) for layer in layers.values()):
        return None
    return {module: (layer.in_features, layer.out_features) for module, layer in layers.items()}


class AdapterStack:
    """n adapters as one flat tensor [n, parameters]; each module's A [n, rank, in] and B [n, out, rank] are views of it.

    An adapter is a row: its optimiser, its gradient norm and its file concern no other.
    """

    def __init__(self, shapes: Shapes, settings: Models, seeds: Sequence[int], device: torch.device) -> None:
        self.shapes, self.rank, self.scale = shapes, settings.rank, settings.alpha / settings.rank
        self.places: dict[str, tuple[int, int, int]] = {}  # module → where A begins, where B begins, where it ends
        end = 0
        for module, (inputs, outputs) in shapes.items():
            start, middle = end, end + self.rank * inputs
            end = middle + outputs * self.rank
            self.places[module] = (start, middle, end)
        # Kept in float32 whatever the base is: small updates would be lost in a shorter format.
        self.values = torch.zeros(len(seeds), end, device=device)
        self.gradients = torch.zeros_like(self.values)
        for n, seed in enumerate(seeds):
            for module, (inputs, _) in shapes.items():
                start, middle, _ = self.places[module]
                self.values[n, start:middle] = first_a(module, (self.rank, inputs), seed).flatten()
        self.rows = [torch.nn.Parameter(row, requires_grad=False) for row in self.values]

    def matrices(self, values: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of every module as views of rows [m, parameters] of values or gradients."""
        found = {}
        for module, (inputs, outputs) in self.shapes.items():
            start, middle, end = self.places[module]
            a = values[:, start:middle].unflatten(1, (self.rank, inputs))
            found[module] = a, values[:, middle:end].unflatten(1, (outputs, self.rank))
        return found

    def leaves(self, count: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The first `count` adapters' matrices as leaves of a computation, whose values are the stack's."""
        return {
            module: (a.detach().requires_grad_(), b.detach().requires_grad_())
            for module, (a, b) in self.matrices(self.values[:count]).items()
        }

    def add_gradients(self, loss: torch.Tensor, leaves: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the gradients of a loss, computed from `leaves`, to `gradients`."""
        flat = [leaf for pair in leaves.values() for leaf in pair]
        into = self.matrices(self.gradients[: len(flat[0])])
        sinks = [sink for module in leaves for sink in into[module]]
        for sink, gradient in zip(sinks, torch.autograd.grad(loss, flat), strict=True):
            sink.add_(gradient)

    @contextmanager
    def on(
        self, base: torch.nn.Module, matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[torch.nn.Module]:
        """The base with an adapter for each row of its input [n, T], for as long as the block lasts."""
        hooks = [
            base.get_submodule(module).register_forward_hook(self._hook(*pair)) for module, pair in matrices.items()
        ]
        try:
            yield base
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, a: torch.Tensor, b: torch.Tensor):  # noqa: ANN202 - a hook
        def add(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            x = args[0]
            down, up = a.to(x.dtype).transpose(1, 2), b.to(x.dtype).transpose(1, 2)
            return torch.baddbmm(output, torch.bmm(x, down), up, alpha=self.scale)

        return add

    def clip(self, count: int, most: float) -> torch.Tensor:
        """Scale each of the first gradients down to a norm; returns what the norms [count] were."""
        norms = self.gradients[:count].norm(dim=1)
        self.gradients[:count].mul_((most / (norms + 1e-6)).clamp_(max=1.0)[:, None])
        return norms

    def save(self, n: int, values: torch.Tensor, settings: Models, base: str, folder: Path) -> None:
        """Write a row of values as an adapter that peft loads."""
        tensors = {}
        for module, (a, b) in self.matrices(values[None]).items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[0].detach().cpu().contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[0].detach().cpu().contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = lora_config(settings)
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True) + "\n")
