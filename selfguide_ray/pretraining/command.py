"""The recipe as a command, on Ray."""

import threading
from collections.abc import Sequence

from selfguide_ray import progress
from selfguide_ray.config_file import read
from selfguide_ray.failures import caught
from selfguide_ray.pretraining import Recipe
from selfguide_ray.run import Run

EVERY = 30.0  # seconds between two lines


def pretrain(arguments: Sequence[str]) -> int:
    """CONFIG [key=value …]: make the student that the file describes; returns the exit code."""
    recipe = read(Recipe, arguments[0], arguments[1:])
    from selfguide_ray.executor import connect
    from selfguide_ray.pretraining.learning import CURVE
    from selfguide_ray.pretraining.recipe import make
    from selfguide_ray.trainer import pretrain as on_ray

    def train(here: Recipe) -> None:
        connect()
        over = threading.Event()
        threading.Thread(target=tell, args=(Run(here.output), over), daemon=True).start()
        try:
            on_ray(here)
        finally:
            over.set()

    def tell(run: Run, over: threading.Event) -> None:
        """Say how far the training is, as long as it lasts."""
        last = told = None
        while not over.wait(EVERY):
            with caught():  # a store that does not answer is asked again
                told = run.get_json(CURVE, dict)
            if told is not None and told["step"] != last:
                last = told["step"]
                tokens, loss = told["curve"][-1]
                progress.event("step", step=last, of=told["steps"], tokens=tokens, loss=loss, seconds=told["seconds"])
                progress.say(
                    f"step {last} of {told['steps']}, {tokens / 1e6:.2f} M tokens, loss {loss}, {told['seconds']:.0f} s"
                )

    folder = make(recipe, train)
    progress.event("student", folder=folder)
    progress.say(f"the student is in {folder}")
    return 0
