"""What is secret in the environment or an address stands in no file of a run and in no output; tables are data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.executor import ShardWorker
from selfguide_ray.failures import failures, note
from selfguide_ray.inputs import Inputs
from selfguide_ray.method import guarded
from selfguide_ray.redaction import MASK, agrees, redacted
from selfguide_ray.report import settings, write_report
from selfguide_ray.run import Run
from selfguide_ray.tasks import plan

SECRET = 'tr0ub4dor&"3\\x'

TEXTS = {
    "a value": (f"refused: {SECRET}.", f"refused: {MASK}."),
    "a value inside JSON": (json.dumps({"a": SECRET}), json.dumps({"a": MASK})),
    "a value in a repr": (repr((SECRET, 1)), repr((MASK, 1))),
    "a value in an address": ("http://h/?token=tr0ub4dor%26%223%5Cx&a=1", f"http://h/?token={MASK}&a=1"),
    "a user with a password": ("s3://me:pass@host:9000/b/c", f"s3://{MASK}@host:9000/b/c"),
    "a password with an @": ("https://me:p@ss@host/b", f"https://{MASK}@host/b"),
    "two addresses": ("s3://a:b@x/y, s3://c:d@z", f"s3://{MASK}@x/y, s3://{MASK}@z"),
    "a port is no password": ("http://host:8265/a@b", "http://host:8265/a@b"),
    "an ordinary text": ("the mean is 3: a@b.c", "the mean is 3: a@b.c"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_secrets_are_masked_and_nothing_else(case):
    text, wanted = TEXTS[case]
    assert redacted(text, {"MY_API_KEY": SECRET}) == wanted


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "AWS_ACCESS_KEY_ID", "APIKEY"])
def test_a_value_is_secret_by_its_variables_name(name):
    assert redacted("it is correct-horse", {name: "correct-horse"}) == f"it is {MASK}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),
        ("TOKENIZERS_PARALLELISM", "falsehood"),
        ("RAY_AUTH_TOKEN_PATH", "/a/b/token"),
        ("A", "x" * 9),
    ],
)
def test_short_values_places_and_other_names_are_no_secrets(name, value):
    assert redacted(f"it is {value}", {name: value}) == f"it is {value}"


def test_a_longer_secret_is_masked_before_one_inside_it():
    assert redacted("abcdefghij", {"A_KEY": "abcdefgh", "B_KEY": "abcdefghij"}) == MASK


def test_a_mask_agrees_with_any_secret_and_with_no_other_setting():
    assert agrees({"a": [f"s3://{MASK}@host/b", 1]}, {"a": ["s3://me:pass@host/b", 1]})
    assert not agrees({"a": [f"s3://{MASK}@host/b", 1]}, {"a": ["s3://me:pass@other/b", 1]})
    assert not agrees({"a": f"s3://{MASK}@host/b"}, {"a": "s3://me:pass@host/b", "b": 1})
    assert not agrees({"a": [1, 2]}, {"a": [1]})


class Refusing:
    """An engine whose service does not let it in, and says with what."""

    def __init__(self):
        raise ConnectionError(f"no entry with {os.environ['MY_SERVICE_TOKEN']} at https://me:open-sesame@host/v1")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Settings with secrets in them, and a run that is planned."""
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)
    config = load(
        overrides=[
            f"run={tmp_path}/run",
            "student.engine=scripted",
            f"student.vllm={json.dumps({'token': SECRET, 'at': 'https://me:open-sesame@host/v1'})}",
            "tasks.instances=2",
            "inputs.rounds=1",
        ]
    )
    run = Run(config.run)
    facts = {"model": "m", "fingerprint": "scripted"}
    plan(run, config, facts)
    return config, run, facts


def leaks(folder):
    """Files with one of the secrets, as it is or escaped."""
    secrets = [text.encode() for text in (SECRET, json.dumps(SECRET)[1:-1], "open-sesame", "tr0ub4dor")]
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret in path.read_bytes() for secret in secrets)]


def test_a_job_that_fails_of_a_secret_leaves_it_in_no_file(job):
    config, run, _ = job
    receipts = list(ShardWorker(config, [Inputs], Refusing).work("00000"))
    assert receipts[0]["failed"]
    write_report(run, config)
    ((table, unit, line),) = failures(run)
    assert (table, unit) == ("inputs", "00000")
    assert line == f"ConnectionError: no entry with {MASK} at https://{MASK}@host/v1"
    assert MASK in run.get("inputs/_settings.json").decode()
    assert leaks(run.root) == []


def test_the_same_settings_are_recognized_and_others_refused(job, monkeypatch):
    config, run, facts = job
    run.check(config, facts)
    monkeypatch.delenv("MY_SERVICE_TOKEN")
    run.check(config, facts)  # also where the value is not known as a secret
    with pytest.raises(SelfGuideError, match=r"seed: 0 there, 1 now\."):
        run.check(config.model_copy(update={"seed": 1}), facts)


def test_the_reports_settings_are_masked(job):
    config, _, _ = job
    shown = {name: value for name, value, _ in settings(config)["student"]}["vllm"]
    assert "open-sesame" not in shown
    assert SECRET not in shown
    assert MASK in shown


@pytest.mark.parametrize("error", [SelfGuideError(f"{SECRET} is no key.", "Why.", "Else."), OSError(f"no {SECRET}")])
def test_what_a_command_prints_of_an_error_is_masked(error, monkeypatch, capsys):
    monkeypatch.setenv("MY_SERVICE_TOKEN", SECRET)

    def fail():
        raise error

    code = guarded(fail)
    told = capsys.readouterr().err
    assert code == (2 if isinstance(error, SelfGuideError) else 1)
    assert MASK in told
    assert "in fail" in told or code == 2  # where it went wrong is told too
    assert "tr0ub4dor" not in told


def test_a_command_of_its_own_prints_no_secret(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "selfguide_ray.cli", "status", "file://me:open-sesame@host/nowhere"],
        env=os.environ | {"MY_SERVICE_TOKEN": SECRET},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert "open-sesame" not in done.stdout + done.stderr


def test_a_note_keeps_what_is_not_secret(tmp_path):
    run = Run(str(tmp_path))
    note(run, "inputs", "00000", ValueError("a plain reason"))
    assert failures(run) == [("inputs", "00000", "ValueError: a plain reason")]
