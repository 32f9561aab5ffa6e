"""The one place that catches whatever goes wrong in a unit of work, notes it, and lets the others go on."""

import contextlib
import traceback
from collections.abc import Iterator

from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import redacted
from selfguide_ray.run import Run


class Caught:
    """What a block of `caught` ended with."""

    error: Exception | None = None


@contextlib.contextmanager
def caught() -> Iterator[Caught]:
    """Run the block, and tell of what exception it ended."""
    box = Caught()
    try:
        yield box
    except Exception as error:
        box.error = error


@contextlib.contextmanager
def noted(run: Run, table: str, unit: str) -> Iterator[None]:
    """Run the block; an exception ends in `failures/<table>/<unit>.txt`, its first line saying what happened."""
    with caught() as ended:
        yield
    if ended.error is not None:
        note(run, table, unit, ended.error)


def note(run: Run, table: str, unit: str, error: Exception) -> None:
    """Write down what a unit of work failed of; where that cannot be, it is raised: the job has to end."""
    first = str(error) if isinstance(error, SelfGuideError) else f"{type(error).__name__}: {error}"
    told = "".join(traceback.format_exception(error))
    try:
        run.put(f"failures/{table}/{unit}.txt", redacted(f"{first}\n\n{told}").encode(errors="replace"))
    except OSError as unwritable:
        raise unwritable from error


def clear(run: Run, table: str, unit: str) -> None:
    """Forget an earlier failure before the unit is tried again."""
    run.remove(f"failures/{table}/{unit}.txt")


def settle(run: Run) -> None:
    """Forget the failures of what is there and whole all the same: a store may do what it says that it could not."""
    for table, unit, _ in failures(run):
        with caught():
            if table != "models":
                run.read(table, unit)  # raises if it is damaged, or not there
            elif not run.exists(f"models/{unit}/model.json"):
                continue
            clear(run, table, unit)


def failures(run: Run) -> list[tuple[str, str, str]]:
    """(table, unit, first line) of everything that failed and has not succeeded since."""
    found = []
    for table in run.names("failures"):
        for name in run.names(f"failures/{table}"):
            text = (run.get(f"failures/{table}/{name}") or b"").decode(errors="replace")
            found.append((table, name.removesuffix(".txt"), text.split("\n", 1)[0]))
    return found
