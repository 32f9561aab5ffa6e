"""What the package brings along: the small student `embedded/nano` and the example tasks `embedded/tasks`."""

from pathlib import Path

PREFIX = "embedded/"


def resolve(name: str) -> Path:
    """A path as the user wrote it, or the place in the package that embedded/... stands for."""
    if name.startswith(PREFIX):
        return Path(__file__).parent / name.removeprefix(PREFIX)
    return Path(name).expanduser()
