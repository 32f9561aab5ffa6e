"""What a user meets at the door: bad input in three parts and exit code 2, status, and a first run."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from selfguide_ray.config_file import fields
from selfguide_ray.embedded import resolve

ROOT = Path(__file__).parents[1]
EXAMPLES = resolve("embedded/tasks")


def selfguide(*arguments, cwd):
    command = [sys.executable, "-m", "selfguide_ray.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: out\nstudent: {engine: scripted}\n")
    return path


def broken_task(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(text)
    return folder


NO_EXAMPLES = json.dumps({"instruction": "Say yes.", "examples": []})
BAD_INPUT = {
    "a missing config": (["nowhere.yaml"], "nowhere.yaml"),
    "an unknown key": (["config.yaml", "inputs.round=3"], "Did you mean inputs.rounds?"),
    "a wrong type": (["config.yaml", "inputs.rounds=many"], "inputs.rounds is 'many'"),
    "a missing source": (["config.yaml", "tasks.source=nowhere"], "nowhere does not exist"),
    "a truncated task": (["config.yaml", "tasks.source=truncated"], "cannot be parsed"),
    "a task without examples": (["config.yaml", "tasks.source=bare"], "has no examples"),
    "an unknown schema": (["config.yaml", "tasks.source=unknown"], "not in a task schema we know"),
    "a missing model": (["config.yaml", "student.engine=transformers", "student.model=./nowhere"], "does not exist"),
    "a model without weights": (["config.yaml", "student.engine=transformers", "student.model=./bare"], "config.json"),
    "a guide that is no run": (["config.yaml", "outputs.guided_by=nowhere"], "no run with models"),
    "a run that guides itself": (["config.yaml", "outputs.guided_by=out"], "this run itself"),
    "an engine that is not installed": (
        ["config.yaml", "student={engine: vllm, model: embedded/nano}"],
        "not installed",
    ),
    "a strict run with one broken file": (
        ["config.yaml", "tasks.source=mixed", "tasks.strict=true"],
        "cannot be parsed",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_in_three_parts_and_leaves_nothing(tmp_path, config, case):
    broken_task(tmp_path / "truncated", "half", '{"Definition": ["x"], "Positive Exa')
    broken_task(tmp_path / "bare", "lonely", NO_EXAMPLES)
    broken_task(tmp_path / "unknown", "other", '{"prompt": "x"}')
    broken_task(tmp_path / "mixed", "z_half", '{"Definition": ["x"], "Positive Exa')
    good = EXAMPLES / "example001_review_sentiment.json"
    (tmp_path / "mixed" / good.name).write_text(good.read_text())
    if case == "an engine that is not installed" and find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    arguments, told = BAD_INPUT[case]
    done = selfguide("run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "\n  why: " in done.stderr
    assert "\n  instead: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_of_other_settings_is_refused_with_the_difference(tmp_path, config):
    (tmp_path / "plan.py").write_text("from selfguide_ray.method import main, plan; main('', [plan])")
    subprocess.run([sys.executable, "plan.py", "config.yaml"], cwd=tmp_path, check=True, capture_output=True)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = selfguide("run", "config.yaml", "trainset.min_frequency=0.5", "seed=3", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed: 0 there, 3 now" in done.stderr
    done = selfguide("run", "config.yaml", "trainset.min_frequency=0.5", cwd=tmp_path)
    assert "trainset.min_frequency: 0.3 there, 0.5 now" in done.stderr
    assert "delete trainset, models, predictions, scores" in done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_status_of_no_run_is_an_error_and_of_a_run_is_json(tmp_path, config):
    assert selfguide("status", "out", cwd=tmp_path).returncode == 2
    (tmp_path / "plan.py").write_text("from selfguide_ray.method import main, plan; main('', [plan])")
    subprocess.run([sys.executable, "plan.py", "config.yaml"], cwd=tmp_path, check=True, capture_output=True)
    done = selfguide("status", "out", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (told["tables"]["tasks"]["done"], told["tables"]["inputs"]["done"]) == (1, 0)
    assert told["tables"]["models"]["of"] == 8
    assert "tasks" in selfguide("status", "out", cwd=tmp_path).stdout


def test_a_job_without_arguments_prints_the_line_that_submits_it(tmp_path):
    for job in ("selfguide", "synthesize", "train", "evaluate", "report"):
        done = subprocess.run(
            [sys.executable, ROOT / "jobs" / f"{job}.py"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 2
        assert f"ray job submit --working-dir . -- python jobs/{job}.py" in done.stdout


def test_settings_lists_every_setting_or_those_with_a_word(tmp_path):
    listed = selfguide("settings", cwd=tmp_path)
    assert listed.returncode == 0
    rows = [line for line in listed.stdout.splitlines()[1:] if line[1] != " "]  # the rest continues a meaning
    assert [line.split()[0] for line in rows] == [name for name, _, _ in fields()]
    found = selfguide("settings", "LoRA adapters", cwd=tmp_path).stdout
    assert "student.max_adapters" in found
    assert "inputs.rounds" not in found
