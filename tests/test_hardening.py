"""What others wrote stays data: it runs nothing, leaves its folder nowhere, grows no larger, and steers no screen."""

import ast
import io
import json
import re
import tarfile
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fuzzing import LAUGHS, finish, tried
from rich.console import Console
from typer.testing import CliRunner

from selfguide_ray import progress, task_files
from selfguide_ray.cli import app
from selfguide_ray.config import Student
from selfguide_ray.config_file import load
from selfguide_ray.doctor.command import CHECKS, examine
from selfguide_ray.documents import MAX_DEPTH, read_json, read_yaml, shown
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.failures import note
from selfguide_ray.method import guarded
from selfguide_ray.run import Run
from selfguide_ray.search.command import table as points
from selfguide_ray.search.sharing import Sharing
from selfguide_ray.student import context_of, locate
from selfguide_ray.tasks import plan

ROOT = Path(__file__).parents[1]
OWN = {"instruction": "Say it.", "examples": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}
FACTS = {"model": "m", "fingerprint": "scripted"}

# --- nothing runs -----------------------------------------------------------------------------------------------------

CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "eval", "exec", "__import__", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "pd.read_pickle",
}  # fmt: skip


def runs_code(source):
    """What in a module could run code that comes as data, or let others in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in CODE]
        if isinstance(node, ast.Call):
            found += [ast.unparse(node.func)] if ast.unparse(node.func) in CALLS else []
            for key in node.keywords:
                if key.arg in ("shell", "allow_pickle", "trust_remote_code") and ast.unparse(key.value) == "True":
                    found.append(f"{key.arg}=True")
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append(node.value)
    return found


@pytest.mark.parametrize("folder", ["selfguide_ray", "jobs"])
def test_no_module_runs_data_or_listens_to_the_world(folder):
    paths = list((ROOT / folder).rglob("*.py"))
    assert len(paths) > 5
    assert {str(p.relative_to(ROOT)): bad for p in paths if (bad := runs_code(p.read_text(encoding="utf-8")))} == {}


def test_the_search_for_such_modules_finds_them():
    source = "import pickle\nfrom dill import load\ntorch.load(x)\nf(shell=True)\neval(a)\nhost = '0.0.0.0'\n"
    assert sorted(runs_code(source)) == ["0.0.0.0", "dill", "eval", "pickle", "shell=True", "torch.load"]


def test_a_student_with_pickled_weights_alone_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(SelfGuideError, match=rf"{tmp_path} holds no \*\.safetensors") as caught:
        locate(Student(model=str(tmp_path)))
    assert "pickled ones can run code" in caught.value.why
    check = [check for check in CHECKS if check.name == "student"]
    (finding,) = examine(load(overrides=[f"student.model={tmp_path}"]), check)
    assert finding["verdict"] == "wrong"
    assert "holds no *.safetensors" in finding["found"]


def test_code_that_comes_with_a_student_is_not_run(tmp_path):
    told = json.loads((resolve("embedded/nano") / "config.json").read_text())
    told["auto_map"] = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\nclass Own: pass\n")
    assert context_of(Student(model=str(tmp_path))) > 0
    assert not (tmp_path / "was-run").exists()


# --- nothing leaves its folder ----------------------------------------------------------------------------------------

NAMES = (
    "../../up.json", "/nowhere/root.json", "a/../../../b.json", "_plan.json", ".tmp-x.json", "task@few_shot_tuned.json",
    "..json", "...json", "nul\0byte.json", "ta\u0455k.json", "task\u2044x.json", "task\uff0fx.json", "\u202etask.json",
    "x" * 250 + ".json", "a b.json", "a\nb.json", "C:\\x.json", "back\\..\\slash.json", "con:.json", "\udcff.json", "ok.json",
    "OK.json", "Ok.yaml",
)  # fmt: skip
TYPES = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)


def test_no_member_of_an_archive_leaves_the_run_or_takes_a_name_that_means_something_there(tmp_path):
    data = json.dumps(OWN).encode()
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in NAMES:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for number, kind in enumerate(TYPES):
            info = tarfile.TarInfo(f"kind{number}.json")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    config = load(overrides=[f"run={tmp_path}/run", f"tasks.source={tmp_path}/t.tar", "tasks.per_shard=100"])
    done = plan(Run(config.run), config, FACTS)
    # NUL ends a name in a tar, and a path in a name counts for nothing.
    assert set(Run(config.run).read("tasks", "00000")["task"].to_pylist()) <= {"up", "root", "b", "ok", "nul", "slash"}
    assert {"up", "root", "b", "ok"} <= set(Run(config.run).read("tasks", "00000")["task"].to_pylist())
    told = " ".join(refused["what"] for refused in done["refused"])
    for name in ("'_plan'", "'task@few_shot_tuned'", "'a b'", "second task named OK", "second task named Ok"):
        assert name in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t.tar"]
    written = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "run").rglob("*") if path.is_file())
    tables = [name for name in written if not name.endswith("_settings.json")]
    assert tables == ["run/tasks/00000.parquet", "run/tasks/_plan.json"]
    json.dumps(done, ensure_ascii=False).encode()


# --- nothing grows ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(task_files, "MAX_FILE_BYTES", 1 << 20)
    source = tmp_path / "source"
    source.mkdir()
    (source / "ok.json").write_text(json.dumps(OWN))
    with (source / "big.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room
    with tarfile.open(tmp_path / "t.tar.xz", "w:xz") as archive:
        archive.add(source / "ok.json", "ok.json")
        info = tarfile.TarInfo("big.json")
        info.size = 8 << 20
        archive.addfile(info, io.BytesIO(bytes(8 << 20)))
    for place in (source, tmp_path / "t.tar.xz"):
        config = load(overrides=[f"run={tmp_path}/run-{place.name}", f"tasks.source={place}"])
        done = plan(Run(config.run), config, FACTS)
        assert done["tasks"] == 1
        ((refused,)) = done["refused"]
        assert re.search(r"big\.json: has [\d,]+ bytes\.", refused["what"])


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
def test_an_archive_that_announces_more_than_there_is_takes_no_memory_for_it(tmp_path, kind):
    info = tarfile.TarInfo("x.txt")
    info.type, info.size = kind, 1 << 60
    (tmp_path / "t.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    found = tried(lambda: list(task_files.task_files(tmp_path / "t.tar")))
    assert found == [] or "cannot be read to its end" in found.what


DEEP = MAX_DEPTH + 1
BAD_YAML = {
    "a billion laughs": (LAUGHS, "aliases repeat more than 100,000 values"),
    "laughs by merging": ("a: &a {k: 1}\n" + "".join(
        f"b{i}: &b{i} {{<<: [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 9)}]}}\n" for i in range(9)), "aliases repeat"),
    "a loop": ("a: &a [*a]", "an alias stands inside what it stands for"),
    "a deep list": ("[" * DEEP + "]" * DEEP, "nested more than 64 levels"),
    "a very deep list": ("[" * 5000, "nested more than 64 levels"),
    "a chain of aliases": (
        "- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, DEEP)), "nested more than 64 levels",
    ),
    "a key twice": ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice in a mapping, line 3"),
    "Python": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "a tag that does not fit": ("a: !!bool x", "a tag does not fit its value"),
    "another one": ("a: !!timestamp x", "a tag does not fit its value"),
    "a large number": ("a: 0x" + "f" * 3000, "a number of 12,000 bits is too large"),
    "a long number": ("a: " + "9" * 9000, "Exceeds the limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_grows_or_asks_for_code_is_refused_in_settings_and_in_task_files(tmp_path, case):
    text, reason = BAD_YAML[case]
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_yaml(text)
    (tmp_path / "bad.yaml").write_text(text)
    error = tried(lambda: load(tmp_path / "bad.yaml"), seconds=20)
    assert error.what.startswith(f"{tmp_path}/bad.yaml: cannot be parsed: ")
    (file,) = task_files.task_files(tmp_path / "bad.yaml")
    error = tried(lambda: task_files.read_task(file), seconds=20)
    assert reason in error.what
    assert isinstance(tried(lambda: load(overrides=[f"inputs.rounds={text}"]), seconds=20), SelfGuideError)


def test_ordinary_aliases_merges_and_nesting_are_read():
    assert read_yaml("a: &a {k: [1, 2]}\nb: {<<: *a, l: *a}\n") == {
        "a": {"k": [1, 2]},
        "b": {"k": [1, 2], "l": {"k": [1, 2]}},
    }
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert read_json('{"a": 1e999, "b": NaN}')["a"] == float("inf")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[" * 100_000, "nested more than 64 levels"),
        ('{"a":' * DEEP + "1" + "}" * DEEP, "nested more than 64 levels"),
        ('{"a": ' + "9" * 4000 + "}", "is too large"),
    ],
)
def test_json_that_says_two_things_or_nests_is_refused(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_json(text)


@pytest.mark.parametrize("text", ['"a\\0b"', '"\\ud800"', ".nan", "!!binary /w==", "{a: [.nan]}"])
def test_what_no_run_could_note_is_no_setting(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"student:\n  vllm: {{x: {text}}}\n")
    for error in (
        tried(lambda: load(tmp_path / "c.yaml")),
        tried(lambda: load(overrides=[f"student.vllm.x={text}"])),
    ):
        assert isinstance(error, SelfGuideError)


def test_a_value_in_an_error_is_cut_and_holds_no_half_of_a_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    text = "a" * 190 + "correct-horse-battery" + "b" * 9000
    assert "correct" not in shown(text)
    assert len(shown([[text] * 100] * 100)) < 12_000
    error = tried(lambda: load(overrides=[f"inputs.rounds={text}"]))
    assert "correct-" not in str(error)


# --- nothing steers a screen ------------------------------------------------------------------------------------------

STEERING = "\x1b[2J\x1b]0;title\x07 [bold]x[/bold] [/] [link=http://h]y \x9b31m \u202e \ud800"


def test_what_failed_is_shown_by_status_as_it_is_written(tmp_path):
    config = load(overrides=[f"run={tmp_path}/[red]", "student.engine=scripted", "tasks.instances=2"])
    run = Run(config.run)
    plan(run, config, FACTS)
    note(run, "inputs", "00000", ValueError(STEERING))
    shown_by = CliRunner().invoke(app, ["status", config.run])
    assert shown_by.exit_code == 0, shown_by.output
    assert not re.search("[\x1b\x07\x9b\u202e]", shown_by.output)
    assert "[bold]x[/bold] [/] [link=http://h]y" in " ".join(shown_by.output.split())
    assert "[red]" in shown_by.output.replace("\n", "")


def test_an_error_is_printed_without_what_steers_a_terminal(capsys):
    def fail():
        raise SelfGuideError(STEERING, "w", "i")

    assert guarded(fail) == 2
    told = capsys.readouterr().err
    assert "[bold]x[/bold] [/]" in told
    assert not re.search("[\x1b\x07\x9b\u202e]", told)


def test_a_searchs_point_is_shown_with_its_brackets(monkeypatch):
    there = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    monkeypatch.setattr(progress, "console", there)
    monkeypatch.setattr("selfguide_ray.search.sharing.READS", ("tasks",))
    for name in ("synthesize", "train", "evaluate"):
        monkeypatch.setattr(f"selfguide_ray.search.sharing.{name}", lambda job, shards: None)
    label = "prefixes=[a, b] [/] [red] x\x1b[2J"
    Sharing({}).make(label, None, [])
    assert there.file.getvalue() == "prefixes=[a, b] [/] [red] x␛[2J\n"
    row = {"label": label, "scored": 1, "gain": 0.0, "worst": 0.0, "stopped": None, "chosen_for": []}
    there.print(points({"rival": "few_shot", "points": [row]}))
    assert "prefixes=[a, b] [/] [red] x␛[2J" in there.file.getvalue()


class Elements(HTMLParser):
    """Which elements a page has, and which attributes they have."""

    def __init__(self, markup):
        super().__init__()
        self.found = defaultdict(set)
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        self.found[tag] |= {name for name, _ in attributes}

    def handle_decl(self, decl):
        assert decl.lower() == "doctype html"

    def handle_comment(self, data):
        raise AssertionError(data)


BREAKING = (
    "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "--><svg onload=alert(1)>", "]]><a href=javascript:x>",
    '" onmouseover="alert(1)', "' autofocus onfocus='x", "</title></textarea><iframe>", "{{ 7*7 }}{% raw %}", "&lt;b&gt;<b>",
    "<!-- x", "\x00<scr\x00ipt>",
)  # fmt: skip


def test_no_element_and_no_attribute_of_a_report_comes_from_data(tmp_path):
    def page(name, texts):
        source = tmp_path / f"{name}-tasks"
        source.mkdir()
        for family in ("labels", "open"):
            said = [text.replace("\n", " ") for text in texts]
            document = {
                "instruction": f"Say it. {' '.join(said)}",
                "category": said[0],
                "noise_words": [said[1]],
                "examples": [{"input": f"{text} {i}", "output": said[i % 2]} for i, text in enumerate(said)],
                "instances": [
                    {"id": f"{text}{i}", "input": text, "output": said[i % 2]} for i, text in enumerate(said)
                ],
            }
            document |= {"labels": said[:2]} if family == "labels" else {}
            (source / f"{family}.json").write_text(json.dumps(document))
        (source / "bad.json").write_text(json.dumps({said[0]: 1, said[2]: 2}))
        settings = [
            f"run={tmp_path}/{name}",
            "student.engine=scripted",
            f"tasks.source={source}",
            "inputs={rounds: 4, prompts_per_round: 5, length_filter: false, noise_words: []}",
            "trainset={length_filter: false, min_frequency: 0.1, noise_words: []}",
            "outputs.samples=4",
            "scores.bootstrap=10",
            f"student.vllm={json.dumps({'x': said[2]})}",
        ]
        run, _ = finish(load(overrides=settings))
        note(run, "inputs", "00009", ValueError(said[0]))
        from selfguide_ray.report import write_report

        write_report(run, load(overrides=settings))
        return run.get("report.html").decode()

    hostile, harmless = page("hostile", BREAKING), page("harmless", [f"word{i} text" for i in range(len(BREAKING))])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in hostile
    found, usual = Elements(hostile).found, Elements(harmless).found
    assert {tag: names - usual[tag] for tag, names in found.items() if tag not in usual or names - usual[tag]} == {}
    assert not {name for names in found.values() for name in names if name.startswith("on")}
