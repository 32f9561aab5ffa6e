"""Metrics: equal to the official ones, and intervals that behave."""

import json
import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from selfguide_ray.metrics import METRICS, bootstrap_interval, exact_match, macro_f1, normalize, rouge_l

WORDS = (
    *(
        "the",
        "a",
        "running",
        "runs",
        "ran",
        "cities",
        "city",
        "gas",
        "ga",
        "happily",
        "U.S.",
        "don't",
        "state-of-the-art",
    ),
    *("3.14", "-5", "é", "naïve", "東京", "Wörter", "x1y2", "ALL", "_", "?!", "\n"),
)


def test_the_official_vectors_score_the_same(natural_instructions):
    lines = (natural_instructions / "eval_vectors.jsonl").read_text(encoding="utf-8").split("\n")
    vectors = [json.loads(line) for line in lines if line]
    assert len(vectors) == 191
    for vector in vectors:
        prediction, references = vector["prediction"], vector["references"]
        assert exact_match(prediction, references) == vector["exact_match"], vector["case"]
        assert abs(rouge_l(prediction, references) - vector["rougeL"]) < 1e-9, vector["case"]


def test_rouge_equals_rouge_score_on_random_texts():
    scorer, rng = RougeScorer(["rougeL"], use_stemmer=True), random.Random(0)
    above = 0
    for _ in range(400):
        prediction, *references = (
            " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 12))) for _ in range(rng.randint(2, 4))
        )
        official = max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)
        assert abs(rouge_l(prediction, references) - official) < 1e-9, (prediction, references)
        above += official > 0
    assert above > 200


@pytest.mark.parametrize(
    ("prediction", "references", "match", "rouge"),
    [
        ("the cat sat", ["the cat sat"], 1.0, 1.0),
        ("The cat.", ["the cat"], 1.0, 1.0),
        ("the cat", ["the dog", "the cat"], 1.0, 1.0),
        ("cat the", ["the cat"], 0.0, 0.5),
        ("cities", ["city"], 0.0, 1.0),
        ("runs", ["run"], 0.0, 1.0),
        ("gas", ["ga"], 0.0, 0.0),  # words of three letters are not stemmed
        ("abc", [""], 0.0, 0.0),
        ("", [""], 1.0, 0.0),
        ("", ["abc"], 0.0, 0.0),
        ("x", [], 0.0, 0.0),
        ("東京", ["東京"], 1.0, 0.0),
    ],
)
def test_known_scores(prediction, references, match, rouge):
    assert exact_match(prediction, references) == match
    assert rouge_l(prediction, references) == pytest.approx(rouge)


def test_normalisation_keeps_articles_and_deletes_punctuation():
    assert normalize(" The  Cat's\nA-Z. ") == "the cats az"


def test_there_are_two_official_metrics():
    assert {"exact_match": exact_match, "rouge_l": rouge_l} == METRICS


@pytest.mark.parametrize(
    ("predictions", "references", "value"),
    [
        (["a", "b"], [["a"], ["b"]], 1.0),
        (["a", "a"], [["a"], ["b"]], (2 / 3 + 0) / 2),
        (["a", "a", "b", "b"], [["a"], ["b"], ["b"], ["b"]], (2 / 3 + 4 / 5) / 2),
        (["A.", "B"], [["a"], ["b"]], 1.0),
        (["c", "b"], [["a"], ["b"]], 0.5),  # an answer that is no class
        (["", ""], [["a"], ["b"]], 0.0),
        (["a"], [["a", "b"]], 1.0),
        (["b"], [["a", "b"]], 0.0),  # the first reference is the class
        ([], [], 0.0),
    ],
)
def test_macro_f1_is_the_mean_over_the_classes(predictions, references, value):
    assert macro_f1(predictions, references) == pytest.approx(value)


def test_a_bootstrap_interval_holds_the_mean_and_narrows_with_the_number_of_values():
    def width(count):
        values = [float(number % 2) for number in range(count)]
        low, high = bootstrap_interval(values, 2000, seed=1)
        assert low < 0.5 < high
        assert high - low == pytest.approx(2 * 1.96 * 0.5 / count**0.5, rel=0.15)
        return high - low

    assert width(400) < width(100) / 1.7


def test_a_bootstrap_interval_of_equal_values_is_that_value():
    assert bootstrap_interval([70.0] * 9, 100, seed=0) == (70.0, 70.0)
    assert bootstrap_interval([3.0], 100, seed=0) == (3.0, 3.0)


def test_a_bootstrap_interval_depends_on_its_seed_alone():
    values = [random.Random(number).random() for number in range(30)]
    assert bootstrap_interval(values, 500, 1) == bootstrap_interval(values, 500, 1)
    assert bootstrap_interval(values, 500, 1) != bootstrap_interval(values, 500, 2)
    assert all(min(values) <= end <= max(values) for end in bootstrap_interval(values, 500, 1))
