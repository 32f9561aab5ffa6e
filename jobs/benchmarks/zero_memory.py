"""What a worker holds at most while two train all weights of a model, with ZeRO-0 and with ZeRO-3."""

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import Measured
from benchmarks.exercise import Forgetful
from benchmarks.workload import SHAPES, WORDS, Shape, save_model
from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.executor import process_environment
from selfguide_ray.tuning import Lesson

WORKERS, PAIRS, PROMPT, ANSWER = 2, 6, 120, 20
EVERY = 0.2  # seconds between two looks: each walks all pages of a worker, and holds it up
TARGET = 0.35  # less per worker


def zero_memory(_: argparse.Namespace) -> Measured:
    """What a worker holds at most with ZeRO-3, against ZeRO-0."""
    with tempfile.TemporaryDirectory() as temporary:
        told = saving(Path(temporary))
    held = {name: max(told[stage]["peak_pss_mib"]) for name, stage in (("ours", "zero_3"), ("zero_0", "zero_0"))}
    return told | {"unit": "MiB, less is better", "rates": held}


def saving(temporary: Path, shape: Shape = SHAPES["120M"]) -> Measured:
    """Peak PSS of a worker under both stages, and the saving as a share.

    PSS is what a process has for itself and its part of what it shares, read from /proc/PID/smaps_rollup of both
    workers five times a second, from their start to their end: loading and saving the model count.
    """
    folder = save_model(temporary / f"base_{shape.layers}_{shape.hidden}", shape)
    found: dict[str, Any] = {}
    for stage in (0, 3):
        found[f"zero_{stage}"] = train(temporary / f"zero_{stage}", folder, shape, stage)
    first, third = (max(found[name]["peak_pss_mib"]) for name in ("zero_0", "zero_3"))
    return {
        "work": f"all weights of the {shape.layers}-layer model by {WORKERS} workers, float32, {PAIRS} pairs of "
        f"{PROMPT} + {ANSWER} tokens, peak PSS of a worker",
        **found,
        "saving": round(1 - third / first, 4),
        "target": TARGET,
    }


def train(folder: Path, model: Path, shape: Shape, stage: int) -> Measured:
    """Train once; returns the peaks of the workers and what was learned."""
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    student = [f"student.model={model}", "student.dtype=float32", "cluster.tasks_per_batch=1"]
    models = ["models.method=full", f"models.zero_stage={stage}", "models.epochs=1", "models.batch_size=2"]
    config = load(None, [f"run={folder}", *student, *models])
    ranks = [
        context.Process(target=work, args=(config.model_dump(mode="json"), rank, str(folder), shape))
        for rank in range(WORKERS)
    ]
    started, peaks = time.perf_counter(), [0] * WORKERS
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        peaks = [max(peak, pss(rank.pid)) for peak, rank in zip(peaks, ranks, strict=True)]
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(EVERY)
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"a worker has ended with {[rank.exitcode for rank in ranks]}")
    losses = json.loads((folder / "told.json").read_text())["losses"]
    shutil.rmtree(folder)
    return {
        "peak_pss_mib": [round(peak / 1024) for peak in peaks],
        "losses": losses,
        "seconds": round(time.perf_counter() - started),
    }


def pss(pid: int | None) -> int:
    """Proportional set size in KiB; 0 once the process has gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


def work(settings: dict[str, Any], rank: int, folder: str, shape: Shape) -> None:
    """The process of a worker."""
    import os

    os.environ |= process_environment(1, 0)
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(WORKERS) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    import torch.distributed
    from transformers import PreTrainedTokenizerFast

    from selfguide_ray.tuning.data_parallel import DataParallel

    store = torch.distributed.FileStore(f"{folder}/store", WORKERS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    chance = random.Random(1)
    draw = lambda count: " ".join(f"w{n}" for n in chance.choices(range(WORDS, shape.vocabulary), k=count))  # noqa: E731
    rows = [{"prompt": draw(PROMPT), "completion": f"{draw(ANSWER - 1)} <eos>"} for _ in range(PAIRS)]
    goal = Path(folder) / "model" if rank == 0 else None
    if goal is not None:
        goal.mkdir()
    config = Config.model_validate(settings)
    tuner = DataParallel(config, rank, WORKERS)
    # AutoTokenizer takes the words of a Qwen2 model for byte pairs, and finds none.
    tuner.tokenizer.hf = PreTrainedTokenizerFast.from_pretrained(config.student.model)
    told = tuner.train([Lesson("task", pa.Table.from_pylist(rows), goal)], Forgetful())["task"]
    if isinstance(told, Exception):
        raise told
    if rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
