"""The whole method with the embedded student on a Ray cluster, over example tasks and over real ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alike import adapter, assert_alike
from peft import PeftModel
from transformers import AutoModelForCausalLM

from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.failures import failures
from selfguide_ray.models import learn, packs
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import tasks_of
from selfguide_ray.student import StudentTokenizer

JOBS = Path(__file__).parents[1] / "jobs"
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = """
tasks: {per_shard: 1, instances: 6}
inputs: {rounds: 2, prompts_per_round: 6, length_slack: 1.0, max_new_tokens: 24}
outputs: {samples: 4, max_new_tokens: 8}
trainset: {length_slack: 4.0, balance: false, min_frequency: 0.0}
models: {epochs: 1, batch_size: 4, learning_rate: 1.0e-3}
scores: {bootstrap: 50}
"""


def job(name, folder, *overrides, text=SMALL):
    """Run an entry script on the test session's cluster; returns the run."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(text)
    command = [sys.executable, JOBS / f"{name}.py", folder / "config.yaml", f"run={folder / 'run'}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(str(folder / "run")), done.stdout


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory, cluster):
    """Training pairs of three example tasks, written by two engine actors."""
    folder = tmp_path_factory.mktemp("two")
    run, _ = job("synthesize", folder, "tasks.select=example00[145]*", "cluster.engines=2")
    return folder, run


def test_one_and_two_engine_actors_write_the_same(tmp_path, cluster, synthesized):
    _, two = synthesized
    one, _ = job("synthesize", tmp_path / "one", "tasks.select=example00[145]*", "cluster.engines=1")
    for table in ("tasks", "inputs", "outputs", "trainset"):
        assert one.shards(table) == two.shards(table) == ["00000", "00001", "00002"]
        a, b = one.read_all(table), two.read_all(table)
        if table == "inputs":  # the rest of the batch is in the last digits of a perplexity
            assert a["perplexity"].to_pylist() == pytest.approx(b["perplexity"].to_pylist(), rel=1e-3)
            a, b = a.drop_columns("perplexity"), b.drop_columns("perplexity")
        assert a.equals(b), table
    assert two.read_all("trainset")["drop_reason"].null_count > 0


def test_two_workers_in_step_learn_what_one_process_learns(tmp_path, cluster, synthesized, one_process):
    folder, _ = synthesized
    shutil.copytree(folder, tmp_path / "pair")
    shutil.copytree(folder, tmp_path / "single")
    pair, _ = job("train", tmp_path / "pair", "tasks.select=example00[145]*", "cluster.workers=2")
    single = Run(str(tmp_path / "single" / "run"))
    config = load(tmp_path / "single" / "config.yaml", [f"run={single.root}"])
    learn(config, packs(single, config))
    assert failures(single) == []
    assert pair.trained() == single.trained() == single.read_all("tasks")["task"].to_pylist()
    for task in single.trained():
        one, two = (r.get_json(f"models/{task}/model.json") for r in (single, pair))
        assert one["trained"]
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert_alike(adapter(pair, task), adapter(single, task))
    assert not Path(pair.root, ".train").exists()


CLASSIFICATION = (
    "task1612_sick_label_classification",
    "task242_tweetqa_classification",
    "task199_mnli_classification",
    "task1548_wiqa_binary_classification",
)
GENERATION = (
    "task1345_glue_qqp_question_paraprashing",
    "task1562_zest_text_modification",
    "task1557_jfleg_answer_generation",
    "task670_ambigqa_question_generation",
)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory, cluster, natural_instructions):
    """The main job over eight real tasks."""
    return job(
        "selfguide",
        tmp_path_factory.mktemp("real"),
        f"tasks.source={natural_instructions / 'sample' / 'tasks'}",
        f"tasks.select={','.join(CLASSIFICATION + GENERATION)}",
        "tasks.per_shard=4",
        "cluster.engines=2",
    )


def test_eight_real_tasks_end_with_adapter_predictions_and_scores(real_run):
    run, printed = real_run
    assert run.trained() == sorted(CLASSIFICATION + GENERATION)
    told = {task: run.get_json(f"models/{task}/model.json") for task in run.trained()}
    assert {task for task, model in told.items() if not model["trained"]} == set()
    predictions = (
        run.read_all("predictions", ["task", "system"]).group_by(["task", "system"]).aggregate([([], "count_all")])
    )
    assert set(predictions["count_all"].to_pylist()) == {6}
    assert predictions.num_rows == 8 * 5
    scores = run.read_all("scores").to_pylist()
    assert {(row["task"], row["system"]) for row in scores if row["metric"] == "rouge_l"} == {
        (task, system) for task in told for system in ("copy", "majority", "zero_shot", "few_shot", "selfguide")
    }
    assert {row["task"] for row in scores if row["metric"] == "macro_f1"} == set(CLASSIFICATION)
    assert "task1612" in printed
    assert "report.html" in printed
    assert (Path(run.root) / "report.html").stat().st_size > 10_000


def test_test_tasks_hold_out_their_official_instances(real_run, natural_instructions):
    run, _ = real_run
    (row,) = [r for r in run.read_all("tasks").to_pylist() if r["task"] == "task1612_sick_label_classification"]
    official = tasks_of(run.read("tasks", run.shards("tasks")[0]))
    assert len(row["instances"]) == 6
    assert all(task.instances for task in official)


def test_plain_transformers_and_peft_give_the_answers_of_the_table(real_run):
    run, _ = real_run
    config = load(None, ["outputs.max_new_tokens=8"])
    tokenizer = StudentTokenizer(config.student)
    prompts = Prompts.within(tokenizer, config.student.max_prompt_tokens, 640, config.outputs.max_new_tokens)
    answers = run.read_all("predictions").to_pylist()
    for task in tasks_of(run.read_all("tasks")):
        base = AutoModelForCausalLM.from_pretrained(resolve("embedded/nano"), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, f"{run.root}/models/{task.name}")
        for row in answers:
            if (row["task"], row["system"]) == (task.name, "selfguide"):
                ids = prompts.answering(task, row["input"]).ids
                whole = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
                assert tokenizer.decode(whole[0, len(ids) :].tolist()).strip() == row["prediction"]
