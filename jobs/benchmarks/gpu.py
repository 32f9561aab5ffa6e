"""On a GPU: what our way of running vLLM costs against vLLM itself, and our own engine beside it."""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import Measured, alternate
from benchmarks.peers import Ids, Vllm, vllm_python
from benchmarks.workload import Work
from selfguide_ray.config import Cluster, Student
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, make_engine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.student import StudentTokenizer, context_of, locate
from selfguide_ray.task_files import read_task, task_files

SHARE = 0.3  # of the GPU for each: all are loaded at once, so that they can take turns
USED = 0.9  # of its share that vLLM is told to fill, as in our engine
ROWS = 256
TASKS, PREFIX, NEW_TOKENS = 8, 600, 128
WARM_UP = 1_000_000  # seed


class EngineActor:
    """An engine in a process of Ray's."""

    def __init__(self, student: Student, cluster: Cluster) -> None:
        self.engine = make_engine(student, cluster)

    def answer(self, requests: list[Request]) -> list[Ids]:
        """The greedy continuations."""
        return [completion.ids for (completion,) in self.engine.generate(requests)]


def gpu(arguments: argparse.Namespace) -> Measured:
    """Tokens a second of vLLM in an actor of ours, of vLLM alone, and of our engine in an actor, in bfloat16."""
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SelfGuideError(
            "gpu: torch sees no CUDA device.",
            "This benchmark compares engines on a GPU; on a CPU they do other work.",
            "Run it on a machine with one, or take generation, which needs none.",
        )
    import ray

    dtype = "bfloat16" if cuda else "float32"
    model = Student(model=arguments.model)
    tokenizer = StudentTokenizer(model)
    work = Work(TASKS, arguments.requests, min(PREFIX, context_of(model) // 2), (5, 35), NEW_TOKENS)
    words = _words(tokenizer)
    python, reason = vllm_python(arguments.vllm)
    in_actor = "vllm" if cuda or not reason else "transformers"  # without a GPU this only tries whether all works
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    def actor(engine: str) -> Callable[[list[Request]], list[Ids]]:
        memory = {"kv_memory_gib": SHARE * _gib() / 2} if cuda and engine == "transformers" else {}
        student = Student(model=arguments.model, engine=engine, dtype=dtype, batch_rows=ROWS, **memory)
        cluster = Cluster(cpus_per_engine=1, gpus_per_engine=SHARE if cuda else 0)
        worker = ray.remote(num_cpus=1, num_gpus=cluster.gpus_per_engine)(EngineActor).remote(student, cluster)
        return lambda requests: ray.get(worker.answer.remote(requests))

    answers: dict[str, list[list[Ids]]] = {}
    not_run = {}
    with contextlib.ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log"
        engines = {"ours": actor(in_actor)}
        if python is None:
            not_run["vllm_alone"] = reason
        else:
            settings = {
                "model": locate(model), "dtype": dtype, "max_num_seqs": ROWS, "enable_prefix_caching": True,
                "max_model_len": work.prefix + work.suffix[1] + NEW_TOKENS,
            }  # fmt: skip
            settings |= {"gpu_memory_utilization": USED * SHARE} if cuda else {}
            eos = tokenizer.hf.eos_token_id
            engines["ours"](work.draw(words, WARM_UP)[:8])  # loaded before the next: vLLM measures what is free
            alone = Vllm(python, log, settings, {}, eos)
            stack.callback(alone.close)
            engines["vllm_alone"] = alone.answer
        engines["transformers_engine"] = actor("transformers")
        for answer in engines.values():
            answer(work.draw(words, WARM_UP)[: 2 * ROWS])
        draws = [work.draw(words, seed) for seed in range(arguments.repeats)]

        def turn(name: str) -> Callable[[], float]:
            answers[name] = []

            def rate() -> float:
                requests = draws[len(answers[name])]
                started = time.perf_counter()
                answers[name].append(engines[name](requests))
                return sum(map(len, answers[name][-1])) / (time.perf_counter() - started)

            return rate

        rates = alternate({name: turn(name) for name in engines}, arguments.repeats)
    ray.shutdown()
    flat = {name: [ids for told in several for ids in told] for name, several in answers.items()}
    return {
        "work": f"{work}, greedy, {dtype}, {arguments.model}; ours is the {in_actor} engine inside a Ray actor",
        "unit": "tokens/s",
        "rates": rates,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        # In bfloat16 engines round differently, and greedy texts part where two tokens are nearly level.
        "differing": {
            name: sum(a != b for a, b in zip(flat["ours"], told, strict=True))
            for name, told in flat.items()
            if name != "ours"
        },
        "compared": len(flat["ours"]),
        "not_run": not_run,
    }


def _words(tokenizer: StudentTokenizer) -> list[int]:
    """The tokens of ordinary text, to draw prompts from."""
    tasks = [read_task(file) for file in task_files(resolve("embedded/tasks"))]
    texts = [text for task in tasks for text in (task.instruction, *(instance.input for instance in task.instances))]
    return sorted({token for text in texts for token in tokenizer.encode(text)})


def _gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30
