"""The official metrics of Natural Instructions V2, macro-F1, bootstrap intervals, and paired tests.

Exact match and ROUGE-L follow upstream's evaluation script (Wang et al. 2022): the maximum over the references, ROUGE-L
as the F-measure over Porter-stemmed words. Values lie in 0-1; tables hold them times 100.
"""

import functools
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACES = str.maketrans({chr(c): " " for c in range(128) if not chr(c).isalnum()})
STEMMED_FROM = 4  # rouge_score stems words longer than three letters
ENUMERATED = 12  # with so many differences or fewer, a paired test goes through all 2^k patterns of signs
FLIPS = 10_000  # random patterns of signs behind the p-value of more differences
NOTHING = 1e-9  # a difference of two scores, 0-100, that is rounding
FLIPPED_AT_A_TIME = 1 << 20  # signs held in memory


def normalize(text: str) -> str:
    """Lower-case, ASCII punctuation deleted, white space collapsed; articles stay."""
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals a reference after normalisation, else 0.0."""
    answer = normalize(prediction)
    return float(any(answer == normalize(reference) for reference in references))


@functools.cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer  # the stemmer that rouge_score uses

    return functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem)


def rouge_tokens(text: str) -> list[str]:
    """Runs of a-z and 0-9 in the lower-cased text, stemmed; text in other scripts has none."""
    stem, text = _stemmer(), text.lower()
    spaced = text.translate(SPACES) if text.isascii() else re.sub(r"[^a-z0-9]+", " ", text)  # the former is faster
    return [stem(w) if len(w) >= STEMMED_FROM else w for w in spaced.split()]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Highest F-measure of the longest common subsequence of words over the references."""
    answer = rouge_tokens(prediction)
    return max((f_measure(answer, rouge_tokens(reference)) for reference in references), default=0.0)


def f_measure(answer: Sequence[str], target: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of two sequences; of two texts, of their characters."""
    common = LCSseq.similarity(answer, target)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(target)
    return 2 * precision * recall / (precision + recall)


def macro_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 over the classes that occur as first references, compared after normalisation.

    An answer that is no class counts against the class it should have been, and for none.
    """
    answers = [normalize(prediction) for prediction in predictions]
    truths = [normalize(several[0]) for several in references]
    scores = []
    for label in sorted(set(truths)):
        hits = sum(a == t == label for a, t in zip(answers, truths, strict=True))
        scores.append(2 * hits / (answers.count(label) + truths.count(label)))
    return float(np.mean(scores)) if scores else 0.0


def bootstrap_interval(values: Sequence[float], resamples: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling instances."""
    column = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(column), size=(resamples, len(column)))
    low, high = np.percentile(column[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


class Paired(NamedTuple):
    """What pairs of values tell: the mean difference, its 95 % interval, and a two-sided p-value of no difference."""

    gain: float
    low: float | None
    high: float | None
    p: float


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], resamples: int, seed: int) -> Paired:
    """Ours less theirs, pair by pair: mean, 95 % percentile interval over resampled pairs, p of `sign_flip_p`.

    The p-value is no bootstrap's: shifting a bootstrap distribution to zero calls too much significant where pairs are
    few, while flipping signs keeps its level at any size. With resamples = 0 there is no interval.
    """
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    low, high = bootstrap_interval(differences.tolist(), resamples, seed) if resamples else (None, None)
    return Paired(float(differences.mean()), low, high, sign_flip_p(differences.tolist(), seed))


def sign_flip_p(differences: Sequence[float], seed: int) -> float:
    """Two-sided p-value of a mean paired difference, by the permutation test that flips the signs of differences.

    If two systems are alike, each difference is as likely as its negative: p is the share of all patterns of signs
    whose mean is at least as far from zero as the one seen, ties counted. It assumes no distribution. Differences of
    zero change no mean; if there are no others, p is 1. It is exact where all differences are of one size, as those of
    exact match (the test is then McNemar's exact one), and where they are few. Else `FLIPS` random patterns are drawn,
    the one seen is counted as a further one (p = (1 + hits) / (1 + FLIPS)), and p cannot fall below 1 / (1 + FLIPS).
    """
    column = np.asarray(differences, dtype=np.float64)
    column = column[np.abs(column) > NOTHING]
    sizes, count = np.abs(column), len(column)
    if not count:
        return 1.0
    if np.ptp(sizes) <= NOTHING:
        more = max(ups := int((column > 0).sum()), count - ups)
        return min(1.0, 2 * sum(math.comb(count, k) for k in range(more, count + 1)) / 2**count)
    seen = abs(column.sum()) - NOTHING * count  # sums of the same numbers in another order may differ by rounding
    if count <= ENUMERATED:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs((2 * patterns - 1) @ column) >= seen).mean())
    rng, hits = np.random.default_rng(seed), 0
    step = max(1, FLIPPED_AT_A_TIME // count)
    for start in range(0, FLIPS, step):
        patterns = rng.integers(0, 2, size=(min(step, FLIPS - start), count), dtype=np.int8)
        hits += int((np.abs((2 * patterns - 1) @ column) >= seen).sum())
    return (1 + hits) / (1 + FLIPS)


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """q-values (Benjamini and Hochberg 1995): calling all with q ≤ 0.05 different is wrong in 5 % of calls on average.

    A q-value is the lowest p * m / rank among p-values that are no smaller, m being their number. None passes through
    and does not count.
    """
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    found: list[float | None] = [None] * len(p_values)
    lowest = 1.0
    for rank, place in reversed(list(enumerate(order, start=1))):
        lowest = min(lowest, p_values[place] * len(order) / rank)
        found[place] = lowest
    return found


Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l}
