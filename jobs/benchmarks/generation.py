"""Our engine against what else generates, on many requests that share few prefixes."""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import Measured, alternate, figures
from benchmarks.peers import VLLM_CPU, VLLM_CPU_PROCESSES, Continuous, Generate, Ids, Ours, Peer, Vllm, vllm_python
from benchmarks.workload import SHAPES, Work, save_model
from selfguide_ray.engine import Request
from selfguide_ray.errors import SelfGuideError

ROWS = 128  # of our batch
PADDED = (16, 32)  # batches tried for model.generate, which gains nothing from larger ones
IN_FLIGHT = (4, 8)  # requests tried for continuous batching: on a CPU, a step's cost grows with their square
TRIED = 32  # requests that they are tried on
SLOW = {"transformers_generate": 32}  # requests that a peer without shared prefixes is given: it answers none sooner
ALONE = 8  # requests whose answers are compared with those of model.generate, one at a time
WARM_UP, CHECK = 1_000_000, 1_000_001  # seeds of requests that are not measured


def generation(arguments: argparse.Namespace) -> Measured:
    """Requests answered a second by each engine, all with the same token ids, greedily, on the same threads."""
    torch.set_num_threads(arguments.threads)
    unknown = [size for size in arguments.sizes.split(",") if size not in SHAPES]
    if unknown:
        raise SelfGuideError(
            f"--sizes: there is no model {unknown[0]!r}.",
            "Models are built to measure.",
            f"Take of {', '.join(SHAPES)}.",
        )
    work = Work(requests=arguments.requests)
    python, reason = vllm_python(arguments.vllm)
    more: Measured = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {size: save_model(Path(temporary) / size, SHAPES[size]) for size in arguments.sizes.split(",")}
        sizes = {
            size: measure(folder, SHAPES[size].words, work, arguments.repeats, arguments.threads, python, reason)
            for size, folder in folders.items()
        }
        if not arguments.quick:
            from benchmarks.adapters import adapters
            from benchmarks.identity import FEW, row_identity
            from benchmarks.memory import growth, memory

            more = {
                "row_identity": row_identity(Path(temporary), arguments.threads),
                "row_identity_bfloat16": row_identity(Path(temporary), arguments.threads, FEW, dtype="bfloat16"),
                "row_identity_strict": row_identity(Path(temporary), arguments.threads, FEW, strict=True),
                "adapters": adapters(Path(temporary), arguments.threads, arguments.repeats),
                "memory": memory(Path(temporary), arguments.threads),
                "growth": growth(Path(temporary), arguments.threads),
            }
    first = next(iter(sizes.values()))
    return {
        "work": f"{work}, greedy with natural stops, arrival shuffled, float32, {arguments.threads} thread(s)",
        "unit": "requests/s",
        "rates": {"ours": first["ours"], **first["peers"]},
        "sizes": sizes,
        **more,
    }


def measure(
    folder: Path, words: Sequence[int], work: Work, repeats: int, threads: int,
    python: str | None = None, reason: str = "",
) -> Measured:  # fmt: skip
    """The engines on one model. Every repetition has tasks of its own, so that no cache knows their prefixes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    warm_up = work.draw(words, WARM_UP)
    peers: dict[str, Peer] = {
        "ours": Ours(folder, ROWS, threads),
        "transformers_generate": quickest([Generate(model, batch) for batch in PADDED], warm_up[:TRIED]),
        "transformers_continuous": quickest([Continuous(model, rows) for rows in IN_FLIGHT], warm_up[:TRIED]),
    }
    not_run = {}
    with contextlib.ExitStack() as stack:
        if python is None:
            not_run["vllm_cpu"] = reason
        else:
            try:
                settings, environment = {"model": str(folder)} | VLLM_CPU, {"OMP_NUM_THREADS": str(threads)}
                log = folder.with_suffix(".vllm.log")
                peers["vllm_cpu"] = Vllm(python, log, settings, VLLM_CPU_PROCESSES | environment)
                stack.callback(peers["vllm_cpu"].close)
            except RuntimeError as error:
                not_run["vllm_cpu"] = str(error)
        for name, peer in peers.items():
            if not name.startswith("transformers_"):  # those are warm from having been tried
                peer.answer(warm_up[:8])
        measured = compare(peers, [work.draw(words, seed) for seed in range(repeats)])
    check = work.draw(words, CHECK)[:ALONE]
    alone = Generate(model, 1).answer(check)
    measured["differing"]["one_at_a_time"] = differing(alone, peers["ours"].answer(check))
    measured["compared"]["one_at_a_time"] = len(check)
    weights = sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()
    settings = {name: peer.settings for name, peer in peers.items()}
    return {"weights_without_input_table": weights} | measured | {"settings": settings, "not_run": not_run}


def quickest(candidates: Sequence[Peer], requests: Sequence[Request]) -> Peer:
    """The candidate that answers soonest."""

    def seconds(peer: Peer) -> float:
        started = time.perf_counter()
        peer.answer(requests)
        return time.perf_counter() - started

    candidates[0].answer(requests[:2])  # what is done at the first call only
    return min(candidates, key=seconds)


def compare(peers: dict[str, Peer], draws: Sequence[Sequence[Request]]) -> Measured:
    """Rates of the peers over the draws, one a repetition, and how many of their answers differ from ours."""
    answers: dict[str, list[dict[int, Ids]]] = {name: [] for name in peers}
    rates: dict[str, list[float]] = {name: [] for name in peers}

    def turn(name: str) -> Callable[[], float]:
        def rate() -> float:
            requests = draws[len(answers[name])]
            chosen = list(range(len(requests)))
            if name in SLOW:
                chosen = sample(requests, answers["ours"][-1], SLOW[name])
            started = time.perf_counter()
            got = peers[name].answer([requests[i] for i in chosen])
            rates[name].append(len(chosen) / (time.perf_counter() - started))
            answers[name].append(dict(zip(chosen, got, strict=True)))
            return rates[name][-1]

        return rate

    medians = alternate({name: turn(name) for name in peers}, len(draws))
    others = [name for name in peers if name != "ours"]
    ours = {name: [answers["ours"][k][i] for k, told in enumerate(answers[name]) for i in told] for name in peers}
    theirs = {name: [ids for told in answers[name] for ids in told.values()] for name in peers}
    return figures(medians) | {
        "rates": {name: [round(rate, 3) for rate in several] for name, several in rates.items()},
        "requests": {name: len(told[0]) for name, told in answers.items()},
        "mean_new_tokens": {name: statistics.mean(map(len, told)) for name, told in theirs.items()},
        "differing": {name: differing(ours[name], theirs[name]) for name in others},
        "compared": {name: len(theirs[name]) for name in others},
    }


def sample(requests: Sequence[Request], answers: dict[int, Ids], count: int) -> list[int]:
    """Positions of so many requests, in order: of each task every k-th by the length of its answer."""
    step = max(1, len(requests) // count)
    chosen: list[int] = []
    for prefix in {request.prefix for request in requests}:
        members = sorted(
            (i for i, request in enumerate(requests) if request.prefix == prefix), key=lambda i: (len(answers[i]), i)
        )
        chosen += members[step // 2 :: step]
    return sorted(chosen)


def differing(some: Sequence[Ids], others: Sequence[Ids]) -> int:
    """How many of two equally long lists of answers are not the same."""
    return sum(a != b for a, b in zip(some, others, strict=True))
