"""The embedded student: what it was trained on, and that its recipe works, goes on after a kill, and says what is wrong."""

import csv
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from objects import BUCKET, environment, store
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfguide_ray.config_file import read
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.models import UNFINISHED
from selfguide_ray.pretraining import Recipe
from selfguide_ray.pretraining.corpus import (
    Naming,
    development_tasks,
    documents,
    pack,
    primer,
    render,
    source_names,
    stream,
    substitute,
    train_tokenizer,
    training_tasks,
    written,
)
from selfguide_ray.pretraining.learning import CURVE, Learning, learn, make_model, weights_of
from selfguide_ray.pretraining.made_up import FAMILIES, GROUPS, WORDS, made_up_task
from selfguide_ray.pretraining.muon import Muon, orthogonalized, split
from selfguide_ray.pretraining.recipe import make as made
from selfguide_ray.pretraining.recipe import prepare
from selfguide_ray.run import Run

NANO = resolve("embedded/nano")
JOB = Path(__file__).parents[1] / "jobs" / "pretrain.py"
SMALL = {"vocabulary": 512, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "feed_forward": 64, "context": 128}


@pytest.fixture(scope="module")
def source(natural_instructions, tmp_path_factory):
    """A checkout of Natural Instructions with a few of its tasks."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "tasks").symlink_to(natural_instructions / "sample" / "tasks")
    (folder / "splits").symlink_to(natural_instructions / "splits")
    return folder


@pytest.fixture(scope="module")
def sample_tasks(natural_instructions):
    return training_tasks(natural_instructions / "sample" / "tasks", natural_instructions / "splits")


# --- the student inside the package


def test_the_student_saw_training_tasks_only_and_no_source_of_a_test_task(natural_instructions):
    manifest = json.loads((NANO / "manifest.json").read_text())
    seen = set(manifest["tasks"])
    with (natural_instructions / "suite_index.csv").open(encoding="utf-8") as file:
        suite = {row["task"]: row for row in csv.DictReader(file)}
    assert len(seen) > 500
    assert {suite[name]["split_default"] for name in seen} == {"train"}
    assert {suite[name]["english_only"] for name in seen} == {"1"}
    test_sources = {
        s for row in suite.values() if row["split_default"] == "test" for s in row["source"].split("; ") if s
    }
    assert not {name for name in seen if test_sources & set(suite[name]["source"].split("; "))}
    # The training tasks to develop on were not seen either, nor any that shares a source with one.
    apart = set(manifest["development"])
    assert not seen & apart
    sources = {s for name in apart for s in suite[name]["source"].split("; ") if s}
    assert not {name for name in seen if sources & set(suite[name]["source"].split("; "))}


def test_the_package_stays_small():
    assert (NANO / "model.safetensors").stat().st_size < 16_000_000


def test_text_survives_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    for text in ("In 2019, 3.14 cats", "naïve café ☕", 'She said "no".\nThen left.', "snake_case  double  space"):
        ids = tokenizer.encode(f"<|user|>{text}<|end|>", add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


# --- the corpus


def test_every_task_read_is_an_english_training_task(sample_tasks, natural_instructions):
    train = set((natural_instructions / "splits" / "default" / "train_tasks.txt").read_text().split())
    assert sample_tasks
    assert {task.name for task in sample_tasks} <= train


def test_a_source_counts_by_its_names_whatever_link_stands_behind_them():
    assert source_names(["wsc; Enhanced_WSC (https://a.org)", "snli"]) == {"wsc", "enhanced_wsc", "snli"}


def test_development_tasks_share_no_source_with_the_others(make_task):
    sources = [("a",), ("a", "b"), ("b",), ("c",), ("d",), ("e", "c"), ("f",), (), ()]
    tasks = [make_task(f"task{n}", sources=some) for n, some in enumerate(sources)]
    for seed in range(20):
        chosen = development_tasks(tasks, 16, seed)
        assert 0 < len(chosen) <= 16
        for one, other in itertools.product(tasks, tasks):
            if one.name in chosen and other.name not in chosen:
                assert not set(one.sources) & set(other.sources)
    assert len({frozenset(development_tasks(tasks, 2, seed)) for seed in range(10)}) > 3
    assert development_tasks(tasks, 0, 1) == set()


def test_conversations_have_the_two_forms_and_labels_are_sometimes_renamed(make_task):
    examples = [(f"item number {i}", "Odd." if i % 2 else "even") for i in range(80)]
    labels = ("Odd.", "even")
    task = make_task("quiz", instruction="Answer odd. or Even", labels=labels, examples=examples, instances=[])
    made = documents([task], seed=3)
    answering = [m for m in made if m[1]["content"] == "Understood."]
    writing = [m for m in made if "Invent one more test item" in m[0]["content"]]
    assert len(answering) + len(writing) == len(made)
    assert writing
    items = [turn["content"] for m in answering for turn in m[2::2]]
    assert len(items) == len(set(items)) == 80  # each is answered once
    answers = {turn["content"] for m in answering for turn in m[3::2]}
    assert {"Odd.", "even"} < answers
    for conversation in answering:  # a renamed label is renamed in the instruction too
        told = conversation[0]["content"].split("Answer ")[-1].lower()
        assert all(turn["content"].lower() in told for turn in conversation[3::2])


def test_how_often_labels_are_renamed_and_how_many_examples_are_shown_can_be_set(make_task):
    examples = [(f"item number {i}", "odd" if i % 2 else "even") for i in range(80)]
    task = make_task("quiz", labels=("odd", "even"), examples=examples, instances=[])

    def answering(**given):
        return [m for m in documents([task], seed=3, **given) if len(m) > 2]

    def answers(made):
        return {turn["content"] for m in made for turn in m[3::2]}

    assert answers(answering(renamed=0.0)) == {"odd", "even"}
    assert not answers(answering(renamed=1.0)) & {"odd", "even"}
    assert {len(m) for m in answering(turns=0)} == {4}  # the instruction and one item, each with its answer
    assert max(len(m) for m in answering(turns=2)) == 8


def test_names_from_the_texts_are_many_and_differ_within_a_task(make_task):
    task = make_task("quiz", labels=("odd", "even", "neither."))
    naming, rng = Naming(["Apple", "pear", "plum", "fig", "kiwi"]), random.Random(0)
    drawn = [naming(task, rng) for _ in range(600)]
    assert all(len(set(names.values())) == 3 for names in drawn)
    names = {name for several in drawn for name in several.values()}
    assert {len(name.split()) for name in names} == {1, 2, 3}
    assert {"apple", "Apple", "APPLE", "apple.", "Fig Kiwi"} <= names
    for labels in (("A", "B"), ("1", "2"), ("yes", "a (b)")):
        assert naming(make_task(labels=labels), rng) == {}
    several = make_task(labels=("main course", "non-veg", "snack."))
    assert naming(several, rng).keys() == set(several.labels)
    assert Naming()(several, rng) == {}
    examples = [(f"item number {i}", "odd" if i % 2 else "even") for i in range(80)]
    task = make_task("quiz", labels=("odd", "even"), examples=examples, instances=[])
    made = documents([task], seed=3, renamed=1.0, names="texts")
    answers = {turn["content"].lower().rstrip(".") for m in made if len(m) > 2 for turn in m[3::2]}
    assert {word for answer in answers for word in answer.split()} == {"item", "number"}


def test_a_label_inside_another_keeps_out_of_it():
    told = {"true": "fig", "not true": "Kiwi Pear", "fig": "plum."}
    text = "Say Not true, TRUE or fig; untrue is no label."
    assert substitute(text, told) == "Say Kiwi Pear, fig or plum.; untrue is no label."
    assert substitute(text, {}) == text


def test_a_bounded_corpus_takes_as_much_of_a_large_task_as_of_a_small_one(make_task):
    def of(name, count):
        return make_task(
            name, instruction=f"Do {name}.", examples=[(f"{name} {i}", str(i)) for i in range(count)], instances=[]
        )

    made = documents([of("large", 900), of("small", 300)], seed=1, made_up=0.2, most=50)
    told = [next((n for n in ("large", "small") if f"{n} " in m[-2]["content"]), "made up") for m in made]
    assert {name: told.count(name) for name in set(told)} == {"large": 20, "small": 20, "made up": 10}
    assert documents([of("large", 900)], seed=1, most=50) == documents([of("large", 900)], seed=1, most=50)


def test_long_inputs_are_left_out(make_task):
    instances = [("word " * n, "yes") for n in range(1, 40)]
    task = make_task("one", examples=[("a", "yes"), ("b", "no")], instances=instances)
    for longest in (50, 1000):
        made = [m for m in documents([task], seed=1, longest=longest) if len(m) > 2]
        inputs = {turn["content"].removeprefix("ITEM: ").strip() for m in made for turn in m[2::2]}
        assert inputs == {"a", "b"} | {text.strip() for text, _ in instances if len(text) <= longest}


def test_another_round_shows_the_same_items_in_other_company(make_task):
    task = make_task("one", examples=[(f"item {i}", str(i)) for i in range(60)], instances=[])
    made = documents([task], seed=1, rounds=2)
    items = [turn["content"] for m in made if len(m) > 2 for turn in m[2::2]]
    assert {items.count(item) for item in items} == {2}
    assert len({m[-2]["content"] for m in made}) > 0.6 * len(made)


def test_labels_that_items_may_quote_are_not_renamed(make_task):
    assert Naming()(make_task(labels=("A", "B")), random.Random(0)) == {}
    assert Naming()(make_task(labels=("Yes.", "No.")), random.Random(0)) == {}
    assert set(Naming()(make_task(labels=("good", "bad")), random.Random(0))) == {"good", "bad"}
    assert (
        substitute('Say "Good" or bad, not goodness.', {"good": "fox", "bad": "oak"})
        == 'Say "fox" or oak, not goodness.'
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.strip("_"))
def test_made_up_tasks_are_answered_by_what_is_read(family):
    known = set(WORDS) | {word for words in GROUPS.values() for word in words}
    for seed in range(30):
        instruction, labels, draw = family(random.Random(seed))
        drawn = [draw() for _ in range(8)]
        again = family(random.Random(seed))[2]
        assert [again() for _ in range(8)] == drawn
        for item, answer in drawn:
            assert item
            assert answer
            if labels:
                assert answer in labels
                assert answer in instruction
            elif not answer.isdigit():
                told = set(re.findall(r"\w+", f"{item} {instruction}"))
                assert known & set(re.findall(r"\w+", answer)) <= told


def test_a_made_up_task_has_items_that_all_differ():
    tasks = [made_up_task(random.Random(seed), 8) for seed in range(60)]
    assert all(len({e.input for e in task.examples}) == len(task.examples) for task in tasks)
    assert sum(len(task.examples) == 8 for task in tasks) > 50
    assert len({task.instruction for task in tasks}) > 30


def test_only_what_the_student_writes_counts_in_full():
    rows = np.array([[9, 2, 5, 1, 3, 6, 7, 1, 2, 8, 1, 3, 4]])  # 2 user, 3 assistant, 1 end
    assert written(rows).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]]
    assert weights_of(rows, 0.25)[0, 3:6].tolist() == [0.25, 1, 1]
    # The first turn has three tokens, the second one: each weighs as much as six.
    assert weights_of(rows, 0.25, least_turn=6)[0].tolist() == [*[0.25] * 4, 2, 2, 2, *[0.25] * 4, 6]
    two = np.concatenate([rows, rows])
    assert (weights_of(two, 0.25, least_turn=2) == weights_of(rows, 0.25, least_turn=2)).all()
    assert weights_of(rows, 0.25, least_turn=2)[0, 4:7].tolist() == [1, 1, 1]


def test_packing_keeps_every_document_whole(make_task):
    texts = [render(m) for m in documents([make_task()], seed=1)] * 50
    usual = len(texts)
    texts += [f"<|user|>{'long ' * n}<|end|>" for n in (1, 9, 5000)]
    tokenizer = train_tokenizer(iter(texts), 400)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    context = 4 * max(map(len, ids[:usual]))
    assert len(ids[-1]) > context  # and is cut
    rows = pack(tokenizer, texts, context, seed=3)
    assert rows.shape[1] == context + 1
    found = []
    for row in rows.tolist():
        used = np.count_nonzero(row)
        assert 0 not in row[:used]  # padding comes last
        found.append(row[:used])
    whole = [one[: context + 1] for one in ids]
    assert sum(map(len, found)) == sum(map(len, whole))
    text = ["".join(f"{token} " for token in row) for row in found]
    assert all(any("".join(f"{token} " for token in one) in row for row in text) for one in whole)
    assert sum(map(len, found)) > 0.8 * rows.size  # little room is lost
    assert (pack(tokenizer, texts, context, seed=3) == rows).all()
    assert (pack(tokenizer, texts, context, seed=4) != rows).any()


def test_what_primes_can_only_be_answered_by_copying(make_task):
    task = make_task(examples=[(f"{a}ling {a}{b}ton", "x") for a, b in itertools.permutations("abcdefghij", 2)])
    made = list(itertools.islice(primer([task], seed=1), 200))
    assert made == list(itertools.islice(primer([task], seed=1), 200))
    assert made != list(itertools.islice(primer([task], seed=2), 200))
    kinds = {conversation[0]["content"]: 0 for conversation in made}
    for conversation in made:
        items, answers = [m["content"] for m in conversation[2::2]], [m["content"] for m in conversation[3::2]]
        assert len(items) == len(answers) == 5
        for item, answer in zip(items, answers, strict=True):
            words = item.removeprefix("ITEM: ").split()
            if "again" in conversation[0]["content"]:
                assert words == answer.split()
            else:
                assert dict(zip(words[:-1:2], words[1::2], strict=True))[words[-1]] == answer
        kinds[conversation[0]["content"]] += 1
    assert min(kinds.values()) > 30
    tokenizer = train_tokenizer((render(m) for m in made), 400)
    rows = stream(tokenizer, (render(m) for m in primer([task], 1)), 64, 1000)
    assert rows.shape == (1000, 65)
    assert (rows != 0).all()


def test_padding_weighs_nothing():
    rows = np.array([[2, 5, 1, 3, 6, 1, 0, 0]])
    assert weights_of(rows, 0.25).tolist() == [[0.25, 0.25, 0.25, 1, 1, 0, 0]]


# --- Muon


def test_a_direction_is_about_orthogonal():
    for shape in ((24, 24), (48, 16), (16, 48)):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonalized(matrix))
        assert values.min() > 0.3
        assert values.max() < 1.3
        # The singular vectors are the matrix's own.
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = (u.T @ orthogonalized(matrix) @ v.T).abs()
        assert (inner - inner.diag().diag()).max() < 0.05


def test_muon_moves_matrices_and_leaves_the_rest_to_adamw():
    def model():
        torch.manual_seed(0)
        return make_model(Recipe(shape=SMALL).shape)

    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    one, other = model(), model()
    matrices, others = split(one)
    names = {id(p): name for name, p in one.named_parameters()}
    assert {names[id(p)] for p in others} == {n for n in names.values() if "norm" in n or "embed" in n}
    assert len(matrices) == 7
    muon = Muon(matrices, others, dtype=torch.float32, **settings)
    adamw = torch.optim.AdamW(other.parameters(), **settings)
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    for student, optimizer in ((one, muon), (other, adamw)):
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if "norm" in name or "embed" in name:
            assert torch.equal(parameter, moved[name])
            assert muon.moments(parameter) == ("exp_avg", "exp_avg_sq")
        else:
            # A step is as long as AdamW's: about the learning rate in each number.
            step = (parameter - before[name] * (1 - 1e-3)).square().mean().sqrt() / 1e-2
            assert 0.1 < step < 0.3
            assert muon.moments(parameter) == ("exp_avg",)
    losses = [one(input_ids=ids, labels=ids).loss.item()]
    for _ in range(20):
        muon.zero_grad()
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        muon.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


# --- the recipe


def recipe_of(source, output, **more):
    settings = {"tokens": 30_000, "batch_rows": 4, "warmup_steps": 5, "development": 8, "primer_tokens": 4000} | more
    return Recipe.model_validate({"output": str(output), "source": str(source), "shape": SMALL} | settings)


def make(recipe, train):
    return Path(made(recipe, train))


def here(recipe):
    learn(recipe, 0, 1)


def told_of(folder):
    return json.loads((folder / "pretraining.json").read_text())


def test_the_rate_rises_stays_and_falls_to_nothing():
    recipe = Recipe(tokens=100 * 1024 * 8, warmup_steps=10, learning_rate=2.0, decay=0.5)
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert len(rates) == 100
    assert rates[:2] == [0.2, 0.4]
    assert set(rates[9:51]) == {2.0}
    assert rates[-1] == pytest.approx(2.0 / 50)


@pytest.mark.slow
def test_the_recipe_leaves_a_student_that_loads_and_its_card(source, tmp_path, one_process):
    recipe = recipe_of(source, tmp_path / "a")
    student = make(recipe, here)
    told = told_of(student)
    assert told["tokens"] == 58 * 4 * 128
    first, last = told["curve"][0], told["curve"][-1]
    assert first[1] > last[1]
    assert told["validation_loss"] < np.log(512)
    model = AutoModelForCausalLM.from_pretrained(student)
    assert model.config.hidden_size == 32
    assert AutoTokenizer.from_pretrained(student).eos_token == "<|end|>"
    manifest = json.loads((student / "manifest.json").read_text())
    assert manifest["tasks"]
    assert not set(manifest["tasks"]) & set(manifest["development"])
    card = (student / "README.md").read_text()
    assert f"{told['validation_loss']} nats" in card
    # From scratch again, it is the same student.
    again = make(recipe_of(source, tmp_path / "b"), here)
    assert told_of(again)["curve"] == told["curve"]
    assert (again / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_recipe_on_an_object_store_leaves_the_same_student(source, tmp_path, one_process, monkeypatch):
    local = make(recipe_of(source, tmp_path / "a", tokens=10_000), here)
    with store() as port:
        for name, value in environment(port).items():
            monkeypatch.setenv(name, value)
        assert made(recipe_of(source, f"s3://{BUCKET}/work", tokens=10_000), here) == f"s3://{BUCKET}/work/student"
        run = Run(f"s3://{BUCKET}/work")
        assert run.names("student") == sorted(path.name for path in local.iterdir())
        assert run.get("student/model.safetensors") == (local / "model.safetensors").read_bytes()
        assert run.get_json("student/pretraining.json")["curve"] == told_of(local)["curve"]


def test_a_student_can_be_gone_on_with(source, tmp_path, one_process):
    first = make(recipe_of(source, tmp_path / "a"), here)
    more = {"start": str(first), "seed": 7, "warmup_steps": 0, "primer_tokens": 0}
    second = make(recipe_of(source, tmp_path / "b", **more), here)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    manifests = [json.loads((student / "manifest.json").read_text()) for student in (first, second)]
    assert manifests[0]["development"] == manifests[1]["development"]
    assert told_of(second)["curve"][0][1] < told_of(first)["curve"][0][1] - 0.5  # it begins where the first ended
    assert f"went on from {first}" in " ".join((second / "README.md").read_text().split())
    third = make(
        recipe_of(source, tmp_path / "c", start=str(second), tokens=600, warmup_steps=0, primer_tokens=0), here
    )
    before = json.loads((third / "start.json").read_text())
    assert before == told_of(second) | {"start": told_of(first)}  # the whole way from scratch


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(source, tmp_path):
    with pytest.raises(SelfGuideError, match=r"holds no pretraining[.]json and no manifest[.]json"):
        make(recipe_of(source, tmp_path / "out", start=str(tmp_path)), here)
    with pytest.raises(SelfGuideError, match="has another shape"):
        make(recipe_of(source, tmp_path / "out", start="embedded/nano"), here)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, as torch.compile does on a CPU")
def test_products_in_bfloat16_and_a_compiled_model_learn_about_the_same(source, tmp_path, one_process):
    plain = told_of(make(recipe_of(source, tmp_path / "plain", rows_per_pass=4), here))
    told = told_of(make(recipe_of(source, tmp_path / "mixed", rows_per_pass=4, dtype="mixed", compile=True), here))
    for (_, one), (_, other) in zip(plain["curve"], told["curve"], strict=True):
        assert one == pytest.approx(other, rel=0.01)
    assert plain["curve"] != told["curve"]


@pytest.mark.parametrize("more", ["zero_stage=1", "dtype=bfloat16"])
def test_muon_is_refused_where_matrices_are_not_whole(tmp_path, more):
    config = Path(__file__).parents[1] / "configs" / "student-nano.yaml"
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, JOB, config, more, f"output={output}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    told = " ".join(done.stderr.split())
    assert f"optimizer: muon does not go with {'zero_stage=1' if 'zero' in more else 'zero_stage=0'}" in told
    assert "Muon sees a matrix as a whole" in told
    assert "Set zero_stage=0 and dtype=mixed or float32, or optimizer=adamw." in told
    assert not output.exists()


@pytest.mark.slow
def test_more_tokens_may_be_asked_for_until_the_rate_falls(source, tmp_path, one_process, monkeypatch):
    class Stop(Exception):
        pass

    def stopping(at):
        honest = Learning._learn

        def learn_until(self):
            if self.step == at:
                self._remember()
                raise Stop
            return honest(self)

        return learn_until

    whole = make(recipe_of(source, tmp_path / "whole"), here)
    for at, tokens, goes_on in ((20, 20_000, True), (35, 20_000, False)):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(Learning, "_learn", stopping(at))
            with pytest.raises(Stop):
                make(recipe_of(source, folder, tokens=tokens), here)
        if goes_on:
            assert told_of(make(recipe_of(source, folder), here))["curve"] == told_of(whole)["curve"]
        else:
            with pytest.raises(SelfGuideError, match="another number than the training was begun with"):
                make(recipe_of(source, folder), here)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_killed_recipe_goes_on_to_the_same_student(source, tmp_path, one_process):
    calm = make(recipe_of(source, tmp_path / "calm", tokens=150_000, optimizer="muon"), here)
    run = Run(str(tmp_path / "killed"))
    settings = {"tokens": 150_000, "batch_rows": 4, "warmup_steps": 5, "development": 8, "checkpoint_seconds": 0}
    settings |= {"primer_tokens": 4000, "optimizer": "muon"}
    config = tmp_path / "student.yaml"
    config.write_text(json.dumps({"output": run.root, "source": str(source), "shape": SMALL} | settings))
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in group}

    def start():
        return subprocess.Popen([sys.executable, JOB, config], env=environment, start_new_session=True)

    process = start()
    try:
        while (run.get_json(CURVE) or {"step": 0})["step"] < 50:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the driver and the cluster that it started
        process.wait()
    kept = run.get_json(CURVE)["step"]
    assert kept < 292
    process = start()
    assert process.wait(300) == 0
    assert not run.names(UNFINISHED)
    curve = told_of(Path(run.root) / "student")["curve"]
    assert curve == told_of(calm)["curve"]
    assert (Path(run.root) / "student" / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


# --- errors


def test_a_folder_that_is_no_checkout_is_explained(tmp_path):
    with pytest.raises(SelfGuideError) as caught:
        make(recipe_of(tmp_path, tmp_path / "out"), here)
    assert "is no checkout of Natural Instructions" in caught.value.what
    assert "Clone" in caught.value.instead
    assert not (tmp_path / "out").exists()


def test_a_corpus_with_nothing_to_learn_is_explained(source, tmp_path):
    with pytest.raises(SelfGuideError, match="nothing is left to learn"):
        prepare(Run(str(tmp_path)), recipe_of(source, tmp_path, documents=5))


def test_another_recipe_in_the_same_folder_is_refused(source, tmp_path):
    with pytest.raises(SelfGuideError, match="nothing is left"):
        make(recipe_of(source, tmp_path, documents=5), here)
    with pytest.raises(SelfGuideError) as caught:
        make(recipe_of(source, tmp_path, documents=5, seed=7), here)
    assert caught.value.what.endswith("was begun with other settings: seed.")


def test_a_setting_that_a_recipe_lacks_is_explained(tmp_path):
    path = tmp_path / "student.yaml"
    path.write_text("shape: {hiden: 3}")
    with pytest.raises(SelfGuideError) as caught:
        read(Recipe, path)
    assert caught.value.instead == "Did you mean shape.hidden?"


@pytest.mark.parametrize("size", ["nano", "small"])
def test_the_recipes_of_the_project_are_read(size):
    recipe = read(Recipe, Path(__file__).parents[1] / "configs" / f"student-{size}.yaml")
    assert recipe.output == f"runs/student-{size}"


@pytest.mark.parametrize("name", ["source", "start"])
def test_what_a_recipe_reads_from_disk_only_is_refused_as_a_uri(name):
    with pytest.raises(SelfGuideError) as refused:
        Recipe.model_validate({name: "s3://bucket/folder"})
    assert refused.value.what == f"{name}: s3://bucket/folder is a URI."


def test_an_output_that_is_no_place_is_refused_by_name(source):
    with pytest.raises(SelfGuideError, match="zz:// is no place for a run"):
        make(recipe_of(source, "zz://bucket/work"), here)
