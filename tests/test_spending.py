"""A budget of hours or money: what a run has cost, kept over its submissions, and a clean stop when it is used up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfguide_ray.config import Budget
from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.lease import LEASE
from selfguide_ray.run import Run
from selfguide_ray.spending import ACCOUNT, Spending
from selfguide_ray.stopping import UsedUp, Work

JOB = Path(__file__).parents[1] / "jobs" / "selfguide.py"


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_every_unit_counts_while_it_is_held(tmp_path, clock):
    spending = Spending(Run(str(tmp_path)), Budget())
    clock[0] += 3600
    assert spending.hours == 0
    assert spending.used_up() is None
    assert not Run(str(tmp_path)).exists(ACCOUNT)  # nothing was spent
    with spending.holding(4):
        clock[0] += 1800
        with spending.holding(2):
            clock[0] += 600
    clock[0] += 3600
    assert spending.hours == pytest.approx(2 + 1)
    assert spending.used_up() is None


def test_an_account_goes_on_where_an_earlier_job_left_it(tmp_path, clock):
    run = Run(str(tmp_path))
    for hours in (1, 2, 3):
        spending = Spending(run, Budget())
        with spending.holding(1):
            clock[0] += 3600
            spending.used_up()
            clock[0] += 7200  # and then it is killed
        assert run.get_json(ACCOUNT) == {"seconds": 3600.0 * hours}


@pytest.mark.parametrize(
    ("budget", "hours", "told"),
    [
        ({"hours": 2}, 1.9, None),
        ({"hours": 2}, 2.0, "budget.hours: 2 of 2 hours are used up"),
        ({"money": 30, "price": 10}, 2.9, None),
        ({"money": 30, "price": 10}, 3.0, "budget.money: 30 of 30 is used up"),
        ({"price": 10}, 1000.0, None),
    ],
)
def test_what_is_used_up_is_named(tmp_path, clock, budget, hours, told):
    spending = Spending(Run(str(tmp_path)), Budget(**budget))
    with spending.holding(1):
        clock[0] += hours * 3600
    assert spending.used_up() == told


@pytest.mark.parametrize("budget", [["budget.money=3"], ["budget.hours=0"], ["budget.hour=3"], ["budget.price=-1"]])
def test_a_budget_that_means_nothing_is_refused(budget):
    with pytest.raises(SelfGuideError, match="budget"):
        load(overrides=budget)


def test_a_job_whose_budget_is_used_up_stops_and_leaves_the_run_free(tmp_path):
    run = Run(str(tmp_path))
    answers = iter([None, None, "that is all"])
    with Work(30, renew=0.05) as work:
        work.hold(run)
        work.watch(run, lambda: next(answers, "that is all"))
        deadline = time.monotonic() + 20
        while work.permit(run)() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not work.permit(run)()  # workers begin nothing more
        with pytest.raises(UsedUp, match="that is all"):
            work.check()
    assert not run.exists(LEASE)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(tmp_path):
    command = [sys.executable, JOB, tmp_path / "config.yaml"]
    (tmp_path / "config.yaml").write_text(
        f"run: {tmp_path / 'run'}\nstudent: {{engine: scripted}}\ntasks: {{per_shard: 1, instances: 4}}\n"
        "cluster: {shards_in_flight: 1}\n"
        "inputs: {rounds: 2, prompts_per_round: 4, length_slack: 5}\noutputs: {samples: 2}\nscores: {bootstrap: 20}\n"
    )

    def job(budget, delay):
        done = subprocess.run(
            [*command, f"budget.hours={budget}"],
            # A cluster of its own, since actors have the environment of the cluster's start.
            env=os.environ | {"RAY_ADDRESS": "local", "SELFGUIDE_SCRIPTED_DELAY": delay},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        return done.returncode, done.stderr

    run = Run(str(tmp_path / "run"))
    code, told = job(0.001, "1.5")  # 3.6 s, and looked at every ten
    assert (code, "budget.hours" in told) == (3, True), told[-2000:]
    begun = len(run.shards("trainset"))
    assert begun < 8
    assert not run.exists(LEASE)
    assert run.get_json(ACCOUNT)["seconds"] >= 3.6
    assert job(0.001, "0")[0] == 3
    assert len(run.shards("trainset")) == begun  # not one more
    assert job(5, "0")[0] == 0
    assert len(run.shards("scores")) == 8
