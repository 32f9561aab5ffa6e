"""All filters but pairwise novelty, over as many rows as a large run has."""

import argparse
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from benchmarks import Measured
from benchmarks.made_up import Language
from selfguide_ray.config import Config
from selfguide_ray.contamination import HeldOut
from selfguide_ray.filters import Rules, Seen, clean, judge, length_bounds, noise_pattern
from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.schema import Instance, Task
from selfguide_ray.trainset import balance
from selfguide_ray.votes import Votes, elect

ROWS, PER_TASK = 1_000_000, 1000
OVERLAPPED, INSTANCES = 10, 100  # tasks whose pairs are held against so many held-out instances, and counted apart


def filters(arguments: argparse.Namespace) -> Measured:
    """Rows a second through the filters with their defaults, on one core. Making the rows up is not counted.

    Seconds are the processor's for this process: other work on the machine is none of theirs.
    """
    language, config, total = Language(0), Config(), arguments.rows or ROWS
    tasks = max(1, total // PER_TASK)
    seconds: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    elections, pairs, overlapping = 0, 0, 0.0
    for number in range(tasks):
        task = language.task(number)
        texts = language.invented(total // tasks)
        answers = [language.answers(task, config.outputs.samples) for _ in texts]
        started = time.process_time()
        rows = judged(task, texts, config)
        inputs_done = time.process_time()
        elected(task, rows, answers, config)
        answers_done = time.process_time()
        if task.labels:
            balance(rows, number)
        seconds["inputs"] += inputs_done - started
        seconds["answers"] += answers_done - inputs_done
        seconds["balance"] += time.process_time() - answers_done
        elections += sum("voters" in row for row in rows)
        verdicts.update(row["drop_reason"] or "kept" for row in rows)
        if number < OVERLAPPED:
            held_out = tuple(Instance(str(place), language.text(), ()) for place in range(INSTANCES))
            kept = [row["input"] for row in rows if row["drop_reason"] is None]
            started = time.process_time()
            apart = HeldOut(
                replace(task, instances=held_out), config.trainset.overlap_words, config.trainset.overlap_rouge
            )
            apart.overlaps(kept, [rouge_tokens(text) for text in kept])
            overlapping += time.process_time() - started
            pairs += len(kept)
    samples, keep = config.outputs.samples, config.trainset.keep
    return {
        "work": f"{verdicts.total()} rows of about 37 words in {tasks} tasks, every other one with labels; a row is an "
        "invented input, cleaned, judged by empty, length and noise, and held against those seen, and where it survives "
        f"{samples} sampled answers, the {keep} likeliest of which are judged, their labels found, and vote; then balance",
        "unit": "rows/s",
        "rates": {"ours": verdicts.total() / seconds.total()},
        "seconds": {name: round(spent, 3) for name, spent in seconds.items()},
        "answers_per_s": samples * elections / seconds["answers"],
        f"pairs_per_s_held_against_{INSTANCES}_instances": pairs / overlapping,
        "verdicts": dict(verdicts.most_common()),
    }


def judged(task: Task, texts: list[str], config: Config) -> list[dict[str, Any]]:
    """The texts as rows of `inputs` with their verdicts, as `inputs.Pool` gives them."""
    shown = [clean(example.input) for example in task.examples]
    words = (*config.inputs.noise_words, *task.noise_words)
    rules = Rules(
        length_bounds(shown, config.inputs.length_sigmas, config.inputs.length_slack), noise_pattern(words, shown)
    )
    seen = Seen((f"example{place}", example.input) for place, example in enumerate(task.examples))
    rows = []
    for place, text in enumerate(texts):
        cleaned = clean(text)
        verdict = judge(cleaned, rules) or seen.judge(cleaned)
        rows.append({"input": cleaned, "drop_reason": verdict.drop_reason if verdict else None})
        if verdict is None:
            seen.add(f"r{place}", cleaned)
    return rows


def elected(task: Task, rows: list[dict[str, Any]], answers: list[list[dict[str, Any]]], config: Config) -> None:
    """Elect the answer of each surviving row, as `trainset` does."""
    votes = Votes(task, config.trainset)
    for row, candidates in zip(rows, answers, strict=True):
        if row["drop_reason"] is None:
            output, told = elect(task, candidates, config.trainset, votes)
            row.update(told, output=output)
