"""Tasks that the project makes up: answers that a rule decides, over plain words, so that a student learns to look.

A natural task can often be guessed at without reading; here nothing but the instruction, the examples and the item
tells the answer. Each task has words, labels and a wording of its own.
"""

import random
from collections.abc import Callable

from selfguide_ray.schema import Example, Task

WORDS = (
    "apple amber anchor arrow badge basin beacon birch blue bold brass brick bright calm candle canyon cedar chalk "
    "cherry circle clear cloud coal copper coral cotton crane crimson crystal dawn delta desert drum dusk eagle east "
    "ember even fast fern field flint forest fox frost garden ginger glass gold grain granite green hammer harbor "
    "hazel heavy high honey indigo iron ivory jade jungle kite lake lamp lemon light lime linen lion low lunar "
    "maple marble meadow mint moon mossy narrow north oak ocean odd olive orange orchid otter paper peach pearl pine "
    "plain plum purple quartz quick quiet rain raven red ridge river robin rose rough round ruby sail salt sand scarlet "
    "shadow sharp silver simple slow smooth snow solar south spruce square star steel stone storm strong sugar sun "
    "swift tall tiger timber tulip valley velvet violet warm water west wheat white wide wild willow wind winter wolf"
).split()
NAMES = "Ada Ben Carla David Emma Felix Grace Hugo Iris James Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor".split()
PLACES = "kitchen garden office school market station library museum harbor park".split()
GROUPS = {
    "animals": "eagle fox lion otter raven robin tiger wolf crane horse mouse rabbit sheep snake whale".split(),
    "plants": "birch cedar fern maple oak olive orchid pine rose spruce tulip willow wheat cotton mint".split(),
    "colours": "blue crimson green indigo ivory orange purple red scarlet violet white yellow black brown grey".split(),
    "food": "apple cherry ginger honey lemon lime peach plum salt sugar bread cheese soup rice butter".split(),
    "weather": "frost rain snow storm wind cloud fog thunder hail sunshine mist breeze drizzle ice heat".split(),
    "materials": "brass brick copper glass gold granite iron linen marble paper silver steel stone velvet timber".split(),
}
Draw = Callable[[], tuple[str, str]]  # a new item and its answer
Family = Callable[[random.Random], tuple[str, tuple[str, ...], Draw]]  # instruction, labels, and what draws items


def made_up_task(rng: random.Random, size: int) -> Task:
    """A task with `size` examples, all different; its name says nothing."""
    instruction, labels, draw = rng.choice(FAMILIES)(rng)
    examples: dict[str, str] = {}
    for _ in range(20 * size):
        item, answer = draw()
        examples.setdefault(item, answer)
        if len(examples) == size:
            break
    return Task("made_up", instruction, tuple(Example(*one) for one in examples.items()), labels)


def _words(rng: random.Random, least: int = 3, most: int = 9) -> list[str]:
    return rng.sample(WORDS, rng.randint(least, most))


def _pair_of_labels(rng: random.Random) -> tuple[str, str]:
    usual = [("Yes", "No"), ("True", "False"), ("yes", "no"), ("A", "B"), ("1", "0"), ("positive", "negative")]
    return rng.choice([*usual, tuple(rng.sample(WORDS, 2)), tuple(word.title() for word in rng.sample(WORDS, 2))])


def _one_word(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Copy the word at a place."""
    name, place = rng.choice([("first", 0), ("second", 1), ("last", -1), ("third", 2), ("last but one", -2)])
    wording = rng.choice(
        [
            f"You are given some words. Write the {name} of them.",
            f"Output only the {name} word of the given text.",
            f"In this task you see a list of words, and your job is to find its {name} word.",
        ]
    )

    def draw() -> tuple[str, str]:
        words = _words(rng)
        return " ".join(words), words[place]

    return wording, (), draw


def _whole(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Copy everything, or all but a part, or in another order."""
    kinds: dict[str, Callable[[list[str]], list[str]]] = {
        "Repeat the given words exactly as they are.": lambda words: words,
        "Write the given words in reverse order.": lambda words: words[::-1],
        "Remove the first word of the text and write the rest.": lambda words: words[1:],
        "Write the text without its last word.": lambda words: words[:-1],
        "Write the given words in alphabetical order.": sorted,
        "Swap the first word of the text with its last one.": lambda words: [words[-1], *words[1:-1], words[0]],
        "Write the text twice.": lambda words: words + words,
    }
    wording = rng.choice(list(kinds))

    def draw() -> tuple[str, str]:
        words = _words(rng)
        return " ".join(words), " ".join(kinds[wording](words))

    return wording, (), draw


def _replaced(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Copy with one word exchanged."""
    old, new = rng.sample(WORDS, 2)

    def draw() -> tuple[str, str]:
        words = [word for word in _words(rng, 3, 8) if word not in (old, new)]
        words.insert(rng.randint(0, len(words)), old)
        return " ".join(words), " ".join(new if word == old else word for word in words)

    return f"Rewrite the text, with the word {new} in place of {old}.", (), draw


def _count(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Count words."""

    def draw() -> tuple[str, str]:
        words = _words(rng, 1, 7)
        return " ".join(words), str(len(words))

    return rng.choice(["Count the words of the text.", "How many words are given? Answer with a number."]), (), draw


def _holds(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """A label by whether a word is there."""
    sought, (yes, no) = rng.choice(WORDS), _pair_of_labels(rng)
    wording = rng.choice(
        [
            f"Answer {yes} if the text holds the word {sought}, and {no} if it does not.",
            f"You are given a text. Say {yes} when {sought} is one of its words, otherwise say {no}.",
        ]
    )

    def draw() -> tuple[str, str]:
        words = [word for word in _words(rng) if word != sought]
        there = rng.random() < 0.5
        if there:
            words.insert(rng.randint(0, len(words)), sought)
        return " ".join(words), yes if there else no

    return wording, (yes, no), draw


def _group(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """A label by what kind of words there are."""
    names = rng.sample(list(GROUPS), rng.randint(2, 4))
    labels = rng.choice([names, rng.sample(WORDS, len(names)), [chr(65 + i) for i in range(len(names))]])
    told = ", ".join(f"{label} for {name}" for label, name in zip(labels, names, strict=True))
    wording = rng.choice(
        [f"Classify the words. Answer with {told}.", f"In this task the kind of some words is asked: {told}."]
    )

    def draw() -> tuple[str, str]:
        which = rng.randrange(len(names))
        return " ".join(rng.sample(GROUPS[names[which]], rng.randint(1, 4))), labels[which]

    return wording, tuple(labels), draw


def _same(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """A label by whether two texts are one."""
    yes, no = _pair_of_labels(rng)

    def draw() -> tuple[str, str]:
        first = _words(rng, 2, 5)
        second = list(first)
        if other := rng.random() < 0.5:
            second[rng.randrange(len(second))] = rng.choice([word for word in WORDS if word not in first])
        return f"Sentence 1: {' '.join(first)} Sentence 2: {' '.join(second)}", no if other else yes

    return f"Two sentences are given. Answer {yes} if they are the same and {no} if they differ.", (yes, no), draw


def _question(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Answer a question about facts that are told."""
    kind = rng.choice(["who", "what", "where"])
    wording = rng.choice(
        ["Read the passage and answer the question.", "Answer the question with a word from the passage."]
    )

    def draw() -> tuple[str, str]:
        count = rng.randint(2, 4)
        people, places = rng.sample(NAMES, count), rng.sample(PLACES, count)
        things = rng.sample(GROUPS["food"] + GROUPS["materials"], count)
        facts = [f"{a} has the {b} in the {c}." for a, b, c in zip(people, things, places, strict=True)]
        at = rng.randrange(count)
        asked = {
            "who": (f"Who has the {things[at]}?", people[at]),
            "what": (f"What does {people[at]} have?", things[at]),
            "where": (f"Where is {people[at]}?", places[at]),
        }[kind]
        return f"Passage: {' '.join(facts)} Question: {asked[0]}", asked[1]

    return wording, (), draw


def _marked(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Copy what stands between marks."""
    name, opened, closed = rng.choice([("brackets", "(", ")"), ("quotes", '"', '"'), ("stars", "*", "*")])

    def draw() -> tuple[str, str]:
        words, inner = _words(rng, 2, 6), _words(rng, 1, 3)
        at = rng.randint(0, len(words))
        marked = f"{opened}{' '.join(inner)}{closed}"
        return " ".join([*words[:at], marked, *words[at:]]), " ".join(inner)

    return f"Write what stands in {name} in the text.", (), draw


def _sentence(rng: random.Random) -> tuple[str, tuple[str, ...], Draw]:
    """Put given values into a sentence."""
    pattern = rng.choice(
        [
            "{a} went to the {b} and bought {c}.", "There is {c} in the {b} of {a}.", "{a} likes {c} from the {b}.",
            "The {b} belongs to {a}, who sells {c}.", "In the {b}, {a} found some {c}.",
        ]
    )  # fmt: skip

    def draw() -> tuple[str, str]:
        a, b = rng.choice(NAMES), rng.choice(PLACES)
        c = rng.choice(GROUPS["food"] + GROUPS["materials"])
        return f"name: {a}, place: {b}, thing: {c}", pattern.format(a=a, b=b, c=c)

    return "Write a sentence from the given values, in the manner of the examples.", (), draw


FAMILIES: tuple[Family, ...] = (
    _one_word, _whole, _replaced, _count, _holds, _group, _same, _question, _marked, _sentence,
)  # fmt: skip
