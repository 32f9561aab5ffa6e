"""jobs/benchmark.py writes figures in the form that others read, and its engines are asked for the same text."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from selfguide_ray.errors import SelfGuideError

JOBS = Path(__file__).parents[1] / "jobs"
sys.path.insert(0, str(JOBS))

from benchmarks import adapters, filters, generation, gpu, identity, made_up, memory, novelty, peers, training  # noqa: E402
from benchmarks.workload import EOS, SHAPES, Work, save_model  # noqa: E402

TINY = SHAPES["tiny"]
WORK = Work(requests=4, prefix=40, suffix=(2, 9), new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", TINY)


@pytest.mark.slow
def test_the_whole_suite_loads_and_the_figures_are_told(tmp_path, natural_instructions):
    command = [sys.executable, JOBS / "benchmark.py", "loading", "--json", tmp_path / "out.json", "--repeats", "1"]
    subprocess.run([*command, "--data", natural_instructions], check=True, capture_output=True, cwd=tmp_path)
    told = json.loads((tmp_path / "out.json").read_text())
    assert {"name", "work", "unit", "ours", "peers", "ratio", "machine", "versions", "date"} <= told.keys()
    assert told["work"] == "1458 task files"
    assert told["ratio"] == {peer: told["ours"] / rate for peer, rate in told["peers"].items()}
    assert told["peak_memory_mb"]["after_1400_tasks"] < 2 * told["peak_memory_mb"]["after_100_tasks"]


def test_an_unknown_benchmark_is_refused():
    done = subprocess.run(
        [sys.executable, JOBS / "benchmark.py", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "loading" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so():
    with pytest.raises(SelfGuideError, match="CUDA"):
        gpu.gpu(argparse.Namespace(device="cuda"))


def test_all_engines_answer_alike_and_what_did_not_run_has_no_ratio(folder):
    told = generation.measure(folder, TINY.words, WORK, repeats=2, threads=1, reason="not here")
    assert told["ratio"] == {peer: told["ours"] / rate for peer, rate in told["peers"].items()}
    assert set(told["ratio"]) == {"transformers_generate", "transformers_continuous"}
    assert told["not_run"] == {"vllm_cpu": "not here"}
    assert set(told["differing"].values()) == {0}
    assert told["compared"] == {"transformers_generate": 16, "transformers_continuous": 16, "one_at_a_time": 8}
    assert told["requests"] == {"ours": 8, "transformers_generate": 8, "transformers_continuous": 8}
    assert len(told["rates"]["ours"]) == 2


def test_a_peer_on_a_sample_gets_answers_as_long_as_the_others(folder):
    requests = Work(requests=40, prefix=20, new_tokens=48).draw(TINY.words, seed=3)
    answers = dict(enumerate(peers.Ours(folder, 64, 1).answer(requests)))
    chosen = generation.sample(requests, answers, 20)
    assert len(chosen) == 20
    assert len({requests[i].prefix for i in chosen}) == 2
    lengths = [len(answers[i]) for i in range(len(requests))]
    assert 1 < sum(lengths) / len(lengths) < 47  # some end by themselves
    assert sum(lengths[i] for i in chosen) / 20 == pytest.approx(sum(lengths) / len(lengths), rel=0.25)


def test_every_seed_has_requests_of_its_own_in_mixed_order():
    first, again, other = (WORK.draw(TINY.words, seed) for seed in (1, 1, 2))
    assert first == again
    assert not {request.prefix for request in first} & {request.prefix for request in other}
    assert len({request.prefix for request in first[:4]}) == 2
    assert all(2 <= len(request.suffix) <= 9 for request in first)


STUB = """
from types import SimpleNamespace as Some
__version__ = "stub"
print("noise")
class SamplingParams:
    def __init__(self, **given): self.max_tokens = given["max_tokens"]
class LLM:
    def __init__(self, model): assert model != "broken", "broken model"
    def generate(self, prompts, params, use_tqdm):
        return [Some(outputs=[Some(token_ids=[*p["prompt_token_ids"][:params.max_tokens], 1, 9])]) for p in prompts]
"""


def test_vllm_is_asked_in_another_interpreter(tmp_path):
    (tmp_path / "vllm.py").write_text(STUB)
    environment = {"PYTHONPATH": str(tmp_path)}
    vllm = peers.Vllm(sys.executable, tmp_path / "log", {"model": "any"}, environment)
    requests = WORK.draw(TINY.words, seed=1)
    assert vllm.answer(requests) == [request.prefix[:12] for request in requests]  # what follows EOS is cut off
    vllm.close()
    assert vllm.process.returncode == 0
    with pytest.raises(RuntimeError, match="broken model"):
        peers.Vllm(sys.executable, tmp_path / "log", {"model": "broken"}, environment)


def test_without_vllm_the_reason_is_told(tmp_path):
    assert peers.vllm_python(str(tmp_path / "python"))[0] is None
    python, reason = peers.vllm_python(sys.executable)
    assert (python is None) == bool(reason)


def test_rows_are_the_same_however_they_are_batched(tmp_path):
    told = identity.row_identity(tmp_path, 1, replace(WORK, new_tokens=5), TINY)
    assert (told["rows"], told["rows_differing"], told["tokens_behind_first_difference"]) == (8, 0, 0)
    assert told["distinct_rows"] > 1


def test_adapters_side_by_side_answer_as_with_plain_peft(tmp_path):
    told = adapters.adapters(tmp_path, 1, 1, replace(WORK, tasks=3, requests=2), TINY)
    assert told["differing"] == {"adapters_one_after_another": 0, "own_engine_one_after_another": 0}
    assert told["changed_by_the_adapters"] > 0
    assert set(told["ratio"]) == set(told["differing"])


def test_memory_is_told(folder):
    told = memory.peak(folder, 1, Work(tasks=3, requests=1, prefix=50, new_tokens=4))
    assert told["answered"] == 3
    assert told["peak_growth_mib"] >= told["growth_mib"] - 1
    assert memory.after(folder, 1, (500,))["after_500_mib"] > 0


def test_the_eos_of_a_model_ends_its_answer():
    assert peers.before_eos([7, 8, EOS, 9]) == (7, 8)
    assert peers.before_eos([7, 8], eos=8) == (7,)


def test_packs_and_plain_peft_train_what_is_trained_one_by_one(tmp_path):
    config = training.Exercise(tasks=3, pairs=16).write(tmp_path / "run", training.NANO, "models.batch_size=2")
    told = training.resident(config, repeats=1)
    assert set(told["ratio"]) == {"sequential_resident", "peft_resident"}
    assert told["ratio"] == {peer: told["ours"] / told[peer] for peer in told["ratio"]}
    assert told["compared"] == {"ours": 3, "peft_resident": 3}
    assert max(told["largest_difference_to_one_by_one"].values()) < 5e-3
    assert told["loss"]["largest_difference"] < 1e-4


def test_the_pairs_to_train_on_are_decided_by_seeds(tmp_path):
    def pairs(name, *overrides):
        config = training.Exercise(tasks=2, pairs=3).write(tmp_path / name, training.NANO, *overrides)
        return training.Run(config.run).read_all("trainset")["prompt"].to_pylist()

    assert pairs("one") == pairs("again") != pairs("other", "seed=1")
    assert len(set(pairs("third"))) == 6


def test_the_peer_of_training_learns_in_a_process_of_its_own(tmp_path):
    config = training.Exercise(tasks=1, pairs=2).write(tmp_path / "run", training.NANO)
    assert training.theirs(config, "task00") > 0


@pytest.mark.parametrize("installed", [True, False])
def test_novelty_is_measured_against_rouge_score_and_what_else_is_there(monkeypatch, installed):
    monkeypatch.setitem(sys.modules, "datasketch", MINHASH if installed else None)
    told = novelty.novelty(argparse.Namespace(rows=20, repeats=1))
    assert set(told["rates"]) == {"ours", "rouge_score"} | ({"datasketch"} if installed else set())
    assert all(rate > 0 for rate in told["rates"].values())
    assert told["largest_difference_to_rouge_score"] < 1e-9
    assert 0 < told["share_dropped"]["ours"][0] < 0.5
    assert ("datasketch" in told["not_run"]) != installed
    assert told["unit"] == "pairs/s"


class Index(dict):
    """Datasketch's interface, by equality instead of by hashes."""

    def __init__(self, threshold, num_perm):
        super().__init__()

    def query(self, words):
        return [place for place, other in self.items() if other == words]

    def insert(self, place, words):
        self[place] = words


class Words(set):
    def __init__(self, num_perm):
        super().__init__()

    def update_batch(self, words):
        self.update(words)


MINHASH = SimpleNamespace(MinHash=Words, MinHashLSH=Index)


def test_filters_are_measured_over_rows_of_all_fates():
    told = filters.filters(argparse.Namespace(rows=2000))
    assert sum(told["verdicts"].values()) == 2000
    assert {"kept", "duplicate", "length", "noise", "empty"} <= set(told["verdicts"])
    assert told["verdicts"]["kept"] > 1000
    assert told["rates"].keys() == {"ours"}
    assert set(told["seconds"]) == {"inputs", "answers", "balance"}


def test_made_up_rows_are_decided_by_their_seed():
    first, again, other = (made_up.Language(seed).texts(50) for seed in (1, 1, 2))
    assert first == again != other
    assert 30 < sum(len(text.split()) for text in first) / 50 < 44
