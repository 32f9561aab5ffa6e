"""Which of many texts are like each other: the exact ROUGE-L of each with each, millions of pairs a second on one core.

The F-measure is that of `metrics.rouge_l`, and so `rouge_score`'s with its stemmer. A text comes as its words, from
`metrics.rouge_tokens`: one in a script that has none there is like nothing, not even itself.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

BLOCK = 64  # texts that are held against all others at a time, which bounds the memory

Words = Sequence[str]


class Spelled:
    """Texts with one character for each word: rapidfuzz compares strings fastest.

    The commonest word is the lowest character, since rapidfuzz looks up those below 256 in an array and the others in a
    hash table. A word that only one of the texts has cannot be common to two, so it is left out, but counted.
    """

    def __init__(self, texts: Sequence[Words]) -> None:
        holders: Counter[str] = Counter()
        for words in texts:
            holders.update(set(words))
        shared = sorted((word for word, count in holders.items() if count > 1), key=lambda word: (-holders[word], word))
        letters = {word: chr(place) for place, word in enumerate(shared)}
        self.texts = ["".join([letters[word] for word in words if word in letters]) for words in texts]
        self.lengths = np.array([len(words) for words in texts], dtype=np.int64)

    def rouge(self, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
        """ROUGE-L of the texts at these places with those at others (rows × columns)."""
        some, others = ([self.texts[i] for i in places] for places in (rows, columns))
        common = cdist(some, others, scorer=LCSseq.similarity, dtype=np.int32, workers=1)
        # With c words in common of m and n, precision c/m and recall c/n make F = 2c / (m + n).
        both = np.add.outer(self.lengths[list(rows)], self.lengths[list(columns)])
        return 2 * common.reshape(both.shape) / np.maximum(both, 1)


def rouge_rows(texts: Sequence[Words], others: Sequence[Words]) -> Iterator[np.ndarray]:
    """For each of the texts in order, its ROUGE-L with all the others."""
    spelled, count = Spelled([*texts, *others]), len(texts)
    columns = range(count, count + len(others))
    for start in range(0, count, BLOCK):
        yield from spelled.rouge(range(start, min(start + BLOCK, count)), columns)


def nearest_earlier(texts: Sequence[Words], most: float, known: Sequence[Words] = ()) -> list[tuple[int, float] | None]:
    """For each text what it is too like, or None if it is novel: greedy, in order.

    A text is novel if its ROUGE-L with none of `known`, and with none of the novel texts before it, is above `most`.
    Else the nearest of those, the first of equals, is told with the ROUGE-L; its place counts `known` before `texts`.
    """
    spelled, total = Spelled([*known, *texts]), len(known) + len(texts)
    novel, found = list(range(len(known))), []
    for start in range(len(known), total, BLOCK):
        block = range(start, min(start + BLOCK, total))
        # Before the block, and in it; those of its texts that turn out too like others are passed over.
        earlier, among = spelled.rouge(block, novel), spelled.rouge(block, block)
        fresh: list[int] = []
        places = np.array(novel, dtype=np.int64)
        for row in range(len(block)):
            values = np.concatenate([earlier[row], among[row, fresh]])
            best = int(values.argmax()) if len(values) else 0
            if len(values) and values[best] > most:
                place = places[best] if best < len(places) else start + fresh[best - len(places)]
                found.append((int(place), float(values[best])))
            else:
                found.append(None)
                fresh.append(row)
        novel += [start + row for row in fresh]
    return found
