"""How far a run is, read from its folders alone: any process, anywhere, at any time."""

from typing import Any

from selfguide_ray.config import LEARNERS
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import failures
from selfguide_ray.run import PLAN, READS, SETTINGS, Run
from selfguide_ray.storage import shown

FIGURES = ("rows", "kept", "seconds", "generated_tokens")


def progress_of(run: Run) -> dict[str, Any]:
    """{tables: {name: {done, of, rows, kept, seconds, generated_tokens}}, left_behind: [text]}; models count in tasks.

    Raises SelfGuideError if there is no run.
    """
    shards = run.shards("tasks")
    if not shards:
        raise SelfGuideError(
            f"{shown(run.uri)} holds no run.",
            "A run has a folder `tasks` with at least one shard.",
            "Check the path, or start one with selfguide run CONFIG run=DIR.",
        )
    tables: dict[str, dict[str, Any]] = {}
    for table in READS:
        if table == "models":
            tables[table] = _models(run, shards)
            continue
        receipts = [run.receipt(table, shard) for shard in run.shards(table)]
        sums = {figure: sum(receipt.get(figure, 0) for receipt in receipts) for figure in FIGURES}
        tables[table] = {"done": len(receipts), "of": len(shards), **sums}
    return {"tables": tables, "left_behind": left_behind(run)}


def left_behind(run: Run) -> list[str]:
    """What the run could not do: refused task files, and failures that stand."""
    refused = (run.get_json(PLAN, dict) or {}).get("refused", [])
    return [r["what"] for r in refused] + [f"{table}/{unit}: {line}" for table, unit, line in failures(run)]


def _models(run: Run, shards: list[str]) -> dict[str, Any]:
    told = [run.get_json(f"models/{model}/model.json", dict) for model in run.trained()]
    systems = (run.get_json(f"predictions/{SETTINGS}", dict) or {"predictions": {"systems": []}})["predictions"][
        "systems"
    ]
    each = max(1, len([system for system in systems if system in LEARNERS]))  # models of a task
    return {
        "done": len(told),
        "of": each * sum(run.receipt("tasks", shard)["kept"] for shard in shards),
        "rows": sum(model["pairs"] for model in told),
        "kept": sum(model["pairs"] for model in told if model["trained"]),
        "seconds": sum(model.get("seconds", 0.0) for model in told),
        "generated_tokens": 0,
    }
