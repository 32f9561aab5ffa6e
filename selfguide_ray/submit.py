"""A run as a job of a Ray cluster: the `ray job submit` line that hands it over, and the environment it needs.

Ray's command does the work; here is only what is easily got wrong: paths that mean something else on the cluster, and
whether to show a token.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import redacted

JOB = "jobs/selfguide.py"
GRACE = "RAY_JOB_STOP_WAIT_TIME_S"  # between SIGTERM and SIGKILL of `ray job stop`; 3 by default
LEAVING = 30  # seconds for a job to leave, once nothing is in hand
AUTH_MODE = "RAY_AUTH_MODE"
DEFAULT_TOKEN = "~/.ray/auth_token"  # where Ray keeps the token that it makes


def submit(config: str, overrides: Sequence[str], address: str | None, wait: bool, dry_run: bool) -> int:
    """Print the command and run it; returns its exit code, 0 of a dry run.

    Raises SelfGuideError for settings that the job would refuse, and for a job or settings outside the working directory.
    """
    settings = load(config, overrides)
    line = command(config, overrides, address, wait, settings.cluster.drain_seconds)
    added, why = authentication()
    shown = shlex.join([*(f"{name}={value}" for name, value in added.items()), *line])
    print(redacted(shown), flush=True)
    print(f"{AUTH_MODE}: {why}", file=sys.stderr)
    if "://" not in settings.run and not Path(settings.run).expanduser().is_absolute():
        print(
            f"run: {redacted(settings.run)} is relative to the job's own copy of this directory on the cluster, and lost "
            "with it; give an absolute path or a URI that all nodes and you can read",
            file=sys.stderr,
        )
    if dry_run:
        return 0
    return subprocess.run([executable(), *line[1:]], env=os.environ | added, check=False).returncode


def command(config: str, overrides: Sequence[str], address: str | None, wait: bool, drain_seconds: float) -> list[str]:
    """`ray job submit …` as a list; the working directory goes along, so the settings are named as they lie in it.

    So does the time that `ray job stop` leaves the job to finish what it has in hand.
    """
    environment = {"env_vars": {GRACE: str(math.ceil(drain_seconds) + LEAVING)}}
    here = Path.cwd().resolve()
    if not (here / JOB).is_file():
        raise SelfGuideError(
            f"{here} holds no {JOB}.",
            "The job is that script, out of the working directory that goes to the cluster.",
            "Change to the folder of this project, and submit from there.",
        )
    place = Path(config).expanduser().resolve()
    if not place.is_relative_to(here):
        raise SelfGuideError(
            f"{config}: lies outside the working directory {here}.",
            "Only the working directory goes to the cluster, so the job could not read its settings.",
            "Copy the file into it, for example to configs/.",
        )
    return [
        *("ray", "job", "submit"),
        *(("--address", address) if address else ()),
        *(() if wait else ("--no-wait",)),
        *("--working-dir", ".", "--runtime-env-json", json.dumps(environment, separators=(",", ":")), "--"),
        *("python", JOB, place.relative_to(here).as_posix(), *overrides),
    ]


def authentication() -> tuple[dict[str, str], str]:
    """What to add to the environment so that the cluster lets the job in, and why.

    Ray (2.60) shows its token by itself only to a cluster that it finds on this machine; one that was started where a
    token lies wants to see it, also with a job.
    """
    mode, token = os.environ.get(AUTH_MODE), token_place()
    if mode is not None:
        if mode.lower() == "token" and token is None:
            return {}, f"is {mode}, and no token is there: Ray will refuse; get one with ray get-auth-token --generate"
        return {}, f"is {mode} already"
    if token is None:
        return {}, "not set, and no token is there: right for a cluster that wants none"
    return {AUTH_MODE: "token"}, f"set to token, since {token} holds one; export {AUTH_MODE}=disabled to show none"


def token_place() -> str | None:
    """Where Ray would find its token: a variable's name or a file; None if nowhere."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_TOKEN
    return path if Path(path).expanduser().is_file() else None


def executable() -> str:
    """Ray's command line: that of the Python that runs this, else the first on PATH."""
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if beside.is_file() else shutil.which("ray")
    if found is None:
        raise SelfGuideError(
            f"ray: there is no such command beside {sys.executable} or on PATH.",
            "A job is submitted by Ray's command line.",
            "pip install 'ray[default]'.",
        )
    return found
