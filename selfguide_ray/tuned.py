"""A tuned model of a run as an engine takes it: its weights in a local folder, once they are known to fit the student."""

import contextlib
from typing import Any

from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import Run
from selfguide_ray.storage import shown


def weights(run: Run, model: str, student: dict[str, Any], stack: contextlib.ExitStack) -> str | None:
    """The model's folder, there for as long as the stack. None for a task that had nothing to learn from: the student.

    Raises FileNotFoundError if the model is not there, SelfGuideError if its weights are not, or are another student's.
    """
    folder = f"models/{model}"
    told = run.get_json(f"{folder}/model.json", dict)
    if told is None:
        raise FileNotFoundError(f"{shown(run.uri, folder)}/model.json: the task has not been trained")
    if not told["trained"]:
        return None
    if told.get("weights") == "removed":
        raise SelfGuideError(
            f"{folder}: its weights have been removed.",
            f"models.keep={told['settings']['keep']} lets them go once predictions are made.",
            f"Delete the folder {folder}, and the task is trained again.",
        )
    if (base := told.get("student")) != student:
        raise SelfGuideError(
            f"{folder}: its weights belong to {base}.",
            f"The student is {student}; on another base an adapter answers nonsense.",
            "Set student.model to the model it was trained on, or train it again in another run=DIR.",
        )
    return str(stack.enter_context(run.local_copy(folder)))
