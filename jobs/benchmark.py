"""Measure this project against its peers, alternating in one run, medians; the ratio is what counts.

python jobs/benchmark.py NAME --json FILE [--data NATURAL_INSTRUCTIONS] [--repeats 3]

loading     the offline suite of tasks
generation  the engine on many requests that share prefixes, and its rows, adapters and memory
novelty     the ROUGE-L of every row of a task with every other
filters     all other filters, on many rows
training    many small tasks fine-tuned, against a process or a Ray Train run for each
zero_memory a worker's memory with ZeRO-3 and with ZeRO-0
scheduling  the time between two shards, and many workers that sleep against one
driver      the driver's memory with many tasks and with few
gpu         vLLM inside a Ray actor, on a GPU
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

from benchmarks import figures

from selfguide_ray.errors import SelfGuideError

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "selfguide_ray")
BENCHMARKS: dict[str, str] = {  # the module and function of each: what one needs is imported for none of the others
    "loading": "benchmarks.loading:loading",
    "generation": "benchmarks.generation:generation",
    "novelty": "benchmarks.novelty:novelty",
    "filters": "benchmarks.filters:filters",
    "training": "benchmarks.training:training",
    "zero_memory": "benchmarks.zero_memory:zero_memory",
    "scheduling": "benchmarks.scheduling:scheduling",
    "driver": "benchmarks.scheduling:driver_memory",
    "gpu": "benchmarks.gpu:gpu",
}


def main() -> None:
    """Run one benchmark, print its figures and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/natural_instructions"), help="Natural Instructions"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", default="15M,120M", help="generation: models, the first for the headline")
    parser.add_argument("--requests", type=int, default=64, help="generation, gpu: requests of a task")
    parser.add_argument("--threads", type=int, default=1, help="generation: threads of every engine")
    parser.add_argument(
        "--rows",
        type=int,
        help="novelty: rows of a task (500); filters: of all tasks (1,000,000); scheduling: shards of a worker (30)",
    )
    parser.add_argument("--workers", type=int, help="scheduling: workers side by side (16)")
    parser.add_argument("--tasks", help="driver: numbers of tasks (100,2000)")
    parser.add_argument("--vllm", help="generation, gpu: a Python interpreter that has vLLM")
    parser.add_argument("--quick", action="store_true", help="generation, training: only the rates")
    parser.add_argument("--model", default="embedded/nano", help="gpu: a model's folder or name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    module, function = BENCHMARKS[arguments.name].split(":")
    try:
        measured = getattr(importlib.import_module(module), function)(arguments)
    except SelfGuideError as error:
        parser.exit(2, f"error: {error}\n")
    result = {
        "name": arguments.name,
        "work": measured.pop("work"),
        "unit": measured.pop("unit"),
        **figures(measured.pop("rates")),
        **measured,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
