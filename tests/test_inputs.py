"""What may be added to the rounds of inputs: checks by the student, a bound on perplexity, and rounds for what lacks."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
from recording import RecordingEngine

from selfguide_ray.config import Student
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Completion, Request, SamplingParams, make_engine
from selfguide_ray.engine.scripted import ByteTokenizer, ScriptedEngine
from selfguide_ray.filters import identity
from selfguide_ray.inputs import Inputs, Pool
from selfguide_ray.prompts import Prompts
from selfguide_ray.schema import TABLES, task_rows
from selfguide_ray.task_files import read_task, task_files

PLAIN = ["inputs.length_filter=false", "inputs.prompts_per_round=4"]


class ToldEngine(RecordingEngine):
    """It writes the texts it is told, one after the other, and says yes to a text with the probability it is told."""

    def __init__(self, texts, yes=None, tokens=4, logprob=-4.0):
        super().__init__()
        self.texts, self.yes, self.calls = iter(texts), yes or {}, []
        self.tokens, self.logprob = tokens, logprob

    def generate(self, requests):
        self.calls.append(requests)
        return [[self.say(request)] for request in requests]

    def say(self, request):
        if not request.params.labels:
            return Completion(next(self.texts), (), self.logprob, "stop", generated_tokens=self.tokens)
        yes = self.yes[candidate(request)]
        shares = () if yes is None else (yes, 1 - yes)
        return Completion("yes", (), -1.0, "stop", label_probabilities=shares)

    @property
    def checks(self):
        """The texts that each call of checks was about."""
        return [[candidate(request) for request in call] for call in self.calls if call[0].params.labels]


def text_of(request):
    return ByteTokenizer().decode(request.prefix + request.suffix)


def candidate(request):
    return text_of(request).split("### Proposed item\nITEM: ")[1].split("\n")[0]


def wanted(request):
    return re.findall(r"must be: (.*)$", text_of(request), re.MULTILINE)[0]


def made(engine, tasks, *settings):
    return Inputs(load(overrides=[*PLAIN, *settings]), None, engine)(task_rows(tasks)).to_pylist()


def reasons(rows):
    return [row["drop_reason"] for row in rows]


# --- verification ----------------------------------------------------------------------------------------------------


def test_the_student_is_asked_about_the_survivors_of_the_rules_and_no_others(make_task):
    texts = ["good", "", "an input", "red apple", "poor", "good", "Good", "fine"]
    engine = ToldEngine(texts, {"good": 0.5, "poor": 0.49, "fine": 1.0})
    rows = made(engine, [make_task()], "inputs.rounds=2", "inputs.verify=0.5")
    assert reasons(rows) == [None, "empty", "noise", "duplicate", "unverified", "duplicate", "duplicate", None]
    assert engine.checks == [["good"], ["poor", "fine"]]
    assert rows[4]["measured"] == 0.49
    assert rows[4]["bound"] == "yes with at least 0.5"


def test_a_check_is_a_choice_of_yes_and_no_by_the_scores(make_task):
    engine = ToldEngine(["good"] * 4, {"good": 1.0})
    made(engine, [make_task()], "inputs.rounds=1", "inputs.verify=0.5")
    params = engine.calls[1][0].params
    assert (params.labels, params.label_mode, params.n) == ((tuple(b" yes"), tuple(b" no")), "score", 1)


def test_a_text_that_the_student_refuses_does_not_join_the_pool(make_task):
    engine = ToldEngine([f"text {n}" for n in range(8)], {f"text {n}": n % 2 for n in range(8)})
    rows = made(engine, [make_task()], "inputs.rounds=2", "inputs.verify=0.5")
    assert reasons(rows) == ["unverified", None] * 4
    shown = set(re.findall(r"text \d", "".join(text_of(request) for request in engine.calls[2])))
    assert shown == {"text 1", "text 3"}


def test_a_refused_text_that_comes_again_is_refused_again_and_not_asked_about(make_task):
    engine = ToldEngine(
        ["poor", "Poor", "x", "poor ", '"poor"', "y", "z", "POOR"], {"poor": 0.1, "x": 1, "y": 1, "z": 1}
    )
    rows = made(engine, [make_task()], "inputs.rounds=2", "inputs.verify=0.2")
    assert [row["input"] for row in rows if row["drop_reason"] == "unverified"] == [
        "poor",
        "Poor",
        "poor",
        "poor",
        "POOR",
    ]
    assert {row["measured"] for row in rows if row["drop_reason"]} == {0.1}
    assert engine.checks == [["poor", "x"], ["y", "z"]]


def test_the_checks_of_all_tasks_of_a_round_go_out_in_one_call(make_task):
    tasks = [make_task("one"), make_task("two"), make_task("three", examples=[("a", "b")])]
    texts = [f"text {n}" for n in range(24)]
    engine = ToldEngine(texts, dict.fromkeys(texts, 1.0))
    rows = made(engine, tasks, "inputs.rounds=2", "inputs.verify=0.5")
    assert [len(call) for call in engine.calls] == [12, 12, 12, 12]
    assert [text for call in engine.checks for text in call] == texts
    assert reasons(rows) == [None] * 24


def test_there_is_no_call_for_checks_where_nothing_is_left_to_check(make_task):
    engine = ToldEngine([""] * 4)
    made(engine, [make_task()], "inputs.rounds=1", "inputs.verify=0.5")
    assert len(engine.calls) == 1


def test_an_answer_that_the_engine_could_not_give_is_no_yes(make_task):
    engine = ToldEngine(["good"] * 4, {"good": None})
    rows = made(engine, [make_task()], "inputs.rounds=1", "inputs.verify=0")
    assert [(row["drop_reason"], row["measured"]) for row in rows] == [("unverified", None)] * 4


def test_a_text_whose_check_has_no_room_is_too_long(make_task):
    task, pools = make_task(), []
    for room in (0, -1):
        renderer = Prompts(ByteTokenizer(), 1 << 16)
        needed = len(renderer.checking(replace(task, examples=()), "a new text").ids)
        config = load(overrides=["inputs.prompts_per_round=2", "inputs.verify=0.5", "inputs.length_filter=false"])
        pool = Pool(task, config, Prompts(ByteTokenizer(), needed + room))
        pool.pending = [{"id": "a", "label": None}, {"id": "b", "label": None}]
        written = [Completion(text, (), -1.0, "stop", generated_tokens=1) for text in ("a new text", "short")]
        checks = pool.check(written)
        pool.keep(written, [Completion("yes", (), -1.0, "stop", label_probabilities=(1.0, 0.0)) for _ in checks])
        pools.append((needed + room, pool))
    assert reasons([row | {"drop_reason": row.get("drop_reason")} for row in pools[0][1].rows]) == [None, None]
    limit, pool = pools[1]
    assert [(row.get("drop_reason"), row.get("measured"), row.get("bound")) for row in pool.rows] == [
        ("too_long", limit + 1.0, f"{limit} tokens"),
        (None, None, None),
    ]
    assert pool.accepted == ["short"]


def test_the_scripted_student_answers_checks_by_the_text_and_says_what_it_said(make_task):
    tasks = [make_task("one"), make_task("two", labels=("a", "b"))]
    settings = ["inputs.rounds=6", "inputs.prompts_per_round=6"]
    engine = RecordingEngine()
    rows = made(engine, tasks, *settings, "inputs.verify=0.5")
    assert rows == made(RecordingEngine(), tasks, *settings, "inputs.verify=0.5")
    counts = Counter(reasons(rows))
    assert counts["unverified"] > 3 < counts[None]
    assert all(0 <= row["measured"] < 0.5 for row in rows if row["drop_reason"] == "unverified")
    checks = [request for request in engine.requests if request.params.labels]
    judged = {(row["task"], identity(row["input"])) for row in rows if row["drop_reason"] in ("unverified", None)}
    assert len(checks) == len(judged)
    assert len({request.seed for request in engine.requests}) == len(engine.requests)
    plain = made(RecordingEngine(), tasks, *settings)
    first = [row["input"] for row in rows if row["round"] == 0]  # later rounds see another pool
    assert first == [row["input"] for row in plain if row["round"] == 0]


def test_the_scripted_students_label_probabilities_are_of_the_prompt_and_sum_to_one():
    engine = ScriptedEngine(Student(engine="scripted"))
    labels = (tuple(b" yes"), tuple(b" no"), tuple(b" maybe"))

    def ask(prompt, seed, mode, labels=labels):
        params = SamplingParams(n=2, labels=labels, label_mode=mode)
        return engine.generate([Request((), tuple(prompt), params, seed=seed)])[0]

    for mode in ("score", "decode"):
        for completion in ask(b"a prompt", 1, mode) + ask(b"a prompt", 2, mode):
            assert tuple(completion.text.encode()) in labels
            if mode == "score":
                assert sum(completion.label_probabilities) == pytest.approx(1)
                index = labels.index(tuple(completion.text.encode()))
                assert completion.probability == completion.label_probabilities[index]
            else:
                assert completion.label_probabilities == ()
    told = {seed: ask(b"a prompt", seed, "score")[0].label_probabilities for seed in (1, 2)}
    assert told[1] == told[2] != ask(b"another prompt", 1, "score")[0].label_probabilities
    texts = [[c.text for c in ask(b"a prompt", 1, mode)] for mode in ("score", "decode")]
    assert texts[0] == texts[1]


# --- perplexity ------------------------------------------------------------------------------------------------------


def test_each_text_has_its_perplexity_and_one_that_was_not_written_has_none(make_task):
    rows = made(RecordingEngine(), [make_task()], "inputs.rounds=3")
    assert all(row["perplexity"] >= 1 for row in rows)
    rows = made(ToldEngine(["a", "b", "", "an input"], logprob=-6.0), [make_task()], "inputs.rounds=1")
    assert [row["perplexity"] for row in rows] == [pytest.approx(math.exp(1.5))] * 4
    rows = made(ToldEngine([""] * 4, tokens=0, logprob=0.0), [make_task()], "inputs.rounds=1")
    assert [row["perplexity"] for row in rows] == [None] * 4
    rows = made(RecordingEngine(), [make_task()], "inputs.rounds=1", "student.max_prompt_tokens=16")
    assert [(row["drop_reason"], row["perplexity"]) for row in rows] == [("too_long", None)] * 4
    rows = made(ToldEngine("abcd", logprob=-math.inf), [make_task()], "inputs.rounds=1", "inputs.max_perplexity=1e300")
    assert reasons(rows) == ["incoherent"] * 4


def test_a_text_over_the_bound_is_incoherent_after_the_rules_and_before_a_check(make_task):
    texts = ["a text", "an input", "red apple", "another"]
    engine = ToldEngine(texts, dict.fromkeys(texts, 0.0))
    settings = ["inputs.rounds=1", "inputs.verify=0.5", f"inputs.max_perplexity={math.e - 1e-6}"]
    rows = made(engine, [make_task()], *settings)
    assert reasons(rows) == ["incoherent", "noise", "duplicate", "incoherent"]  # the first that speaks
    assert rows[0]["measured"] == rows[0]["perplexity"] == pytest.approx(math.e)
    assert rows[0]["bound"] == "perplexity of at most 2.71828"
    assert engine.checks == []
    again = ToldEngine(texts, dict.fromkeys(texts, 1.0))
    assert reasons(made(again, [make_task()], *settings[:2], f"inputs.max_perplexity={math.e + 1e-6}")) == [
        None,
        "noise",
        "duplicate",
        None,
    ]


def test_with_the_student_perplexity_is_that_of_its_tokens_and_checks_are_answered():
    config = load(
        overrides=[
            "inputs={rounds: 1, prompts_per_round: 6, max_new_tokens: 16, length_filter: false, verify: 0.5}",
            "student.strict=true",
        ]
    )
    task = read_task(list(task_files(resolve("embedded/tasks")))[4])
    engine = make_engine(config.student, config.cluster)
    seen, generate = [], engine.generate

    def recording(requests):
        completions = generate(requests)
        seen.append(list(zip(requests, completions, strict=True)))
        return completions

    engine.generate = recording
    rows = Inputs(config, None, engine)(task_rows([task])).to_pylist()
    assert len(rows) == 6
    written, checks = seen
    assert [row["perplexity"] for row in rows] == [
        pytest.approx(math.exp(-completion.logprob / completion.generated_tokens)) for _, (completion,) in written
    ]
    told = {c.label_probabilities[0] for _, (c,) in checks}
    assert all(0 < yes < 1 for yes in told)
    for row in rows:
        if row["drop_reason"] == "unverified":
            assert row["measured"] in told
            assert row["measured"] < 0.5
    assert sum(yes >= 0.5 for yes in told) == sum(row["drop_reason"] is None for row in rows)


# --- rounds for what lacks -------------------------------------------------------------------------------------------


class PickyEngine(ToldEngine):
    """Whatever it writes for one of the labels is empty up to a round; other texts are all different."""

    def __init__(self, label, rounds):
        super().__init__(())
        self.label, self.rounds, self.count = label, rounds, 0

    def say(self, request):
        self.count += 1
        poor = self.label in (None, wanted(request) if "must be" in text_of(request) else None)
        text = "" if poor and len(self.calls) <= self.rounds else f"text {self.count}"
        return Completion(text, (), -1.0, "stop", generated_tokens=1)


def test_extra_rounds_ask_only_for_labels_that_lack_and_end_when_enough_are_there(make_task):
    engine = PickyEngine("b", 4)
    settings = ["inputs.rounds=2", "inputs.extra_rounds=9", "inputs.least.classification=3"]
    rows = made(engine, [make_task(labels=("a", "b", "c"))], *settings, "inputs.prompts_per_round=12")
    asked = [Counter(wanted(request) for request in call) for call in engine.calls]
    assert all(set(labels) == {"a", "b", "c"} for labels in asked[:2])  # statement 3
    assert asked[2:] == [{"b": 12}] * 3  # two more come to nothing, the third is enough
    assert [row["id"] for row in rows] == [f"r{r:03d}i{i:03d}" for r in range(5) for i in range(12)]
    assert Counter(row["label"] for row in rows if row["drop_reason"] is None)["b"] == 12


def test_an_extra_round_draws_uniformly_among_the_labels_that_lack(make_task):
    engine = PickyEngine("a", 0)
    settings = ["inputs.rounds=0", "inputs.extra_rounds=1", "inputs.least=1", "inputs.prompts_per_round=600"]
    made(engine, [make_task(labels=("a", "b", "c"))], *settings)
    counts = Counter(wanted(request) for request in engine.calls[0])
    assert all(150 <= counts[label] <= 250 for label in "abc"), counts


def test_extra_rounds_end_at_their_number_and_a_task_that_still_lacks_is_no_failure(make_task):
    engine = PickyEngine(None, 99)
    rows = made(engine, [make_task()], "inputs.rounds=2", "inputs.extra_rounds=3", "inputs.least=1")
    assert len(engine.calls) == 5
    assert {row["round"] for row in rows} == set(range(5))
    assert set(reasons(rows)) == {"empty"}


@pytest.mark.parametrize(
    ("least", "extra", "calls"), [(0, 9, 1), (4, 9, 1), (5, 9, 2), (9, 9, 3), (9, 0, 1), (9, 1, 2)]
)
def test_a_generation_task_goes_on_until_it_has_enough(make_task, least, extra, calls):
    engine = ToldEngine(f"text {n}" for n in range(99))
    settings = ["inputs.rounds=1", f"inputs.least.generation={least}", "inputs.least.classification=99"]
    rows = made(engine, [make_task()], *settings, f"inputs.extra_rounds={extra}")
    assert len(engine.calls) == calls
    assert len(rows) == 4 * calls


def test_ordinary_rounds_are_the_same_with_extra_rounds_behind_them(make_task):
    task = make_task(labels=("a", "b"))
    plain = made(RecordingEngine(), [task], "inputs.rounds=3")
    more = made(RecordingEngine(), [task], "inputs.rounds=3", "inputs.extra_rounds=2", "inputs.least=99")
    assert more[: len(plain)] == plain
    assert len(more) == len(plain) + 8


def test_tasks_of_a_shard_move_forward_together_and_do_not_change_each_other(make_task):
    tasks = [make_task("one"), make_task("two", labels=("a", "b")), make_task("three", examples=[("word", "x")])]
    settings = ["inputs.rounds={classification: 3, generation: 1}", "inputs.extra_rounds=4", "inputs.verify=0.5"]
    settings += ["inputs.least={classification: 5, generation: 7}"]
    together = made(RecordingEngine(), tasks, *settings)
    for task in tasks:
        assert made(RecordingEngine(), [task], *settings) == [row for row in together if row["task"] == task.name]
    engine = ToldEngine(f"text {n}" for n in range(99))
    made(engine, tasks, *settings[:2], "inputs.least=5")
    names = [len(call) // 4 for call in engine.calls]
    assert names[:2] == [3, 3]  # both generation tasks lack one text, and take it together


# --- what was there before -------------------------------------------------------------------------------------------


def test_settings_that_drop_nothing_leave_every_row_as_it_is(make_task):
    tasks = [make_task("one"), make_task("two", labels=("a", "b"))]
    plain = made(RecordingEngine(), tasks, "inputs.rounds=5")
    loose = ["inputs.verify=0", "inputs.max_perplexity=1e9", "inputs.prefixes=[zzz]", "inputs.extra_rounds=3"]
    assert made(RecordingEngine(), tasks, "inputs.rounds=5", *loose) == plain
    assert list(plain[0]) == TABLES["inputs"].names
