"""`selfguide plan`: an estimate of a run, and of how far off it was, as JSON or as tables."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from selfguide_ray.config import Config
from selfguide_ray.estimate import FIGURES, Told, against, estimate, observe
from selfguide_ray.run import Run

HEADS = {name: name.replace("_", " ") for name in (*FIGURES, "hours", "wall_hours", "money")}


def planning(config: Config, rate: str | None, price: float | None, other: str | None) -> dict[str, Any]:
    """The estimate by what the run `rate` tells; with `against` the figures of `other`, or of the config's run once begun."""
    told = estimate(config, Told() if rate is None else observe(Run(rate)), price) | {"rate": rate}
    held = other or (config.run if begun(Run(config.run)) else None)
    return told if held is None else told | {"against": {"run": held, "tables": against(told, Run(held))}}


def begun(run: Run) -> bool:
    """Whether a shard is made that an estimate can be held against."""
    return bool(run.shards("inputs"))


def tables(told: dict[str, Any]) -> list[Table]:
    """What `planning` tells, for a terminal."""
    found = [_planned(told)]
    if "against" in told:
        found.append(_compared(told["against"]))
    return found


def _planned(told: dict[str, Any]) -> Table:
    total, columns = told["total"], [*FIGURES]
    columns += [name for name in ("hours", "wall_hours", "money") if total[name] is not None]
    count = ", ".join(f"{n} {family}" for family, n in told["tasks"].items() if n)
    shares = f"{told['shares']['inputs']:.0%} of inputs and {told['shares']['pairs']:.0%} of pairs survive"
    origin = f"as in {told['rate']}" if told["rate"] else "a guess: --rate RUN tells more, and speeds"
    refused = f"; {told['refused']} files refused" if told["refused"] else ""
    table = Table(
        title=f"{count} tasks, prompts of {told['sampled']} rendered{refused}",
        title_justify="left",
        caption=escape(f"{shares} ({origin})"),
        caption_justify="left",
    )
    table.add_column("table")
    for name in columns:
        table.add_column(HEADS[name], justify="right")
    for row in told["tables"]:
        table.add_row(row["table"], *(_number(row[name]) for name in columns))
    if total["hours"] is not None:
        table.add_section()
        table.add_row("all", *("" if name in FIGURES else _number(total[name]) for name in columns))
    return table


def _compared(held: dict[str, Any]) -> Table:
    table = Table(title=escape(f"planned → actual in {held['run']}"), title_justify="left")
    table.add_column("table")
    table.add_column("done", justify="right")
    for name in FIGURES:
        table.add_column(HEADS[name], justify="right")
    for line in held["tables"]:
        cells = [_pair(line[name]) if name in line else "" for name in FIGURES]
        table.add_row(line["table"], f"{line['done']}/{line['of']}", *cells)
    return table


def _pair(figures: list[Any]) -> str:
    expected, actual, ratio = figures
    return f"{expected:,} → {actual:,}" + ("" if ratio is None else f" (×{ratio:.2f})")


def _number(value: float | None) -> str:
    if not value:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
