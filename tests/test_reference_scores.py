"""`method: reference`: the reference code's metrics, its floors, and a whole run that ends in them."""

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from recording import RecordingEngine
from rich.console import Console

from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine.scripted import ByteTokenizer
from selfguide_ray.inputs import Inputs
from selfguide_ray.models import learn, packs, publish_untrained, untrained
from selfguide_ray.outputs import Outputs
from selfguide_ray.predictions import Predictions
from selfguide_ray.reference import METRICS, HeaderAndNewline, Scoring, character_rouge, reference_match
from selfguide_ray.report import headline, write_report
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Instance, task_rows
from selfguide_ray.scores import Scores
from selfguide_ray.significance import gains
from selfguide_ray.standings import FAMILIES, Board, score_table, standings
from selfguide_ray.task_files import read_task, task_files
from selfguide_ray.trainset import Trainset

ROOM = 1 << 16


def settings(*overrides):
    return load(overrides=["method=reference", *overrides])


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "gold", "labels", "value"),
    [
        # statement 21
        ("I do not know", "no", ("yes", "no"), 1.0),
        ("Yes", "yes", ("yes", "no"), 0.0),
        ("no, or rather yes", "yes", ("yes", "no"), 1.0),
        ("no, or rather yes", "no", ("yes", "no"), 0.0),
        ("Entails.", "entails", ("entails", "neutral"), 0.0),
        ("it entails.", "entails", ("entails", "neutral"), 1.0),
        ("", "no", ("yes", "no"), 0.0),
        ("perhaps", "no", ("yes", "no"), 0.0),
        # the first label of the list that fits at a place is taken there, and occurrences do not overlap
        ("B_entails", "B_entails", ("B", "B_entails"), 0.0),
        ("B_entails", "B_entails", ("B_entails", "B"), 1.0),
        ("abab", "bab", ("aba", "bab"), 0.0),
        ("a.c", "a.c", ("a.c",), 1.0),
        ("abc", "a.c", ("a.c",), 0.0),
        ("An Apple", "A", ("B", "A", "Neither"), 1.0),  # any capital A counts
        ("Yes.", "yes", ("Yes.", "yes"), 1.0),  # equal after normalisation
    ],
)
def test_the_references_exact_match(prediction, gold, labels, value):
    assert reference_match(prediction, gold, labels) == value


@pytest.mark.parametrize(
    ("prediction", "gold", "value"),
    [
        # statement 22
        ("the cat sat", "the cat sat", 1.0),
        ("the cat sat", "tac eht tas", 0.4545),
        ("abc", "", 0.0),
        ("The cat.", "the cat", 0.8),
        ("", "abc", 0.0),
        (" abc", "abc", 6 / 7),  # white space counts
        ("東京都", "東京", 0.8),
    ],
)
def test_the_references_rouge_is_over_characters(prediction, gold, value):
    assert character_rouge(prediction, gold) == pytest.approx(value, abs=5e-5)


def test_character_rouge_equals_the_textbook_table():
    def plain(one, other):
        table = np.zeros((len(one) + 1, len(other) + 1))
        for i, a in enumerate(one, start=1):
            for j, b in enumerate(other, start=1):
                table[i, j] = table[i - 1, j - 1] + 1 if a == b else max(table[i - 1, j], table[i, j - 1])
        common = table[-1, -1]
        return 2 * common / (len(one) + len(other)) if common else 0.0  # F1 of common/len and common/len

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc é\n", k=rng.randint(0, 30))) for _ in range(2))
        assert character_rouge(one, other) == pytest.approx(plain(one, other))


@pytest.fixture
def scoring():
    return lambda *overrides: Scoring(settings(*overrides), RecordingEngine())


def test_labels_are_the_golds_of_the_counted_instances_in_order_of_appearance(make_task, scoring):
    held_out = [("1", " no"), ("2", "not"), ("3", "no ")]  # "maybe", a label of the task, is no gold
    task = make_task(labels=("maybe", "not", "no"), instances=held_out)
    assert scoring()(task, ["no\n", "not", "maybe"]) == {"reference_match": [100.0, 0.0, 0.0]}
    late = replace(task, instances=task.instances[1:])
    assert scoring()(late, ["not", "maybe no"]) == {"reference_match": [100.0, 100.0]}


def test_the_first_reference_counts_stripped_and_the_prediction_as_it_is(make_task, scoring):
    task = replace(make_task(), instances=(Instance("a", "x", (" abc ", "abcd")),))
    assert scoring()(task, ["abc"]) == {"character_rouge": [100.0]}
    assert scoring()(task, ["abcd"])["character_rouge"] == [pytest.approx(600 / 7)]
    assert scoring()(task, [" abc"])["character_rouge"] == [pytest.approx(600 / 7)]


def test_instances_with_a_long_prompt_or_gold_do_not_count(make_task, scoring):
    task = make_task(instances=[("a", "x" * 20), ("word " * 200, "yes"), ("b", "x" * 21), ("c", "yes")])
    room = len(HeaderAndNewline(ByteTokenizer(), ROOM).answering(task, "a").ids)
    found = scoring("outputs.max_new_tokens=20", f"student.max_prompt_tokens={room}")
    assert found(task, ["x" * 20, "yes", "x" * 21, "no"]) == {"character_rouge": [100.0, 0.0]}
    # One token less, and the prompts would lose a demonstration.
    assert scoring(f"student.max_prompt_tokens={room - 1}")(task, ["yes"] * 4) == {}


def test_the_standard_metrics_count_what_the_references_leave_out(make_task):  # statement 24
    task = make_task(instances=[("a", "one"), ("word " * 200, "two")])
    config = settings("student.max_prompt_tokens=400", "predictions.systems=[copy]", "scores.bootstrap=20")
    told = {"task": task.name, "system": "copy", "input": "", "references": [], "finish_reason": "stop"}
    rows = [told | {"id": i.id, "prediction": i.references[0]} for i in task.instances]
    predictions = pa.Table.from_pylist(rows, schema=TABLES["predictions"])
    scores = Scores(config, None, RecordingEngine())(task_rows([task]), predictions).to_pylist()
    assert {row["metric"]: (row["n"], row["value"]) for row in scores} == {
        "exact_match": (2, 100.0), "rouge_l": (2, 100.0), "character_rouge": (1, 100.0)
    }  # fmt: skip
    board = Board([task], {(row["task"], row["metric"], row["system"]): row for row in scores}, ["copy"])
    lines = score_table(board)["groups"][""][0]["lines"]
    assert [(line["metric"], line["n"]) for line in lines] == [("character_rouge", 1), ("rouge_l", 2)]


# --- floors ----------------------------------------------------------------------------------------------------------

# Spec §5.2, over the reference's test split; at hand are up to 300 instances of a task. (task199 and task329 have other
# shares of labels here: the copy keeps the balanced head of a test task whole.)
COPY = {"task036": (0.366, 0.02), "task1345": (0.559, 0.02), "task1562": (0.652, 0.01)}
MAJORITY = {
    "task200": 0.335, "task937": 0.500, "task1386": 0.334, "task1612": 0.333, "task1615": 0.334, "task346": 0.500
}  # fmt: skip


@pytest.mark.slow
def test_floors_of_tasks_at_hand_are_those_of_the_specification(natural_instructions, scoring):  # statement 23
    found = {}
    score = scoring(f"student.max_prompt_tokens={ROOM}")
    for file in task_files(natural_instructions / "tasks.tar.xz"):
        number = file.name.split("_")[0]
        if number in COPY or number in MAJORITY:
            task = read_task(file)
            assert bool(task.labels) == (number in MAJORITY)
            common = Counter(i.references[0] for i in task.instances).most_common(1)[0]
            given = [common[0] if task.labels else instance.input for instance in task.instances]
            (values,) = score(task, given).values()
            assert len(values) == len(task.instances) > 140
            found[number] = sum(values) / len(values) / 100
            if task.labels:
                assert found[number] == pytest.approx(common[1] / len(values))
    for number, (value, tolerance) in COPY.items():
        assert found[number] == pytest.approx(value, abs=tolerance), number
    # Two standard errors of a share of 1/2 in 300.
    assert {number: found[number] for number in MAJORITY} == pytest.approx(MAJORITY, abs=0.058)


# --- a whole run -----------------------------------------------------------------------------------------------------

SHARD = "00000"
STANDARD = {"exact_match", "rouge_l"}


@pytest.fixture(scope="module")
def examples():
    """The tasks inside the package, twelve instances each."""
    tasks = [read_task(file) for file in task_files(resolve("embedded/tasks"))]
    return [replace(task, instances=task.instances[:12]) for task in tasks]


class SpacedEngine(RecordingEngine):
    """The scripted engine, with white space around its texts as models write it."""

    def generate(self, requests):
        return [
            [replace(c, text=f"{c.text} \n") for c in completions]
            if requests[0].params.temperature == 0
            else completions
            for completions in super().generate(requests)
        ]


@pytest.fixture(scope="module")
def whole(examples, tmp_path_factory):
    """The method over all example tasks, and the requests of each stage."""
    config = settings(
        f"run={tmp_path_factory.mktemp('reference')}",
        "student.engine=scripted",
        "inputs={rounds: 6, prompts_per_round: 5, length_sigmas: 4}",
        "outputs.samples=6",
        "trainset={keep: 5, length_sigmas: 4}",
        "scores.bootstrap=50",
    )
    run, engine, asked = Run(config.run), SpacedEngine(), {}
    run.write("tasks", SHARD, task_rows(examples), {})

    def work(kind):
        engine.requests = []
        stage = kind(config, run, engine)
        tables = [run.read(table, SHARD, columns) for table, columns in stage.reads.items()]
        assert run.write(stage.writes, SHARD, stage(*tables), {})
        asked[stage.writes] = [(engine.tokenizer.decode(r.prefix + r.suffix), r.params) for r in engine.requests]

    for stage in (Inputs, Outputs, Trainset):
        work(stage)
    for task, due in untrained(run, config).items():
        if not due.pairs:
            publish_untrained(run, task)
    learn(config, packs(run, config))
    for stage in (Predictions, Scores):
        work(stage)
    return config, run, asked


def test_raw_quotes_stay_in_inputs_and_reach_the_training_pairs(whole):  # B10
    _, run, _ = whole
    made, pairs = run.read("inputs", SHARD).to_pylist(), run.read("trainset", SHARD).to_pylist()
    assert {row["drop_reason"] for row in made} == {None, "length", "noise"}  # raw, no text repeats a stripped one
    quoted = {row["input"] for row in made if row["drop_reason"] is None and re.fullmatch('".*"', row["input"])}
    taught = [row for row in pairs if row["drop_reason"] is None and row["input"] in quoted]
    assert len(taught) > 3
    assert all(f"ITEM: {row['input']}\nASSISTANT:\n" in row["prompt"] for row in taught)


def test_each_stage_has_the_prompts_of_its_own(whole):
    _, run, asked = whole
    prompts = {stage: [prompt for prompt, _ in requests] for stage, requests in asked.items()}
    pairs = [row for row in run.read("trainset", SHARD).to_pylist() if row["prompt"]]
    assert {params.stops for requests in asked.values() for _, params in requests} == {()}
    assert all(prompt.endswith("\nITEM:") for prompt in prompts["inputs"])
    assert all(prompt.endswith("\nASSISTANT:") for prompt in prompts["outputs"])
    assert all(prompt.endswith("\nASSISTANT:\n") for prompt in prompts["predictions"])
    assert all(row["prompt"].endswith("\nASSISTANT:\n") for row in pairs)
    learned = {row["prompt"] for row in pairs if row["system"] == "selfguide"}
    assert learned <= {prompt + "\n" for prompt in prompts["outputs"]}
    assert not any(row["completion"].startswith(" ") for row in pairs)


def test_predictions_are_the_raw_texts(whole):
    _, run, _ = whole
    said = [row for row in run.read("predictions", SHARD).to_pylist() if row["system"] in ("few_shot", "selfguide")]
    assert said
    assert all(row["prediction"].endswith(" \n") for row in said)


def test_scores_hold_the_references_metric_beside_the_standard_ones(whole, examples):
    config, run, _ = whole
    answers = {(r["task"], r["system"], r["id"]): r["prediction"] for r in run.read("predictions", SHARD).to_pylist()}
    found = {(row["task"], row["system"], row["metric"]): row for row in run.read("scores", SHARD).to_pylist()}
    assert len(found) == 5 * (4 * 4 + 4 * 3)
    for task in examples:
        own = {"reference_match", "macro_f1"} if task.labels else {"character_rouge"}
        assert {metric for name, _, metric in found if name == task.name} == STANDARD | own
        gold = [i.references[0].strip() for i in task.instances]
        for system in config.predictions.systems:
            given = [answers[task.name, system, i.id] for i in task.instances]
            values = (
                [reference_match(a, g, list(dict.fromkeys(gold))) for a, g in zip(given, gold, strict=True)]
                if task.labels
                else list(map(character_rouge, given, gold))
            )
            row = found[task.name, system, "reference_match" if task.labels else "character_rouge"]
            assert (row["n"], row["value"]) == (12, pytest.approx(100 * sum(values) / 12))
            assert row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9


def test_the_references_metrics_are_what_systems_are_ranked_by(whole, examples):
    config, run, _ = whole
    board = Board.read(run, examples)
    for family, metric in {"classification": "reference_match", "generation": "character_rouge"}.items():
        told = standings(board, family)
        assert told["metric"] == metric == METRICS[family]
        few_shot = next(system for system in told["systems"] if system["name"] == "few_shot")
        tasks = [task for task in examples if bool(task.labels) == (family == "classification")]
        assert few_shot["values"] == [board.rows[task.name, metric, "few_shot"]["value"] for task in tasks]
    lines = {row["task"]: [line["metric"] for line in row["lines"]]
             for several in score_table(board)["groups"].values() for row in several}  # fmt: skip
    for task in examples:
        own = ["reference_match"] if task.labels else ["character_rouge"]
        assert lines[task.name] == [*own, task.metric, *(["macro_f1"] if task.labels else [])]
    found = {gain.task: gain for gain in gains(board)}
    assert {found[task.name].metric for task in examples} == {"reference_match", "character_rouge"}
    for task in examples:
        rows = {s: board.rows[task.name, board.main(task), s]["value"] for s in ("selfguide", found[task.name].rival)}
        assert found[task.name].points == pytest.approx(rows["selfguide"] - rows[found[task.name].rival])
    console = Console(width=200)
    with console.capture() as captured:
        console.print(headline(run))
    text = captured.get()
    assert "ref. EM" in text
    assert "char. ROUGE-L" in text
    write_report(run, config)
    page = run.get("report.html").decode()
    assert "ROUGE-L of characters" in page
    assert "exact match" in page


def test_other_runs_are_ranked_by_the_standard_metrics(examples):
    rows = {(task.name, task.metric, "copy"): {"value": 1.0, "n": 12, "system": "copy"} for task in examples}
    board = Board(examples, rows, ["copy"])
    assert {family: board.metric(family) for family in FAMILIES} == FAMILIES
    assert [board.main(task) for task in examples] == [task.metric for task in examples]
