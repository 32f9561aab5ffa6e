"""Which rows of a task are too like an earlier one: ours against rouge_score, and against MinHash as datasketch has it."""

import argparse
import importlib
import random
import time
from collections.abc import Callable
from itertools import chain

from rouge_score.rouge_scorer import RougeScorer

from benchmarks import Measured, alternate
from benchmarks.made_up import WORDS, Language
from selfguide_ray.metrics import rouge_tokens
from selfguide_ray.similarity import nearest_earlier, rouge_rows

ROWS, TASKS = 500, 32  # of a task; tasks share a vocabulary, as those of a language do
HASHED = 4  # tasks that datasketch is given a turn
MOST = 0.7  # ROUGE-L of a novel row with any before it, as in Self-Instruct
SCORED = 300  # pairs that rouge_score is given a turn: it scores none sooner
CHECKED = 2000  # random pairs whose values are compared
PERMUTATIONS = 128

Texts = list[list[str]]  # of each task


def novelty(arguments: argparse.Namespace) -> Measured:
    """Pairs of rows decided a second, on one core, from the texts on: what tokenises and stems them is counted.

    Every turn has words of its own, so that no cache knows their stems. Seconds are the processor's for this process.
    """
    rows, tasks = arguments.rows or ROWS, TASKS if arguments.rows is None else HASHED
    draws = [[language.texts(rows) for _ in range(tasks)] for language in map(Language, range(arguments.repeats))]
    pairs = rows * (rows - 1) // 2  # of a task
    dropped: dict[str, list[int]] = {}

    def turn(name: str, decided: Callable[[Texts], tuple[int, int]]) -> Callable[[], float]:
        dropped[name] = []

        def rate() -> float:
            texts = draws[len(dropped[name])]
            started = time.process_time()
            count, alike = decided(texts)
            seconds = time.process_time() - started
            dropped[name].append(alike)
            return count / seconds

        return rate

    def ours(drawn: Texts) -> tuple[int, int]:
        found = [nearest_earlier([rouge_tokens(text) for text in texts], MOST) for texts in drawn]
        return pairs * len(drawn), sum(neighbour is not None for neighbour in chain(*found))

    def theirs(drawn: Texts) -> tuple[int, int]:
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        some = _pairs(drawn[0], SCORED, seed=0)
        return len(some), sum(scorer.score(one, other)["rougeL"].fmeasure > MOST for one, other in some)

    turns = {"ours": turn("ours", ours), "rouge_score": turn("rouge_score", theirs)}
    not_run = {}
    try:
        datasketch = importlib.import_module("datasketch")
    except ImportError as error:
        not_run["datasketch"] = f"{error}; pip install datasketch"
    else:

        def hashed(drawn: Texts) -> tuple[int, int]:
            return pairs * HASHED, sum(_minhash(datasketch, texts) for texts in drawn[:HASHED])

        turns["datasketch"] = turn("datasketch", hashed)
    rouge_tokens("imports the stemmer")
    rates = alternate(turns, arguments.repeats)
    words = [[rouge_tokens(text) for text in texts] for texts in draws[0]]
    started = time.process_time()
    for several in words:
        nearest_earlier(several, MOST)
    without_tokenising = pairs * tasks / (time.process_time() - started)
    return {
        "work": f"{tasks} tasks × {rows} rows of about {WORDS} words, each row against all novel rows of its task before "
        f"it, too like one above ROUGE-L {MOST:g}; rouge_score is given {SCORED} random pairs, datasketch {HASHED} tasks",
        "unit": "pairs/s",
        "rates": rates,
        "ours_without_tokenising": without_tokenising,
        "share_dropped": {
            name: [count / (rows * (HASHED if name == "datasketch" else tasks)) for count in several]
            for name, several in dropped.items()
            if name != "rouge_score"
        },
        "largest_difference_to_rouge_score": difference(list(chain(*draws[0])), CHECKED),
        "compared": CHECKED,
        "approximate": {
            "datasketch": f"it estimates the Jaccard similarity of words by MinHash, {PERMUTATIONS} permutations, with "
            f"LSH at {MOST:g}, not ROUGE-L; its pairs are all pairs of the rows that it decided on, for its time"
        },
        "not_run": not_run,
    }


def difference(texts: list[str], count: int) -> float:
    """The largest difference of our ROUGE-L to rouge_score's over random pairs."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    some = _pairs(texts, count, seed=1)
    return max(
        abs(
            next(rouge_rows([rouge_tokens(one)], [rouge_tokens(other)]))[0]
            - scorer.score(one, other)["rougeL"].fmeasure
        )
        for one, other in some
    )


def _pairs(texts: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    return [(chance.choice(texts), chance.choice(texts)) for _ in range(count)]


def _minhash(datasketch: object, texts: list[str]) -> int:
    """How many of the texts are near-duplicates of one kept before, as datasketch's own documentation goes about it."""
    index, dropped = datasketch.MinHashLSH(threshold=MOST, num_perm=PERMUTATIONS), 0
    for place, text in enumerate(texts):
        mine = datasketch.MinHash(num_perm=PERMUTATIONS)
        mine.update_batch([word.encode() for word in set(text.lower().split())])
        if index.query(mine):
            dropped += 1
        else:
            index.insert(place, mine)
    return dropped
