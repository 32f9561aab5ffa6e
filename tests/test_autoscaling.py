"""A run on a cluster without workers: nodes come when there is work, up to the most, and go when there is none.

Ray's own autoscaler decides, over a provider that starts its nodes as processes on this machine.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from heads import environment, free_ports, head

ROOT = Path(__file__).parents[1]
MOST = 3
SMALL = (
    "student.engine=scripted",
    "tasks.source=embedded/tasks",
    "tasks.per_shard=1",
    "tasks.instances=4",
    "inputs.rounds=2",
    "inputs.prompts_per_round=4",
    "outputs.samples=2",
    f"cluster.engines={MOST}",
)


def autoscaler(address):
    """Settings of an autoscaler that may start nodes of one CPU, as processes of this machine."""
    kinds = {
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST},
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    }
    return {
        "cluster_name": "pretended",
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,  # which its nodes join
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "max_workers": MOST,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": 0.1,
        "auth": {},
        **{name: {} for name in ("docker", "file_mounts", "head_node", "worker_nodes")},
        **{f"{node}setup_commands": [] for node in ("", "head_", "worker_")},
        **{f"{node}_start_ray_commands": [] for node in ("head", "worker")},
        **{name: [] for name in ("initialization_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


def drive(folder, address):
    """The run, in a process of its own; how many nodes there were is noted every half second."""
    import ray

    from selfguide_ray.config_file import load
    from selfguide_ray.method import SELFGUIDE, perform

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    counts, over = [], threading.Event()

    def workers():
        return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())

    def watch():
        while not over.wait(0.5):
            counts.append(workers())

    before = workers()
    watching = threading.Thread(target=watch)
    watching.start()
    code = perform(load(None, [f"run={folder / 'run'}", *SMALL]), SELFGUIDE)
    deadline = time.monotonic() + 180
    while workers() and time.monotonic() < deadline:
        time.sleep(0.5)
    over.set()
    watching.join()
    told = {"code": code, "before": before, "most": max(counts), "after": workers()}
    (folder / "seen.json").write_text(json.dumps(told))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_come_from_zero_up_to_the_most_and_go_again(tmp_path):
    from ray._private.services import get_node_ip_address

    (port,) = free_ports(1)
    address = f"{get_node_ip_address()}:{port}"
    (tmp_path / "autoscaler.json").write_text(json.dumps(autoscaler(address)))
    pretended = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with head(f"--autoscaling-config={tmp_path / 'autoscaler.json'}", f"--port={port}", cpus=0, **pretended):
        done = subprocess.run(
            [sys.executable, __file__, tmp_path, address],
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
            env=environment(PYTHONPATH=str(ROOT), SELFGUIDE_SCRIPTED_DELAY="0.5"),
        )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert json.loads((tmp_path / "seen.json").read_text()) == {"code": 0, "before": 0, "most": MOST, "after": 0}


if __name__ == "__main__":
    drive(Path(sys.argv[1]), sys.argv[2])
