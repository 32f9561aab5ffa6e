"""All weights of a task by workers on two nodes, of which one goes away: ZeRO-3 on a cluster that is simulated."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_data_parallel import assert_equal, distance, make_student, plan, told, weights

from selfguide_ray.failures import failures
from selfguide_ray.models import UNFINISHED, packs
from selfguide_ray.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = ("models.method=full", "models.zero_stage=3", "models.epochs=16", "cluster.checkpoint_seconds=0")
LOSE_AT = 5  # steps: the training has 48


def latest(run):
    """(step, workers) of the state that is kept of a task in training; None if there is none."""
    for path in Path(run.root, UNFINISHED).glob("*/*/latest.json"):
        try:
            note = json.loads(path.read_text())
        except OSError:  # the task has just ended
            return None
        return note["step"], note["world"]
    return None


def drive(folder):
    """Three trainings on one cluster of two nodes, in a process of its own: pytest's has a cluster already."""
    import ray
    from ray.cluster_utils import Cluster

    from selfguide_ray.schema import Example, Task
    from selfguide_ray.trainer import train_packs

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    student = make_student(folder / "student")
    task = Task("colours", "Say it.", tuple(Example(f"in {i}", f"out {i}") for i in range(3)), ())
    seen = {}

    def disturb(run, training, replace):
        """Once some steps are kept, take a node away, and perhaps give another."""
        while (now := latest(run)) is None or now[0] < LOSE_AT:
            assert not training.done(), training.result()
            time.sleep(0.01)
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        if replace:
            nodes.append(cluster.add_node(num_cpus=1))
        kept = seen[Path(run.root).name] = [now]
        while not training.done():
            if (now := latest(run)) is not None:
                kept.append(now)
            time.sleep(0.01)

    for name, workers, replace in (("calm", "2", None), ("moved", "2", True), ("shrunk", "[1, 2]", False)):
        config, run = plan(folder / name, student, [task], *SETTINGS, f"cluster.workers={workers}")
        with ThreadPoolExecutor(1) as pool:  # nodes start and stop in the main thread only
            training = pool.submit(lambda: list(train_packs(config, packs(run, config))))  # noqa: B023
            if replace is not None:
                disturb(run, training, replace)
            assert training.result() == [("colours", True)], failures(run)
    (folder / "seen.json").write_text(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(runs by name, what was kept in their course)."""
    folder = tmp_path_factory.mktemp("nodes")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    here = Path(__file__)
    environment |= {"PYTHONPATH": f"{here.parent}:{here.parents[1]}", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    done = subprocess.run(
        [sys.executable, here, folder], capture_output=True, text=True, timeout=560, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {name: Run(str(folder / name)) for name in ("calm", "moved", "shrunk")}, json.loads(
        (folder / "seen.json").read_text()
    )


def test_a_node_that_is_lost_and_replaced_changes_no_bit(trained):
    runs, seen = trained
    assert_equal(runs["moved"], runs["calm"])
    steps = [step for step, _ in seen["moved"]]
    assert steps == sorted(steps)  # what was kept was not learned again
    assert {world for _, world in seen["moved"]} == {2}


def test_a_group_that_may_shrink_goes_on_with_the_node_that_is_left(trained):
    runs, seen = trained
    assert seen["shrunk"][0][1] == 2
    assert seen["shrunk"][-1][1] == 1
    assert [step for step, _ in seen["shrunk"]] == sorted(step for step, _ in seen["shrunk"])
    assert told(runs["shrunk"])["losses"] == pytest.approx(told(runs["calm"])["losses"], rel=1e-3)
    calm = weights(runs["calm"])
    assert distance(weights(runs["shrunk"]), calm) <= 0.01 * distance(
        calm, {n: torch.zeros_like(x) for n, x in calm.items()}
    )


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
