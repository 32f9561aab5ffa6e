"""Each thing that would stop or mislead a run is found before it starts, and told with what to do."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from selfguide_ray import student
from selfguide_ray.config_file import load
from selfguide_ray.doctor import Check, Finding, Patient, installation, reading
from selfguide_ray.doctor.command import CHECKS, examine, exit_code
from selfguide_ray.embedded import resolve
from selfguide_ray.engine.scripted import ByteTokenizer
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.tasks import plan

NANO = resolve("embedded/nano")
RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No cluster, no token."""
    for name in RAY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def look(names, *overrides):
    """What the checks of these names find."""
    chosen = [check._replace(needs=()) for check in CHECKS if check.name in names.split(",")]
    assert len(chosen) == len(names.split(","))
    return examine(load(overrides=list(overrides)), chosen)


def only(found):
    (finding,) = found
    return finding["verdict"], finding["found"], finding["advice"]


def settings(folder, *more):
    return load(overrides=[f"run={folder}", "student.engine=scripted", *more])


# --- the whole ----------------------------------------------------------------------------------------------------------


def test_the_embedded_student_is_well_and_nothing_is_left_behind(tmp_path):
    found = examine(load(Path(__file__).parents[1] / "configs" / "quickstart.yaml", [f"run={tmp_path / 'a' / 'run'}"]))
    assert {finding["check"] for finding in found} == {check.name for check in CHECKS}
    assert [f for f in found if f["verdict"] == "wrong"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_unexpectedly_is_wrong_with_its_error_and_the_others_go_on(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse")

    def failing(patient):
        yield Finding("ok", "so far")
        raise KeyError("correct-horse")

    def refusing(patient):
        raise SelfGuideError("This is wrong.", "So it is.", "Do that.")

    def well(patient):
        yield Finding("ok", "fine")

    checks = [Check("a", failing), Check("b", refusing), Check("c", well, ("a",)), Check("d", well)]
    found = [tuple(finding.values()) for finding in examine(load(), checks)]
    assert found == [
        ("a", "ok", "so far", ""),
        ("a", "wrong", "KeyError: '***'", "The check could not go on: put right what the error names."),
        ("b", "wrong", "This is wrong. So it is.", "Do that."),
        ("c", "warning", "Not looked at, since a is wrong.", "Correct that first."),
        ("d", "ok", "fine", ""),
    ]


def test_warnings_are_no_reason_to_stop():
    assert exit_code([{"verdict": "ok"}, {"verdict": "warning"}]) == 0
    assert exit_code([{"verdict": "ok"}, {"verdict": "wrong"}]) == 1


def test_the_commands_exit_code_says_what_it_found(tmp_path):
    def ask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "selfguide_ray.cli", "doctor", *arguments],
            cwd=tmp_path,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    (tmp_path / "config.yaml").write_text("run: out\nstudent: {engine: scripted}\n")
    well = ask("config.yaml", "--json")
    assert well.returncode == 0, well.stdout + well.stderr
    assert {finding["verdict"] for finding in json.loads(well.stdout)} <= {"ok", "warning"}
    ill = ask("student.engine=scripted", "tasks.source=nowhere")  # settings without a file
    assert ill.returncode == 1
    assert "nowhere does not exist" in ill.stdout
    assert "Traceback" not in ill.stdout + ill.stderr
    assert ask("config.yaml", "inputs.round=3").returncode == 2
    assert ask("nowhere.yaml").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# --- Python, packages, processors, Ray ----------------------------------------------------------------------------------

WANTED = {  # what ours requires, what is there → what is told
    "too old": (["ray>=2.60"], {"ray": "2.50.0"}, "ray 2.50.0; selfguide_ray wants >=2.60."),
    "too new": (["torch<2.14,>=2.10"], {"torch": "2.14.1+cpu"}, "torch 2.14.1+cpu; selfguide_ray wants <2.14,>=2.10."),
    "not there": (["peft>=0.21"], {}, "peft is not installed; selfguide_ray wants >=0.21."),
    "a local build": (["torch<2.14,>=2.10"], {"torch": "2.13.0+cpu"}, None),
    "an extra that is not asked for": (["pytest>=8; extra == 'dev'", "vllm==0.29.*; extra == 'vllm'"], {}, None),
}


def with_packages(monkeypatch, wanted, there):
    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(installation, "version", version)
    monkeypatch.setattr(installation, "requires", wanted.get)
    monkeypatch.setattr(installation, "metadata", lambda name: {"Requires-Python": ">=3.10"})


@pytest.mark.parametrize("case", WANTED)
def test_packages_are_held_against_what_is_required(monkeypatch, case):
    wanted, there, told = WANTED[case]
    with_packages(monkeypatch, {"selfguide_ray": wanted}, {"selfguide_ray": "0.1.0"} | there)
    verdict, found, _ = only(look("packages"))
    assert (verdict, found) == ("wrong", told) if told else verdict == "ok"


def test_vllm_wants_its_own_torch(monkeypatch):
    wanted = {"selfguide_ray": ["vllm==0.29.*; extra == 'vllm'"], "vllm": ["torch==2.13.0", "numpy"]}
    there = {"selfguide_ray": "0.1.0", "vllm": "0.29.1", "torch": "2.12.0"}
    with_packages(monkeypatch, wanted, there)
    assert only(look("packages", "student.engine=vllm"))[1] == "torch 2.12.0; vllm wants ==2.13.0."
    assert only(look("packages"))[0] == "ok"
    with_packages(monkeypatch, wanted, there | {"torch": "2.13.0+cu130", "vllm": "0.30.0"})
    assert only(look("packages", "student.engine=vllm"))[1] == "vllm 0.30.0; selfguide_ray wants ==0.29.*."


def test_an_old_python_is_wrong(monkeypatch):
    with_packages(monkeypatch, {}, {})
    monkeypatch.setattr(installation.platform, "python_version", lambda: "3.9.1")
    assert only(look("Python"))[:2] == ("wrong", "Python 3.9.1, and >=3.10 is wanted.")


def test_more_than_the_machine_has_is_told_unless_there_is_a_cluster(monkeypatch):
    monkeypatch.setattr(installation.os, "cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def verdicts(*more):
        return [(f["verdict"], f["found"]) for f in look("processors", *more)[1:]]

    assert verdicts("cluster={engines: 2, cpus_per_engine: 2}") == []
    assert verdicts("cluster={engines: 3, cpus_per_engine: 2}") == [
        ("warning", "cluster.cpus_per_engine=2: 3 engines want 6, and this machine has 4.")
    ]
    ((verdict, found),) = verdicts("cluster={gpus_per_engine: 1}")
    assert (verdict, found.split(":")[0]) == ("wrong", "cluster.gpus_per_engine=1")
    ((verdict, _),) = verdicts("cluster={workers: 3, cpus_per_worker: 2}")  # all of a group start together
    assert verdict == "wrong"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert verdicts("cluster={gpus_per_engine: 1}") == []


@pytest.mark.parametrize(("value", "verdict"), [("1", "ok"), ("two", "warning"), ("0", "warning"), ("999", "warning")])
def test_threads_of_this_process(monkeypatch, value, verdict):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert only(look("threads"))[0] == verdict


def test_a_ray_address_has_to_answer(monkeypatch):
    assert only(look("Ray"))[0] == "ok"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert only(look("Ray"))[0] == "wrong"  # bound, but nobody listens yet
        listening.listen()
        assert only(look("Ray"))[0] == "ok"
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")
        assert [finding["verdict"] for finding in look("Ray")] == ["ok", "warning"]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:port")
    assert only(look("Ray"))[0] == "wrong"


# RAY_AUTH_MODE, whether a token is there, and an address → the verdict.
TOKENS = {
    "nothing set": (None, False, None, "ok"),
    "a token shown by itself": (None, True, "auto", "ok"),
    "a token not shown to an address": (None, True, "h:1", "warning"),
    "wanted and made": ("token", False, None, "ok"),
    "wanted and not there": ("token", False, "h:1", "wrong"),
    "wanted and there": ("token", True, "h:1", "ok"),
    "there and not shown": ("disabled", True, "h:1", "warning"),
    "not shown here": ("disabled", True, None, "ok"),
    "no such mode": ("yes", False, None, "warning"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_the_token_fits_its_mode(monkeypatch, case):
    mode, there, address, verdict = TOKENS[case]
    for name, value in {
        "RAY_AUTH_MODE": mode,
        "RAY_AUTH_TOKEN": "abcdefgh12345678" if there else None,
        "RAY_ADDRESS": address,
    }.items():
        if value:
            monkeypatch.setenv(name, value)
    assert only(look("Ray's token"))[0] == verdict


# --- the student --------------------------------------------------------------------------------------------------------


@pytest.fixture
def remade(tmp_path):
    """Makes a copy of the embedded student with other keys of its tokenizer or another chat template."""

    def make(change=str, **keys):
        folder = tmp_path / "student"
        shutil.copytree(NANO, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "model.safetensors").symlink_to(NANO / "model.safetensors")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        template = folder / "chat_template.jinja"
        template.write_text(change(template.read_text()))
        return f"student.model={folder}"

    return make


def test_a_student_that_is_not_there_is_wrong_and_what_reads_it_is_passed_over(tmp_path):
    found = examine(load(overrides=["student.model=./nowhere", f"run={tmp_path}"]))
    wrong = [f for f in found if f["verdict"] == "wrong"]
    assert [f["check"] for f in wrong] == ["student"]
    assert "./nowhere does not exist" in wrong[0]["found"]
    assert sum("Not looked at" in f["found"] for f in found) == 8


def test_a_config_that_cannot_be_read_is_wrong(remade):
    setting = remade()
    (Path(setting.partition("=")[2]) / "config.json").write_text("{")
    assert only(look("student", setting))[0] == "wrong"


def test_two_bos_tokens_are_wrong_and_one_is_right(remade):
    given = remade(lambda text: "<|pad|>" + text, bos_token="<|pad|>")
    assert only(look("BOS", given))[:2] == ("ok", "A prompt begins with one BOS, as the model has it.")
    template = Path(given.partition("=")[2]) / "chat_template.jinja"
    template.write_text("<|pad|>" + template.read_text())
    verdict, found, _ = only(look("BOS", given))
    assert verdict == "wrong"
    assert "begins with 2 BOS tokens" in found


def test_a_pad_token_that_is_eos_is_told_and_eos_is_learned_all_the_same(remade):
    assert "the pad token is the same" not in only(look("EOS"))[1]
    verdict, found, _ = only(look("EOS", remade(pad_token="<|end|>")))
    assert verdict == "ok"
    assert "the pad token is the same" in found


def test_a_chat_template_without_the_assistants_header_is_told(remade):
    setting = remade(lambda text: text.replace("add_generation_prompt", "false"))
    first = look("chat template", setting)[0]
    assert first["verdict"] == "warning"
    assert "does not go on from there" in first["found"]


def test_a_turn_that_ends_otherwise_than_training_teaches_is_told(remade):
    found = look("chat template", remade(eos_token="<|pad|>"))
    assert [f["verdict"] for f in found] == ["ok", "warning"]
    assert "ends an answer with '<|end|>', and the student is taught '<|pad|>'" in found[1]["found"]


def test_a_chat_template_that_does_not_render_is_wrong(remade):
    setting = remade(lambda text: "{{ raise_exception('no such role') }}")
    verdict, found, _ = only(look("chat template", setting))
    assert verdict == "wrong"
    assert "no such role" in found


def test_both_methods_have_one_renderer_or_say_where_they_differ():
    assert "the same prompt" in only(look("one renderer"))[1]
    verdict, found, _ = only(look("one renderer", "method=reference"))
    assert verdict == "ok"
    assert "as the reference has it" in found


class Loose(ByteTokenizer):
    """Reads a special token also with white space inside, so that breaking it up does not help."""

    special_tokens = ("\x04", "<|x|>")

    def encode(self, text):
        parts = re.split(r"(<\s?\|x\|>)", text)
        return [i for part in parts for i in ([999] if re.fullmatch(r"<\s?\|x\|>", part) else part.encode())]


def test_special_tokens_that_get_through_are_wrong():
    patient = Patient(load(overrides=["student.engine=scripted"]))
    patient.reader = (Loose(), 1000)
    (finding,) = reading.escaping(patient)
    assert finding.verdict == "wrong"
    assert "'<|x|>'" in finding.found
    assert only(look("special tokens"))[0] == "ok"


CONTEXT = {  # settings → verdicts behind the first line, and a word of what is told
    "room for all": (["inputs.max_new_tokens=64", "outputs.max_new_tokens=64"], [], ""),
    "new tokens that may be cut": (["outputs.max_new_tokens=64"], ["warning"], "inputs.max_new_tokens=500"),
    "no room for the examples": (
        ["inputs.max_new_tokens=64", "outputs.max_new_tokens=64", "student.max_prompt_tokens=230"],
        ["warning"],
        "has room for 2 of 3 examples",
    ),
    "no room at all": (
        ["inputs.max_new_tokens=64", "outputs.max_new_tokens=64", "student.max_prompt_tokens=16"],
        ["wrong", "wrong"],
        "there is room for 16",
    ),
}


@pytest.mark.parametrize("case", CONTEXT)
def test_prompts_and_answers_have_to_find_room(case):
    given, verdicts, word = CONTEXT[case]
    _, *found = look("context", *given)
    assert [finding["verdict"] for finding in found] == verdicts
    assert all(word in finding["found"] for finding in found)


# --- source and folder --------------------------------------------------------------------------------------------------


def test_a_source_is_read_up_to_its_first_good_task(tmp_path):
    (tmp_path / "a_broken.json").write_text("{")
    setting = f"tasks.source={tmp_path}"
    verdict, found, _ = only(look("task source", setting))
    assert verdict == "wrong"
    assert "cannot be parsed" in found
    shutil.copy(next(resolve("embedded/tasks").iterdir()), tmp_path)
    assert [finding["verdict"] for finding in look("task source", setting)] == ["warning", "ok"]
    assert only(look("task source", "tasks.source=./nowhere"))[0] == "wrong"


def test_a_folder_of_other_settings_is_wrong(tmp_path):
    config = settings(tmp_path / "run")
    checks = [check._replace(needs=()) for check in CHECKS if check.name == "settings"]
    assert "holds no run yet" in only(examine(config, checks))[1]
    plan(Patient(config).run, config, student.facts(config.student))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "goes on there" in only(examine(config, checks))[1]
    verdict, found, _ = only(examine(settings(tmp_path / "run", "seed=3"), checks))
    assert verdict == "wrong"
    assert "seed: 0 there, 3 now" in found
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert only(look("run folder", f"run={tmp_path / 'file' / 'run'}"))[0] == "wrong"
    assert only(look("run folder", f"run={tmp_path / 'new' / 'run'}"))[0] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    assert only(look("disk", f"run={tmp_path}"))[0] == "ok"
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: full)
    for more, verdict in (([], "wrong"), (["tasks.instances=1", "inputs.rounds=1", "models.method=full"], "wrong")):
        assert only(look("disk", f"run={tmp_path}", *more))[0] == verdict
    small = ["student.engine=scripted", "tasks.instances=1", "inputs.rounds=1"]
    assert only(look("disk", f"run={tmp_path}", *small))[0] == "ok"
