"""Texts through the pool of one task, as if the student had written them."""

from selfguide_ray import reference
from selfguide_ray.config_file import load
from selfguide_ray.engine import Completion
from selfguide_ray.engine.scripted import ByteTokenizer
from selfguide_ray.inputs import Pool

OPEN = ("a", "b" * 90)  # examples whose lengths let every short text pass
ROOM = 1 << 16  # tokens of a prompt


def through_pool(make_task, texts, examples=OPEN, settings=(), **task):
    """The rows that come of the texts in a task with these inputs as examples."""
    config = load(overrides=[f"inputs.prompts_per_round={len(texts)}", *settings])
    task = make_task(examples=[(text, "x") for text in examples], **task)
    pool = Pool(task, config, reference.PROMPTS[config.method](ByteTokenizer(), ROOM))
    pool.ask(0)
    pool.keep([Completion(text, (), 0.0, "stop") for text in texts])
    return pool.rows


def reasons(rows):
    """The drop reason of each row, None for a survivor."""
    return [row.get("drop_reason") for row in rows]
