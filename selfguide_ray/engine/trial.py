"""What an engine finds out about a model before it serves: whether our attention suits it, its memory, its ceiling."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from selfguide_ray.engine import CPU_KV_GIB
from selfguide_ray.engine.attention import Pass, SharedPrefixAttention, Sharing, Store, forward, write
from selfguide_ray.errors import SelfGuideError

LAYERS = {"full_attention", "sliding_attention"}  # what our attention computes
PREFIX, OWN = 40, 8  # tokens of the trial
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05  # relative difference of logits, in float32 and in half precision
GPU_SHARE = 0.85
WORKSPACE = 1 / 8  # of the memory for keys and values is left to what a pass needs besides
PATIENCE = 0.5  # seconds: a pass that takes longer is not measured again


@dataclass(frozen=True)
class Probe:
    """Whether the model gives the right logits with our attention, and the memory of a token's keys and values."""

    shared: bool
    bytes_per_token: int


@dataclass(frozen=True)
class Ceiling:
    """Seconds of the bare model for a prompt token and for a new token, in full batches without a past."""

    prompt_token: float
    new_token: float


@torch.inference_mode()
def probe(model: torch.nn.Module, attention: SharedPrefixAttention, name: str) -> Probe:
    """Compare a pass in our parts with the model's own; a model that agrees keeps our attention, registered as `name`.

    Raises SelfGuideError if the model remembers by anything but keys and values.
    """
    device, config = next(model.parameters()).device, model.config.get_text_config()
    ids = torch.arange(3, 3 + PREFIX + OWN, device=device) * 7 % config.vocab_size
    output = model(input_ids=ids[None], use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    if not layers or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        raise SelfGuideError(
            f"student.model: {type(model).__name__} remembers its text by other means than keys and values.",
            "The transformers engine shares keys and values between rows, and knows no other memory.",
            "Set student.engine: vllm, or use a model with attention in all layers.",
        )
    sizes = [layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in layers]
    bytes_per_token = sum(sizes) * layers[0].keys.element_size()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    before = model.config._attn_implementation
    shared = kinds <= LAYERS and _agrees(model, attention, name, ids, output.logits[0].float())
    if not shared:
        model.set_attn_implementation(before)
    return Probe(shared, bytes_per_token)


def _agrees(
    model: torch.nn.Module, attention: SharedPrefixAttention, name: str, ids: torch.Tensor, expected: torch.Tensor
) -> bool:
    """Whether a prefix in two chunks, a row's tokens behind it and one more token have the logits expected."""
    calls = attention.calls
    try:
        model.set_attn_implementation(name)
        prefix, store = Store(1, PREFIX), Store(2, OWN)
        half = PREFIX // 2
        logits = [forward(attention, model, ids[:half], _consecutive(prefix, 0, half, 0, ids.device), 1)]
        attention.last = max(prefix.layers)
        write(attention, model, ids[half:PREFIX], _consecutive(prefix, half, PREFIX, 0, ids.device))
        for start, stop in ((0, OWN - 1), (OWN - 1, OWN)):
            now = _consecutive(store, start, stop, PREFIX, ids.device, first=1)
            now.sharing = Sharing([(prefix, stop - start)])
            logits.append(forward(attention, model, ids[PREFIX + start : PREFIX + stop], now, 0))
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False  # the model's code does not call an attention function, or calls it in another way
    found = torch.cat(logits).float()
    expected = torch.cat([expected[PREFIX // 2 - 1 :][:1], expected[PREFIX:]])
    tolerance = TOLERANCE if ids.device.type == "cpu" and logits[0].dtype == torch.float32 else HALF_TOLERANCE
    return attention.calls > calls and bool((found - expected).norm() <= tolerance * expected.norm())


def _consecutive(store: Store, start: int, stop: int, offset: int, device: torch.device, first: int = 0) -> Pass:
    """The pass of tokens start to stop of one row, which sees its own earlier ones; `offset` tokens lie before the row."""
    places = torch.arange(stop, device=device)
    mine = places[start:]
    return Pass(
        store=store,
        first=first,
        row=torch.zeros_like(mine),
        slot=mine,
        hidden=(places > mine[:, None])[None],
        position=offset + mine,
        own_position=offset + places[None],
        column=mine - start,
    )


def tokens_that_fit(bytes_per_token: int, gib: float | None, device: torch.device) -> int:
    """Tokens whose keys and values the setting has room for, less what passes need besides."""
    if gib is None and device.type == "cuda":
        room = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        room = (CPU_KV_GIB if gib is None else gib) * 1024**3
    return max(1, int(room * (1 - WORKSPACE) / bytes_per_token))


@torch.inference_mode()
def measure_ceiling(
    model: torch.nn.Module, attention: SharedPrefixAttention | None, rows: int, prefill: int
) -> Ceiling:
    """Time the bare model: a prompt of `prefill` tokens, and `rows` rows of one token. Without our attention, its own."""
    device = next(model.parameters()).device
    ids = torch.arange(max(rows, prefill), device=device) % model.config.get_text_config().vocab_size

    def prompt() -> None:
        if attention is None:
            model(input_ids=ids[None, :prefill], use_cache=False, logits_to_keep=1)
        else:
            write(attention, model, ids[:prefill], _consecutive(Store(1, prefill), 0, prefill, 0, device))

    def step() -> None:
        if attention is None:
            model(input_ids=ids[:rows, None], past_key_values=DynamicCache(), use_cache=True)
        else:
            zeros = torch.zeros(rows, dtype=torch.long, device=device)
            hidden = zeros.bool()[:, None, None]
            row = torch.arange(rows, device=device)
            forward(attention, model, ids[:rows], Pass(Store(rows, 1), 0, row, zeros, hidden, zeros, zeros[:, None]), 0)

    return Ceiling(_seconds(prompt, device) / prefill, _seconds(step, device) / rows)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The shortest of three runs; of fewer if they take long."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        if best > PATIENCE:
            break
    return best
