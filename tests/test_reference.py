"""`method: reference`: the reference code's filters, votes, prompts and settings, worked out by hand from their specification."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pools import OPEN, ROOM, reasons, through_pool

from selfguide_ray.config import Config, Student
from selfguide_ray.config_file import load
from selfguide_ray.engine.scripted import ByteTokenizer, ScriptedEngine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.prompts import Prompts
from selfguide_ray.reference import (
    HeaderAndNewline,
    Seen,
    Stripped,
    answer_rules,
    input_rules,
    length_bounds,
    noise_words,
)
from selfguide_ray.run import READS, made_by
from selfguide_ray.schema import TABLES, Example, task_rows
from selfguide_ray.trainset import Trainset
from selfguide_ray.votes import Votes, elect


def settings(*overrides):
    return load(overrides=["method=reference", *overrides])


@pytest.fixture
def rows_of(make_task):
    """Runs texts through the pool of a task with these inputs as examples; returns the rows that come of it."""

    def run(texts, examples=OPEN, settings=(), **task):
        return through_pool(make_task, texts, examples, ("method=reference", *settings), **task)

    return run


@pytest.fixture
def reasons_of(rows_of):
    return lambda *given, **more: reasons(rows_of(*given, **more))


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "legal"),
    [
        ((3, 5), range(2, 6)),  # statement 7
        ((7, 7), range(0)),
        ((1, 9), range(0, 13)),  # statement 8: 5 ± 8, a negative lower end
        ((1, 1, 9), range(0, 11)),  # 11/3 ± 2·3.771: -3.9 and 11.2
        ((10, 11), range(9, 11)),  # 9.5 and 11.5 are cut to 9 and 11, so the example of 11 is outside
        ((100, 10, 10, 10, 10, 10), range(0, 92)),  # 25 ± 67.08: the example of 100 is outside
    ],
)
def test_a_length_is_from_the_lower_bound_to_below_the_upper_one(reasons_of, lengths, legal):
    examples = ["x" * length for length in lengths]
    texts = ["y" * length for length in range(1, 120)]
    assert [len(text) for text, reason in zip(texts, reasons_of(texts, examples), strict=True) if not reason] == [
        length for length in legal if length
    ]


def test_a_negative_lower_bound_stays_what_it_is():
    assert length_bounds(["a", "b" * 9], 2.0) == (-3, 12)
    assert length_bounds(["a", "a", "b" * 9], 2.0) == (-3, 10)  # -3.88 is cut towards zero


def test_white_space_counts_in_a_length_and_is_not_stored(rows_of):  # bounds 2 and 6
    rows = rows_of([" abcd", "  abcd ", "    ", "  ab\n"], ("abc", "vwxyz"))
    assert [row.get("drop_reason") for row in rows] == [None, "length", None, None]
    assert [row["input"] for row in rows] == ["abcd", "abcd", "", "ab"]
    assert (rows[1]["measured"], rows[1]["bound"]) == (7.0, "2 to 5 characters")


def test_examples_are_measured_as_they_stand(reasons_of):
    assert reasons_of(["abc", "abcdef"], ("abc  ", " abc   ")) == ["length", None]  # 5 and 7 characters: 4 to 7


def test_the_length_filter_can_be_off(reasons_of):
    texts = ["x" * 900, "input"]
    assert reasons_of(texts, ("abc", "vwxyz"), settings=["inputs.length_filter=false"]) == [None, "noise"]


@pytest.mark.parametrize(("labels", "reason"), [((), "length"), (("yes", "no"), "no_label")])
@pytest.mark.parametrize("flag", ["true", "{classification: true, generation: true}"])
def test_classification_has_no_bound_on_the_length_of_answers(make_task, labels, reason, flag):  # statement 15
    task = make_task(labels=labels, examples=[("a", "yes"), ("b", "no")])
    config = settings(f"trainset.length_filter={flag}").trainset
    assert vote(task, config, "y" * 30)[1]["drop_reason"] == reason
    assert (answer_rules(task, config).lengths is None) == bool(labels)


def test_the_flag_of_answers_changes_no_input_and_that_of_inputs_no_answer(make_task):  # statement 15
    task = make_task()
    one, other = settings("trainset.length_filter=false"), settings("inputs.length_filter=false")
    assert input_rules(task, one.inputs) == input_rules(task, settings().inputs) != input_rules(task, other.inputs)
    assert answer_rules(task, other.trainset) == answer_rules(task, settings().trainset)
    assert answer_rules(task, one.trainset).lengths is None


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the input", "noise"),  # statement 9: anywhere in a text, in its own case
        ("throughput and inputs", "noise"),
        ("outputs", "noise"),
        ("Input and OUTPUT", None),
        ("throughput", None),  # holds "put" alone
        ("a\n\nb", "noise"),
        ("\n\na", "noise"),  # before stripping (B8)
        ("a\n\n", "noise"),
        ("a\n \nb", None),
        ("a\nb", None),
        (r"a \_\_ b", "noise"),
        (r"a \_ b", None),
        ("a __ b", None),
        ("Sure, a", "noise"),  # our chat phrases
        ("sure, a", None),
        ("and therefore b", None),
    ],
)
def test_noise_is_found_anywhere_in_its_own_case_before_stripping(reasons_of, text, reason):
    assert reasons_of([text]) == [reason]


def test_classification_has_more_noise_words(reasons_of):
    texts = ["so therefore", "Therefore", "Hence a", "henceforth", "the neutral"]
    assert reasons_of(texts) == [None] * 5
    assert reasons_of(texts, labels=("yes", "no")) == ["noise", "noise", "noise", None, None]


@pytest.mark.parametrize(
    ("name", "noise", "fine"),
    [
        ("task1612_sick_label_classification", [r"a \_ b"], ["The premise"]),
        ("task1529_scitail1.1_classification", ["The premise is", "The hypothesis"], [r"a \_ b", "the premise"]),
        ("task199_mnli_classification", ["therefore"], ["Hence"]),
        ("task738_perspectrum_classification", ["Therefore"], ["Hence"]),
        ("task190_snli_classification", ["Hence"], [r"a \_ b", "The premise"]),
    ],
)
def test_tasks_of_the_paper_have_words_of_their_own(reasons_of, name, noise, fine):
    reasons = reasons_of([*noise, *fine], name=name, labels=("yes", "no"))
    assert reasons == ["noise"] * len(noise) + [None] * len(fine)


def test_what_an_example_holds_is_noise_all_the_same(reasons_of, make_task):
    assert reasons_of(["my input"], ("your input", "b" * 90)) == ["noise"]
    task = make_task(examples=[("a", "the input"), ("b", "x" * 40)])
    assert vote(task, settings().trainset, "the input")[1]["drop_reason"] == "noise"


def test_words_of_one_task_never_reach_the_next(make_task):  # statement 10
    before = noise_words(make_task(), ("input",))
    assert "zebra" in noise_words(make_task(noise_words=("zebra",), labels=("yes", "no")), ("input",))
    assert noise_words(make_task(), ("input",)) == before == ("input", "\n\n", r"\_\_")


# --- empty, duplicates, order ----------------------------------------------------------------------------------------


def test_only_no_character_at_all_is_empty(reasons_of):
    assert reasons_of(["", " ", "\t\n", '""', "ITEM:"]) == ["empty", None, None, None, None]


def test_a_generated_text_is_a_duplicate_of_a_stored_one_alone(rows_of):  # statement 12, B9
    texts = [" x ", "x", '"x"', '"x"', " x ", "a", "X", "y", "y "]
    rows = rows_of(texts)
    reasons = [None, "duplicate", None, "duplicate", None, None, None, None, None]
    assert [row.get("drop_reason") for row in rows] == reasons
    assert [row["input"] for row in rows] == ["x", "x", '"x"', '"x"', "x", "a", "X", "y", "y"]
    assert rows[1]["neighbour"] == "r000i000"
    assert rows[3]["neighbour"] == "r000i002"


def test_a_duplicate_is_known_by_its_first_row():
    seen = Seen()
    seen.add("one", " x")
    seen.add("two", "x")
    assert seen.judge("x").neighbour == "one"
    assert seen.judge("x ") is None


def test_the_first_of_empty_length_noise_duplicate_is_the_reason(reasons_of):  # statement 11
    texts = ["", "abcd", "an input", "input", "abcd", "abc"]
    assert reasons_of(texts, ("abc", "vwxyz")) == ["empty", None, "length", "noise", "duplicate", None]


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(*texts, logprobs=None):
    values = logprobs or [-1.0] * len(texts)
    return [
        {"output": text, "logprob": value, "finish_reason": "stop", "probability": None}
        for text, value in zip(texts, values, strict=True)
    ]


def vote(task, config, *texts, logprobs=None):
    return elect(task, answers(*texts, logprobs=logprobs), config, Votes(task, config, answer_rules))


@pytest.mark.parametrize(
    ("texts", "winner", "reason"),
    [
        (["bb", "a", "ccc", "bb", "a"], "a", None),  # statement 14
        (["w", "x", "y", "z"], None, "no_majority"),
        (["input", "", "an output", "a"], "a", None),
        (["", " ", "input"], None, "empty"),
        ([" a", "a\n", "b"], "a", None),
        (["b", "a"], "b", None),  # as many, as long: the first
        (["throughput in", "a input", "abc"], "abc", None),
    ],
)
def test_the_vote_is_ours(make_task, texts, winner, reason):
    task = make_task(examples=[("x", "a"), ("y", "b" * 20)])
    output, told = vote(task, settings().trainset, *texts)
    assert (output, told.get("drop_reason")) == (winner, reason)


def test_the_ten_likeliest_of_twenty_vote(make_task):
    logprobs = [-float((7 * number) % 20) for number in range(20)]
    texts = ["good" if logprob > -10 else "bad" for logprob in logprobs]
    output, told = vote(make_task(), settings("trainset.length_filter=false").trainset, *texts, logprobs=logprobs)
    assert (output, told["votes"], told["voters"]) == ("good", 10, 10)


@pytest.mark.parametrize(
    ("answer", "label"),
    [("neutral", "neutral"), (" neutral\n", "neutral"), ("The answer is neutral.", None), ("neutral.", None),
     ("Neutral", None), ("entails or neutral", None)],
)  # fmt: skip
def test_a_label_is_the_whole_answer_or_none(make_task, answer, label):  # statement 16
    task = make_task(labels=("entails", "neutral"), examples=[("a", "entails"), ("b", "neutral")])
    assert vote(task, settings().trainset, answer)[0] == label


def test_the_stage_votes_by_these_rules(make_task):
    candidates = [*answers("inputs"), *answers("much too long to be right"), *answers("sky")]
    given = {"task": "toy", "id": "r0", "label": None, "input": "x", "candidates": candidates, "drop_reason": None}
    outputs = pa.Table.from_pylist([given], schema=TABLES["outputs"])
    stage = Trainset(settings(), None, ScriptedEngine(Student(engine="scripted")))
    row = stage(task_rows([make_task()]), outputs).to_pylist()[0]  # outputs of 3, 4 and 5 characters: below 5
    assert (row["output"], row["verdicts"]) == ("sky", ["length", "length", None])
    ours = replace(make_task(), examples=(*make_task().examples, Example("y", "z" * 9)))
    row = stage(task_rows([ours]), outputs).to_pylist()[0]
    assert row["verdicts"] == ["noise", "length", None]  # "inputs" holds a word that to us is another


# --- prompts ---------------------------------------------------------------------------------------------------------


class ChatTokenizer(ByteTokenizer):
    """Bytes with a chat format whose header ends in `end`."""

    end = "<|assistant|>\n"

    def chat(self, messages):
        return "".join(f"<|{m['role']}|>\n{m['content']}\x04\n" for m in messages) + self.end


class BareTokenizer(ChatTokenizer):
    end = "<|assistant|>"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ChatTokenizer(), BareTokenizer()])
def test_annotation_is_stripped_and_training_and_evaluation_end_in_header_and_newline(make_task, tokenizer):
    task = make_task()  # statement 18, B17
    ours, asked, taught = (kind(tokenizer, ROOM).answering(task, "old house") for kind in
                           (Prompts, Stripped, HeaderAndNewline))  # fmt: skip
    assert asked.text == ours.text.strip()
    assert taught.text == asked.text + "\n"
    assert asked.text.endswith(("\nASSISTANT:", "<|assistant|>"))
    for prompt in (asked, taught):
        assert prompt.ids == tuple(tokenizer.encode(prompt.text))
        assert "None" not in prompt.text  # B6
        assert prompt.examples == 3


def test_an_answer_follows_the_newline_at_once_and_ends_in_eos():
    assert HeaderAndNewline(ByteTokenizer(), ROOM).completion(" yes\n") == "yes\x04"
    assert Prompts(ByteTokenizer(), ROOM).completion(" yes\n") == " yes\x04"


def test_there_are_no_stop_strings():  # B24
    for kind in (Stripped, HeaderAndNewline):
        prompts = kind(ByteTokenizer(), ROOM)
        assert (prompts.answer_stops, prompts.item_stops) == ((), ())


def test_the_prompt_for_new_items_is_ours(make_task):
    given = (make_task(), ["red apple"], ["a  b"], "yes")
    assert HeaderAndNewline(ByteTokenizer(), ROOM).writing(*given) == Prompts(ByteTokenizer(), ROOM).writing(*given)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("outputs.labels=decode", 'outputs.labels is "decode" beside method: reference.'),
        ("predictions.labels=score", 'predictions.labels is "score" beside method: reference.'),
        ("trainset.extract_labels=true", "trainset.extract_labels is true beside method: reference."),
        ("trainset.answer=wanted", 'trainset.answer is "wanted" beside method: reference.'),
        ("trainset.vote_among=samples", 'trainset.vote_among is "samples" beside method: reference.'),
        ("trainset.length_slack=0.5", "trainset.length_slack is 0.5 beside method: reference."),
        ("inputs.length_slack=0.5", "inputs.length_slack is 0.5 beside method: reference."),
    ],
)
def test_a_setting_that_contradicts_the_reference_is_refused(override, told):
    with pytest.raises(SelfGuideError) as caught:
        settings(override)
    assert caught.value.what == told
    assert caught.value.why.startswith("The reference code knows only ")
    assert caught.value.instead.endswith("or choose method: selfguide.")
    assert load(overrides=[override]).method == "selfguide"


def test_a_default_gives_way_and_a_setting_that_agrees_is_fine():
    assert settings().trainset.extract_labels is False
    assert settings("trainset.extract_labels=false", "outputs.labels=free", "inputs.length_slack=0") == settings()
    assert settings("trainset.keep=3").trainset.model_dump() == settings().trainset.model_dump() | {"keep": 3}
    assert Config().trainset.extract_labels is True
    assert Config(method="reference", trainset=Config().trainset) == settings()


def test_a_section_that_is_none_is_told_as_ever():
    with pytest.raises(SelfGuideError, match="command line: trainset is 3"):
        settings("trainset=3")
    assert settings("trainset=") == settings()


def test_the_method_is_among_what_makes_the_rows_it_changes():
    def told(config):
        return {table: made_by(table, config, {"model": "m"}) for table in READS}

    ours, theirs = told(load()), told(settings())
    assert ours["tasks"] == theirs["tasks"]
    assert [table for table in READS if ours[table] != theirs[table]] == list(READS)[1:]
    assert [table for table in READS if theirs[table].get("method") == "reference"] == [
        "inputs", "outputs", "trainset", "predictions", "scores"
    ]  # fmt: skip
    assert all("method" not in settings for settings in ours.values())  # what older runs noted still holds


def test_the_papers_run_is_the_reference_with_one_setting_for_all_tasks():
    config = load(Path(__file__).parents[1] / "configs" / "paper.yaml")
    assert (config.method, len(config.tasks.select.split(","))) == ("reference", 22)
    assert (config.inputs, config.outputs, config.trainset) == (Config().inputs, Config().outputs, settings().trainset)
    assert {"method": "full", "epochs": 3, "batch_size": 1}.items() <= config.models.model_dump().items()
    assert (config.models.peak_rate, config.trainset.max_tokens, config.student.max_prompt_tokens) == (5e-5, 2000, 3000)
