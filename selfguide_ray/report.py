"""report.html, one file that opens anywhere and tells what a run did, chapter by chapter; and its headline in a terminal.

Every figure is counted from the tables again, so a run that is half done has half a report. Drawing is the template's.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group
from rich.table import Table
from rich.text import Text

from selfguide_ray import charts, significance
from selfguide_ray.config import Config
from selfguide_ray.failures import failures
from selfguide_ray.metrics import METRICS
from selfguide_ray.redaction import redacted, redacted_values
from selfguide_ray.run import PLAN, READS, Run
from selfguide_ray.schema import TABLES, TASK_COLUMNS, Task, tasks_of
from selfguide_ray.sections import PerFamily
from selfguide_ray.standings import FAMILIES, FLOORS, PROMPTED, TUNED, Board, best_of, score_table, standings
from selfguide_ray.storage import shown
from selfguide_ray.suspects import suspicions

METRIC_NAMES = {
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "macro_f1": "macro-F1",
    "reference_match": "the reference's exact match",
    "character_rouge": "ROUGE-L of characters",
}
SHORT_NAMES = METRIC_NAMES | {
    "exact_match": "EM",
    "macro_f1": "F1",
    "reference_match": "ref. EM",
    "character_rouge": "char. ROUGE-L",
}

HEADLINE_TASKS = 30
SAMPLED_TASKS, SAMPLED_PAIRS, SAMPLED_DROPS, SAMPLED_PREDICTIONS = 40, 5, 3, 5
READERS = 16  # small files of an object store read at a time

Plan = dict[str, list[Task]]
Reasons = Counter[str | None]

T = TypeVar("T")
R = TypeVar("R")


def write_report(run: Run, config: Config) -> str:
    """Write `report.html` into the run; returns where it lies."""
    plan = read_plan(run)
    tasks = [task for several in plan.values() for task in several]
    board, models = Board.read(run, tasks), read_models(run, tasks)
    page = _templates().get_template("report.html.j2")
    text = page.render(
        name=run.root.rsplit("/", 1)[-1],
        uri=redacted(shown(run.uri)),
        written=time.strftime("%d %B %Y, %H:%M %Z"),
        config=config,
        tasks=tasks,
        tables=census(run, models),
        families=[standings(board, family) for family in FAMILIES if board.family(family)],
        board=score_table(board),
        gains=significance.told(board),
        suspicions=suspicions(board),
        funnel=funnel(run, plan) | {"lacking": lacking(run, plan, config.inputs.least)},
        models=models,
        samples=samples(run, plan),
        settings=settings(config),
        costs=costs(run, models),
        failures=failures(run),
        refused=(run.get_json(PLAN, dict) or {}).get("refused", []),
    )
    run.put("report.html", text.encode())
    return shown(run.uri, "report.html")


def headline(run: Run) -> Group:
    """Tasks by systems in each task's own metric, then the mean of each family; only the means if tasks are many.

    Below it a line for each family tells what SELF-GUIDE gains, and how much of that is more than chance.
    """
    board = Board.read(run, [task for several in read_plan(run).values() for task in several])
    table = Table(caption=None if board.systems else "no scores yet", caption_justify="left")
    table.add_column("task", overflow="ellipsis")
    table.add_column("metric", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for system in board.systems:
        table.add_column(system, justify="right", no_wrap=True, style="dim" if system in FLOORS else "")
    scored = [task for task in board.tasks if board.n(task) is not None]
    for task in scored if len(scored) <= HEADLINE_TASKS else ():
        metric = board.main(task)
        values = [board.value(task, metric, system) for system in board.systems]
        table.add_row(Text(task.name), SHORT_NAMES[metric], str(board.n(task)), *_bold_best(values))
    table.add_section()
    for family in FAMILIES:
        values = [board.mean(family, system) for system in board.systems]
        if any(value is not None for value in values):
            count = max(len(board.values(family, system)) for system in board.systems)
            table.add_row(f"mean of {count} {family}", SHORT_NAMES[board.metric(family)], "", *_bold_best(values))
    families = significance.by_family(significance.gains(board))
    return Group(table, *(Text(significance.line(family)) for family in families))


def _bold_best(values: Sequence[float | None]) -> list[Text]:
    best = best_of(values)
    return [
        Text("-" if v is None else f"{v:.1f}", "bold not dim" if v is not None and v == best else "") for v in values
    ]


# --- inputs, outputs, trainset: the funnel ----------------------------------------------------------------------------


def funnel(run: Run, plan: Plan) -> dict[str, Any]:
    """From invented inputs to training pairs: the drops of the whole run by reason, and the numbers of each task."""
    inputs, pairs, verdicts = drops(run, plan, "inputs"), drops(run, plan, "trainset"), candidates(run)
    elected, learned = elections(run, plan)
    totals = {
        "inputs": ("accepted", sum(inputs.values(), Counter())),
        "candidates": ("voted", verdicts),
        "trainset": ("training pairs", sum(pairs.values(), Counter())),
    }
    reasons = dict.fromkeys(reason for _, total in totals.values() for reason, _ in total.most_common())
    order = [reason for reason in reasons if reason is not None]
    lines = []
    for task in (task for tasks in plan.values() for task in tasks):
        mine, made = (table.get(task.name) for table in (inputs, pairs))
        unlearned = [label for label in task.labels if (task.name, label) not in learned]
        lines.append(_funnel_line(task.name, mine, elected[task.name], made) | {"unlearned": unlearned})
    return {
        "bars": [(table, total.total(), parts(total, kept, order)) for table, (kept, total) in totals.items()],
        "generated": totals["inputs"][1].total(),
        "accepted": totals["inputs"][1][None],
        "elected": elected.total(),
        "pairs": totals["trainset"][1][None],
        "tasks": lines,
        "starved": [line["task"] for line in lines if line["pairs"] == 0],
    }


def lacking(run: Run, plan: Plan, least: PerFamily[int]) -> list[tuple[str, str]]:
    """The tasks with fewer surviving inputs than `inputs.least` wants, and what each has: of the labels that lack, or at all."""
    found = []
    for shard in run.shards("inputs") if max(least.classification, least.generation) > 0 else ():
        rows = _rows(run, "inputs", shard, ["task", "label", "drop_reason"])
        alive = dict(tally(rows.filter(pc.is_null(rows["drop_reason"])).select(["task", "label"])))
        for task in plan.get(shard, ()):
            counts = {label: alive.get((task.name, label), 0) for label in task.labels or (None,)}
            few = [f"{label} {n}" if label else str(n) for label, n in counts.items() if n < least.of(task.labels)]
            if few:
                found.append((task.name, ", ".join(few)))
    return found


def drops(run: Run, plan: Plan, table: str) -> dict[str, Reasons]:
    """Each task's rows of a table by drop reason, None for those alive; a task whose shard is due has no entry."""
    # One whose shard was made has an entry even without a row: it starved.
    found: dict[str, Reasons] = {task.name: Counter() for shard in run.shards(table) for task in plan.get(shard, ())}
    for shard in run.shards(table):
        for (task, reason), count in tally(_rows(run, table, shard, ["task", "drop_reason"])):
            found.setdefault(task, Counter())[reason] += count
    return found


def elections(run: Run, plan: Plan) -> tuple[Counter[str], set[tuple[str, str]]]:
    """How many answers were elected in each task, and the (task, label) that the training pairs teach."""
    elected, learned = Counter(), set()
    for shard in run.shards("trainset"):
        rows = _rows(run, "trainset", shard, ["task", "output", "drop_reason"])
        elected.update(rows.filter(pc.is_valid(rows["output"]))["task"].to_pylist())
        labelled = pa.array([task.name for task in plan.get(shard, ()) if task.labels], pa.string())
        alive = rows.filter(pc.and_(pc.is_null(rows["drop_reason"]), pc.is_in(rows["task"], labelled)))
        learned |= {key for key, _ in tally(alive.select(["task", "output"]))}
    return elected, learned


def candidates(run: Run) -> Reasons:
    """What became of all sampled answers; None are those that voted."""
    found: Reasons = Counter()
    for shard in run.shards("trainset"):
        verdicts = pc.list_flatten(run.read("trainset", shard, ["verdicts"])["verdicts"])
        found.update({verdict: count for (verdict,), count in tally(pa.table({"verdict": verdicts}))})
    return found


def tally(rows: pa.Table) -> list[tuple[tuple[Any, ...], int]]:
    """The distinct rows in the order of their first, each with its count."""
    counted = rows.group_by(rows.column_names, use_threads=False).aggregate([([], "count_all")])
    keys = zip(*(counted[name].to_pylist() for name in rows.column_names), strict=True)
    return list(zip(keys, counted["count_all"].to_pylist(), strict=True))


def _funnel_line(task: str, inputs: Reasons | None, elected: int, pairs: Reasons | None) -> dict[str, Any]:
    lost = Counter({reason: n for reason, n in ((inputs or Counter()) + (pairs or Counter())).items() if reason})
    generated = None if inputs is None else inputs.total()
    kept = None if pairs is None else pairs[None]
    return {
        "task": task,
        "generated": generated,
        "accepted": None if inputs is None else inputs[None],
        "elected": None if pairs is None else elected,
        "pairs": kept,
        "yield": 100 * kept / generated if generated and kept is not None else None,
        "lost": lost.most_common(1),
    }


def parts(counts: Reasons, kept: str, order: list[str]) -> list[dict[str, Any]]:
    """What was kept, then the drops, the commonest first; `place` is a reason's place among all reasons of the run."""
    ranked = sorted(counts.items(), key=lambda item: (item[0] is not None, -item[1]))
    return [
        {
            "name": kept if reason is None else reason,
            "place": None if reason is None else order.index(reason),
            "count": count,
            "share": 100 * count / counts.total(),
        }
        for reason, count in ranked
    ]


# --- models, samples, how it was made ---------------------------------------------------------------------------------


def read_plan(run: Run) -> Plan:
    """The tasks of each shard, without their held-out instances."""
    return {shard: tasks_of(run.read("tasks", shard, TASK_COLUMNS)) for shard in run.shards("tasks")}


def read_models(run: Run, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """What `model.json` tells of each task that has one, in the order of the tasks."""
    there = set(run.names("models"))
    told = _together(
        lambda name: run.get_json(f"models/{name}/model.json", dict),
        [task.name for task in tasks if task.name in there],
    )
    return [model for model in told if model]


def census(run: Run, models: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of each of the seven tables, and how much of it is made: models by task, the others by shard."""
    due = len(run.shards("tasks"))
    rows = {table: run.read_all(table, ["task"]).num_rows for table in TABLES}
    found = {
        table: {"rows": rows[table], "made": len(run.shards(table)), "due": due, "unit": "shards"} for table in TABLES
    }
    found["models"] = {"rows": len(models), "made": len(models), "due": rows["tasks"], "unit": "tasks"}
    return {table: found[table] for table in READS}


def samples(run: Run, plan: Plan) -> list[dict[str, Any]]:
    """What was written for some tasks, evenly chosen: pairs, dropped rows, and predictions side by side."""
    chosen = {task.name for task in spread([task for tasks in plan.values() for task in tasks], SAMPLED_TASKS)}
    found = []
    for shard, tasks in plan.items():
        mine = [task for task in tasks if task.name in chosen]
        if mine:
            verdict = ["input", "drop_reason", "measured", "bound", "neighbour"]
            inputs = _rows(run, "inputs", shard, ["task", *verdict])
            pairs = _rows(run, "trainset", shard, ["task", "output", "votes", "voters", *verdict])
            answers = _rows(run, "predictions", shard, ["task", "id", "system", "input", "references", "prediction"])
            found += [sample(task, *(_of(task, rows) for rows in (inputs, pairs, answers))) for task in mine]
    return found


def sample(task: Task, inputs: list[dict], pairs: list[dict], answers: list[dict]) -> dict[str, Any]:
    """One task's rows of the chapter: evenly spaced, so the same run always shows the same ones."""
    dropped = [row | {"table": "inputs"} for row in inputs if row["drop_reason"] is not None]
    dropped += [row | {"table": "trainset"} for row in pairs if row["drop_reason"] is not None]
    there = {row["system"] for row in answers}
    systems = [name for name in (*PROMPTED, TUNED) if name in there][-2:]
    return {
        "task": task,
        "pairs": spread([row for row in pairs if row["drop_reason"] is None], SAMPLED_PAIRS),
        # In order of their reasons, so that evenly spaced rows show the commoner reasons more often.
        "dropped": spread(sorted(dropped, key=lambda row: (row["table"], row["drop_reason"])), SAMPLED_DROPS),
        "systems": systems,
        "predictions": _side_by_side(task, systems, answers),
    }


def _side_by_side(task: Task, systems: list[str], answers: list[dict]) -> list[dict[str, Any]]:
    by_id: dict[str, dict[str, dict[str, Any]]] = {}
    for row in answers:
        by_id.setdefault(row["id"], {})[row["system"]] = row
    found = []
    for rows in spread(list(by_id.values()), SAMPLED_PREDICTIONS):
        several = [rows.get(system) for system in systems]
        scored = [
            row and row | {"score": 100 * METRICS[task.metric](row["prediction"], row["references"])} for row in several
        ]
        found.append({"instance": next(iter(rows.values())), "answers": scored})
    return found


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spaced from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _rows(run: Run, table: str, shard: str, columns: list[str]) -> pa.Table:
    """Some columns of a shard, no row if it is not there; of `trainset` what selfguide learns."""
    if not run.exists(f"{table}/{shard}.parquet"):
        return TABLES[table].empty_table().select(columns)
    if table != "trainset":
        return run.read(table, shard, columns)
    rows = run.read(table, shard, [*columns, "system"])
    return rows.filter(pc.equal(rows["system"], TUNED)).select(columns)


def _of(task: Task, rows: pa.Table) -> list[dict[str, Any]]:
    return rows.filter(pc.equal(rows["task"], task.name)).to_pylist()


def settings(config: Config) -> dict[str, list[tuple[str, str, bool]]]:
    """(name, value, whether it differs from the default) of every setting, by section."""
    usual, found = Config().model_dump(mode="json"), {"run": []}
    for name, given in redacted_values(config.model_dump(mode="json")).items():
        section, values, defaults = (
            (name, given, usual[name]) if isinstance(given, dict) else ("run", {name: given}, usual)
        )
        found.setdefault(section, []).extend((k, _spelled(v), v != defaults[k]) for k, v in values.items())
    return found


def _spelled(value: Any) -> str:
    if isinstance(value, dict) and set(value) == set(FAMILIES):
        return " / ".join(dict.fromkeys(_spelled(value[family]) for family in FAMILIES))
    if isinstance(value, list):
        return " · ".join(map(_spelled, value)) or "none"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


SUMMED = ("seconds", "prompt_tokens", "cached_tokens", "generated_tokens")


def costs(run: Run, models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds and tokens of each table, summed over the receipts of its shards; the models tell theirs."""
    found = []
    for table in list(READS)[1:]:
        receipts = _together(functools.partial(run.receipt, table), run.shards(table)) if table in TABLES else models
        if receipts:
            sums = {key: sum(r.get(key) or 0 for r in receipts) for key in SUMMED}
            sums |= {key: _mean_rate(receipts, key) for key in ("occupancy", "share_of_ceiling")}
            engines = sorted({r["engine"] for r in receipts if r.get("engine")})
            nodes = {r["node"] for r in receipts if r.get("node")}
            found.append({"table": table, "units": len(receipts), "engines": engines, "nodes": len(nodes)} | sums)
    return found


def _mean_rate(receipts: Sequence[dict[str, Any]], key: str) -> float | None:
    """The mean of an engine's rate over the receipts that tell it, by the seconds of each."""
    told = [(r["engine_rates"][key], r["seconds"]) for r in receipts if (r.get("engine_rates") or {}).get(key)]
    seconds = sum(s for _, s in told)
    return sum(rate * s for rate, s in told) / seconds if seconds else None


def _together(read: Callable[[str], R], names: Sequence[str]) -> list[R]:
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, names))


def _templates() -> jinja2.Environment:
    """Everything is escaped, since all text is data (design, invariant 7)."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts.register(templates)
    templates.globals |= {"metric_names": METRIC_NAMES, "sampled_tasks": SAMPLED_TASKS, "tuned": TUNED}
    return templates
