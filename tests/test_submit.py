"""A run is handed to a cluster by the line that is printed, which fails before it starts where the job would."""

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfguide_ray.cli import app

GRACE = '{"env_vars":{"RAY_JOB_STOP_WAIT_TIME_S":"90"}}'  # cluster.drain_seconds, and time to leave
FAKE_RAY = """#!{python}
import json, os, sys
keep = {{"arguments": sys.argv[1:], "mode": os.environ.get("RAY_AUTH_MODE"), "cwd": os.getcwd()}}
open({told!r}, "w").write(json.dumps(keep))
sys.exit(7)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with the job and settings, no token, and Ray's command replaced by one that tells its call."""
    folder = tmp_path / "project"
    for name, text in {
        "jobs/selfguide.py": "",
        "configs/own.yaml": "run: s3://bucket/run\nstudent: {engine: scripted}\n",
        "../outside.yaml": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "ray"
    fake.write_text(FAKE_RAY.format(python=sys.executable, told=str(tmp_path / "told.json")))
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def submit(*arguments):
    return CliRunner().invoke(app, ["submit", *arguments])


def told(project):
    path = project.parent / "told.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_a_dry_run_prints_the_line_and_submits_nothing(project):
    done = submit("configs/own.yaml", "tasks.select=a b,!c*", "inputs.rounds=4", "--address", "http://h:1", "--dry-run")
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        f"ray job submit --address http://h:1 --working-dir . --runtime-env-json '{GRACE}' -- "
        "python jobs/selfguide.py configs/own.yaml "
        "'tasks.select=a b,!c*' inputs.rounds=4\n"
    )
    assert told(project) is None


def test_what_is_printed_is_what_runs_and_its_exit_code_is_passed_on(project):
    done = submit("configs/own.yaml", "tasks.select=a b", "--no-wait")
    assert done.exit_code == 7
    call = told(project)
    assert shlex.split(done.stdout) == ["ray", *call["arguments"]]
    assert call["arguments"] == [
        *("job", "submit", "--no-wait", "--working-dir", ".", "--runtime-env-json", GRACE, "--"),
        *("python", "jobs/selfguide.py", "configs/own.yaml", "tasks.select=a b"),
    ]
    assert call["cwd"] == str(project)


def test_settings_named_by_an_absolute_path_are_named_as_they_lie_in_the_working_directory(project):
    done = submit(str(project / "configs" / "own.yaml"), "--dry-run")
    assert done.stdout.endswith("python jobs/selfguide.py configs/own.yaml\n")


REFUSED = {
    "settings outside": (["../outside.yaml"], "outside the working directory"),
    "no settings": (["configs/none.yaml"], "no such file"),
    "a wrong setting": (["configs/own.yaml", "inputs.round=3"], "Did you mean inputs.rounds?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_job_would_refuse_is_refused_here(project, case):
    arguments, why = REFUSED[case]
    done = submit(*arguments)
    assert done.exit_code == 2
    assert why in done.stderr
    assert "\n  why: " in done.stderr
    assert "\n  instead: " in done.stderr
    assert told(project) is None


def test_elsewhere_than_in_the_project_there_is_no_job(project, monkeypatch):
    monkeypatch.chdir(project / "configs")
    done = submit("own.yaml")
    assert done.exit_code == 2
    assert "holds no jobs/selfguide.py" in done.stderr


def test_without_rays_command_the_error_says_so(project, monkeypatch):
    (project.parent / "bin" / "ray").unlink()
    monkeypatch.setenv("PATH", str(project))
    done = submit("configs/own.yaml")
    assert done.exit_code == 2
    assert "ray: there is no such command" in done.stderr


# Where a token is, what RAY_AUTH_MODE is before, what it is for Ray, and what is said of it.
TOKENS = {
    "no token": ({}, False, None, "no token is there"),
    "a token in Ray's file": ({}, True, "token", "set to token"),
    "a token in the environment": ({"RAY_AUTH_TOKEN": "abcdefgh12345678"}, False, "token", "RAY_AUTH_TOKEN holds one"),
    "a token not to be shown": ({"RAY_AUTH_MODE": "disabled"}, True, "disabled", "is disabled already"),
    "a token to be shown": ({"RAY_AUTH_MODE": "token"}, True, "token", "is token already"),
    "a token wanted and not there": ({"RAY_AUTH_MODE": "token"}, False, "token", "Ray will refuse"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_ray_is_told_to_show_its_token_where_there_is_one(project, monkeypatch, case):
    environment, kept, mode, said = TOKENS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if kept:
        (project.parent / ".ray").mkdir()
        (project.parent / ".ray" / "auth_token").write_text("abcdefgh12345678")
    done = submit("configs/own.yaml")
    assert told(project)["mode"] == mode
    assert said in done.stderr
    assert done.stdout.startswith(
        "RAY_AUTH_MODE=token ray job" if mode and not environment.get("RAY_AUTH_MODE") else "ray job"
    )
    assert "abcdefgh12345678" not in done.output


@pytest.mark.parametrize(("run", "warned"), [("runs/a", True), ("s3://b/a", False), ("/data/a", False)])
def test_a_run_that_would_lie_in_the_jobs_own_folder_is_warned_of(project, run, warned):
    done = submit("configs/own.yaml", f"run={run}", "--dry-run")
    assert ("lost with it" in done.stderr.replace("\n", " ")) == warned


def test_a_password_in_an_address_is_not_printed(project):
    done = submit("configs/own.yaml", "run=s3://me:open-sesame@host/b", "--dry-run")
    assert "open-sesame" not in done.output
    assert "open-sesame" not in submit("configs/own.yaml", "run=s3://me:open-sesame@host/b").output
    assert "run=s3://me:open-sesame@host/b" in told(project)["arguments"]


def test_the_real_command_takes_the_line(project, monkeypatch):
    """It fails of the closed port, not of an option that it does not know."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.undo()
    monkeypatch.chdir(project)
    monkeypatch.setenv("HOME", str(project.parent))
    if not Path(sys.executable).with_name("ray").is_file():
        pytest.skip("Ray's command is not beside this Python")
    done = submit("configs/own.yaml", "--no-wait", "--address", f"http://127.0.0.1:{port}")
    assert done.exit_code == 1
