"""What a run says while it works, on standard error: bars with rates and time left in a terminal, else JSON lines.

Results go to standard output (`out`), so that they can be piped while the progress is watched.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from selfguide_ray.redaction import redacted
from selfguide_ray.visible import visible

console = Console(stderr=True)
out = Console(width=None if sys.stdout.isatty() else 140)


def event(name: str, **fields: Any) -> None:
    """One JSON line where there is no terminal: a submitted job has none, and its log is read by machines."""
    if not console.is_terminal:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": name, **fields}
        sys.stderr.write(redacted(json.dumps(line, ensure_ascii=False)) + "\n")
        sys.stderr.flush()


def say(text: str, lead: str = "", style: str = "bold") -> None:
    """A line for people, in a terminal only; `lead` comes first, in the style. Nothing in either is markup."""
    if console.is_terminal:
        console.print(Text.assemble((plain(lead), style), plain(text)), highlight=False)


def plain(text: str) -> str:
    """Text that may be shown: without secrets, and without what steers a terminal."""
    return visible(redacted(text))


def follow(
    receipts: Iterable[dict[str, Any]], totals: dict[str, int], done: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Pass receipts on and show them: a bar for each table of `totals`, `done` of which were there before."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:<34}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    started = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        places = {
            table: bars.add_task(table, total=n, completed=done.get(table, 0), rate="") for table, n in totals.items()
        }
        rows: dict[str, int] = dict.fromkeys(totals, 0)
        tokens: dict[str, int] = dict.fromkeys(totals, 0)
        for receipt in receipts:
            table = receipt["table"]
            event("failed" if receipt.get("failed") else "done", **{k: v for k, v in receipt.items() if k != "failed"})
            rows[table] += receipt.get("rows", 0)
            tokens[table] += receipt.get("generated_tokens", 0)
            seconds = max(1e-9, time.monotonic() - started)
            rate = f"{rows[table] / seconds:,.1f} rows/s"
            rate += f", {tokens[table] / seconds:,.0f} tokens/s" if tokens[table] else ""
            bars.update(places[table], advance=0 if receipt.get("failed") else 1, rate=rate)
            yield receipt
