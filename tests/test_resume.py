"""kill -9 of the driver, anywhere, then the same command: nothing is lost, nothing is made twice."""

from pathlib import Path

import pytest
from driving import assert_equal_runs, finish, kill_when, published, reached

from selfguide_ray.run import Run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

SCRIPTED = """
run: {run}
student: {{engine: scripted}}
tasks: {{per_shard: 2, instances: 10}}
inputs: {{rounds: 3, prompts_per_round: 6, length_slack: 1.0}}
outputs: {{samples: 4}}
trainset: {{length_slack: 3.0}}
scores: {{bootstrap: 50}}
"""

# Inside every stage (some shards made, others not) and at every boundary between two.
POINTS = [
    ("tasks", 1),
    ("inputs", 1),
    ("outputs", 2),
    ("trainset", 3),
    ("trainset", 4),
    ("models", 1),
    ("models", 8),
    ("predictions", 1),
    ("scores", 4),
]


def test_a_run_killed_in_and_between_all_stages_equals_an_undisturbed_one(tmp_path, cluster):
    disturbed = Run(str(tmp_path / "disturbed" / "run"))
    seen, killed = {}, 0
    for point in POINTS:
        killed += kill_when(tmp_path / "disturbed", SCRIPTED, reached(*point), delay="0.1")
        now = published(disturbed)
        assert {name: now.get(name) for name in seen} == seen, f"made again before {point}"
        seen = now
    assert killed >= len(POINTS) - 2  # the last points may be passed while the process ends by itself
    finish(tmp_path / "disturbed", SCRIPTED)
    now = published(disturbed)
    assert {name: now.get(name) for name in seen} == seen
    assert_equal_runs(disturbed, finish(tmp_path / "calm", SCRIPTED))
    assert not list(Path(disturbed.root).rglob(".tmp-*"))


def test_weights_that_do_not_stay_never_pile_up(tmp_path, cluster):
    """Trained and answered in waves, each of which is removed before the next begins, also across a death."""
    text = SCRIPTED + "models: {{method: full, keep: none}}\ncluster: {{models_on_disk: 2}}\n"
    run, seen = Run(str(tmp_path / "run")), []

    def weights():
        return [path.parent.name for path in Path(run.root).glob("models/[!.]*/memory.json")]

    def answered(run):
        seen.append(len(weights()))
        return len(run.shards("predictions")) >= 2

    kill_when(tmp_path, text, answered, delay="0.05")
    finish(tmp_path, text)
    assert 0 < max(seen) <= 4  # a wave, and the one before it while it is being removed
    assert weights() == []
    assert len(run.trained()) == 8
    assert {run.get_json(f"models/{task}/model.json")["weights"] for task in run.trained()} == {"removed"}
    stay = finish(tmp_path / "stay", SCRIPTED + "models: {{method: full, keep: last}}\n")
    assert run.read_all("predictions").equals(stay.read_all("predictions"))
    assert len(list(Path(stay.root).glob("models/*/memory.json"))) == 8
