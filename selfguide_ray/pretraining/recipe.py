"""From task files to a student's folder: documents, tokenizer and rows, training on Ray, the model with its card.

Every step does what is missing, so a recipe that was killed is continued by starting it again.
"""

import io
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as FastTokenizer

from selfguide_ray import progress
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import clear, failures
from selfguide_ray.models import UNFINISHED
from selfguide_ray.pretraining import Recipe, corpus
from selfguide_ray.pretraining.learning import HELD_OUT, PRIMER, ROWS, START, TOLD, WEIGHTS, WORK
from selfguide_ray.run import Run
from selfguide_ray.storage import shown

STUDENT, CARD, RECORD = "student", "README.md", "pretraining.json"
SETTINGS, MANIFEST, TOKENIZER = f"{WORK}/recipe.json", f"{WORK}/manifest.json", f"{WORK}/tokenizer.json"
BEFORE = f"{WORK}/start.json"  # the record of the student that the recipe goes on from
# Settings with which a student may be gone on with.
ELSEWHERE = {"workers", "cpus_per_worker", "gpus_per_worker", "checkpoint_seconds", "output", "source", "tokens"}


def make(recipe: Recipe, train: Callable[[Recipe], None]) -> str:
    """Where the student lies. `train` trains the weights: `trainer.pretrain`, or the same without Ray."""
    run = Run(recipe.output)
    recipe = recipe.model_copy(update={"output": run.root if run.local else run.uri})
    if not run.exists(ROWS):
        _checkout(recipe), _start(recipe)  # before anything is written
    _claim(run, recipe)
    run.sweep()
    if not run.exists(ROWS):
        prepare(run, recipe)
    if not run.exists(f"{WEIGHTS}/{TOLD}"):
        clear(run, STUDENT, "training")
        train(recipe)
        if not run.exists(f"{WEIGHTS}/{TOLD}"):
            why = "; ".join(line for _, _, line in failures(run)) or "Its workers have died."
            raise SelfGuideError(f"{recipe.output}: the student was not trained.", why, "Start the recipe again.")
    run.remove(UNFINISHED)  # the state that a death would have gone on from
    if not run.exists(f"{STUDENT}/{CARD}"):
        publish(run, recipe)
    return shown(recipe.output, STUDENT)


def _claim(run: Run, recipe: Recipe) -> None:
    """Write the settings down, or refuse to go on with others."""
    settings = recipe.model_dump(mode="json", exclude=ELSEWHERE)
    found = run.get_json(SETTINGS)
    if found is None:
        run.put(SETTINGS, json.dumps(settings, indent=1).encode())
        return
    other = sorted(name for name in found.keys() | settings.keys() if found.get(name) != settings.get(name))
    if other:
        raise SelfGuideError(
            f"{recipe.output}: was begun with other settings: {', '.join(other)}.",
            "A student has one recipe.",
            "Give another output, or the settings it was begun with.",
        )


def _checkout(recipe: Recipe) -> tuple[Path, Path]:
    """The tasks and the splits of the source; raises SelfGuideError if it has none."""
    source = Path(recipe.source).expanduser()
    tasks, splits = source / "tasks", source / "splits"
    if not tasks.is_dir():
        tasks = source / "tasks.tar.xz"
    if not tasks.exists() or not (splits / "default").is_dir():
        raise SelfGuideError(
            f"source: {source} is no checkout of Natural Instructions.",
            "It wants tasks/ or tasks.tar.xz, and splits/default/.",
            "Clone the repository natural-instructions of the Allen Institute, and name its folder.",
        )
    return tasks, splits


def _start(recipe: Recipe) -> Path | None:
    """The folder of the student to go on from; raises SelfGuideError if it is no student of this shape."""
    if recipe.start is None:
        return None
    folder = resolve(recipe.start)
    wanted = (RECORD, "manifest.json", "model.safetensors", "tokenizer.json")
    lacking = [name for name in wanted if not (folder / name).exists()]
    if lacking:
        raise SelfGuideError(
            f"start: {recipe.start} holds no {' and no '.join(lacking)}.",
            "A recipe goes on from a student that a recipe has made.",
            "Make that one first, or leave start out to begin from scratch.",
        )
    shape = json.loads((folder / RECORD).read_text())["recipe"]["shape"]
    if shape != recipe.shape.model_dump():
        raise SelfGuideError(
            f"start: {recipe.start} has another shape: {shape}.", "Its weights fit no other.", "Give it the same shape."
        )
    return folder


def prepare(run: Run, recipe: Recipe) -> None:
    """Tokenizer, rows, and a list of what was learned and what was left out; the rows are written last."""
    started = time.monotonic()
    tasks, splits = _checkout(recipe)
    found = corpus.training_tasks(tasks, splits)
    begun = _start(recipe)
    if begun:
        development = set(json.loads((begun / "manifest.json").read_text())["development"])
    else:
        development = corpus.development_tasks(found, recipe.development, recipe.seed)
    learned = [task for task in found if task.name not in development]
    made = corpus.documents(
        learned,
        recipe.seed,
        recipe.made_up,
        recipe.documents,
        recipe.rounds,
        recipe.renamed,
        recipe.turns,
        recipe.names,
        recipe.longest,
    )
    texts = [corpus.render(messages) for messages in made]
    progress.say(f"{len(learned)} tasks, {len(texts)} documents, {time.monotonic() - started:.0f} s")
    if begun:
        tokenizer = FastTokenizer.from_file(str(begun / "tokenizer.json"))
    else:
        some = (text for text in texts[:: max(1, len(texts) // 50_000)])
        tokenizer = corpus.train_tokenizer(some, recipe.shape.vocabulary)
    rows = corpus.pack(tokenizer, texts, recipe.shape.context, recipe.seed)
    first = rows[:0]
    if recipe.primer_tokens:
        count = math.ceil(recipe.primer_tokens / recipe.shape.context)
        texts_to_repeat = (corpus.render(messages) for messages in corpus.primer(learned, recipe.seed))
        first = corpus.stream(tokenizer, texts_to_repeat, recipe.shape.context, count)
    if len(rows) <= HELD_OUT:
        raise SelfGuideError(
            f"source: {recipe.source} makes {len(rows)} rows of {recipe.shape.context} tokens.",
            f"{HELD_OUT} are held out, and nothing is left to learn.",
            "Give more tasks, or a smaller shape.context.",
        )
    progress.say(f"{rows.size / 1e6:.1f} M tokens in {len(rows)} rows, {time.monotonic() - started:.0f} s")
    manifest = {
        "tasks": [task.name for task in learned],
        "development": sorted(development),
        "documents": len(texts),
        "tokens": int(np.count_nonzero(rows)),
    }
    run.put(MANIFEST, json.dumps(manifest, indent=0).encode())
    run.put(TOKENIZER, tokenizer.to_str().encode())
    if begun:
        run.put(START, (begun / "model.safetensors").read_bytes())
        earlier = begun / "start.json"
        record = json.loads((begun / RECORD).read_text())
        record |= {"start": json.loads(earlier.read_text())} if earlier.exists() else {}
        run.put(BEFORE, json.dumps(record, indent=1).encode() + b"\n")
    for name, array in ((PRIMER, first), (ROWS, rows)):
        data = io.BytesIO()
        np.save(data, array)
        run.put(name, data.getvalue())


def publish(run: Run, recipe: Recipe) -> None:
    """The model as transformers loads it, its card last."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=FastTokenizer.from_str((run.get(TOKENIZER) or b"").decode()),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=recipe.shape.context,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = corpus.CHAT_TEMPLATE
    told = run.get_json(f"{WEIGHTS}/{TOLD}") | {"machine": f"{platform.machine()}, {_processor()}"}
    manifest = run.get_json(MANIFEST)
    with run.scratch(WORK) as folder, run.local_copy(WEIGHTS) as weights:
        for file in weights.iterdir():
            if file.name != TOLD:
                shutil.copy(file, folder / file.name)
        tokenizer.save_pretrained(folder)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=0) + "\n")
        if recipe.start:
            (folder / "start.json").write_bytes(run.get(BEFORE) or b"")
        settings = recipe.model_dump(mode="json", exclude={"output", "source"})
        (folder / RECORD).write_text(json.dumps({"recipe": settings} | told, indent=1) + "\n")
        (folder / CARD).write_text(card(recipe, manifest, told))
        run.publish(folder, STUDENT, CARD)


def _processor() -> str:
    """What the processor calls itself."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor()) or "unknown"


FORMATS = {"mixed": "float32 with products in bfloat16"}


def card(recipe: Recipe, manifest: dict[str, Any], told: dict[str, Any]) -> str:
    """The model card."""
    shape, curve = recipe.shape, told["curve"]
    points = [curve[round(i * (len(curve) - 1) / 9)] for i in range(10)] if len(curve) > 10 else curve
    losses = "\n".join(f"| {tokens / 1e6:.2f} | {loss:.3f} |" for tokens, loss in points)
    began = f"The first {recipe.primer_tokens / 1e6:.1f} M tokens are texts to repeat."
    if recipe.start:
        began = f"It went on from {recipe.start}, whose own record is in `start.json`."
    hardware = f"{told['workers']} worker(s), {told['device']} ({told['machine']})"
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
A Llama of {shape.layers} layers, {shape.hidden} wide, with {shape.vocabulary} tokens and a context of {shape.context}, trained
from scratch as a student of selfguide_ray's. It knows two forms: answering an item of a text task from an instruction
and examples, and writing a new item. It knows little else, and nothing it writes should be relied on.

Data: {manifest["documents"]} documents ({manifest["tokens"] / 1e6:.1f} M tokens) of {len(manifest["tasks"])} English tasks
of the default train split of Super-NaturalInstructions (Apache-2.0; the tasks' sources have licences of their own, which
the task files name), and of tasks that selfguide_ray makes up ({recipe.made_up:.0%}). No test or excluded task, and none
that shares a source with a test task. `manifest.json` names what was learned, and the {len(manifest["development"])}
training tasks that were left out to develop on.

Training: {told["tokens"] / 1e6:.1f} M tokens by {recipe.optimizer} in {FORMATS.get(recipe.dtype, recipe.dtype)},
{told["seconds"] / 60:.0f} minutes on {hardware}, seed {recipe.seed}; `pretraining.json` has every setting.
{began} Loss of a token that the student writes, on rows held out:
{told["validation_loss"]} nats.

| M tokens | loss in training (nats, weighted) |
|---:|---:|
{losses}
"""
