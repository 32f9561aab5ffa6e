"""Mutated task files, settings and tables out of a seed, and what it takes to try them; SELFGUIDE_FUZZ=full tries all."""

import contextlib
import copy
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import yaml

from selfguide_ray.config_file import fields
from selfguide_ray.engine.scripted import ScriptedEngine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.inputs import Inputs
from selfguide_ray.models import learn, packs, publish_untrained, untrained
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.report import write_report
from selfguide_ray.run import Run
from selfguide_ray.scores import Scores
from selfguide_ray.student import facts
from selfguide_ray.task_files import ARCHIVES
from selfguide_ray.tasks import plan
from selfguide_ray.trainset import Trainset

FULL = os.environ.get("SELFGUIDE_FUZZ") == "full"
SEED = int(os.environ.get("SELFGUIDE_FUZZ_SEED", "0"))


class Hung(BaseException):
    """A case took longer than any case may; no `except Exception` swallows it."""


@contextlib.contextmanager
def within(seconds):
    """Raise Hung if the block takes more seconds of processor time, which is the same however busy the machine is."""

    def stop(number, frame):
        raise Hung

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tried(action, seconds=60):
    """What the action gives, or the SelfGuideError that it ends with, whose three parts are checked; nothing else passes."""
    with within(seconds):
        try:
            return action()
        except SelfGuideError as error:
            for part in (error.what, error.why, error.instead):
                assert part.strip()
                assert len(part) < 20_000
            str(error).encode()  # it can be printed and written
            return error


def snapshot(folder, without):
    """Every file below a folder with size and time of its last change, one subfolder left out."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if without not in (path, *path.parents) and not path.is_dir()
    }


# --- values -----------------------------------------------------------------------------------------------------------

STRINGS = (
    "", " ", "\0", "a\0b", "\ud800", "x\udfffy", "\u202e\u2066abc", "\u200f", "\ufeff", "é" * 50, "x" * 100_000,
    "\x1b[31mred\x1b[0m", "[bold]x[/]", "../../etc/passwd", "/dev/zero", "<script>alert(1)</script>", "NaN", "null",
    "{{ 7*7 }}", "%s%n", "\n\n\n", "\r\n", "ｆｕｌｌ", "\U0001f600", "a" + "\u0301" * 300, "yes", "1e400", "0x10",
    "~", "*a", "!!x",
)  # fmt: skip


def scalar(rng):
    numbers = (0, -1, 1, 3, 10**30, -(10**400), 0.5, -1.5, 1e308, float("inf"), float("-inf"), float("nan"))
    return rng.choice([None, True, False, *numbers, *STRINGS])


def value(rng, depth=0):
    """Any value at all, now and then nested, deep, or long."""
    kind = rng.random()
    if kind < 0.6 or depth > 3:
        return scalar(rng)
    if kind < 0.78:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind < 0.95:
        return {rng.choice(["input", "output", "id", *STRINGS[:12]]): value(rng, depth + 1) for _ in range(3)}
    deep = scalar(rng)
    for _ in range(rng.choice([10, 70, 200])):
        deep = rng.choice([[deep], {"a": deep}])
    return deep


def places(document, path=()):
    """The path of everything inside a document."""
    found = [path] if path else []
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, part in inner:
        found += places(part, (*path, key))
    return found


def mutated(rng, document):
    """A copy with one thing changed: a value of another kind, a key lost, renamed or moved, an item twice."""
    document = copy.deepcopy(document)
    *above, key = rng.choice(places(document))
    holder = document
    for step in above:
        holder = holder[step]
    change = rng.choice(["value", "value", "string", "drop", "rename", "twice", "swap"])
    if change == "value":
        holder[key] = value(rng)
    elif change == "string" and isinstance(holder[key], str):
        at = rng.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + rng.choice(STRINGS) + holder[key][at:]
    elif change == "drop":
        del holder[key]
    elif change == "rename" and isinstance(holder, dict):
        holder[rng.choice([f"{key} ", str(key).lower(), str(key)[:-1], *STRINGS[:10]])] = holder.pop(key)
    elif change == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    else:
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    return document


# --- bytes ------------------------------------------------------------------------------------------------------------


def damaged(rng, data):
    """Bytes as a disk, an editor or a cut connection leaves them."""
    change = rng.choice(
        ["cut", "flip", "flip", "flips", "insert", "repeat", "encode", "bom", "empty", "zeros", "lines"]
    )
    at = rng.randrange(len(data) + 1)
    if change == "cut":
        return data[:at]
    if change in ("flip", "flips") and data:
        changed = bytearray(data)
        for _ in range(1 if change == "flip" else rng.randrange(2, 40)):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if change == "insert":
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if change == "repeat":
        return data[:at] + data[at // 2 :]
    if change == "encode":
        return data.decode(errors="replace").encode(rng.choice(["utf-16", "utf-32", "latin-1", "cp037"]), "replace")
    if change == "bom":
        return b"\xef\xbb\xbf" * rng.randrange(1, 3) + data
    if change == "zeros":
        return data[:at] + bytes(len(data) - at)
    return b"" if change == "empty" else data.replace(b"\n", rng.choice([b"\r", b"\r\n", b"\xe2\x80\xa8"]))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
BOMBS = (
    LAUGHS,
    "x: &x {a: &a {k: 1}, b: *a}\n<<: [*x, *x]\n<<: *x\n",
    "a: &a [*a]\n",
    "[" * 3000,
    "{a: " * 2000,
    "- " * 500 + "x",
    "!!python/object/apply:os.system [touch /tmp/selfguide-was-here]\n",
    "a: !!timestamp x\nb: !!bool x\n",
    "a: !!int ''\n",
    "? [a, b]\n: c\n",
    "a: !!binary ////\n",
    "a: 0x" + "f" * 9000 + "\n",
    "a: " + "9" * 9000 + "\n",
    "a: 1\na: 2\n",
    "%YAML 9.9\n---\na: 1\n",
    "--- a\n--- b\n",
    "a: !!set {x, y}\nb: !!omap [a: 1]\n",
    "a: 2024-31-12\n",
    "a: 190:20:30\nb: =\n",
    "\x07\x1b",
)  # fmt: skip


# --- task files -------------------------------------------------------------------------------------------------------

OFFICIAL = {
    "Contributors": ["n.n."],
    "Source": ["made up"],
    "Categories": ["Word Analogy"],
    "Definition": ["Name the colour."],
    "Input_language": ["English"],
    "Output_language": ["English"],
    "Positive Examples": [
        {"input": "grass", "output": "green"},
        {"input": "sky", "output": "blue", "explanation": "-"},
    ],
    "Negative Examples": [],
    "Emphasis & Caution": "Be brief.",
    "Instances": [{"id": f"t-{i}", "input": f"thing {i}", "output": [("red", "blue")[i % 2]]} for i in range(8)],
}
OWN = {
    "instruction": "Say whether it is good.",
    "examples": [{"input": "fine", "output": "yes"}, {"input": "bad", "output": "no"}],
    "labels": ["yes", "no"],
    "category": "Sentiment",
    "metric": "exact_match",
    "noise_words": ["Review"],
    "instances": [{"input": f"text {i}", "output": ("yes", "no")[i % 2]} for i in range(8)],
}


def text_of(rng, document, json_like):
    """A document as JSON or YAML; what YAML has no spelling for is JSON all the same, which is YAML too."""
    if json_like:
        return json.dumps(document, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    try:
        return yaml.safe_dump(document, allow_unicode=rng.random() < 0.5, sort_keys=False)
    except (yaml.YAMLError, RecursionError):
        return json.dumps(document)


def task_file(rng, index):
    """(file name, bytes) of a task file that is wrong in one to three ways, or now and then in none."""
    suffix = rng.choice([".json", ".json", ".yaml", ".yml"])
    document = rng.choice([OFFICIAL, OWN])
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if document:
            document = mutated(rng, document)
    try:
        text = text_of(rng, document, suffix == ".json" or rng.random() < 0.3)
    except RecursionError:
        text = "[" * 5000
    kind = rng.random()
    if kind < 0.06:
        text = rng.choice(BOMBS) + rng.choice(["", text])
    elif kind < 0.1:
        text = text.replace('"input"', '"output"') if rng.random() < 0.5 else text.replace("null", "NaN")
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        data = damaged(rng, data)
    names = [
        f"task{index}",
        f"task{index}_ö",
        f"task{index} x",
        "x" * 210 + str(index),
        f"-{index}",
        f"TASK{index - 1}",
    ]
    return rng.choices(names, [40, 1, 1, 1, 1, 1])[0] + suffix, data


def write_folder(folder, rng, count):
    """A folder of mutated task files, a folder and a link among them; returns how many files there are."""
    folder.mkdir()
    for index in range(count):
        name, data = task_file(rng, index)
        (folder / name).write_bytes(data)
    (folder / "folder.json").mkdir()
    (folder / "gone.json").symlink_to(folder / "nowhere")
    (folder / "zero.json").symlink_to("/dev/zero")
    return len([path for path in folder.iterdir() if path.is_file()])


def archive_of(rng, files):
    """(suffix, bytes) of an archive of files, damaged."""
    suffix, buffer = rng.choice(ARCHIVES), io.BytesIO()
    mode = {".tar.xz": "w:xz", ".tar.bz2": "w:bz2", ".tar": "w"}.get(suffix, "w:gz")
    with tarfile.open(
        fileobj=buffer, mode=mode, format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as archive:
        for name, data in files:
            info = tarfile.TarInfo(rng.choice(["", "../", "/", "a/" * 60]) + name)
            info.size = len(data)
            info.type = rng.choices([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE], [9, 1, 1, 1])[
                0
            ]
            info.linkname = "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return suffix, damaged(rng, buffer.getvalue())


# --- settings ---------------------------------------------------------------------------------------------------------

NAMES = tuple(name for name, _, _ in fields())


def settings(rng):
    """(text of a settings file or None, overrides): a few settings with any value, unknown keys, damaged text."""
    document = {}
    for name in rng.sample(NAMES, rng.choice([0, 1, 1, 1, 2, 4])):
        *above, key = name.split(".")
        inner = document
        for part in above:
            inner = inner.setdefault(part, {})
        inner[rng.choice([key, key, key, key, key + "s", "classification"])] = value(rng)
    if rng.random() < 0.15:
        document[rng.choice(["student", "inputs", "nonsense", *STRINGS[:8]])] = value(rng)
    overrides = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        name = rng.choice(
            [*NAMES, "inputs.rounds.generation", "student.vllm.a.b", "a.b.c", "", "=", ".", "inputs..x", "seed.x"]
        )
        given = rng.choice(
            [*BOMBS, *STRINGS[:10], "[1, 2", "{a: 1}", "1e999", ".nan", "*a", "&a [1]", "-5", "{}", "[[[[", "null"]
        )
        overrides.append(rng.choice([f"{name}={given}", f"{name}={given}", f"{name}{given}", given]))
    if rng.random() < 0.1:
        return None, overrides
    text = rng.choice(BOMBS) if rng.random() < 0.1 else text_of(rng, document, rng.random() < 0.2)
    if rng.random() < 0.05:
        text = f"student:\n  vllm:\n    {rng.choice(BOMBS)}".replace("\n", "\n    ")
    data = text.encode("utf-8", "surrogatepass")
    return (damaged(rng, data) if rng.random() < 0.25 else data), overrides


# --- a run ------------------------------------------------------------------------------------------------------------


def finish(config):
    """A run from task files to the report, in this process, with the scripted student; (run, engine)."""
    run, engine = Run(config.run), ScriptedEngine(config.student)
    plan(run, config, facts(config.student))

    def stages(*kinds):
        for kind in kinds:
            for shard in run.shards("tasks"):
                stage = kind(config, run, engine)
                rows = stage(*(run.read(t, shard, c) for t, c in stage.reads.items()))
                run.write(stage.writes, shard, rows, {"rows": rows.num_rows, "kept": rows.num_rows, "seconds": 1.0})

    stages(Inputs, Outputs, Trainset)
    for task, work in untrained(run, config).items():
        if not work.pairs:
            publish_untrained(run, task)
    learn(config, packs(run, config))
    stages(Predictions, Scores)
    write_report(run, config)
    return run, engine
