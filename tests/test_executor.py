"""Shards in flight share an engine, and each has a receipt of its own."""

import json
import threading
import time
import urllib.request

import numpy as np
import pytest

from selfguide_ray.config import Cluster, Student
from selfguide_ray.config_file import load
from selfguide_ray.engine import Counters, make_engine
from selfguide_ray.executor import ShardWorker, meters, waiting
from selfguide_ray.inputs import Inputs
from selfguide_ray.metering import Metered, rates
from selfguide_ray.outputs import Outputs
from selfguide_ray.run import Run
from selfguide_ray.schema import task_rows

OVERRIDES = ["inputs.rounds=2", "inputs.prompts_per_round=4", "inputs.max_new_tokens=12", "inputs.length_filter=false",
             "outputs.samples=2", "outputs.max_new_tokens=4"]  # fmt: skip


def planned(folder, make_task, engine):
    config = load(overrides=[f"run={folder}", f"student.engine={engine}", *OVERRIDES])
    run = Run(config.run)
    for i in range(4):
        run.write("tasks", f"{i:05d}", task_rows([make_task(f"toy{i}")]), {})
    return config, run


def worked(config, threads):
    """Receipts of all shards, made by a worker in so many threads."""
    started = []

    def engine():
        started.append(time.monotonic())
        time.sleep(0.2)  # long enough for another thread to want one too
        return make_engine(config.student, config.cluster)

    worker = ShardWorker(config, [Inputs, Outputs], engine)
    shards = [f"{i:05d}" for i in range(4)]
    receipts = []

    def work(mine):
        receipts.extend(map(json.loads, worker({"shard": np.array(mine)})["receipt"]))

    several = [threading.Thread(target=work, args=(shards[i::threads],)) for i in range(threads)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert len(started) == 1
    return {(r["table"], r["shard"]): r for r in receipts}, worker


@pytest.mark.parametrize("engine", ["scripted", "transformers"])
def test_shards_in_flight_make_what_one_at_a_time_makes(tmp_path, make_task, engine):
    one, run_one = planned(tmp_path / "one", make_task, engine)
    two, run_two = planned(tmp_path / "two", make_task, engine)
    alone, _ = worked(one, threads=1)
    together, worker = worked(two, threads=2)
    assert set(alone) == set(together) == {(t, f"{i:05d}") for t in ("inputs", "outputs") for i in range(4)}
    for table, shard in alone:
        a, b = (run.read(table, shard).to_pylist() for run in (run_one, run_two))
        if table == "inputs":  # the rest of the batch is in the last digits of these
            assert [row.pop("perplexity") for row in a] == pytest.approx([row.pop("perplexity") for row in b], rel=1e-3)
        for row in (*a, *b):  # and of these
            for candidate in row.get("candidates") or ():
                candidate["logprob"] = round(candidate["logprob"], 2)
        assert a == b
        for key in ("rows", "kept", "prompt_tokens", "generated_tokens"):
            assert alone[table, shard][key] == together[table, shard][key]
    counters = worker.engine.counters
    for key in ("prompt_tokens", "cached_tokens", "generated_tokens"):
        assert sum(r[key] for r in together.values()) == getattr(counters, key) >= 0
    assert counters.prompt_tokens > 0


def test_a_receipt_tells_how_well_the_engine_was_used(tmp_path, make_task):
    config, _ = planned(tmp_path, make_task, "transformers")
    receipts, _ = worked(config, threads=2)
    told = [receipts["outputs", f"{i:05d}"]["engine_rates"] for i in range(4)]
    for one in told:
        assert set(one) == {
            "prefix_hit_rate", "occupancy", "prompt_tokens_per_s", "generated_tokens_per_s", "share_of_ceiling",
        }  # fmt: skip
        assert 0 < one["prefix_hit_rate"] < 1
        assert 0 < one["occupancy"] <= 1
        assert one["generated_tokens_per_s"] > 0
    done = Counters(prompt_tokens=100, cached_tokens=75, rows=30, places=60, busy_seconds=2.0, ideal_seconds=0.5)
    assert list(rates(done).values()) == [0.75, 0.5, 50.0, None, 0.25]


def test_a_thread_counts_what_it_took_and_nothing_twice():
    engine = Metered(make_engine(Student(engine="scripted"), Cluster()))
    assert engine.taken() == {"prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}


def test_what_a_cluster_lacks_is_told_now_and_then(monkeypatch):
    told, there = [], {"CPU": 2.0, "memory": 9.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("selfguide_ray.progress.event", lambda name, **fields: told.append((name, fields)))

    def until(count):
        deadline = time.monotonic() + 20
        while len(told) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(told) >= count

    with waiting(4, 1.0, 0.5, first=0.02):
        assert until(2)
        there |= {"CPU": 4.0, "GPU": 1.0}
        assert until(3)
        there |= {"GPU": 2.0}
        time.sleep(0.5)
        before = len(told)
        time.sleep(1.0)
        assert len(told) == before  # all is there
    assert told[0] == ("waiting", {"asked": {"CPU": 4.0, "GPU": 2.0}, "there": {"CPU": 2.0, "GPU": 0.0}, "seconds": 0})
    assert threading.active_count() < 50


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_prometheus_is_told_of_shards_rows_and_tokens(tmp_path, make_task, cluster):
    import ray

    config, _ = planned(tmp_path, make_task, "scripted")

    @ray.remote(num_cpus=0)
    class Actor:
        def work(self):
            worker = ShardWorker(config, [Inputs, Outputs], lambda: make_engine(config.student, config.cluster))
            return ray.get_runtime_context().get_worker_id(), worker({"shard": np.array(["00000", "00001"])})["receipt"]

    actor = Actor.remote()
    worker, told = ray.get(actor.work.remote())
    receipts = [json.loads(receipt) for receipt in told]
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
    deadline, text = time.monotonic() + 120, ""
    while (
        f'WorkerId="{worker}' not in text.partition("selfguide_tokens")[2] and time.monotonic() < deadline
    ):  # Ray collects them every ten seconds
        time.sleep(1)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()

    def total(name, **tags):
        lines = [line for line in text.splitlines() if line.startswith(f"ray_selfguide_{name}") and worker in line]
        chosen = [line for line in lines if all(f'{tag}="{value}"' in line for tag, value in tags.items())]
        return sum(float(line.rpartition(" ")[2]) for line in chosen)

    assert total("shards_total", table="inputs") == 2
    made = [receipt for receipt in receipts if receipt["table"] == "inputs"]
    assert total("rows_total", table="inputs") == sum(receipt["rows"] for receipt in made)
    assert total("rows_total", table="inputs", verdict="kept") == sum(receipt["kept"] for receipt in made)
    assert total("tokens_total", kind="generated") == sum(receipt["generated_tokens"] for receipt in receipts)
    assert meters() is meters()
    ray.kill(actor)
