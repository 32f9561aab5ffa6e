"""Votes, label clean-up, balance: how answers become training pairs."""

from collections import Counter
from statistics import fmean

import pyarrow as pa
import pytest

from selfguide_ray.config import Student
from selfguide_ray.config import Trainset as Settings
from selfguide_ray.config_file import load
from selfguide_ray.engine.scripted import ScriptedEngine
from selfguide_ray.inputs import Inputs
from selfguide_ray.metrics import rouge_l
from selfguide_ray.outputs import Outputs
from selfguide_ray.schema import TABLES, task_rows
from selfguide_ray.trainset import Trainset, balance
from selfguide_ray.votes import elect

FREE = {"length_filter": False}


def answers(*texts, logprobs=None):
    logprobs = logprobs or [-1.0] * len(texts)
    return [
        {"output": text, "logprob": value, "finish_reason": "stop", "probability": None}
        for text, value in zip(texts, logprobs, strict=True)
    ]


def election(task, *texts, logprobs=None, **settings):
    """The winner, and the columns about the vote."""
    return elect(task, answers(*texts, logprobs=logprobs), Settings(**FREE | settings))


def table(*rows):
    """A table `outputs` of (task, id, input, answers or drop reason)."""
    records = [
        {"task": task, "id": row, "label": None, "input": text, "candidates": [], "drop_reason": given}
        if isinstance(given, str)
        else {"task": task, "id": row, "label": None, "input": text, "candidates": answers(*given), "drop_reason": None}
        for task, row, text, given in rows
    ]
    return pa.Table.from_pylist(records, schema=TABLES["outputs"])


def made(tasks, outputs, *settings, system="selfguide"):
    config = load(overrides=list(settings))
    rows = Trainset(config, None, ScriptedEngine(config.student))(task_rows(tasks), outputs).to_pylist()
    return [row for row in rows if row["system"] == system]


# --- the vote --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "winner", "votes", "voters"),
    [
        (["bb", "bb", "a", "a", "ccc"], "a", 2, 5),  # statement 14: a tie goes to the shortest
        (["w", "x", "y", "z"], None, 1, 4),
        (["only"], "only", 1, 1),
        (["x", "y", "z"], "x", 1, 3),  # 1/3 >= 0.3, a tie of equal lengths goes to the first
        (["a", "a", "a", "b", "c", "d", "e", "f", "g", "h"], "a", 3, 10),  # 0.3 is enough
        (["a", "a", "b", "c", "d", "e", "f"], None, 2, 7),
        (["  a", "a\n", "b"], "a", 2, 3),
        (["", "  ", "an input", "b"], "b", 1, 1),  # one survivor wins
        (["A", "a", "a."], "A", 1, 3),
    ],
)
def test_the_most_frequent_answer_wins_if_it_is_frequent_enough(make_task, texts, winner, votes, voters):
    output, told = election(make_task(), *texts)
    assert (output, told["votes"], told["voters"]) == (winner, votes, voters)
    assert told.get("drop_reason") == (None if winner else "no_majority")


def test_a_vote_without_majority_tells_the_share(make_task):
    output, told = election(make_task(), "w", "x", "y", "z")
    assert output is None
    assert told == {
        "drop_reason": "no_majority", "measured": 0.25, "bound": "at least 0.3 of the votes", "neighbour": None,
        "votes": 1, "voters": 4, "verdicts": [None] * 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "reason"),
    [(["", " "], "empty"), (["an input", "", "my output"], "noise"), ([""] * 20, "empty")],
)
def test_without_survivors_the_commonest_verdict_is_the_rows(make_task, texts, reason):  # statement 14
    output, told = election(make_task(), *texts)
    assert (output, told["drop_reason"], told["votes"], told["voters"]) == (None, reason, 0, 0)
    assert (told["measured"], told["bound"]) == (0.0, "at least 1 vote")


def test_the_ten_likeliest_of_twenty_vote(make_task):  # statement 13
    logprobs = [-float((7 * number) % 20) for number in range(20)]  # all different
    texts = ["good" if logprob > -10 else "bad" for logprob in logprobs]
    output, told = election(make_task(), *texts, logprobs=logprobs)
    assert (output, told["votes"], told["voters"]) == ("good", 10, 10)
    assert told["verdicts"] == [None if text == "good" else "not_kept" for text in texts]


def test_of_equally_likely_answers_the_first_are_kept(make_task):
    output, told = election(make_task(), "a", "b", "b", logprobs=[-1.0, -1.0, -1.0], keep=1)
    assert (output, told["verdicts"]) == ("a", [None, "not_kept", "not_kept"])


def test_by_consensus_the_answer_wins_that_is_most_like_the_others(make_task):
    texts = ["the old house by the sea", "an old house by the sea", "the old house", "a new car", "a new car"]
    assert election(make_task(), *texts)[0] == "a new car"  # two of five say just this
    output, told = election(make_task(), *texts, vote="consensus")
    assert output == "the old house by the sea"
    expected = fmean(rouge_l(output, [text]) for text in texts[1:])
    output, told = election(make_task(), *texts, vote="consensus", min_frequency=0.9)
    assert (output, told["drop_reason"]) == (None, "no_majority")
    assert told["measured"] == pytest.approx(expected)
    assert election(make_task(), "alone", vote="consensus", min_frequency=1.0)[0] == "alone"
    assert election(make_task(), "?!", "?!", "...", vote="consensus")[0] == "?!"  # no words: equal or not at all alike
    labels = make_task(labels=("yes", "no"))
    assert election(labels, "no", "no", "yes", vote="consensus")[1]["votes"] == 2  # labels are counted as ever


def test_a_filtered_answer_is_not_replaced_by_a_less_likely_one(make_task):
    output, told = election(make_task(), "my input", "a", "b", logprobs=[-1.0, -2.0, -3.0], keep=2)
    assert (output, told["verdicts"], told["voters"]) == ("a", ["noise", None, "not_kept"], 1)


@pytest.mark.parametrize(("among", "winner"), [("survivors", "a"), ("samples", None)])
def test_the_share_is_of_the_survivors_or_of_all_that_may_vote(make_task, among, winner):
    output, told = election(make_task(), "a", "", "", "", vote_among=among)
    assert output == winner
    assert (told["votes"], told["voters"]) == (1, 1)
    assert told.get("measured") == (None if winner else 0.25)


def test_samples_means_those_that_were_kept(make_task):
    texts = ["a", "a", "", "", *["b"] * 16]
    output, told = election(make_task(), *texts, logprobs=[-1.0] * 4 + [-2.0] * 16, keep=4, vote_among="samples")
    assert (output, told["votes"], told["voters"]) == ("a", 2, 2)


def test_the_length_filter_measures_answers_against_the_examples_outputs(make_task):
    task = make_task(examples=[("x" * 50, "abc"), ("y" * 50, "vwxyz")])  # 2 to 6
    output, told = election(task, "x", "xx", "xxxxxx", "xxxxxxx", length_filter=True)
    assert told["verdicts"] == ["length", None, None, "length"]
    assert output == "xx"
    assert election(task, "x" * 9, length_filter=True, length_slack=1.0)[0] == "x" * 9


def test_answers_with_a_beginning_that_is_not_wanted_do_not_vote(make_task):
    task = make_task(examples=[("x", "so it is"), ("y", "z")], labels=("a", "well done"))
    free = make_task(examples=[("x", "so it is"), ("y", "z")])
    _, told = election(free, "So what", "Well, a", "welly", prefixes=("so", "well"))
    assert told["verdicts"] == [None, "prefix", None]  # an example's answer begins with the first
    _, told = election(task, "well done", "so a", "a", prefixes=("so", "well"), extract_labels=True)
    assert told["verdicts"] == [None, None, None]  # as does a label with the second


def test_words_that_the_examples_answers_use_are_no_noise(make_task):
    task = make_task(examples=[("x", "the input"), ("y", "z")], noise_words=("zebra",))
    _, told = election(task, "my input", "my output", "a zebra")
    assert told["verdicts"] == [None, "noise", "noise"]
    assert election(make_task(labels=("input", "output")), "output")[0] == "output"


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "extracted", "exact"),
    [
        (["The answer is neutral.", "neutral", "positive"], ("neutral", 2, 3), ("neutral", 1, 2)),
        (["The answer is neutral."], ("neutral", 1, 1), (None, 0, 0)),  # statement 16
        (["Neutral", "positive."], ("neutral", 1, 2), (None, 0, 0)),
        (["neutral or positive", "positive"], ("positive", 1, 1), ("positive", 1, 1)),
        ([" neutral "], ("neutral", 1, 1), ("neutral", 1, 1)),
        (["dunno"], (None, 0, 0), (None, 0, 0)),
    ],
)
def test_an_answer_votes_for_the_label_it_names_or_only_for_the_one_it_equals(make_task, texts, extracted, exact):
    task = make_task(labels=("neutral", "positive"))
    for extract, wanted in ((True, extracted), (False, exact)):
        output, told = election(task, *texts, extract_labels=extract)
        assert (output, told["votes"], told["voters"]) == wanted
        assert told.get("drop_reason") == (None if wanted[0] else "no_label")


def test_two_labels_in_an_answer_are_its_verdict(make_task):
    output, told = election(make_task(labels=("neutral", "positive")), "neutral or positive")
    assert (output, told["verdicts"], told["drop_reason"]) == (None, ["ambiguous_label"], "ambiguous_label")


def test_length_flags_are_independent(make_task):  # statement 15
    tasks = [make_task("open"), make_task("closed", labels=("sky", "tree"), examples=[("a b", "sky"), ("c d", "tree")])]

    def tables(*flags):
        config = load(overrides=["inputs.rounds=4", "trainset.balance=false", *flags])
        engine = ScriptedEngine(Student(engine="scripted"))
        inputs = Inputs(config, None, engine)(task_rows(tasks))
        outputs = Outputs(config, None, engine)(task_rows(tasks), inputs)
        return inputs, Trainset(config, None, engine)(task_rows(tasks), outputs).to_pylist()

    inputs, rows = tables("trainset.length_filter={classification: false, generation: true}")
    same_inputs, other_rows = tables("trainset.length_filter=false")
    assert inputs.equals(same_inputs)
    assert [row for row in rows if row["task"] == "closed"] == [row for row in other_rows if row["task"] == "closed"]


def test_turning_the_output_flag_on_drops_answers_of_generation_tasks_only(make_task):  # statement 15
    outputs = table(("open", "r1", "x", ["much too long an answer"]), ("closed", "r1", "x", ["it is surely yes"]))
    tasks = [make_task("open"), make_task("closed", labels=("yes", "no"))]
    assert [row["drop_reason"] for row in made(tasks, outputs)] == ["length", None]


# --- balance ---------------------------------------------------------------------------------------------------------


def labelled(**counts):
    return [
        {"id": f"{label}{number}", "output": label, "drop_reason": None}
        for label, count in counts.items()
        for number in range(count)
    ]


def alive(rows):
    return [row["id"] for row in rows if row["drop_reason"] is None]


@pytest.mark.parametrize(
    ("counts", "left"),
    [({"A": 7, "B": 4, "C": 9}, 4), ({"A": 7, "B": 4}, 4), ({"A": 3}, 3), ({"A": 1, "B": 50}, 1), ({}, 0)],
)
def test_balancing_leaves_as_many_pairs_of_each_label_as_the_rarest_has(counts, left):  # statement 17
    rows = labelled(**counts)
    balance(rows, seed=5)
    kept = alive(rows)
    assert Counter(name[0] for name in kept) == dict.fromkeys(counts, left)
    assert len(kept) == len(set(kept))
    assert len(rows) == sum(counts.values())
    for row in rows:
        if row["drop_reason"] is not None:
            size = counts[row["output"]]
            assert (row["drop_reason"], row["measured"], row["bound"]) == ("imbalanced", size, f"{left} of each label")


def test_balancing_depends_on_its_seed_alone():
    def kept(seed):
        rows = labelled(A=30, B=10)
        balance(rows, seed)
        return alive(rows)

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)
    assert kept(1)[:10] != [f"A{number}" for number in range(10)]


def test_pairs_that_were_dropped_before_are_not_counted():
    rows = labelled(A=3, B=2)
    rows[0]["drop_reason"] = "no_majority"
    rows[3]["drop_reason"] = "too_long"
    balance(rows, 0)
    assert Counter(name[0] for name in alive(rows)) == {"A": 1, "B": 1}
    assert (rows[0]["drop_reason"], rows[3]["drop_reason"]) == ("no_majority", "too_long")


@pytest.mark.parametrize(("setting", "labels", "left"), [("true", 1, 4), ("false", 1, 6), ("true", 0, 6)])
def test_only_classification_tasks_are_balanced_and_only_if_wanted(make_task, setting, labels, left):
    outputs = table(*(("toy", f"r{n}", f"text {n}", ["yes"] if n < 4 else ["no"]) for n in range(6)))
    task = make_task(labels=("yes", "no") * labels, examples=[("a", "yes"), ("b", "no")])
    rows = made([task], outputs, f"trainset.balance={setting}")
    assert [row["drop_reason"] for row in rows].count(None) == left
    assert [row["drop_reason"] for row in rows].count("imbalanced") == 6 - left


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_row_of_outputs_becomes_one_of_trainset(make_task):
    outputs = table(
        ("one", "r1", "text", ["apple"]),
        ("two", "r1", "text", "too_long"),
        ("one", "r2", "more", ["", ""]),
        ("two", "r2", "more", ["apple", "tree", "sky", "x" * 99]),
    )
    rows = made([make_task("one"), make_task("two")], outputs)
    assert [(row["task"], row["id"], row["input"], row["output"], row["drop_reason"]) for row in rows] == [
        ("one", "r1", "text", "apple", None),
        ("one", "r2", "more", None, "empty"),
        ("two", "r1", "text", None, "too_long"),
        ("two", "r2", "more", "sky", None),
    ]
    assert [row["verdicts"] for row in rows] == [[None], ["empty", "empty"], None, [None, None, None, "length"]]


def test_a_pair_tells_its_prompt_completion_and_tokens(make_task):
    (row,) = made([make_task()], table(("toy", "r1", "old house", ["apple"])))
    assert row["prompt"].endswith("\nUSER: ITEM: old house\nASSISTANT:")
    assert row["completion"] == " apple\x04"
    assert row["tokens"] == len(row["prompt"]) + len(" apple\x04")
    assert (row["votes"], row["voters"], row["measured"], row["bound"], row["neighbour"]) == (1, 1, None, None, None)


def test_an_over_long_pair_is_dropped_with_its_length_and_never_cut(make_task):  # statement 20
    outputs = table(("toy", "r1", "old house", ["apple"]))
    (whole,) = made([make_task()], outputs)
    (fits,) = made([make_task()], outputs, f"trainset.max_tokens={whole['tokens']}")
    (row,) = made([make_task()], outputs, f"trainset.max_tokens={whole['tokens'] - 1}")
    assert fits == whole
    assert (row["drop_reason"], row["measured"]) == ("too_long", float(whole["tokens"]))
    assert row["bound"] == f"{whole['tokens'] - 1} tokens"
    assert (row["prompt"], row["completion"]) == (whole["prompt"], whole["completion"])


# --- the label that an input was asked for


@pytest.mark.parametrize(
    ("answer", "outputs", "reasons"),
    [
        ("voted", ["yes", "no", None, "no"], [None, None, "no_label", None]),
        ("agreed", ["yes", "no", None, "no"], [None, "disagreed", "no_label", None]),
        ("wanted", ["yes", "yes", "yes", "no"], [None] * 4),
    ],
)
def test_the_wanted_label_may_have_to_agree_or_count_alone(make_task, answer, outputs, reasons):
    task = make_task("closed", labels=("yes", "no"))
    asked = [("yes", ["yes"] * 3), ("yes", ["no"] * 3), ("yes", ["maybe"] * 3), ("no", ["no"] * 3)]
    answered = table(*(("closed", f"r{n}", f"item {n}", given) for n, (_, given) in enumerate(asked)))
    labelled = answered.set_column(2, "label", pa.array([label for label, _ in asked]))
    rows = made([task], labelled, f"trainset.answer={answer}", "trainset.balance=false")
    assert [row["output"] for row in rows] == outputs
    assert [row["drop_reason"] for row in rows] == reasons
    for row in rows:
        assert (row["prompt"] is None) == (row["drop_reason"] is not None)


def test_a_generation_task_has_no_label_to_agree_with(make_task):
    rows = made([make_task("open")], table(("open", "r1", "x", ["house"] * 3)), "trainset.answer=wanted")
    assert [(row["output"], row["drop_reason"]) for row in rows] == [("house", None)]


# --- the examples as pairs


def test_each_example_is_a_pair_of_a_baseline_whose_prompt_does_not_hold_its_answer(make_task):
    task = make_task("things", examples=[("red apple", "zebra"), ("blue sky", "quince"), ("green tree", "walrus")])
    rows = made([task], table(("things", "r1", "old house", ["house"])), system="few_shot_tuned")
    assert [(row["id"], row["output"]) for row in rows] == [
        ("example0", "zebra"), ("example1", "quince"), ("example2", "walrus")
    ]  # fmt: skip
    for row in rows:
        assert row["drop_reason"] is None
        assert row["output"] not in row["prompt"]
        assert row["completion"].strip().startswith(row["output"])
        assert all(other["output"] in row["prompt"] for other in rows if other is not row)
    # Where an example has no room, it says so.
    dropped = made([task], table(), "trainset.max_tokens=16", system="few_shot_tuned")
    assert {row["drop_reason"] for row in dropped} == {"too_long"}


# --- pairs too like each other, or too like what they will be judged by


def pairs(*texts, output="house"):
    return table(*(("things", f"r{n}", text, [output]) for n, text in enumerate(texts)))


def told(rows, *columns):
    return [tuple(row[column] for column in columns) for row in rows]


SAID = "one two three four five"
NEAR = "one two three four seven"  # ROUGE-L 0.8


def test_a_pair_too_like_an_example_or_an_earlier_survivor_is_dropped_with_its_neighbour(make_task):
    task = make_task("things", instances=[])
    texts = [SAID, "red apples", NEAR, "one two three six seven", "five four"]
    rows = made([task], pairs(*texts), "trainset.novelty=0.7")
    assert told(rows, "drop_reason", "measured", "bound", "neighbour") == [
        (None, None, None, None),
        ("too_similar", 1.0, "ROUGE-L up to 0.7", "example0"),  # a stem apart from "red apple"
        ("too_similar", 0.8, "ROUGE-L up to 0.7", "r0"),
        (None, None, None, None),  # like r2, which is dropped, and 0.6 like r0
        (None, None, None, None),
    ]
    assert rows[2]["prompt"] is not None
    assert {row["drop_reason"] for row in made([task], pairs(*texts))} == {None}


def test_a_pair_that_was_dropped_before_makes_no_other_too_similar(make_task):
    outputs = table(("things", "r0", SAID, ["w"]), ("things", "r1", NEAR, ["house"]))
    rows = made([make_task("things")], outputs, "trainset.novelty=0.5")
    assert [row["drop_reason"] for row in rows] == ["length", None]


def test_similar_pairs_go_before_labels_are_balanced(make_task):
    task = make_task("things", labels=("yes", "no"), examples=[("a", "yes"), ("b", "no")])
    outputs = table(
        ("things", "r0", SAID, ["yes"]), ("things", "r1", NEAR, ["yes"]),
        ("things", "r2", "other words", ["no"]),
    )  # fmt: skip
    rows = made([task], outputs, "trainset.novelty=0.7")
    assert [row["drop_reason"] for row in rows] == [None, "too_similar", None]


def test_the_middle_by_length_is_kept(make_task):
    texts = ["x" * n for n in (5, 1, 9, 3, 7, 2, 8, 10, 4, 6)]
    rows = made([make_task("things")], pairs(*texts), "trainset.middle_lengths=0.8")
    dropped = [row for row in rows if row["drop_reason"]]
    assert told(dropped, "input", "drop_reason", "measured", "bound") == [
        ("x", "not_middle", 1.0, "the middle 0.8, 2 to 9 characters"),
        ("x" * 10, "not_middle", 10.0, "the middle 0.8, 2 to 9 characters"),
    ]


@pytest.mark.parametrize(
    ("count", "share", "dropped"),
    [(4, 0.5, [0, 3]), (5, 0.5, [0, 4]), (9, 0.8, []), (20, 0.8, [0, 1, 18, 19]), (1, 0.01, []), (3, 0.01, [0, 2])],
)
def test_of_equally_long_inputs_the_outer_rows_go(make_task, count, share, dropped):
    rows = made([make_task("things")], pairs(*["same"] * count), f"trainset.middle_lengths={share}")
    assert [n for n, row in enumerate(rows) if row["drop_reason"] == "not_middle"] == dropped


HELD_OUT = "alpha beta gamma delta epsilon zeta eta theta iota kappa"  # ten words
COPIED_RUN = "so alpha beta gamma delta epsilon zeta eta theta and then wholly unlike words follow in this long text"


@pytest.mark.parametrize(
    ("text", "suspects", "kind", "measured", "bound"),
    [
        ('  "OLD   house" ', ["things-0"], "exact", 1.0, "no equal text"),
        (COPIED_RUN, ["things-1", "things-2"], "words", 8.0, "no run of 8 words"),
        (HELD_OUT.replace("epsilon", "x"), ["things-1"], "rouge_l", 0.9, "ROUGE-L below 0.8"),
        (HELD_OUT, ["things-1", "things-2"], "exact", 1.0, "no equal text"),
        ("alpha beta gamma delta", [], None, None, None),
        ("古い家", ["things-3"], "exact", 1.0, "no equal text"),
        ("古い車", [], None, None, None),
    ],
)
def test_a_pair_that_overlaps_a_held_out_instance_is_marked_or_dropped(
    make_task, text, suspects, kind, measured, bound
):
    instances = [("old house", "house"), (HELD_OUT, "x"), (HELD_OUT[:-6] + " mu nu", "x"), ("古い家", "x")]
    task = make_task("things", instances=instances)
    (row,) = made([task], pairs(text))
    assert (row["suspects"], row["overlap"]) == (suspects, kind)
    assert (row["drop_reason"], row["prompt"] is None) == (None, False)
    (row,) = made([task], pairs(text), "trainset.decontaminate=drop")
    reason, neighbour = ("contaminated", suspects[0]) if suspects else (None, None)
    assert told([row], "drop_reason", "measured", "bound", "neighbour") == [(reason, measured, bound, neighbour)]
    assert row["overlap"] == kind
    (row,) = made([task], pairs(text), "trainset.decontaminate=off")
    assert (row["suspects"], row["overlap"], row["drop_reason"]) == (None, None, None)


def test_the_instance_with_the_longest_run_is_the_neighbour(make_task):
    shorter, longer = (" ".join(COPIED_RUN.split()[:count]) for count in (9, 12))
    task = make_task("things", instances=[(f"b c d {shorter} a", "x"), (f"e f g {longer} b", "x")])
    (row,) = made([task], pairs(COPIED_RUN), "trainset.decontaminate=drop", "trainset.overlap_rouge=1")
    assert row["suspects"] == ["things-0", "things-1"]
    assert (row["neighbour"], row["measured"]) == ("things-1", 12.0)


@pytest.mark.parametrize(
    ("given", "overlap"),
    [
        ({}, "words"),
        ({"instruction": f"Say what {HELD_OUT} is."}, None),
        ({"examples": [(f"{HELD_OUT} here", "b")]}, None),
        ({"examples": [("a", f"the {HELD_OUT}")]}, None),
        ({"examples": [("a", f"the {HELD_OUT[12:]}")]}, "words"),
    ],
)
def test_words_that_the_task_itself_shows_are_no_overlap(make_task, given, overlap):
    task = make_task("things", instances=[(f"{HELD_OUT} by the sea", "x")], **given)
    settings = ("trainset.overlap_rouge=1", "trainset.overlap_words=10", "trainset.length_filter=false")
    (row,) = made([task], pairs(f"{HELD_OUT} and more"), *settings)
    assert (row["suspects"], row["overlap"]) == (["things-0"] if overlap else [], overlap)


def test_an_example_that_equals_a_held_out_instance_is_a_suspect_and_stays(make_task):
    task = make_task("things", instances=[("Blue  sky", "sky"), ("new car", "car")])
    for settings in ((), ("trainset.decontaminate=drop",)):
        rows = made([task], pairs("old house"), *settings, system="few_shot_tuned")
        assert told(rows, "suspects", "overlap", "drop_reason") == [
            ([], None, None), (["things-0"], "exact", None), ([], None, None)
        ]  # fmt: skip


def test_a_pair_that_is_dropped_for_its_overlap_makes_no_other_too_similar(make_task):
    task = make_task("things", instances=[(SAID, "x")])
    settings = ("trainset.novelty=0.7", "trainset.decontaminate=drop", "trainset.overlap_rouge=0.9")
    rows = made([task], pairs(SAID, NEAR), *settings)
    assert [row["drop_reason"] for row in rows] == ["contaminated", None]
