"""Many LoRA adapters over one base: in one pass, and one after another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import Measured, alternate, figures
from benchmarks.peers import Generate, Ids, Ours
from benchmarks.workload import SHAPES, Shape, Work, save_model
from selfguide_ray.engine import Request

RANK = 16
WORK = Work(tasks=20, requests=16)  # a task for each adapter
ROWS = 128  # of our batch


def adapters(temporary: Path, threads: int, repeats: int, work: Work = WORK, shape: Shape = SHAPES["15M"]) -> Measured:
    """All adapters' requests at once, against plain peft adapter by adapter, and our engine adapter by adapter.

    Reading the adapters counts, reading the base does not. Every turn has prefixes and an engine of its own.
    """
    folder = save_model(temporary / f"base_{shape.layers}_{shape.hidden}", shape)
    names = save_adapters(folder, temporary / "adapters", work.tasks)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    draws = [_adapted(work.draw(shape.words, seed), names) for seed in range(repeats)]
    warm_up = replace(work, tasks=1, requests=1).draw(shape.words, repeats)
    answers: dict[str, list[dict[int, Ids]]] = {}

    def at_once(requests: Sequence[Request]) -> Callable[[], list[Ids]]:
        ours = _warm(folder, threads, warm_up)
        return lambda: ours.answer(requests)

    def one_by_one(requests: Sequence[Request]) -> Callable[[], dict[int, Ids]]:
        ours = _warm(folder, threads, warm_up)
        return lambda: _by_adapter(requests, lambda _, some: ours.answer(some))

    def plain_peft(requests: Sequence[Request]) -> Callable[[], dict[int, Ids]]:
        def answer(name: str, some: Sequence[Request]) -> list[Ids]:
            adapted = PeftModel.from_pretrained(base, name).eval()
            told = Generate(adapted, len(some)).answer(some)
            adapted.unload()
            return told

        return lambda: _by_adapter(requests, answer)

    def turn(name: str, prepare: Callable) -> Callable[[], float]:
        answers[name] = []

        def rate() -> float:
            requests = draws[len(answers[name])]
            run = prepare(requests)
            started = time.perf_counter()
            told = run()
            seconds = time.perf_counter() - started
            answers[name].append(told if isinstance(told, dict) else dict(enumerate(told)))
            return len(requests) / seconds

        return rate

    candidates = {
        "ours": turn("ours", at_once),
        "adapters_one_after_another": turn("adapters_one_after_another", plain_peft),
        "own_engine_one_after_another": turn("own_engine_one_after_another", one_by_one),
    }
    rates = alternate(candidates, repeats)
    unadapted = _warm(folder, threads, warm_up).answer([replace(request, adapter=None) for request in draws[0]])
    return {
        "work": f"{work}; {work.tasks} adapters of rank {RANK} on all linear layers",
        **figures(rates),
        "differing": {name: _differing(answers["ours"], told) for name, told in answers.items() if name != "ours"},
        "compared": sum(map(len, answers["ours"])),
        "changed_by_the_adapters": sum(answers["ours"][0][i] != ids for i, ids in enumerate(unadapted)),
    }


def save_adapters(base: Path, folder: Path, count: int) -> list[str]:
    """Folders of random adapters that change what the base says."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    names = []
    with torch.random.fork_rng(), torch.no_grad():
        for number in range(count):
            torch.manual_seed(number)
            for name, weight in model.named_parameters():
                if "lora_A" in name:
                    weight.normal_(std=weight.shape[1] ** -0.5)
                elif "lora_B" in name:
                    weight.normal_(std=0.25 * RANK**-0.5)
                    if "o_proj" in name or "down_proj" in name:
                        weight[0] = 0  # the coordinate that no layer writes, see workload
            model.save_pretrained(folder / str(number))
            names.append(str(folder / str(number)))
    return names


def _adapted(requests: Sequence[Request], names: Sequence[str]) -> list[Request]:
    """The requests with an adapter for each prefix."""
    adapter = dict(zip(dict.fromkeys(request.prefix for request in requests), names, strict=True))
    return [replace(request, adapter=adapter[request.prefix]) for request in requests]


def _warm(folder: Path, threads: int, requests: Sequence[Request]) -> Ours:
    """An engine that has read its base and no adapter."""
    ours = Ours(folder, ROWS, threads)
    ours.answer(requests)
    return ours


def _by_adapter(
    requests: Sequence[Request], answer: Callable[[str, Sequence[Request]], Sequence[Ids]]
) -> dict[int, Ids]:
    """Answers by position, asked for one adapter after another."""
    told: dict[int, Ids] = {}
    for name in dict.fromkeys(request.adapter for request in requests):
        positions = [i for i, request in enumerate(requests) if request.adapter == name]
        told |= dict(zip(positions, answer(name, [requests[i] for i in positions]), strict=True))
    return told


def _differing(some: Sequence[dict[int, Ids]], others: Sequence[dict[int, Ids]]) -> int:
    return sum(a[i] != b[i] for a, b in zip(some, others, strict=True) for i in a)
