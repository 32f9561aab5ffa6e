"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import objects
import pytest

from selfguide_ray.schema import Example, Instance, Task

SHARED = Path(__file__).parents[2] / "shared" / "natural_instructions"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray come first: they take longest, and two processes share the tests file by file."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def natural_instructions() -> Path:
    """The folder with Natural Instructions; it is no part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs Natural Instructions in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def make_task() -> Callable[..., Task]:
    """Builds a task in memory: a generation task with three examples, unless told otherwise."""

    def make(name: str = "toy", **given: Any) -> Task:
        pairs = given.pop("examples", [("red apple", "apple"), ("blue sky", "sky"), ("green tree", "tree")])
        held_out = given.pop("instances", [("old house", "house"), ("new car", "car")])
        return Task(
            name=name,
            instruction=given.pop("instruction", "Name the thing."),
            examples=tuple(Example(*pair) for pair in pairs),
            instances=tuple(Instance(f"{name}-{i}", text, (right,)) for i, (text, right) in enumerate(held_out)),
            **given,
        )

    return make


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A local Ray cluster that lasts as long as the tests; jobs that they start find it through RAY_ADDRESS."""
    import ray

    os.environ |= objects.ENVIRONMENT  # its processes have this one's environment, as it is now
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address = ray.get_runtime_context().gcs_address
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address
    yield address
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS")
    if before is not None:
        os.environ["RAY_ADDRESS"] = before


@pytest.fixture(scope="session")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A process group of one, as Ray Train gives it to a worker; DeepSpeed cannot be given a second one."""
    import torch.distributed

    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
