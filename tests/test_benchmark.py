"""jobs/benchmark.py writes figures in the form that others read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[1] / "jobs"


@pytest.mark.slow
def test_the_whole_suite_loads_and_the_figures_are_told(tmp_path, natural_instructions):
    command = [sys.executable, JOBS / "benchmark.py", "loading", "--json", tmp_path / "out.json", "--repeats", "1"]
    subprocess.run([*command, "--data", natural_instructions], check=True, capture_output=True, cwd=tmp_path)
    told = json.loads((tmp_path / "out.json").read_text())
    assert {"name", "work", "unit", "ours", "peers", "ratio", "machine", "versions", "date"} <= told.keys()
    assert told["work"] == "1458 task files"
    assert told["ratio"] == {peer: told["ours"] / rate for peer, rate in told["peers"].items()}
    assert told["peak_memory_mb"]["after_1400_tasks"] < 2 * told["peak_memory_mb"]["after_100_tasks"]


def test_an_unknown_benchmark_is_refused():
    done = subprocess.run(
        [sys.executable, JOBS / "benchmark.py", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "loading" in done.stderr
