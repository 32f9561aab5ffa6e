"""A head node of Ray of its own: what `ray start --head` makes on a real cluster, here with free ports."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil

RAY = Path(sys.executable).with_name("ray")
PORTS = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")


class Head(NamedTuple):
    """Where a head listens: the dashboard's URL, and what `ray.init` is given."""

    dashboard: str
    address: str


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(**given):
    """This process's, without another cluster's address; tokens are not what is tested."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    path = f"{RAY.parent}:{os.environ.get('PATH', '')}"  # a job is started by the name `python`
    patience = {"RAY_raylet_start_wait_time_s": "300"}  # 30 are too few for a busy machine
    return mine | patience | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **given}


@contextlib.contextmanager
def head(*more, cpus=2, **given):
    """A head for as long as the block lasts, with more options; `given` is added to its environment."""
    folder = tempfile.mkdtemp(prefix="sg-")  # short: Ray's sockets lie in it
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    options = [f"{name}={port}" for name, port in ports.items()]
    options += ["--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={folder}", *more]
    dashboard = f"http://127.0.0.1:{ports['--dashboard-port']}"
    with Path(folder, "head.log").open("wb") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", *options],
            env=environment(**given),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 400
        while not living_nodes(dashboard):
            assert process.poll() is None, Path(folder, "head.log").read_text()
            assert time.monotonic() < deadline, Path(folder, "head.log").read_text()
            time.sleep(0.2)
        yield Head(dashboard, node_address(dashboard) + f":{ports['--port']}")
        assert process.poll() is None, Path(folder, "head.log").read_text()
    finally:
        process.terminate()  # it ends what it has started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for other in psutil.process_iter():  # nodes that an autoscaler has started beside it
            with contextlib.suppress(psutil.Error):
                if any(folder in part for part in other.cmdline()):
                    other.kill()
        shutil.rmtree(folder, ignore_errors=True)


def living_nodes(dashboard):
    try:
        told = get(f"{dashboard}/nodes?view=summary")
    except OSError:
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in told["data"]["summary"])


def node_address(dashboard):
    return get(f"{dashboard}/nodes?view=summary")["data"]["summary"][0]["ip"]


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)
