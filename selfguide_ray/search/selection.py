"""Which point a task should have, by validation alone, and which points have no chance (spec §4, statement 25)."""

from collections.abc import Mapping, Sequence

import numpy as np

from selfguide_ray.metrics import METRICS
from selfguide_ray.run import Run
from selfguide_ray.schema import Task

Values = Mapping[str, float]  # task → score or gain, 0-100
RESAMPLES = 2000


def choose(rule: str, found: Mapping[str, Values], rival: Values, families: Sequence[Sequence[str]]) -> dict[str, str]:
    """Each task's point. `found` is what each point scored, `rival` what the rival did.

    per_task: the point with the best score. one_for_all: in each family the point whose smallest gain over the rival is
    largest, among those that have a score of every task; then the one with the larger mean. The first of equals wins.
    A task that no point has a score of, or a family that no point is through with, gets none.
    """
    chosen: dict[str, str] = {}
    for family in families:
        tasks = [task for task in family if any(task in values for values in found.values())]
        if rule == "per_task":
            for task in tasks:
                there = [point for point, values in found.items() if task in values]
                chosen[task] = max(there, key=lambda point: found[point][task])
            continue
        whole = {
            p: [values[t] - rival[t] for t in tasks] for p, values in found.items() if all(t in values for t in tasks)
        }
        if tasks and whole:
            best = max(whole, key=lambda point: (min(whole[point]), float(np.mean(whole[point]))))
            chosen |= dict.fromkeys(tasks, best)
    return chosen


def hopeless(found: Mapping[str, Mapping[str, Sequence[float]]], seed: int) -> dict[str, tuple[str, float]]:
    """Points whose mean score is below the leader's for certain: point → (leader, upper end of the 95 % interval).

    `found` holds a point's scores of each instance, task by task. Instances are resampled within their tasks, the same
    for both; each task counts once. A point that lacks a task of the leader's is left alone.
    """
    means = {point: np.mean([np.mean(scores) for scores in tasks.values()]) for point, tasks in found.items() if tasks}
    if not means:
        return {}
    leader = max(means, key=lambda point: means[point])
    stopped = {}
    for point, tasks in found.items():
        if point == leader or tasks.keys() != found[leader].keys():
            continue
        rng = np.random.default_rng(seed)
        resampled = []
        for name, scores in sorted(tasks.items()):
            difference = np.asarray(scores, dtype=float) - np.asarray(found[leader][name], dtype=float)
            resampled.append(difference[rng.integers(0, len(difference), (RESAMPLES, len(difference)))].mean(axis=1))
        upper = float(np.percentile(np.mean(resampled, axis=0), 97.5))
        if upper < 0:
            stopped[point] = (leader, upper)
    return stopped


def instance_scores(run: Run, tasks: Mapping[str, Task], system: str, shards: Sequence[str]) -> dict[str, list[float]]:
    """A system's score of each instance, 0-100, task by task, in the order of `predictions`."""
    found: dict[str, list[float]] = {}
    for shard in set(shards) & set(run.shards("predictions")):
        for row in run.read("predictions", shard, ["task", "system", "prediction", "references"]).to_pylist():
            if row["system"] == system:
                metric = METRICS[tasks[row["task"]].metric]
                found.setdefault(row["task"], []).append(100 * metric(row["prediction"], row["references"]))
    return found
