"""An ablation: the same tasks with one thing changed at a time, over several seeds, in runs that share what they can."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from selfguide_ray import comparison, progress, student
from selfguide_ray.config import Config
from selfguide_ray.config_file import load, read
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.method import tell_left
from selfguide_ray.run import Run
from selfguide_ray.search import spelled
from selfguide_ray.search.sharing import Sharing
from selfguide_ray.sections import Section
from selfguide_ray.stopping import Work
from selfguide_ray.storage import inside

BASE, TOLD = "base", "ablation.json"


class Ablation(Section):
    """What is changed, one thing at a time."""

    run: str = "runs/ablation"
    """The folder of the runs, NAME-SEED each, and of ablation.json."""
    base: str = "configs/quickstart.yaml"
    """The settings of all runs, a run's YAML file."""
    settings: dict[str, Any] = Field({})
    """Settings over those of base, for all runs: section.key with its value."""
    variants: dict[str, dict[str, Any]] = Field({})
    """Each variant's name, with its settings over those; {base} in a value is the base run of the same seed."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Every variant is run with each of them."""


def configs(ablation: Ablation) -> dict[str, list[Config]]:
    """The runs of the base and of each variant, seed by seed; raises SelfGuideError for settings that no run could have."""
    odd = [name for name in ablation.variants if name == BASE or not name.replace("_", "").isalnum()]
    if odd or not ablation.variants:
        raise SelfGuideError(
            f"variants: {', '.join(odd) or 'there is none'}.",
            "A variant's name becomes a folder beside the base's.",
            "Give names of letters, digits and _, each with its settings.",
        )
    made: dict[str, list[Config]] = {}
    for name, changed in {BASE: {}, **ablation.variants}.items():
        for seed in ablation.seeds:
            base = inside(ablation.run, f"{BASE}-{seed}")
            given = ablation.settings | {
                k: v.replace("{base}", base) if isinstance(v, str) else v for k, v in changed.items()
            }
            # The prompted systems answer the same whatever is changed, so the base asks them for all.
            systems = {} if name == BASE else {"predictions.systems": ["selfguide"]}
            given |= {"run": inside(ablation.run, f"{name}-{seed}"), "seed": seed, **systems}
            config = load(ablation.base, [f"{key}={spelled(value)}" for key, value in given.items()])
            made.setdefault(name, []).append(config)
    return made


def ablate(arguments: Sequence[str]) -> int:
    """CONFIG [key=value …]: run what the file describes, and compare; returns the exit code."""
    ablation = read(Ablation, arguments[0], arguments[1:])
    groups = configs(ablation)
    first = groups[BASE][0]
    with Work(first.cluster.drain_seconds) as work:
        work.hold(Run(ablation.run))
        sharing = Sharing(student.facts(first.student), work)
        for several in zip(*groups.values(), strict=True):  # a seed's runs one after the other, so that they can share
            for config in several:
                job = sharing.job(config)
                sharing.make(config.run, job, job.run.shards("tasks"))
    left = sharing.left()
    tell_left(left)
    told = comparison.compare([[config.run for config in several] for several in groups.values()])
    Run(ablation.run).put(TOLD, json.dumps(told, indent=1).encode() + b"\n")
    for table in comparison.tables(told):
        progress.out.print(table)
    return 1 if left else 0
