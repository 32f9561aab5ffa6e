"""The official metrics of Natural Instructions V2, macro-F1, and bootstrap intervals.

Exact match and ROUGE-L follow upstream's evaluation script (Wang et al. 2022): the maximum over the references, ROUGE-L
as the F-measure over Porter-stemmed words. Values lie in 0-1; tables hold them times 100.
"""

import functools
import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACES = str.maketrans({chr(c): " " for c in range(128) if not chr(c).isalnum()})
STEMMED_FROM = 4  # rouge_score stems words longer than three letters


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
    return max((_f_measure(answer, rouge_tokens(reference)) for reference in references), default=0.0)


def _f_measure(answer: list[str], target: list[str]) -> float:
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


Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {"exact_match": exact_match, "rouge_l": rouge_l}
