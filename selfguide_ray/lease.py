"""A lease on a run: the file `_lease.json` in its folder says which job works on it, and that this job lives.

One job at a time writes a run. The holder renews the file every few seconds; another job that finds it is refused by name,
and takes over what nobody renews any more. On a local disk a lock on the folder makes looking and writing one step. An
object store has none: there the writer looks again after a moment, and the last to write has it.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import Run

LEASE = "_lease.json"
RENEW = 10.0  # seconds between two signs of life
STALE = 60.0  # without one for so long, the owner is taken for dead
SETTLE = 2.0  # seconds after which the writers of an object store look who was last


class Lease:
    """A job's hold on one run; `token` is the job's own, the same for all runs that it holds."""

    def __init__(self, run: Run, token: str, renew: float = RENEW, stale: float = STALE) -> None:
        self.run, self.token, self.pause, self.stale = run, token, renew, stale
        self.me = {"token": token, **owner(), "since": time.time()}

    def take(self) -> str | None:
        """Take the lease; returns who had it, if it was left by a job that is dead.

        Raises SelfGuideError, and nothing is written, if another job has it.
        """
        found = read(self.run)
        if found is not None and not self._dead(found):
            raise held(self.run, found)
        with exclusive(self.run) as sure:
            now = read(self.run)
            if now is not None and now != found:  # a sign of life, or another was faster
                raise held(self.run, now)
            self._write(False)
        if not sure:
            time.sleep(SETTLE)
            if (now := read(self.run) or {}).get("token") != self.token:
                raise held(self.run, now)
        return None if found is None else spelled(found)

    def renew(self, stopping: bool = False) -> bool:
        """A sign of life; `stopping` also tells the job's workers to begin nothing more. False if another job has it."""
        with exclusive(self.run):
            if (read(self.run) or self.me).get("token") != self.token:
                return False
            self._write(stopping)
            return True

    def release(self) -> None:
        """Give the run free, if it is still held; a folder that holds nothing else goes too."""
        with exclusive(self.run):
            if (read(self.run) or {}).get("token") == self.token:
                self.run.remove(LEASE)
        if self.run.local:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(self.run.root)

    def lost(self) -> SelfGuideError:
        """What a job is told whose lease another has taken."""
        return SelfGuideError(
            f"{self.run.uri} was taken over by {spelled(read(self.run) or {})}.",
            f"This job had shown no sign of life for {self.stale:.0f} s, as after a suspended machine, and was taken for dead.",
            "Leave the run to that job; whatever this one had finished is kept.",
        )

    def _write(self, stopping: bool) -> None:
        self.run.put(LEASE, json.dumps(self.me | {"alive": time.time(), "stopping": stopping}).encode())

    def _dead(self, found: dict[str, Any]) -> bool:
        """Whether an owner has gone: its process on this machine, or for long without a sign of life.

        Clocks of two machines may differ, and a suspended machine may just have woken: before a job is taken for dead it is
        watched for some renewals.
        """
        if found.get("machine") == self.me["machine"] and not lives(found["pid"], found["started"]):
            return True
        if abs(time.time() - found.get("alive", 0.0)) <= self.stale:
            return False
        end = time.monotonic() + 3 * self.pause
        while time.monotonic() < end:
            time.sleep(self.pause / 4)
            if read(self.run) != found:
                return False
        return True


def goes_on(run: Run, token: str) -> bool:
    """Whether a worker of the job with this token may begin another shard or pack of the run."""
    found = read(run)
    return found is None or (found.get("token") == token and not found.get("stopping"))


def read(run: Run) -> dict[str, Any] | None:
    """The lease on a run; None if there is none, empty if it is unreadable."""
    try:
        found = run.get_json(LEASE)
    except FileNotFoundError:  # released between two looks
        return None
    except SelfGuideError:
        return {}
    return found if found is None or isinstance(found, dict) else {}


def held(run: Run, found: dict[str, Any]) -> SelfGuideError:
    """What a second job is told."""
    since, alive = (time.strftime("%F %T %z", time.localtime(found.get(name, 0.0))) for name in ("since", "alive"))
    job, pid, host = (found.get(name) for name in ("job", "pid", "host"))
    end = f"ray job stop {job}" if job else f"kill {pid} on {host}"
    return SelfGuideError(
        f"{run.uri} is held by {spelled(found)} since {since}; its last sign of life: {alive}.",
        "Two jobs on one run would do the same work twice, and could remove each other's files.",
        f"Wait for it, stop it with {end}, or choose another run=DIR. "
        f"If it has died on another machine, it is taken over {STALE:.0f} s after its last sign of life.",
    )


def spelled(found: dict[str, Any]) -> str:
    """An owner by name."""
    job = f"job {found['job']}, " if found.get("job") else ""
    return f"{job}process {found.get('pid', 'unknown')} on {found.get('host', 'an unknown machine')}"


def owner() -> dict[str, Any]:
    """This process: host, machine, pid, the process's start, and the name under which it was submitted to Ray."""
    try:
        submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        submitted = None
    pid = os.getpid()
    return {"host": os.uname().nodename, "machine": machine(), "pid": pid, "started": started(pid), "job": submitted}


def machine() -> str:
    """Tells whether two processes would see each other: the host, this boot of it, and the namespace of process ids."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):  # not Linux
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When a process started, in ticks since boot, which tells it from a later one with the same id; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def lives(pid: int, begun: str | None) -> bool:
    """Whether the process of this id and start is there."""
    if begun is not None:
        return started(pid) == begun
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def exclusive(run: Run) -> Iterator[bool]:
    """A block that one process at a time is in; yields False where the run's file system has no such thing."""
    if not run.local:
        yield False
        return
    Path(run.root).mkdir(parents=True, exist_ok=True)
    folder = os.open(run.root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            sure = True
        except OSError:  # some network file systems
            sure = False
        yield sure
    finally:
        os.close(folder)  # and with it the lock goes
