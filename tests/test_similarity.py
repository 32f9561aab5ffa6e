"""Many texts at once: each pair's ROUGE-L is rouge_score's, and what is too like an earlier text is found in order."""

import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.similarity import BLOCK, nearest_earlier, rouge_rows

ODD = [
    "",
    " ",
    "...",
    "?!",
    "naïve café",
    "日本語のテキスト",
    "İstanbul K",
    "a",
    "A a a",
    "running runs ran",
    "x_y",
    "1 000",
]


def texts_of(count, seed, words=12, vocabulary=30):
    chance = random.Random(seed)
    known = [chance.choice(["walk", "talk", "jump", "read", "house", "on", "ö"]) + chance.choice(["", "s", "ing", "ed"])
             for _ in range(vocabulary)]  # fmt: skip
    return [" ".join(chance.choices(known, k=chance.randint(0, 2 * words))) for _ in range(count)]


def tokens(texts):
    return [rouge_tokens(text) for text in texts]


def theirs(one, other):
    return RougeScorer(["rougeL"], use_stemmer=True).score(one, other)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("texts", "others"),
    [
        (texts_of(30, 1), texts_of(20, 2)),
        (ODD, ODD),
        (
            texts_of(4, 3, words=150, vocabulary=600),
            texts_of(4, 4, words=150, vocabulary=600),
        ),  # longer than a machine word
        (texts_of(2 * BLOCK + 1, 5, words=4), texts_of(2, 6, words=4)),  # over several blocks
    ],
    ids=["random", "odd", "long", "blocks"],
)
def test_each_value_is_that_of_rouge_score(texts, others):
    found = np.array(list(rouge_rows(tokens(texts), tokens(others))))
    wanted = np.array([[theirs(text, other) for other in others] for text in texts])
    assert found.shape == wanted.shape
    assert abs(found - wanted).max() < 1e-9
    assert wanted.max() > 0.3


def test_more_words_than_a_byte_counts_are_told_apart():
    words = [f"w{number}" for number in range(70_000)]
    (values,) = rouge_rows([words], [words, words[::-1], [f"v{number}" for number in range(9)], [], words[:35_000]])
    assert values.tolist() == pytest.approx([1.0, 1 / 70_000, 0.0, 0.0, 2 / 3])


def test_nothing_is_like_nothing():
    assert list(rouge_rows([], [["a"]])) == []
    assert [row.shape for row in rouge_rows([["a"]], [])] == [(0,)]
    assert nearest_earlier([], 0.5, [["a"]]) == []
    assert nearest_earlier([[], []], 0.0, [[]]) == [None, None]


def one_by_one(texts, most, known):
    """The same with rouge_score, pair by pair, as the definition says it."""
    novel, found = list(enumerate(known)), []
    for place, text in enumerate(texts, len(known)):
        values = [(theirs(text, other), earlier) for earlier, other in novel]
        best = max((value for value, _ in values), default=0.0)
        if best > most:
            found.append((min(earlier for value, earlier in values if value > best - 1e-12), best))
        else:
            found.append(None)
            novel.append((place, text))
    return found


@pytest.mark.parametrize(("count", "known", "most"), [(2 * BLOCK + 9, 3, 0.5), (BLOCK, 0, 0.7), (20, BLOCK + 5, 0.4)])
def test_what_is_too_like_a_novel_text_before_it_is_found_in_order(count, known, most):
    texts = texts_of(count + known, seed=count, words=5, vocabulary=12)
    texts, before = texts[known:], texts[:known]
    found = nearest_earlier(tokens(texts), most, tokens(before))
    wanted = one_by_one(texts, most, before)
    assert [pair and pair[0] for pair in found] == [pair and pair[0] for pair in wanted]
    assert [pair[1] for pair in found if pair] == pytest.approx([pair[1] for pair in wanted if pair], abs=1e-9)
    assert 0 < found.count(None) < count


def test_a_text_like_one_that_was_dropped_is_novel():
    chain = [["a", "b", "c", "d"], ["b", "c", "d", "e"], ["c", "d", "e", "f"]]  # each 3/4 like the one before
    assert nearest_earlier(chain, 0.7) == [None, (0, 0.75), None]
    assert nearest_earlier(chain, 0.75) == [None, None, None]  # the bound itself is allowed
