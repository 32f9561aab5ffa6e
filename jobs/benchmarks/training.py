"""Many small tasks fine-tuned: side by side in one process, against a process, a Ray Train run or a turn for each.

Every ratio compares like with like: fresh process with fresh processes (`process_per_task`), one Ray Train run with a
run for each task on the same Ray (`ray_train_per_task`), and a warm process with itself (`sequential_resident`).
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from benchmarks import Measured, alternate, figures
from benchmarks.exercise import (
    LONG,
    MIDDLE,
    NANO,
    Exercise,
    Forgetful,
    PlainPeft,
    described,
    difference,
    lessons_of,
    mean_tokens,
)
from benchmarks.workload import SHAPES, save_model
from selfguide_ray.config import Config
from selfguide_ray.executor import process_environment
from selfguide_ray.failures import failures
from selfguide_ray.models import MODEL, Pack, packs
from selfguide_ray.run import Run
from selfguide_ray.student import locate
from selfguide_ray.tuning.side_by_side import SideBySide

TOGETHER = (8, 16)  # cluster.tasks_per_batch tried
# Tasks of a turn of what trains one at a time: a task's time is the mean of theirs, and the next turn takes others.
SAMPLE = {"process_per_task": 2, "ray_train_per_task": 2, "sequential_resident": 8, "peft_resident": 4}
BATCH, OTHER = 4, 1  # pairs in a step: of the headline, and the default besides
GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OURS = """
import sys
from selfguide_ray.config_file import load
from selfguide_ray.models import learn, packs
from selfguide_ray.run import Run
config = load(sys.argv[1])
learn(config, packs(Run(config.run), config))
"""


def training(arguments: argparse.Namespace) -> Measured:
    """Adapters trained an hour."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        return measure(Path(temporary), Exercise(), arguments.repeats, arguments.quick)


def measure(temporary: Path, exercise: Exercise, repeats: int, quick: bool) -> Measured:
    """All parts: processes, the warm process, Ray, and unless `quick` other batches and students."""
    config = exercise.write(temporary / "run", NANO, f"models.batch_size={BATCH}")
    tried = {size: _ours(_anew(config, tasks_per_batch=size)) for size in TOGETHER}
    rates = {size: exercise.tasks * 3600 / seconds for size, seconds in tried.items()}
    together = max(rates, key=rates.__getitem__)
    config = _anew(config, tasks_per_batch=together)
    apart = processes(config, repeats)
    warm = resident(config, repeats, apart.pop("models"))
    on_ray = ray_train(config, repeats)
    more: Measured = {}
    if not quick:
        settings = (f"models.batch_size={OTHER}", f"cluster.tasks_per_batch={together}")
        single = exercise.write(temporary / "other", NANO, *settings)
        more = {
            f"batch_{OTHER}": {
                "processes": {k: v for k, v in processes(single, repeats).items() if k != "models"},
                "resident": resident(single, repeats),
            },
            "where_the_gain_ends": cells(temporary, repeats, together),
        }
    return {
        "work": f"{described(config)}; ours in packs of {together}; what trains one task at a time gets some a turn: {SAMPLE}",
        "unit": "adapters/h",
        "rates": {name: apart[name] for name in ("ours", "process_per_task")},
        "ratio": {
            "process_per_task": apart["ratio"]["process_per_task"],
            "ray_train_per_task": on_ray["ratio"]["ray_train_per_task"],
            "sequential_resident": warm["ratio"]["sequential_resident"],
        },
        "tasks_per_batch_tried": rates,
        "processes": apart,
        "resident": warm,
        "ray": on_ray,
        **more,
    }


# --- a fresh process


def processes(config: Config, repeats: int) -> Measured:
    """One process for all tasks, against one with transformers' Trainer and peft for each; `models` are our first."""
    runs: list[Config] = []
    losses: list[float] = []
    names = _tasks(config)
    turns = itertools.cycle(names)

    def ours() -> int:
        runs.append(_anew(config))
        _ours(runs[-1])
        return len(names)

    def process_per_task() -> int:
        for _ in range(count := min(SAMPLE["process_per_task"], len(names))):
            losses.append(theirs(config, next(turns)))
        return count

    measured = _rates({"ours": ours, "process_per_task": process_per_task}, repeats)
    run = Run(runs[0].run)
    told = [run.get_json(f"models/{task}/{MODEL}")["losses"][-1] for task in names]
    # Other first values and another order: the losses show that as much is learned, no more.
    measured["mean_loss"] = {"ours": statistics.mean(told), "process_per_task": statistics.mean(losses)}
    return measured | {"models": Path(runs[0].run) / "models"}


def _ours(config: Config) -> float:
    """Seconds of a process that trains all tasks of a run."""
    settings = Path(config.run) / "benchmark.json"
    settings.write_text(config.model_dump_json())
    started = time.perf_counter()
    _execute("-c", OURS, str(settings))
    seconds = time.perf_counter() - started
    _all_learned(Run(config.run), len(_tasks(config)))
    return seconds


def theirs(config: Config, task: str) -> float:
    """The loss of a process that trains one task."""
    models, folder = config.models, Path(tempfile.mkdtemp(dir=Path(config.run).parent))
    rows = [row for row in Run(config.run).read_all("trainset").to_pylist() if row["task"] == task]
    (folder / "rows").write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows))
    job = {
        "model": locate(config.student), "rows": str(folder / "rows"), "folder": str(folder / "adapter"),
        "batch_size": models.batch_size, "epochs": models.epochs, "learning_rate": models.peak_rate,
        "rank": models.rank, "alpha": models.alpha, "seed": config.seed,
    }  # fmt: skip
    (folder / "job").write_text(json.dumps(job))
    told = _execute(str(Path(__file__).with_name("training_peer.py")), str(folder / "job"))
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    return json.loads(told.splitlines()[-1])["loss"]


def _execute(*arguments: str) -> str:
    """What a Python process with one thread prints."""
    # A group of processes that this one belongs to is not theirs.
    environment = {k: v for k, v in os.environ.items() if k not in GROUP} | process_environment(1, 0)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


# --- a warm process


def resident(config: Config, repeats: int, models: Path | None = None, plain: bool = True) -> Measured:
    """Whole packs, the same tuner one task after the other, and plain peft, in this process and warm.

    `models` are adapters trained elsewhere, to be compared too.
    """
    tuner, peft = SideBySide(config), PlainPeft(config)
    whole = packs(Run(config.run), config)
    alone = [single for pack in whole for single in pack.split()]
    turns = {name: itertools.cycle(alone) for name in ("sequential_resident", "peft_resident")}
    folders: dict[str, dict[str, Path]] = {}
    losses: dict[str, dict[str, float]] = {}

    def learn(name: str, some: Iterable[Pack]) -> int:
        place, count = Path(tempfile.mkdtemp(dir=Path(config.run).parent)), 0
        for pack in some:
            lessons = lessons_of(config, pack, place)
            if name == "peft_resident":
                told = {lesson.task: peft.train(lesson) for lesson in lessons}
            else:
                told = {task: what["losses"][-1] for task, what in tuner.train(lessons, Forgetful()).items()}
            losses.setdefault(name, {}).update(told)
            folders.setdefault(name, {}).update((lesson.task, lesson.folder) for lesson in lessons)
            count += len(lessons)
        return count

    def turn(name: str) -> Callable[[], int]:
        return lambda: learn(name, itertools.islice(turns[name], min(SAMPLE[name], len(alone))))

    candidates = {"ours": lambda: learn("ours", whole), **{name: turn(name) for name in turns}}
    if not plain:
        del candidates["peft_resident"]
    for name in candidates:  # what is done at the first call only
        learn(name, alone[-1:])
    measured = _rates(candidates, repeats)
    if models is not None:
        folders["ours_in_a_fresh_process"] = {task: models / task for task in folders["ours"]}
    one_by_one = folders.pop("sequential_resident")
    measured["largest_difference_to_one_by_one"] = {
        name: max(difference(found[task], one_by_one[task]) for task in found.keys() & one_by_one.keys())
        for name, found in folders.items()
    }
    measured["compared"] = {name: len(found.keys() & one_by_one.keys()) for name, found in folders.items()}
    if plain:
        pairs = [(losses["ours"][task], loss) for task, loss in losses["peft_resident"].items()]
        measured["loss"] = {
            "ours": statistics.mean(ours for ours, _ in pairs),
            "peft_resident": statistics.mean(theirs for _, theirs in pairs),
            "largest_difference": max(abs(ours - theirs) for ours, theirs in pairs),
        }
    return {"work": described(config)} | measured


def cells(temporary: Path, repeats: int, together: int) -> list[Measured]:
    """The warm process with ever more work in a step of one task: what is gained by packing it with others."""
    small = str(save_model(temporary / "15M", SHAPES["15M"]))
    plan = [
        (NANO, 1, Exercise(8, 8, MIDDLE)),
        (NANO, 4, Exercise(8, 16, MIDDLE)),
        (NANO, 16, Exercise(8, 16, MIDDLE)),
        (small, 1, Exercise(8, 4)),
        (small, 4, Exercise(8, 8)),
        (small, 8, Exercise(4, 8, LONG)),
    ]
    table = []
    for number, (model, batch, exercise) in enumerate(plan):
        settings = (f"models.batch_size={batch}", f"cluster.tasks_per_batch={together}")
        config = exercise.write(temporary / f"cell{number}", model, *settings)
        told = resident(config, repeats, plain=False)
        cell = {"student": Path(model).name, "batch_size": batch, "tokens_per_pair": mean_tokens(config)}
        table.append(cell | {"ratio": told["ratio"], "adapters_per_hour": told["adapters_per_hour"]})
    return table


# --- Ray Train


def ray_train(config: Config, repeats: int) -> Measured:
    """One Ray Train run for all tasks, against one for each, on a local Ray that has started."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from selfguide_ray.trainer import train_packs

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    whole = packs(Run(config.run), config)
    turns = itertools.cycle([single for pack in whole for single in pack.split()])

    def ours() -> int:
        here = _anew(config)
        done = list(train_packs(here, whole))
        _all_learned(Run(here.run), len(done))
        return len(done)

    def fit(here: Config, pack: Pack) -> None:
        def work() -> None:  # imports nothing that only this process finds
            from selfguide_ray.models import learn

            learn(here, [pack])

        TorchTrainer(
            work,
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(
                name=pack.name,
                storage_path=f"{here.run}/.train",
                worker_runtime_env={"env_vars": process_environment(1, 0)},
            ),
        ).fit()

    def ray_train_per_task() -> int:
        here = _anew(config)
        chosen = list(itertools.islice(turns, SAMPLE["ray_train_per_task"]))
        for pack in chosen:
            fit(here, pack)
        _all_learned(Run(here.run), len(chosen))
        return len(chosen)

    try:
        return _rates({"ours": ours, "ray_train_per_task": ray_train_per_task}, repeats)
    finally:
        ray.shutdown()


# --- what the parts share


def _rates(candidates: Mapping[str, Callable[[], int]], repeats: int) -> Measured:
    """Adapters an hour of candidates that return how many they trained: medians, ratios, and the rate of every turn."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}

    def turn(name: str) -> Callable[[], float]:
        def rate() -> float:
            started = time.perf_counter()
            count = candidates[name]()
            rates[name].append(round(count * 3600 / (time.perf_counter() - started), 1))
            print(f"{name}: {rates[name][-1]} adapters/h", file=sys.stderr)
            return rates[name][-1]

        return rate

    medians = alternate({name: turn(name) for name in candidates}, repeats)
    return medians | {"ratio": figures(medians)["ratio"], "adapters_per_hour": rates}


def _anew(config: Config, **cluster: int) -> Config:
    """The same work with no model yet, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=Path(config.run).parent)) / "run"
    shutil.copytree(config.run, folder, ignore=shutil.ignore_patterns("models", ".*"))
    return config.model_copy(
        update={"run": str(folder), "cluster": config.cluster.model_copy(update=cluster)}, deep=True
    )


def _all_learned(run: Run, count: int) -> None:
    """Raise RuntimeError if there are fewer models: what has failed would only look quick."""
    if len(run.trained()) != count:
        raise RuntimeError(f"{len(run.trained())} of {count} tasks were trained: {failures(run)}")


def _tasks(config: Config) -> list[str]:
    return sorted(Run(config.run).read_all("tasks")["task"].to_pylist())
