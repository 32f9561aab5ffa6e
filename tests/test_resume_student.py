"""The same with the real student: what it wrote and learned does not depend on the death of the driver."""

import pytest
from driving import assert_equal_runs, finish, kill_when, make_here, published, reached

from selfguide_ray.config_file import load
from selfguide_ray.failures import failures
from selfguide_ray.method import Job
from selfguide_ray.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

# Strict: what else was in the batch, which a death changes, is not even in the last digits of a logprob.
REAL = """
run: {run}
student: {{strict: true, batch_rows: 8}}
tasks: {{select: "example001*,example005*", per_shard: 1, instances: 8}}
inputs: {{rounds: 2, prompts_per_round: 6, length_slack: 1.0, max_new_tokens: 24}}
outputs: {{samples: 4, max_new_tokens: 8}}
trainset: {{length_slack: 3.0, balance: false, min_frequency: 0.0}}
models: {{epochs: 1, batch_size: 4, learning_rate: 1.0e-3}}
scores: {{bootstrap: 50}}
"""


def in_this_process(folder):
    """The undisturbed run, made by the same stages without Ray."""
    folder.mkdir()
    (folder / "config.yaml").write_text(REAL.format(run=folder / "run"))
    job = Job(load(folder / "config.yaml"), Run(str(folder / "run")))
    make_here(job)
    assert failures(job.run) == []
    return job.run


def test_the_real_student_killed_while_it_learns_ends_the_same(tmp_path, cluster, one_process):
    assert kill_when(tmp_path / "disturbed", REAL, reached("models", 1))
    before = published(Run(str(tmp_path / "disturbed" / "run")))
    disturbed = finish(tmp_path / "disturbed", REAL)
    after = published(disturbed)
    assert {name: after[name] for name in before} == before
    calm = in_this_process(tmp_path / "calm")
    assert_equal_runs(disturbed, calm)
    for task in calm.trained():
        weights = f"models/{task}/adapter_model.safetensors"
        assert calm.get(weights) == disturbed.get(weights)
        assert calm.get(weights) is not None
