"""A search for settings (spec §4): a grid of points, each a run of its own, which share every table that they can.

`selection` says which point a task should have; `walk` goes through the points and judges the chosen ones.
"""

import itertools
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field

from selfguide_ray.config import LEARNERS, Config, SystemName
from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import digest
from selfguide_ray.sections import Section
from selfguide_ray.storage import inside

FIXED = ("run", "tasks", "predictions", "scores", "student", "cluster")  # what all points have alike


class Search(Section):
    """What is searched, and how the choice is made."""

    run: str = "runs/search"
    """The search's folder: points/, chosen/, and search.html."""
    base: str = "configs/quickstart.yaml"
    """The settings of all points, a run's YAML file; tasks.validation has to be set."""
    settings: dict[str, Any] = Field({})
    """Settings over those of base, for all points: section.key with its value."""
    grid: dict[str, tuple[Any, ...]] = Field({}, validate_default=False)
    """What differs: section.key with the values to try. Every combination is a point."""
    rule: Literal["one_for_all", "per_task"] = "one_for_all"
    """One point for a family, with the best gain on its worst task, or for each task the point with the best score."""
    rival: SystemName = "few_shot"
    """The system that the gain is told over, on validation instances too."""
    baselines: tuple[SystemName, ...] = ("copy", "majority", "zero_shot", "few_shot")
    """Systems that answer beside the points."""
    stop: bool = True
    """Stop a point that is behind the leader for certain after the first rung."""
    first_rung: float = Field(0.5, gt=0, le=1)
    """Share of the shards that every point goes through before one may be stopped."""


class Point(NamedTuple):
    """One combination of the grid."""

    name: str  # of its folder: the same for the same settings, whatever else is in the grid
    label: str
    config: Config


def points(search: Search) -> list[Point]:
    """The grid's points in order; raises SelfGuideError for a grid that is empty, or that no run could have."""
    if not all(search.grid.values()) or not search.grid:
        raise SelfGuideError(
            "grid: holds nothing to search.",
            "A point is a combination of its values.",
            "Give settings with the values to try, such as models.epochs: [1, 2, 3].",
        )
    for key in search.grid:
        if key.split(".")[0] in FIXED:
            raise SelfGuideError(
                f"grid: {key} cannot be searched.",
                "Points have to answer the same instances, by the same student.",
                "Put it into `settings`, and search another time.",
            )
    if {search.rival, *search.baselines} & set(LEARNERS) or search.rival not in search.baselines:
        raise SelfGuideError(
            f"rival: {search.rival}, baselines: {', '.join(search.baselines)}.",
            "The baselines are asked once for all points, without training, and the rival is one of them.",
            "Take prompted systems and floors, such as few_shot.",
        )
    made = []
    for values in itertools.product(*search.grid.values()):
        chosen = dict(zip(search.grid, values, strict=True))
        name = digest(chosen)[:8]
        label = ", ".join(f"{key}={spelled(value)}" for key, value in chosen.items())
        made.append(Point(name, label, _config(search, f"points/{name}", chosen, ["selfguide"])))
    return made


def baselines(search: Search, instances: str) -> Config:
    """The run in which the baselines answer the instances, held_out or those for validation."""
    config = _config(search, f"baselines/{instances}", {}, list(search.baselines))
    return config.model_copy(update={"predictions": config.predictions.model_copy(update={"instances": instances})})


def final(search: Search, point: Point) -> Config:
    """A chosen point's run over the held-out instances."""
    predictions = point.config.predictions.model_copy(update={"instances": "held_out"})
    return point.config.model_copy(update={"run": inside(search.run, "chosen", point.name), "predictions": predictions})


def _config(search: Search, folder: str, chosen: dict[str, Any], systems: list[str]) -> Config:
    given = search.settings | chosen
    ours = {
        "run": inside(search.run, folder),
        "predictions.systems": systems,
        "predictions.instances": "validation",
        "tasks.strict": False,
    }
    return load(search.base, [f"{key}={spelled(value)}" for key, value in (given | ours).items()])


def spelled(value: Any) -> str:
    """A value as it stands on a command line."""
    return yaml.safe_dump(value, default_flow_style=True, width=9999).removesuffix("\n").removesuffix("\n...")
