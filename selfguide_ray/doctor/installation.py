"""Checks of what a run is run by: Python, packages, processors, and the way to a Ray cluster."""

import os
import platform
import socket
from collections.abc import Iterator
from importlib.metadata import PackageMetadata, PackageNotFoundError, metadata, requires, version
from urllib.parse import urlsplit

from selfguide_ray.doctor import Finding, Patient
from selfguide_ray.submit import AUTH_MODE, token_place

NAMED = ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "vllm")
SECONDS = 3.0  # to wait for an address to answer
PORT = 6379  # of a cluster's head, where an address names none
REINSTALL = "Install the package again, pip install -e . in its folder, into an environment of its own."


def python(patient: Patient) -> Iterator[Finding]:
    """Python's version against `requires-python`."""
    from packaging.specifiers import SpecifierSet

    own = _own()
    if own is None:
        yield Finding("warning", "selfguide_ray is not installed, so what it requires is not known.", REINSTALL)
        return
    wanted, here = own["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(here, prereleases=True):
        yield Finding("ok", f"Python {here} (wanted: {wanted}).")
    else:
        yield Finding("wrong", f"Python {here}, and {wanted} is wanted.", "Make an environment with another Python.")


def packages(patient: Patient) -> Iterator[Finding]:
    """Versions of the packages against what ours requires, and with vLLM the torch that it requires."""
    if _own() is None:
        return
    extra = "vllm" if patient.config.student.engine == "vllm" else ""
    unfit = [*_unfit("selfguide_ray", extra)]
    if extra:
        unfit += [(line, name) for line, name in _unfit("vllm", "") if name == "torch"]
    for line, _ in unfit:
        yield Finding("wrong", line, REINSTALL if not extra else "pip install 'selfguide_ray[vllm]' ties all of them.")
    if not unfit:
        found = [f"{name} {_version(name)}" for name in NAMED if _version(name) is not None]
        yield Finding("ok", f"{', '.join(found)}; all that is required is there.")


def _unfit(package: str, extra: str) -> Iterator[tuple[str, str]]:
    """(what is told, name) of each requirement of a package that is not met."""
    from packaging.requirements import Requirement

    if _version(package) is None:
        return
    for text in requires(package) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        here = _version(wanted.name)
        if here is None:
            yield f"{wanted.name} is not installed; {package} wants {wanted.specifier or 'any'}.", wanted.name
        elif not wanted.specifier.contains(here, prereleases=True):
            yield f"{wanted.name} {here}; {package} wants {wanted.specifier}.", wanted.name


def _own() -> PackageMetadata | None:
    try:
        return metadata("selfguide_ray")
    except PackageNotFoundError:
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processors(patient: Patient) -> Iterator[Finding]:
    """CPUs and GPUs of this machine against what `cluster` asks for; without a cluster, what is lacking never comes."""
    import torch

    cluster, alone = patient.config.cluster, not os.environ.get("RAY_ADDRESS")
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(gpus)})
    memory = sum(torch.cuda.get_device_properties(i).total_memory for i in range(gpus)) / (1 << 30)
    yield Finding(
        "ok", f"{cpus} CPUs, {gpus or 'no'} GPUs" + (f" ({', '.join(names)}; {memory:.0f} GiB)." if gpus else ".")
    )
    workers = cluster.workers if isinstance(cluster.workers, int) else cluster.workers[0]
    least = {  # what one unit takes at once, and all of them
        "engine": (cluster.engines, cluster.cpus_per_engine, cluster.gpus_per_engine, 1),
        "worker": (cluster.groups * workers, cluster.cpus_per_worker, cluster.gpus_per_worker, workers),
    }
    for name, (count, cpu, gpu, together) in least.items() if alone else ():
        for kind, each, there in (("cpus", cpu, cpus), ("gpus", gpu, gpus)):
            setting = f"cluster.{kind}_per_{name}={each:g}"
            if each * together > there:
                yield Finding(
                    "wrong",
                    f"{setting}: {each * together:g} are wanted at once, and this machine has {there}.",
                    "The run would wait for ever: ask for less, or set RAY_ADDRESS to a cluster.",
                )
            elif each * count > there:
                yield Finding(
                    "warning",
                    f"{setting}: {count} {name}s want {each * count:g}, and this machine has {there}.",
                    "Some would wait for others: ask for fewer, or set RAY_ADDRESS to a cluster.",
                )
    if alone and gpus and not cluster.gpus_per_engine:
        yield Finding(
            "warning", "cluster.gpus_per_engine=0: the GPU here stays idle.", "Set it to 1, and gpus_per_worker."
        )


def threads(patient: Patient) -> Iterator[Finding]:
    """OMP_NUM_THREADS: workers get a number of their own, this process what is set here."""
    value, cpus = os.environ.get("OMP_NUM_THREADS"), os.cpu_count() or 1
    if value is None:
        yield Finding("ok", "OMP_NUM_THREADS is not set; engines and workers get their CPUs as threads.")
    elif not value.isdigit() or int(value) < 1:
        yield Finding("warning", f"OMP_NUM_THREADS={value} is no number of threads.", "Set it to 1, or unset it.")
    elif int(value) > cpus:
        advice = "Set it to 1: threads that wait for a CPU cost more than they bring."
        yield Finding("warning", f"OMP_NUM_THREADS={value}, and there are {cpus} CPUs.", advice)
    else:
        yield Finding("ok", f"OMP_NUM_THREADS={value} here; engines and workers get their CPUs as threads.")


def ray(patient: Patient) -> Iterator[Finding]:
    """RAY_ADDRESS: something answers there, or a local cluster will be started."""
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        yield Finding(
            "ok",
            "RAY_ADDRESS names no cluster: the run takes one that runs on this machine, or starts one that ends with it.",
        )
        return
    if address == "auto":
        yield Finding("ok", "RAY_ADDRESS=auto: the run takes the cluster that runs on this machine.")
        return
    there = urlsplit(address if "://" in address else f"//{address}")
    default = {"http": 80, "https": 443, "ray": 10001}.get(there.scheme, PORT)
    try:
        socket.create_connection((there.hostname or "", there.port or default), SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: a port that is no number
        yield Finding(
            "wrong",
            f"RAY_ADDRESS={address} does not answer: {error}.",
            "Start the cluster, open the way to it, or unset RAY_ADDRESS for one on this machine.",
        )
        return
    yield Finding("ok", f"RAY_ADDRESS={address} answers.")
    if there.scheme in ("http", "https"):
        yield Finding(
            "warning",
            "RAY_ADDRESS is a dashboard's: it takes jobs, and selfguide run cannot connect to it.",
            "Use selfguide submit, or set it to the head's own address, HEAD:6379.",
        )


def token(patient: Patient) -> Iterator[Finding]:
    """RAY_AUTH_MODE against the token that is there; a local `ray.init` makes one, and clusters started later want it.

    Ray (2.60) shows it by itself to a cluster that it finds on this machine, and to none whose address it is given.
    """
    mode, place = os.environ.get(AUTH_MODE), token_place()
    elsewhere = os.environ.get("RAY_ADDRESS") not in (None, "", "local")
    if mode is None and place and elsewhere and os.environ["RAY_ADDRESS"] != "auto":
        yield Finding(
            "warning",
            f"{AUTH_MODE} is not set, so {place} is not shown to the cluster at RAY_ADDRESS.",
            f"If that was started where a token lay, it refuses: export {AUTH_MODE}=token.",
        )
    elif mode is None:
        yield Finding("ok", f"{AUTH_MODE} is not set; {f'a token is in {place}' if place else 'no token is there'}.")
    elif mode.lower() == "token" and place is None and elsewhere:
        yield Finding(
            "wrong", f"{AUTH_MODE}={mode}, and no token is there.", "Copy the cluster's token to ~/.ray/auth_token."
        )
    elif mode.lower() == "disabled" and place and elsewhere:
        yield Finding(
            "warning",
            f"{AUTH_MODE}={mode}, though {place} holds a token.",
            f"If the cluster refuses: ray start turned tokens on there. Unset {AUTH_MODE}, or set it to token.",
        )
    elif mode.lower() not in ("token", "disabled"):
        yield Finding("warning", f"{AUTH_MODE}={mode} is neither token nor disabled.", "Set it to one of these.")
    else:
        yield Finding("ok", f"{AUTH_MODE}={mode}" + (f"; {place} holds a token." if place else "."))
