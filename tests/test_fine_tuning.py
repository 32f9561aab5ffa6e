"""How one task is learned: the loss mask, the order of batches, the schedule, and adapters that others can load."""

import json
import os

import pytest
import torch
from pairs import pair, write_pairs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from selfguide_ray.config import Models
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, SamplingParams, make_engine
from selfguide_ray.failures import failures
from selfguide_ray.models import Pack, learn, packs, untrained
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import task_rows
from selfguide_ray.student import StudentTokenizer
from selfguide_ray.tuning.data_parallel import collate
from selfguide_ray.tuning.pairs import IGNORED, Pair, batches, rate_factor


@pytest.fixture
def planned(tmp_path, make_task):
    """A run with a task of two labels whose six pairs have been elected, and one without pairs."""

    def make(*overrides):
        config = load(
            None, [f"run={tmp_path / 'run'}", "models.batch_size=2", "models.learning_rate=0.003", *overrides]
        )
        run = Run(config.run)
        task, starved = make_task("colours", labels=("warm", "cold")), make_task("starved")
        prompts = Prompts(StudentTokenizer(config.student), 500)
        texts = [("red", "warm"), ("blue", "cold"), ("orange", "warm")] * 2
        rows = [pair(prompts, task, i, text, answer) for i, (text, answer) in enumerate(texts)]
        rows.append(
            {"task": "colours", "system": "selfguide", "id": "dropped", "drop_reason": "imbalanced", "tokens": 9000}
        )
        run.write("tasks", "00000", task_rows([task, starved]), {})
        write_pairs(run, "00000", rows)
        return config, run, [prompts.answering(task, text).ids for text in ("red", "blue")]

    return make


def learn_all(config, run):
    learn(config, packs(run, config))


def test_loss_lies_on_answer_and_eos_only_even_if_pad_is_eos():
    eos = 1
    pairs = [Pair((5, 6, 7), (8, eos)), Pair((5,), (9, 10, eos)), Pair((2, 3, eos, 4), (eos,))]
    ids, mask, labels = collate(pairs, pad=eos)
    assert ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 10, 1, 1], [2, 3, 1, 4, 1]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    none = IGNORED
    assert labels.tolist() == [[none, none, none, 8, 1], [none, 9, 10, 1, none], [none, none, none, none, 1]]


def test_every_epoch_sees_every_pair_once_in_an_order_that_the_seed_decides():
    settings = Models(epochs=3, batch_size=4)
    plan = list(batches(10, settings, seed=5))
    assert [len(members) for _, members in plan] == [4, 4, 2] * 3
    epochs = [[i for e, members in plan if e == epoch for i in members] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert plan == list(batches(10, settings, seed=5)) != list(batches(10, settings, seed=6))


def test_the_rate_falls_linearly_to_zero_after_its_warm_up():
    assert [rate_factor(step, 4, Models()) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [rate_factor(step, 6, Models(warmup_steps=2)) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert {rate_factor(step, 6, Models(schedule="constant")) for step in range(6)} == {1.0}


def test_an_adapter_teaches_its_task_and_others_load_it_with_equal_answers(one_process, planned):
    config, run, prompts = planned("models.epochs=40")
    learn_all(config, run)
    assert failures(run) == []
    told = run.get_json("models/colours/model.json")
    assert (told["pairs"], told["steps"], len(told["losses"])) == (6, 120, 40)
    assert told["losses"][-1] < 0.1 < told["losses"][0]
    folder = f"{run.root}/models/colours"
    engine = make_engine(config.student, config.cluster)
    params = SamplingParams(max_new_tokens=4)
    ours = [c.ids for (c,) in engine.generate([Request((), ids, params, adapter=folder) for ids in prompts])]
    assert [engine.tokenizer.decode(ids).strip() for ids in ours] == ["warm", "cold"]
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(resolve("embedded/nano"), dtype="float32"), folder
    )
    for ids, answer in zip(prompts, ours, strict=True):
        theirs = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert tuple(theirs[0, len(ids) :].tolist()) == (*answer, engine.tokenizer.hf.eos_token_id)
    asked = [Request((), ids, params) for ids in prompts]
    untouched = make_engine(config.student, config.cluster).generate(asked)
    assert engine.generate(asked) == untouched  # the adapter left no trace in the base


def test_a_task_is_learned_the_same_whatever_was_learned_before(one_process, planned):
    config, run, _ = planned()
    rows = run.read("trainset", "00000")
    run.write("tasks", "00001", run.read("tasks", "00000").slice(0, 0), {})
    learn(config, [Pack((("colours", "00000"),), 1)])
    alone = load_file(f"{run.root}/models/colours/adapter_model.safetensors")
    run.remove("models/colours")
    other = rows.set_column(0, "task", [["another"] * rows.num_rows])
    run.write("trainset", "00001", other, {})
    learn(config, [Pack((("another", "00001"),), 1), Pack((("colours", "00000"),), 1)])
    after = load_file(f"{run.root}/models/colours/adapter_model.safetensors")
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[name], after[name]) for name in alone)


def test_all_weights_can_be_trained_and_loaded(one_process, planned):
    config, run, prompts = planned("models.method=full", "models.epochs=25", "models.learning_rate=0.001")
    learn_all(config, run)
    assert failures(run) == []
    engine = make_engine(config.student, config.cluster)
    params, folder = SamplingParams(max_new_tokens=4), f"{run.root}/models/colours"
    answers = engine.generate([Request((), ids, params, adapter=folder) for ids in prompts])
    assert [c.text.strip() for (c,) in answers] == ["warm", "cold"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("models.target_modules=[nowhere]", "fits no module"),
        ("models.learning_rate=1.0e+30", "the loss is"),
        ("models.quantize=nf4", "nf4 cannot be had here"),
        ("models.deepspeed={zero_optimization: {stage: 9}}", "DeepSpeed does not accept"),
    ],
)
def test_a_task_that_cannot_be_trained_is_noted_and_leaves_nothing(one_process, planned, override, told):
    config, run, _ = planned(override)
    learn_all(config, run)
    ((table, unit, line),) = failures(run)
    assert (table, unit) == ("models", "colours")
    assert told in line
    assert run.trained() == []
    assert not [name for name in os.listdir(f"{run.root}/models") if name.startswith(".tmp-")]


def test_finished_tasks_are_skipped_and_a_success_forgets_the_failure(one_process, planned):
    config, run, _ = planned("models.target_modules=[nowhere]")
    learn_all(config, run)
    assert len(failures(run)) == 1
    config = config.model_copy(update={"models": load(None, ["models.epochs=1"]).models})
    learn_all(config, run)
    assert failures(run) == []
    before = json.dumps(run.get_json("models/colours/model.json"))
    learn(config, [Pack((("colours", "00000"),), 1)])
    assert json.dumps(run.get_json("models/colours/model.json")) == before
    assert untrained(run, config) == {"starved": ("00000", 0, 0)}
