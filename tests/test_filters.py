"""Filters: which texts are dropped, and with which reason."""

from functools import partial

import pytest
from pools import OPEN, reasons, through_pool

from selfguide_ray.config_file import load
from selfguide_ray.engine.scripted import ByteTokenizer
from selfguide_ray.filters import (
    FILTERS,
    Rules,
    Seen,
    Verdict,
    clean,
    find_label,
    identity,
    judge,
    length_bounds,
    prefix_pattern,
)
from selfguide_ray.inputs import Pool
from selfguide_ray.prompts import Prompts

PAIR = ("a plain example", "another example here")


@pytest.fixture
def rows_of(make_task):
    """Runs texts through a pool whose examples have the given inputs; returns the rows that come of it."""
    return partial(through_pool, make_task)


@pytest.fixture
def reasons_of(rows_of):
    return lambda *given, **more: reasons(rows_of(*given, **more))


@pytest.mark.parametrize(
    ("text", "examples", "reason"),
    [
        ("", OPEN, "empty"),
        (" \n\t ", OPEN, "empty"),
        ('""', OPEN, "empty"),
        ("ITEM:", OPEN, "empty"),
        # statement 7: lengths 3 and 5 give 2 to 6, both ends inclusive
        ("x", ("abc", "vwxyz"), "length"),
        ("xx", ("abc", "vwxyz"), None),
        ("xxxxxx", ("abc", "vwxyz"), None),
        ("xxxxxxx", ("abc", "vwxyz"), "length"),
        ("1234567", ("abcdefg", "hijklmn"), None),
        ("123456", ("abcdefg", "hijklmn"), "length"),
        ("12345678", ("abcdefg", "hijklmn"), "length"),
        # statement 8: characters, not bytes; a negative lower end is 0
        ("ééééé\U0001f600", ("abc", "vwxyz"), None),
        ("x", ("a", "b" * 9), None),
        ("x" * 13, ("a", "b" * 9), None),
        ("x" * 14, ("a", "b" * 9), "length"),
        # statement 9: whole words in their case, blank lines inside
        ("the input of it", OPEN, "noise"),
        ("the output", OPEN, "noise"),
        ("input", OPEN, "noise"),
        ("[input]", OPEN, "noise"),
        ("the throughput of it", OPEN, None),
        ("all inputs", OPEN, None),
        ("a reinput, a tooutput", OPEN, None),
        ("input_size", OPEN, None),
        ("Input of it", OPEN, None),
        ("Sure, this is one", OPEN, "noise"),
        ("Sure this is one", OPEN, None),
        ("Unsure, this is one", OPEN, None),
        ("Here is an item", OPEN, "noise"),
        ("Here's one", OPEN, "noise"),
        ("one line\n\nanother line", OPEN, "noise"),
        ("one line\n \t\nanother line", OPEN, "noise"),
        ("one line\nanother line", OPEN, None),
        ("\n\none line\n\n", OPEN, None),
        # what a task's own examples hold is no noise in it
        ("the input of it", ("some input", "b" * 90), None),
        ("the output of it", ("some input", "b" * 90), "noise"),
        ("the input of it", ("inputs", "b" * 90), "noise"),
        ("one line\n\nanother line", ("a\n\nb", "b" * 90), None),
        ("one line\n\nanother line", ("a\n\n", "b" * 90), "noise"),  # outer blank lines of an example are none
        # statement 12: an example is a duplicate of itself
        ("a plain example", PAIR, "duplicate"),
        (' "A  Plain\nEXAMPLE" ', PAIR, "duplicate"),
        ("ITEM: a plain example", PAIR, "duplicate"),
        ("a plain sample.", PAIR, None),
    ],
)
def test_a_text_is_dropped_with_the_reason(reasons_of, text, examples, reason):
    assert reasons_of([text], examples) == [reason]


@pytest.mark.parametrize(
    ("text", "examples", "reason"),
    [
        ("", ("abc", "abcdef"), "empty"),  # also too short
        ("an input that is long\n\nvery", ("abc", "vwxyz"), "length"),  # also noise
        ("my input", ("my input.", "an input"), None),
        ("output", ("my input", "output"), "duplicate"),
        ("output", ("my text", "Output"), "noise"),  # also a duplicate
    ],
)
def test_the_first_filter_that_speaks_gives_the_reason(reasons_of, text, examples, reason):  # statement 11
    assert reasons_of([text], examples) == [reason]
    assert list(FILTERS) == ["empty", "length", "noise", "prefix"]


def test_kept_and_dropped_rows_add_up_and_each_has_one_reason(rows_of):  # statement 11
    texts = ["one", "one", "", "an input", "x" * 500, "two"]
    rows = rows_of(texts)
    assert [row.get("drop_reason") for row in rows] == [None, "duplicate", "empty", "noise", "length", None]
    assert [row["id"] for row in rows] == [f"r000i{number:03d}" for number in range(6)]


def test_a_verdict_tells_what_was_measured_and_against_what(rows_of):
    rows = rows_of(["x" * 8, "", "a\n\nb", "one", "ONE", "abc"], ("abc", "vwxyz"))
    told = [(row["drop_reason"], row["measured"], row["bound"], row["neighbour"]) for row in rows if "measured" in row]
    assert told == [
        ("length", 8.0, "2 to 6 characters", None),
        ("empty", 0.0, "at least 1 character", None),
        ("noise", 1.0, "no 'blank line'", None),
        ("duplicate", 1.0, "no equal text", "r000i003"),
        ("duplicate", 1.0, "no equal text", "example0"),
    ]


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "sigmas", "slack", "bounds"),
    [
        ((3, 5), 2.0, 0.0, (2, 6)),  # statement 7
        ((7, 7), 2.0, 0.0, (7, 7)),
        ((7, 7), 2.0, 0.5, (3, 10)),
        ((7,), 2.0, 0.0, (7, 7)),
        ((1, 9), 2.0, 0.0, (0, 13)),  # statement 8: 5 ± 8
        ((10, 20, 30), 2.0, 0.0, (3, 36)),  # 20 ± 2 * 8.165: the population's deviation
        ((10, 10, 10, 10, 10, 10, 40), 1.0, 0.0, (3, 40)),  # the longest example would be outside
        ((3, 5), 0.0, 0.0, (3, 5)),
        ((0, 0), 2.0, 1.0, (0, 0)),
    ],
)
def test_length_bounds_are_mean_and_deviations(lengths, sigmas, slack, bounds):
    assert length_bounds(["x" * length for length in lengths], sigmas, slack) == bounds


@pytest.mark.parametrize("sigmas", [0.0, 0.5, 1.0, 2.0])
def test_every_example_passes_the_bounds_made_of_them(sigmas):
    for lengths in [(1, 1, 1, 50), (3, 100), (7, 8, 7, 8, 200, 7, 7, 7, 7, 7), (0, 5)]:
        low, high = length_bounds(["x" * length for length in lengths], sigmas, 0.0)
        assert low <= min(lengths)
        assert max(lengths) <= high


def test_the_length_filter_can_be_widened_and_switched_off(reasons_of):
    examples = ("abcdefgh", "ijklmnop")
    assert reasons_of(["x" * 9, "x" * 10, "x" * 11], examples, settings=["inputs.length_slack=0.25"]) == [
        None,
        None,
        "length",
    ]
    assert reasons_of(["x", "y" * 99], examples, settings=["inputs.length_filter=false"]) == [None, None]
    assert reasons_of(["x" * 12, "x" * 13], ("abcdefgh", "i" * 10), settings=["inputs.length_sigmas=3"]) == [
        None,
        "length",
    ]


# --- noise -----------------------------------------------------------------------------------------------------------


def test_words_of_one_task_do_not_reach_another(reasons_of):  # statement 10
    texts = ["what a zebra", "what a horse", "an input"]
    assert reasons_of(texts, noise_words=("zebra",)) == ["noise", None, "noise"]
    assert reasons_of(texts) == [None, None, "noise"]
    assert reasons_of(texts, settings=["inputs.noise_words=[horse]"]) == [None, "noise", None]
    assert reasons_of(texts) == [None, None, "noise"]


def test_judging_many_texts_leaves_the_rules_as_they_were(make_task):  # statement 10
    pool = Pool(make_task(noise_words=("zebra",)), load(), Prompts(ByteTokenizer(), 1 << 16))
    pattern, bounds, words = pool.rules.noise.pattern, pool.rules.lengths, pool.settings.noise_words
    dropped = sum(judge(f"input {number}"[-12:], pool.rules) is not None for number in range(100_000))
    assert dropped == 100_000
    assert (pool.rules.noise.pattern, pool.rules.lengths, pool.settings.noise_words) == (pattern, bounds, words)
    with pytest.raises(AttributeError):
        pool.rules.noise = None


def test_no_rules_let_everything_but_nothing_pass():
    rules = Rules(None, None)
    assert [judge(text, rules) for text in ("x", "an input\n\n")] == [None, None]
    assert judge(" ", rules) == Verdict("empty", 0.0, "at least 1 character")


# --- beginnings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The premise is this", "prefix"),
        ("the PREMISE", "prefix"),  # in any case
        (' "The premise: x"', "prefix"),  # quotes and outer white space are no part of a text
        ("The premises are these", None),  # a whole word
        ("Under the premise", None),  # at the beginning alone
        ("one\nthe premise", None),
        ("Note: this", "prefix"),
        ("Note:this", "prefix"),  # what ends in no letter needs no end of a word
        ("Note this", None),
        ("a+b", None),
        ("a.c is", "prefix"),  # no pattern, but text
        ("abc is", None),
        ("the premise of an input", "noise"),  # noise comes first
    ],
)
def test_a_beginning_that_is_not_wanted_is_dropped(reasons_of, text, reason):
    settings = ["inputs.prefixes=[the premise, 'note:', a.c, '']"]
    assert reasons_of([text], settings=settings) == [reason]
    assert reasons_of([text]) == [reason if reason == "noise" else None]


def test_a_prefix_comes_before_a_duplicate_and_its_verdict_tells_it(rows_of):
    row = rows_of(["Well then", "x", "X"], settings=["inputs.prefixes=[well]"], examples=("a then", "b" * 90))
    told = [(r.get("drop_reason"), r.get("measured"), r.get("bound")) for r in row]
    assert told[0] == ("prefix", None, "does not begin with 'Well'")
    assert [reason for reason, _, _ in told] == ["prefix", None, "duplicate"]
    pattern = prefix_pattern(["well"], [])
    assert judge("Well", Rules(None, None, pattern)) == Verdict("prefix", None, "does not begin with 'Well'")


def test_a_prefix_that_begins_an_example_is_no_reason_in_its_task(reasons_of):
    texts, settings = ["Why not?", "How so?"], ["inputs.prefixes=[why, how]"]
    assert reasons_of(texts, ("WHY is it?", "b" * 90), settings=settings) == [None, "prefix"]
    assert reasons_of(texts, ("Whyever", "and why?" * 20), settings=settings) == ["prefix", "prefix"]
    assert reasons_of(texts, settings=settings) == ["prefix", "prefix"]


# --- one item or two -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  x \n", "x"),
        ('"x"', "x"),
        (' "x y" ', "x y"),
        ("'x'", "x"),
        ("\u201cx\u201d", "x"),
        ("\u2018x\u2019", "x"),
        ("`x`", "x"),
        ('" x "', "x"),
        ("ITEM: x", "x"),
        ("ITEM:x", "x"),
        ('ITEM: "x"', "x"),
        ('"ITEM: x"', "x"),
        ("ITEMS: x", "ITEMS: x"),
        ("an ITEM: x", "an ITEM: x"),
        ('"x" and "y"', '"x" and "y"'),
        ("\u201cx\u201d and \u201cy\u201d", "\u201cx\u201d and \u201cy\u201d"),
        ('"x', '"x'),
        ('"', '"'),
        ("it's", "it's"),
        ("'it's'", "'it's'"),
        ("\"x'", "\"x'"),
        ('"x\'s"', "x's"),
    ],
)
def test_outer_space_quotes_and_the_echoed_key_are_removed(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" x ", "x", True),  # statement 12
        ('"x"', "x", True),
        ("Straße", "STRASSE", True),
        ("a  b\nc", "a b c", True),
        ("\ufb01sh", "fish", True),
        ("\uff21", "a", True),
        ("e\u0301", "\u00e9", True),
        ("\u201cx\u201d", "'x'", True),
        ("x", "y", False),
        ("x.", "x", False),
        ("a b", "ab", False),
        ("-1", "1", False),
    ],
)
def test_two_texts_are_one_item_whatever_their_case_space_and_quotes(one, other, same):
    assert (identity(one) == identity(other)) == same


def test_a_repeated_item_names_the_first_of_them():
    seen = Seen([("example0", "Red"), ("example1", "red")])
    seen.add("r1", "Blue")
    seen.add("r2", "blue")
    assert seen.judge(' "RED" ') == Verdict("duplicate", 1.0, "no equal text", "example0")
    assert seen.judge("BLUE") == Verdict("duplicate", 1.0, "no equal text", "r1")
    assert seen.judge("green") is None


def test_a_dropped_text_may_come_again(reasons_of):
    texts = ["an input", "an input", "x", '"x"', "x "]
    assert reasons_of(texts) == ["noise", "noise", None, "duplicate", "duplicate"]


# --- labels ----------------------------------------------------------------------------------------------------------

NLI = ("entailment", "contradiction", "neutral")


@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        ("neutral", NLI, "neutral"),
        ("The answer is neutral.", NLI, "neutral"),  # statement 16
        ("Neutral", NLI, "neutral"),
        ("neutral.", NLI, "neutral"),
        ("NEUTRAL!", NLI, "neutral"),
        ("neutral, that is: neutral", NLI, "neutral"),
        ("neutral or entailment", NLI, "ambiguous_label"),  # statement 16
        ("no idea", NLI, "no_label"),
        ("neutrality", NLI, "no_label"),
        ("no", ("yes", "no"), "no"),
        ("I do not know", ("yes", "no"), "no_label"),  # no label inside a word
        ("not entailment", ("entailment", "not entailment"), "not entailment"),
        ("It is not entailment", ("entailment", "not entailment"), "not entailment"),
        ("not entailment, but entailment", ("entailment", "not entailment"), "ambiguous_label"),
        ("not_entailment", ("entailment", "not_entailment"), "not_entailment"),
        ("-1", ("1", "-1"), "-1"),
        ("The answer is -1.", ("-1", "1"), "-1"),
        ("the answer is 1", ("-1", "1"), "1"),
        ("Yes.", ("Yes.", "No."), "Yes."),
        ("yes", ("Yes.", "No."), "Yes."),
        ("The answer is Yes.", ("Yes.", "No."), "Yes."),
        ("The answer is yes", ("Yes.", "No."), "Yes."),  # a label's final dot is not asked for
        ("agent", ("Agent", "agent"), "agent"),  # where case alone tells labels apart, it counts
        ("Agent", ("Agent", "agent"), "Agent"),
        ("AGENT", ("Agent", "agent"), "no_label"),
        ("C++", ("C", "C++"), "C++"),
        ("it is C++", ("C", "C++"), "C++"),
        (",", (",", "."), ","),
        (".", (",", "."), "."),
        ("A", ("A.", "A"), "A"),  # an equal label comes before one that a dot makes equal
        ("...", (".", "..."), "..."),
    ],
)
def test_a_label_is_found_where_an_answer_names_only_one(text, labels, found):
    result = find_label(text, labels)
    assert (result.drop_reason if isinstance(result, Verdict) else result) == found


def test_a_verdict_on_labels_counts_those_that_were_named():
    assert find_label("neutral or entailment", NLI) == Verdict("ambiguous_label", 2.0, "names exactly 1 label")
    assert find_label("none", NLI) == Verdict("no_label", 0.0, "names exactly 1 label")
