"""A search as a command, and its report."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
from rich.table import Table
from rich.text import Text

from selfguide_ray import progress
from selfguide_ray.config_file import read
from selfguide_ray.method import tell_left
from selfguide_ray.run import Run
from selfguide_ray.search import Search, points
from selfguide_ray.search.walk import Walk
from selfguide_ray.standings import TUNED
from selfguide_ray.stopping import Work
from selfguide_ray.storage import shown

REPORT, TOLD = "search.html", "search.json"


def search(arguments: Sequence[str]) -> int:
    """CONFIG [key=value …]: go through the search that the file describes; returns the exit code."""
    settings = read(Search, arguments[0], arguments[1:])
    run = Run(settings.run)
    with Work(points(settings)[0].config.cluster.drain_seconds) as work:
        work.hold(run)
        walk = Walk(settings, work)
        told = walk.go()
        run.put(TOLD, json.dumps(told, indent=1).encode() + b"\n")
        run.put(REPORT, page(told).encode())
    progress.out.print(table(told))
    progress.out.print(f"report: {progress.plain(shown(settings.run, REPORT))}", soft_wrap=True, markup=False)
    left = walk.sharing.left()
    tell_left(left)
    return 1 if left else 0


def table(told: dict[str, Any]) -> Table:
    """The points, the best first."""
    made = Table("point", "scored", f"gain over {told['rival']}", "worst task", "", title="on validation instances")
    for row in ranked(told):
        made.add_row(
            Text(progress.plain(row["label"])),
            str(row["scored"]),
            _points(row["gain"]),
            _points(row["worst"]),
            fate(row),
        )
    return made


def ranked(told: dict[str, Any]) -> list[dict[str, Any]]:
    """The points, by their mean gain; those that were stopped come last."""
    return sorted(told["points"], key=lambda row: (row["stopped"] is not None, -(row["gain"] or 0.0)))


def fate(row: dict[str, Any]) -> str:
    """What became of a point."""
    if row["stopped"]:
        return f"stopped after {row['stopped']['shards']} shards, {-row['stopped']['upper']:.1f} points behind at least"
    return f"chosen for {len(row['chosen_for'])} tasks" if row["chosen_for"] else ""


def page(told: dict[str, Any]) -> str:
    """The report as HTML; all text is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    templates.filters["points"] = _points
    labels = {row["name"]: row["label"] for row in told["points"]}
    systems = [*told["baselines"], TUNED]
    families = []
    for name, kind in (("classification", True), ("generation", False)):
        tasks = [
            task for task, about in told["tasks"].items() if bool(about["labels"]) == kind and told["judged"][task]
        ]
        rows = [(task, labels.get(told["chosen"].get(task, ""), "none"), told["judged"][task]) for task in tasks]
        means = {
            system: fmean(scores[system] for _, _, scores in rows)
            for system in systems
            if rows and all(system in scores for _, _, scores in rows)
        }
        families.append({"name": name, "rows": rows, "means": means})
    return templates.get_template("report.html.j2").render(
        told=told, points=[row | {"fate": fate(row)} for row in ranked(told)], systems=systems, families=families
    )


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"
