"""The embedded student: what it was trained on, and that its recipe works."""

import csv
import json
import random

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfguide_ray.embedded import resolve
from selfguide_ray.pretraining import (
    Recipe,
    documents,
    pack,
    pretrain,
    renamed,
    render,
    source_names,
    substitute,
    train_tokenizer,
    training_tasks,
    written,
)

NANO = resolve("embedded/nano")


@pytest.fixture(scope="module")
def sample_tasks(natural_instructions):
    return training_tasks(natural_instructions / "sample" / "tasks", natural_instructions / "splits")


def test_the_student_saw_training_tasks_only_and_no_source_of_a_test_task(natural_instructions):
    seen = set(json.loads((NANO / "training_tasks.json").read_text()))
    with (natural_instructions / "suite_index.csv").open(encoding="utf-8") as file:
        suite = {row["task"]: row for row in csv.DictReader(file)}
    assert len(seen) > 500
    assert {suite[name]["split_default"] for name in seen} == {"train"}
    assert {suite[name]["english_only"] for name in seen} == {"1"}
    test_sources = {
        s for row in suite.values() if row["split_default"] == "test" for s in row["source"].split("; ") if s
    }
    shared = {name for name in seen if test_sources & set(suite[name]["source"].split("; "))}
    # Upstream's own split has these two in train beside task249 in test; the recipe leaves them out from now on.
    assert shared <= {"task275_enhanced_wsc_paraphrase_generation", "task276_enhanced_wsc_classification"}


def test_the_package_stays_small():
    assert (NANO / "model.safetensors").stat().st_size < 16_000_000


def test_every_task_read_is_an_english_training_task(sample_tasks, natural_instructions):
    train = set((natural_instructions / "splits" / "default" / "train_tasks.txt").read_text().split())
    assert sample_tasks
    assert {task.name for task in sample_tasks} <= train


def test_a_source_counts_by_its_names_whatever_link_stands_behind_them():
    assert source_names(["wsc; Enhanced_WSC (https://a.org)", "snli"]) == {"wsc", "enhanced_wsc", "snli"}


def test_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    for text in ("In 2019, 3.14 cats", "naïve café ☕", 'She said "no".\nThen left.', "snake_case  double  space"):
        ids = tokenizer.encode(f"<|user|>{text}<|end|>", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_conversations_have_the_two_forms_and_labels_are_sometimes_renamed(make_task):
    examples = [(f"item number {i}", "Odd." if i % 2 else "even") for i in range(40)]
    labels = ("Odd.", "even")
    task = make_task("quiz", instruction="Answer odd. or Even", labels=labels, examples=examples, instances=[])
    made = documents([task], seed=3)
    answering = [m for m in made if m[1]["content"] == "Understood."]
    writing = [m for m in made if "Invent one more test item" in m[0]["content"]]
    assert len(answering) + len(writing) == len(made)
    assert writing
    answers = {turn["content"] for m in answering for turn in m[3::2]}
    assert {"Odd.", "even"} < answers
    for conversation in answering:  # a renamed label is renamed in the instruction too
        told = conversation[0]["content"].split("Answer ")[-1].lower()
        assert all(turn["content"].lower() in told for turn in conversation[3::2])


def test_labels_that_items_may_quote_are_not_renamed(make_task):
    assert renamed(make_task(labels=("A", "B")), random.Random(0)) == {}
    assert renamed(make_task(labels=("Yes.", "No.")), random.Random(0)) == {}
    assert set(renamed(make_task(labels=("good", "bad")), random.Random(0))) == {"good", "bad"}
    assert (
        substitute('Say "Good" or bad, not goodness.', {"good": "fox", "bad": "oak"})
        == 'Say "fox" or oak, not goodness.'
    )


def test_only_what_the_student_writes_counts_in_full():
    rows = np.array([[9, 2, 5, 1, 3, 6, 7, 1, 2, 8, 1, 3, 4]])  # 2 user, 3 assistant, 1 end
    assert written(rows).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]]


def test_packing_loses_nothing_but_the_last_row(make_task):
    texts = [render(m) for m in documents([make_task()], seed=1)] * 50
    tokenizer = train_tokenizer(iter(texts), 400)
    rows = pack(tokenizer, texts, 32)
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids[:33]]
    assert rows.shape[1] == 33
    assert rows.flatten().tolist() == ids[: rows.size]
    assert len(ids) - rows.size < 33


@pytest.mark.slow
def test_the_recipe_leaves_a_student_that_loads(tmp_path, natural_instructions):
    size = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 64}
    recipe = Recipe(vocabulary=512, context=128, minutes=0.1, threads=1, **size)
    figures = pretrain(natural_instructions / "sample" / "tasks", natural_instructions / "splits", tmp_path, recipe)
    assert figures["steps"] > 10
    assert figures["validation_loss"] < np.log(512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|end|>"
