"""report"""

from typing import Any

from rich.table import Table

from selfguide_ray.config import Config
from selfguide_ray.run import Run


def write_report(run: Run, config: Config) -> str:
    return ""


def headline(run: Run) -> Table:
    """Systems by tasks in each task's own metric, as a terminal table."""
    metric = {row["task"]: row["metric"] for row in run.read_all("tasks", ["task", "metric"]).to_pylist()}
    rows = [r for r in run.read_all("scores").to_pylist() if r["metric"] == metric[r["task"]]]
    systems = list(dict.fromkeys(r["system"] for r in rows))
    table = Table("task", "metric", *systems)
    for task in dict.fromkeys(r["task"] for r in rows):
        values: dict[str, Any] = {r["system"]: f"{r['value']:.1f}" for r in rows if r["task"] == task}
        table.add_row(task, metric[task], *(values[s] for s in systems))
    return table
