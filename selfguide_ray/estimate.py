"""What a run will take, told before it starts: rows, tokens, hours and money of each table; and after it, how far off.

Numbers of tasks, prompts and instances are counted, tokens are those of real prompts of some tasks under the student's
own tokenizer. Two shares are guesses unless a run tells them: how many inputs survive, and how many pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from selfguide_ray import reference, report, tasks
from selfguide_ray.baselines import CHOICES, FLOORS, shown
from selfguide_ray.config import Config, Student
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run, model_of
from selfguide_ray.schema import Example, Task, Tokenizer, evaluated
from selfguide_ray.status import progress_of
from selfguide_ray.student import StudentTokenizer, context_of

SURVIVE = 2 / 3  # share of the inputs, and of the pairs, that survive, unless a run tells
SAMPLED_TASKS = 8  # of a family, whose prompts are rendered
SAMPLED_INSTANCES = 3  # of each
SPOKEN = ("inputs", "outputs", "predictions")  # tables that an engine makes
FIGURES = ("rows", "kept", "prompt_tokens", "generated_tokens", "trained_tokens")


@dataclass(frozen=True)
class Told:
    """What a run tells of others: shares that survive, and speeds; None where it has not come so far.

    `generated` are tokens per engine-second of each table, `trained` tokens per second of a training group.
    """

    inputs: float | None = None
    pairs: float | None = None
    generated: dict[str, float] | None = None
    trained: float | None = None


def reader(student: Student) -> tuple[Tokenizer, int]:
    """The student's tokenizer, and the tokens of its context, without its weights."""
    if student.engine == "scripted":
        from selfguide_ray.engine.scripted import ScriptedEngine

        engine = ScriptedEngine(student)
        return engine.tokenizer, engine.context
    return StudentTokenizer(student), context_of(student)


# --- before the run ---------------------------------------------------------------------------------------------------


def estimate(config: Config, told: Told, price: float | None = None) -> dict[str, Any]:
    """{tasks, sampled, refused, shares, tables: [figures, hours, wall_hours, money], total}.

    hours are those of engines, or of training workers; wall_hours share them among what `cluster` has. Rounds that may
    follow to reach inputs.least are not counted. Times are None without speeds, money without a price.
    """
    refusals: list[tasks.Refusal] = []
    families: dict[str, list[tuple[Task, int]]] = {"classification": [], "generation": []}
    for task in tasks.selected(config, refusals):
        judged = evaluated([task], config.predictions.instances)[0]
        few = replace(judged, instances=judged.instances[:SAMPLED_INSTANCES], validation=())
        families["classification" if task.labels else "generation"].append((few, len(judged.instances)))
    if not any(families.values()):
        raise SelfGuideError(
            f"tasks.select: {config.tasks.select} leaves no task that can be read in {config.tasks.source}.",
            f"{len(refusals)} files were refused{f', the first: {refusals[0].what}' if refusals else ''}.",
            "selfguide doctor CONFIG tells more.",
        )
    tokenizer, context = reader(config.student)
    work = Work(config, tokenizer, context, told)
    tables = {table: dict.fromkeys(FIGURES, 0.0) for table in (*SPOKEN[:2], "trainset", "models", SPOKEN[2])}
    sampled = 0
    for members in families.values():
        some = report.spread(members, SAMPLED_TASKS)
        sampled += len(some)
        instances = sum(count for _, count in members)
        for task, _ in some:
            # Each stands for its share of the family, and of the family's held-out instances.
            for table, figures in work.of(task, instances / len(members)).items():
                for name, figure in figures.items():
                    tables[table][name] += figure * len(members) / len(some)
    rows = [{"table": table} | {name: round(value) for name, value in row.items()} for table, row in tables.items()]
    rows = [row | cost(row, config, told, price) for row in rows]
    known = [row for row in rows if row["hours"] is not None]
    return {
        "tasks": {family: len(members) for family, members in families.items()},
        "sampled": sampled,
        "refused": len(refusals),
        "shares": {"inputs": told.inputs or SURVIVE, "pairs": told.pairs or SURVIVE},
        "tables": rows,
        "total": {
            name: sum(row[name] for row in known) if known and known[0][name] is not None else None
            for name in ("hours", "wall_hours", "money")
        },
    }


class Work:
    """What tasks ask of the student: rows and tokens, under one config."""

    def __init__(self, config: Config, tokenizer: Tokenizer, context: int, told: Told) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.inputs_survive, self.pairs_survive = told.inputs or SURVIVE, told.pairs or SURVIVE
        limit, answer = config.student.max_prompt_tokens, config.outputs.max_new_tokens
        kind = reference.PROMPTS[config.method]
        self.writing = kind.within(tokenizer, limit, context, config.inputs.max_new_tokens)
        self.prompts = kind.within(tokenizer, limit, context, answer)
        self.annotation = reference.ANNOTATION[config.method].within(tokenizer, limit, context, answer)

    def of(self, task: Task, instances: float) -> dict[str, dict[str, float]]:
        """The figures of each table for one task with so many instances to answer."""
        config, samples = self.config, self.config.outputs.samples
        asked = config.inputs.rounds.of(task.labels) * config.inputs.prompts_per_round
        accepted = asked * self.inputs_survive
        pairs = accepted * self.pairs_survive
        prompt = _mean([len(self.annotation.answering(task, e.input).ids) for e in task.examples])
        lengths = [len(self.tokenizer.encode(self.prompts.completion(e.output))) for e in task.examples]
        answer = _mean([min(length, config.outputs.max_new_tokens) for length in lengths])
        learned = {system: self._learned(system, task, pairs) for system in config.predictions.taught}
        tuned = [learned.get(name, pairs) for name in config.predictions.tuned or ("selfguide",)]
        seen = config.models.epochs * (1 - config.models.validation) * (prompt + answer)
        return {
            "inputs": self._writing(task, asked) | {"rows": asked, "kept": accepted},
            "outputs": {
                "rows": accepted,
                "kept": accepted,
                "prompt_tokens": accepted * samples * prompt,
                "generated_tokens": accepted * samples * answer,
            },
            "trainset": {"rows": accepted + sum(learned.values()), "kept": pairs + sum(learned.values())},
            "models": {"rows": sum(tuned), "kept": sum(tuned), "trained_tokens": sum(tuned) * seen},
            "predictions": self._predicting(task, instances, answer),
        }

    def _writing(self, task: Task, asked: int) -> dict[str, float]:
        """Tokens of the requests for new inputs; the examples' inputs stand for those that are not written yet."""
        settings = self.config.inputs
        texts = [example.input for example in task.examples]
        earlier = round(self._earlier(settings.rounds.of(task.labels)))
        shown = [texts[i % len(texts)] for i in range(earlier)]
        prompt = len(self.writing.writing(task, texts, shown, task.labels[0] if task.labels else None).ids)
        written = _mean([min(len(self.tokenizer.encode(text)) + 1, settings.max_new_tokens) for text in texts])
        tokens = asked * prompt
        if settings.verify is not None:  # each text that is left is asked about, and the answer is a word
            tokens += asked * self.inputs_survive * len(self.writing.checking(task, texts[0]).ids)
        return {"prompt_tokens": tokens, "generated_tokens": asked * written}

    def _earlier(self, rounds: int) -> float:
        """Earlier inputs that a prompt shows, on average over the rounds: 1 to max_earlier of what there is by then."""
        settings, shown = self.config.inputs, []
        for number in range(rounds):
            there = number * settings.prompts_per_round * self.inputs_survive
            most = min(there, settings.max_earlier)
            shown.append((1 + most) / 2 if most >= 1 else 0.0)
        return _mean(shown)

    def _learned(self, system: str, task: Task, pairs: float) -> float:
        """Pairs that a tuned baseline learns; those that people wrote all survive."""
        few: dict[str, float] = {
            "few_shot_tuned": len(task.examples),
            "self_icl_tuned": min(pairs, self.config.trainset.in_context),
            "gold_tuned": len(task.gold),
        }
        return few.get(system, pairs)

    def _predicting(self, task: Task, instances: float, answer: float) -> dict[str, float]:
        """All systems on the instances; some of them are rendered."""
        prompt_tokens = generated = 0.0
        inputs = [instance.input for instance in task.instances] or [task.examples[0].input]
        pairs = [task.examples[i % len(task.examples)] for i in range(self.config.trainset.in_context)]
        for system in self.config.predictions.systems:
            if system not in FLOORS:
                n = self.config.outputs.samples if system in CHOICES else 1
                renderer = self.annotation if system in CHOICES else self.prompts
                examples = shown(system, task, pairs, self.config.seed)
                prompt_tokens += n * instances * _mean([_size(renderer, task, text, examples) for text in inputs])
                generated += n * instances * answer
        rows = instances * len(self.config.predictions.systems)
        return {"rows": rows, "kept": rows, "prompt_tokens": prompt_tokens, "generated_tokens": generated}


def _size(prompts: Prompts, task: Task, text: str, examples: Sequence[Example]) -> int:
    return len(prompts.answering(task, text, examples).ids)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def cost(row: dict[str, Any], config: Config, told: Told, price: float | None) -> dict[str, float | None]:
    """Hours of engines or workers that a table takes, by the speed of another run, shared among them, and their price."""
    cluster, rates = config.cluster, told.generated or {}
    speed, units, each = None, cluster.engines, 1
    if row["table"] == "models":
        workers = cluster.workers
        each = workers if isinstance(workers, int) else workers[1]
        speed, units = told.trained, cluster.groups * each
    elif row["table"] in SPOKEN and rates:
        speed = rates.get(row["table"]) or _mean(list(rates.values()))
    tokens = row["trained_tokens"] if row["table"] == "models" else row["generated_tokens"]
    hours = None if not speed else tokens / speed / 3600 * each
    return {
        "hours": hours,
        "wall_hours": None if hours is None else hours / units,
        "money": None if hours is None or price is None else hours * price,
    }


# --- what a run tells -------------------------------------------------------------------------------------------------


def observe(run: Run) -> Told:
    """Shares and speeds of a run that has ended, or has come some way. Raises SelfGuideError if there is none."""
    figures = progress_of(run)["tables"]
    speeds = {table: _speed([run.receipt(table, shard) for shard in run.shards(table)]) for table in SPOKEN}
    trained, seconds = trained_tokens(run)
    own = _own_pairs(run)
    return Told(
        inputs=figures["inputs"]["kept"] / figures["inputs"]["rows"] if figures["inputs"]["kept"] else None,
        pairs=own[0] / own[1] if own[0] else None,
        generated={table: speed for table, speed in speeds.items() if speed} or None,
        trained=trained / seconds if trained and seconds else None,
    )


def _own_pairs(run: Run) -> tuple[int, int]:
    """(alive, all) rows of `trainset` that are selfguide's."""
    rows = run.read_all("trainset", ["system", "drop_reason"])
    mine = rows.filter(pc.equal(rows["system"], "selfguide"))
    return mine["drop_reason"].null_count, mine.num_rows


def _speed(receipts: Sequence[dict[str, Any]]) -> float | None:
    """Tokens that an engine generated in a second: of its busy time, or where it tells none of its shards' time.

    Shards in flight share an engine, so the latter is less than it can do.
    """
    busy = [(r["engine_rates"]["generated_tokens_per_s"], r["seconds"]) for r in receipts if _tells(r)]
    if seconds := sum(s for _, s in busy):
        return sum(rate * s for rate, s in busy) / seconds
    tokens, seconds = (sum(r.get(name) or 0 for r in receipts) for name in ("generated_tokens", "seconds"))
    return tokens / seconds if tokens and seconds else None


def _tells(receipt: dict[str, Any]) -> bool:
    return bool((receipt.get("engine_rates") or {}).get("generated_tokens_per_s"))


def trained_tokens(run: Run) -> tuple[int, float]:
    """(tokens of pairs, once for each epoch, seconds of its group) summed over the models that learned something."""
    rows = run.read_all("trainset", ["task", "system", "tokens", "drop_reason"])
    sums = rows.filter(pc.is_null(rows["drop_reason"])).group_by(["task", "system"]).aggregate([("tokens", "sum")])
    tokens = {model_of(row["task"], row["system"]): row["tokens_sum"] for row in sums.to_pylist()}
    total, seconds = 0, 0.0
    for model in run.trained():
        told = run.get_json(f"models/{model}/model.json", dict)
        if told["trained"]:
            share = 1 - told["settings"]["validation"]
            total += round(tokens.get(model, 0) * len(told["losses"]) * share)
            seconds += told.get("seconds", 0.0)
    return total, seconds


# --- after the run ----------------------------------------------------------------------------------------------------


def against(planned: dict[str, Any], run: Run) -> list[dict[str, Any]]:
    """Each table's figures, [planned, actual, ratio of actual to planned]; of a run half made, for the part that is made."""
    figures, found = progress_of(run)["tables"], []
    for row in planned["tables"]:
        table = row["table"]
        done, due = figures[table]["done"], figures[table]["of"]
        if not done:
            continue
        receipts = [run.receipt(table, shard) for shard in run.shards(table)]
        actual = {name: sum(r.get(name) or 0 for r in receipts) for name in FIGURES}
        if table == "models":
            actual = {"trained_tokens": trained_tokens(run)[0]}
        actual |= {name: figures[table][name] for name in ("rows", "kept")}
        line: dict[str, Any] = {"table": table, "done": done, "of": due}
        for name in FIGURES:
            expected = row[name] * done / due
            if expected or actual.get(name):
                ratio = actual.get(name, 0) / expected if expected else None
                line[name] = [round(expected), actual.get(name, 0), ratio]
        found.append(line)
    return found
