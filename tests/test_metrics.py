"""Metrics: equal to the official ones, intervals that behave, and tests of pairs that keep their level."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from selfguide_ray.metrics import (
    METRICS,
    benjamini_hochberg,
    bootstrap_interval,
    exact_match,
    macro_f1,
    normalize,
    paired_bootstrap,
    rouge_l,
    sign_flip_p,
)

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


def all_patterns(differences):
    """The p-value by its definition: every pattern of signs, zeros flipped too."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(s * v for s, v in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(one >= seen for one in sums) / len(sums)


@pytest.mark.parametrize("kind", ["right or wrong", "in eighths", "anything"])
def test_the_p_value_of_few_pairs_is_the_share_of_all_patterns_of_signs(kind):
    rng, small = random.Random(kind), 0
    draw = {
        "right or wrong": lambda: rng.choice((-100, 0, 100, 100)),
        "in eighths": lambda: rng.randint(-8, 24) / 8,  # many ties, between patterns and at zero
        "anything": lambda: rng.gauss(0.5, 1),
    }[kind]
    for number in range(60):
        differences = [draw() for _ in range(1 + number % 9)]
        p = sign_flip_p(differences, seed=number)
        assert p == pytest.approx(all_patterns(differences), abs=1e-12), differences
        small += p < 0.05
    assert small > 1


def test_of_more_pairs_a_sample_of_patterns_gives_nearly_the_same_p_value():
    rng = random.Random(4)
    for shift in (0.0, 0.4, 0.8):
        differences = [rng.gauss(shift, 1) for _ in range(14)]
        exact = all_patterns(differences)
        error = 4 * math.sqrt(exact * (1 - exact) / 10_000) + 2e-4
        assert sign_flip_p(differences, seed=1) == pytest.approx(exact, abs=error)


def test_right_or_wrong_is_mcnemars_exact_test_at_any_size():
    # 40 answers became right and 20 wrong of 500: twice the tail of 60 fair coins.
    differences = [100.0] * 40 + [-100.0] * 20 + [0.0] * 440
    tail = sum(math.comb(60, k) for k in range(40, 61)) / 2**60
    assert sign_flip_p(differences, seed=0) == pytest.approx(2 * tail)
    assert sign_flip_p([100.0] * 3000, seed=0) == pytest.approx(0.0, abs=1e-300)


def test_a_sampled_p_value_is_never_zero():
    assert sign_flip_p([1.0 + n / 100 for n in range(100)], seed=0) == 1 / 10_001


def test_columns_that_are_alike_have_a_p_value_of_1():
    assert paired_bootstrap([3.0, 50.0, 0.1 + 0.2], [3.0, 50.0, 0.3], 100, seed=0)[3] == 1.0
    assert sign_flip_p([100.0, -100.0], seed=0) == 1.0
    assert sign_flip_p([5.0, -7.0, 2.0], seed=0) == 1.0


@pytest.mark.parametrize("pairs", [6, 12, 40])
@pytest.mark.parametrize("kind", ["right or wrong", "anything"])
def test_under_the_null_a_p_value_is_below_its_level_no_more_often_than_that(pairs, kind):
    rng = np.random.default_rng([pairs, len(kind)])
    trials, levels = 400, (0.05, 0.2)
    found = []
    for number in range(trials):
        ours, theirs = (
            rng.integers(0, 2, (2, pairs)) * 100 if kind == "right or wrong" else rng.gamma(0.5, 30, (2, pairs))
        )
        found.append(sign_flip_p((ours - theirs).tolist(), seed=number))
    for level in levels:
        # With the level kept, more than this many of 400 happen once in 1,000 times at most.
        allowed = next(
            k
            for k in range(trials)
            if sum(math.comb(trials, i) * level**i * (1 - level) ** (trials - i) for i in range(k + 1)) >= 0.999
        )
        assert sum(p <= level for p in found) <= allowed
    if kind == "anything" and pairs > 6:  # and nothing is given away where ties are rare
        assert sum(p <= 0.2 for p in found) > 0.14 * trials


def test_a_paired_interval_is_that_of_the_differences_and_needs_fewer_pairs_than_two_of_its_own():
    rng = np.random.default_rng(3)
    theirs = rng.uniform(0, 100, 80)
    ours = theirs + rng.normal(4, 5, 80)  # hard instances are hard for both
    told = paired_bootstrap(ours, theirs, 2000, seed=9)
    assert told.gain == pytest.approx(ours.mean() - theirs.mean())
    assert told.gain - told.low == pytest.approx(1.96 * (ours - theirs).std() / 80**0.5, rel=0.15)
    assert told.low > 0
    assert told.p < 0.001
    assert bootstrap_interval(ours, 2000, 9)[0] < theirs.mean()  # unpaired, nothing would be seen
    assert paired_bootstrap(ours, theirs, 0, seed=9) == (told.gain, None, None, told.p)


def test_a_paired_result_changes_its_sign_with_the_order_of_the_systems():
    ours, theirs = [random.Random(n).random() for n in range(30)], [random.Random(-n - 1).random() for n in range(30)]
    one, other = paired_bootstrap(ours, theirs, 500, 2), paired_bootstrap(theirs, ours, 500, 2)
    assert (one.gain, one.low, one.high) == pytest.approx((-other.gain, -other.high, -other.low))
    assert one.p == other.p


# The 15 p-values of Benjamini and Hochberg (1995, section 3.2), who find the first four at 0.05.
PAPER = [
    0.0001,
    0.0004,
    0.0019,
    0.0095,
    0.0201,
    0.0278,
    0.0298,
    0.0344,
    0.0459,
    0.3240,
    0.4262,
    0.5719,
    0.6528,
    0.7590,
    1.0,
]


def test_q_values_of_the_papers_example():
    q_values = benjamini_hochberg(PAPER)
    assert [q <= 0.05 for q in q_values] == [True] * 4 + [False] * 11
    # By hand: p * 15 / rank; ranks 6 to 8 (0.0695, 0.0639, 0.0645) take the lowest that follows.
    assert q_values[:9] == pytest.approx(
        [0.0015, 0.003, 0.0095, 0.035625, 0.0603, 0.0638571, 0.0638571, 0.0645, 0.0765], abs=1e-6
    )


def test_q_values_equal_their_definition_in_any_order():
    rng = random.Random(8)
    for _ in range(30):
        p_values = [rng.choice((None, rng.random() ** 3, 0.02, 1.0)) for _ in range(rng.randint(0, 12))]
        there = [p for p in p_values if p is not None]
        wanted = [
            None if p is None else min(r * len(there) / sum(other <= r for other in there) for r in there if r >= p)
            for p in p_values
        ]
        assert benjamini_hochberg(p_values) == pytest.approx(wanted)


def test_q_values_follow_p_values_and_are_never_below_them():
    q_values = benjamini_hochberg([0.04, None, 0.01, 0.03, 0.03])
    assert q_values == [0.04, None, 0.04, 0.04, 0.04]
    assert benjamini_hochberg([None, 0.3]) == [None, 0.3]
    assert benjamini_hochberg([]) == []
