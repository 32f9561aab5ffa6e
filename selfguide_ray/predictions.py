"""Every system answers the held-out instances of every task; nothing is left out (statement 24)."""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pyarrow as pa

from selfguide_ray import reference
from selfguide_ray.config import Config
from selfguide_ray.engine import Engine, Request, SamplingParams, share_prefix
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.prompts import Prompt, held_to_labels
from selfguide_ray.run import Run, model_of
from selfguide_ray.schema import TABLES, Instance, Task, tasks_of
from selfguide_ray.student import facts

WITHOUT_MODEL = {
    "copy": lambda task, instance: instance.input,
    # The constant that the task's held-out references favour most: an oracle floor that no constant answer beats.
    "majority": lambda task, instance: majority(task),
}
EXAMPLES: dict[str, Callable[[Task], int]] = {
    "zero_shot": lambda task: 0,
    "few_shot": lambda task: len(task.examples),
    "few_shot_tuned": lambda task: len(task.examples),
    "selfguide": lambda task: len(task.examples),  # the paper's tuned model keeps its demonstrations (spec §2)
}
SYSTEMS = (*WITHOUT_MODEL, *EXAMPLES)


def majority(task: Task) -> str:
    """The commonest first reference of the task's instances; the first met wins a tie."""
    return Counter(instance.references[0] for instance in task.instances).most_common(1)[0][0]


class Predictions:
    """tasks, models → predictions. Prompted systems decode greedily from the annotator's own prompt."""

    writes: ClassVar = "predictions"
    reads: ClassVar = {"tasks": None}

    def __init__(self, config: Config, run: Run, engine: Engine) -> None:
        self.config, self.run, self.engine = config, run, engine
        self.student = facts(config.student)
        limit, new_tokens = config.student.max_prompt_tokens, config.outputs.max_new_tokens
        self.prompts = reference.PROMPTS[config.method].within(engine.tokenizer, limit, engine.context, new_tokens)
        self.said = reference.SAID[config.method]
        self.params = SamplingParams(max_new_tokens=new_tokens, stops=self.prompts.answer_stops)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """The rows of `predictions` for a shard."""
        rows: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        requests: list[Request] = []
        with contextlib.ExitStack() as stack:
            for task in tasks_of(tasks):
                adapters = {name: self._adapter(task, name, stack) for name in self.config.predictions.tuned}
                for system in self.config.predictions.systems:
                    mine = [_row(task, instance, system) for instance in task.instances]
                    rows += mine
                    if system in EXAMPLES:
                        answered, wanted = self._ask(task, mine, system, adapters.get(system))
                        asked += answered
                        requests += wanted
                    else:
                        for row, instance in zip(mine, task.instances, strict=True):
                            row.update(prediction=WITHOUT_MODEL[system](task, instance), finish_reason="stop")
            for row, (completion,) in zip(asked, self.engine.generate(requests), strict=True):
                row.update(prediction=self.said(completion.text), finish_reason=completion.finish_reason)
        return pa.Table.from_pylist(rows, schema=TABLES["predictions"])

    def _ask(
        self, task: Task, rows: list[dict[str, Any]], system: str, adapter: str | None
    ) -> tuple[list[dict[str, Any]], list[Request]]:
        """The rows that an engine answers and their requests; a prompt without room is answered by nothing, which is wrong."""
        shown = task.examples[: EXAMPLES[system](task)]
        prompts: list[Prompt] = [self.prompts.answering(task, row["input"], shown) for row in rows]
        for row in rows:
            row.update(prediction="", finish_reason="too_long")
        asked = [(row, prompt.ids) for row, prompt in zip(rows, prompts, strict=True) if not prompt.too_long]
        split = share_prefix([ids for _, ids in asked])
        params = held_to_labels(self.params, task, self.config.predictions.labels, self.prompts)
        return [row for row, _ in asked], [Request(a, b, params, adapter=adapter) for a, b in split]

    def _adapter(self, task: Task, system: str, stack: contextlib.ExitStack) -> str | None:
        """The tuned model's folder. A task that had nothing to learn from keeps the student as it is."""
        folder = f"models/{model_of(task.name, system)}"
        told = self.run.get_json(f"{folder}/model.json")
        if told is None:
            raise FileNotFoundError(f"{folder}/model.json: the task has not been trained")
        if not told["trained"]:
            return None
        if told.get("weights") == "removed":
            raise SelfGuideError(
                f"{folder}: its weights have been removed.",
                f"models.keep={told['settings']['keep']} lets them go once predictions are made.",
                f"Delete the folder {folder}, and the task is trained again.",
            )
        if (base := told.get("student")) != self.student:
            raise SelfGuideError(
                f"{folder}: its weights belong to {base}.",
                f"The student is {self.student}; on another base an adapter answers nonsense.",
                "Set student.model to the model it was trained on, or train it again in another run=DIR.",
            )
        return str(stack.enter_context(self.run.local_copy(folder)))


def _row(task: Task, instance: Instance, system: str) -> dict[str, Any]:
    return {
        "task": task.name,
        "id": instance.id,
        "system": system,
        "input": instance.input,
        "references": list(instance.references),
    }
