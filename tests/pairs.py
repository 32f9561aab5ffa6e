"""A shard of `trainset` with pairs that a test has thought up."""

import pyarrow as pa

from selfguide_ray.schema import TABLES


def pair(prompts, task, number, text, answer, examples=None):
    """A row of selfguide's, rendered as the stages do."""
    return {
        "task": task.name,
        "system": "selfguide",
        "id": f"{task.name}{number}",
        "input": text,
        "output": answer,
        "tokens": 90,
        "prompt": prompts.answering(task, text, examples).text,
        "completion": prompts.completion(answer),
    }


def unlike(prompts, task, count):
    """Pairs whose items and answers differ in length."""
    made = ((f"{task.name} {i} {'x ' * (i % 3)}", f"a {'long ' * (i % 2)}{i}") for i in range(count))
    return [pair(prompts, task, i, text, answer) for i, (text, answer) in enumerate(made)]


def write_pairs(run, shard, rows):
    run.write("trainset", shard, pa.Table.from_pylist(rows, TABLES["trainset"]), {})
