"""The report tells what the tables hold: every expectation here is worked out from the rows by hand."""

import json
import re
from collections import Counter, defaultdict
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from selfguide_ray.config import Config
from selfguide_ray.report import SAMPLED_TASKS, headline, spread, write_report
from selfguide_ray.run import Run
from selfguide_ray.schema import TABLES, Example, Task, task_rows
from selfguide_ray.standings import verdict

HOSTILE = "</span><script>alert(1)</script> \x00 \u2028 \u202e &amp; " + "w" * 5000
SYSTEMS = ("copy", "majority", "zero_shot", "few_shot", "selfguide")
TASKS = [
    Task("topic", "Name the topic.", (Example("goal!", "sport"),), ("sport", "money", "sky"), "Topics", "exact_match"),
    Task("mood", HOSTILE, (Example(HOSTILE, "good"),), ("good", "bad", "<b>odd</b>"), "Moods <i>", "exact_match"),
    Task("title", "Write a title.", (Example("A long story.", "Story"),), category="Titles"),
    Task("starved", "Nothing comes of it.", (), category="Titles"),
]
SCORES = {  # of the task's own metric, in the order of SYSTEMS
    "topic": (0.0, 40.0, 10.0, 30.0, 60.0),
    "mood": (5.0, 50.0, 50.0, 45.0, 50.0),
    "title": (30.0, 12.0, 8.25, 20.5, 25.0),
    "starved": (10.0, 4.0, 0.0, 16.5, 20.0),
}


def rows(table, items):
    return pa.Table.from_pylist(items, schema=TABLES[table])


def input_row(task, number, text="some input", reason=None):
    verdict = {"measured": 3.5, "bound": "at least 9"} if reason else {}
    return {"task": task, "id": f"r{number}", "round": 0, "input": text, "drop_reason": reason, **verdict}


def pair_row(task, number, text, output, reason=None, verdicts=(None, "noise")):
    given = {
        "task": task,
        "system": "selfguide",
        "id": f"r{number}",
        "input": text,
        "output": output,
        "drop_reason": reason,
    }
    return given | {"votes": 3, "voters": 4, "verdicts": list(verdicts), "prompt": "p", "completion": "c", "tokens": 2}


INPUTS = [
    *(input_row("topic", n) for n in range(6)),
    *(input_row("topic", n, reason="length") for n in range(6, 9)),
    *(input_row("mood", n, HOSTILE) for n in range(2)),
    input_row("mood", 2, HOSTILE, "a reason nobody knew"),
    *(input_row("title", n) for n in range(4)),
    *(input_row("starved", n, reason="noise") for n in range(5)),
]
TRAINSET = [
    *(pair_row("topic", n, "some input", label) for n, label in enumerate(["sport", "money", "sport"])),
    pair_row("topic", 3, "some input", "sport", "imbalanced"),
    *(pair_row("topic", n, "some input", None, "no_majority", ["no_label", "not_kept"]) for n in (4, 5)),
    *(pair_row("mood", n, HOSTILE, "good") for n in range(2)),
    *(pair_row("title", n, "some input", HOSTILE) for n in range(4)),
]


def score_rows(tasks, systems=SYSTEMS):
    for task in tasks:
        for name, value in zip(SYSTEMS, SCORES[task.name], strict=True):
            row = {"task": task.name, "category": task.category, "system": name, "n": 7}
            bounds = {"low": max(0.0, value - 1.5), "high": value + 2.5}
            other = "rouge_l" if task.metric == "exact_match" else "exact_match"
            if name in systems:
                yield row | bounds | {"metric": task.metric, "value": value}
                yield row | bounds | {"metric": other, "value": 99.0}  # not the task's metric: shown nowhere
                if task.labels:
                    yield row | {"metric": "macro_f1", "value": value / 2}


def predictions_of(task):
    for number in range(9):
        for system in SYSTEMS:
            right = system == "selfguide"
            told = {"id": str(number), "input": f"item {number} of {task.name}", "references": ["yes", HOSTILE]}
            answer = {"prediction": "yes" if right else "nonsense", "finish_reason": "stop"}
            yield {"task": task.name, "system": system, **told, **answer}


def write_all(run, systems=SYSTEMS, tables=tuple(TABLES), models=True):
    for shard, tasks in (("00000", TASKS[:2]), ("00001", TASKS[2:])):
        names = {task.name for task in tasks}
        content = {
            "inputs": [row for row in INPUTS if row["task"] in names],
            "outputs": [],
            "trainset": [row for row in TRAINSET if row["task"] in names],
            "predictions": [row for task in tasks for row in predictions_of(task) if row["system"] in systems],
            "scores": list(score_rows(tasks, systems)),
        }
        run.write("tasks", shard, task_rows(tasks), {"kept": len(tasks)})
        for table in set(tables) - {"tasks"}:
            tokens = {"prompt_tokens": 1000, "cached_tokens": 900, "generated_tokens": 300} if table == "inputs" else {}
            if table in ("inputs", "scores"):
                tokens["engine_rates"] = {"occupancy": 0.5, "share_of_ceiling": None}
            run.write(
                table,
                shard,
                rows(table, content[table]),
                {"seconds": 21.0, "node": "n", "engine": "scripted", **tokens},
            )
    for task in TASKS if models else ():
        trained = {"trained": True, "pairs": 3, "steps": 9, "losses": [1.23456, 0.5, 0.25], "seconds": 7.0}
        nothing = {"trained": False, "pairs": 0, "reason": "no training pair survived"}
        told = {"task": task.name} | (nothing if task.name == "starved" else trained)
        run.put(f"models/{task.name}/model.json", json.dumps(told).encode())


class Page(HTMLParser):
    """The page as a reader meets it: the text and the table rows of each section, and what tags and links there are."""

    def __init__(self, markup):
        super().__init__()
        self.markup, self.section, self.hidden, self.cell = markup, "", False, False
        self.texts, self.tables = defaultdict(str), defaultdict(list)
        self.tags, self.links, self.classes = Counter(), [], defaultdict(list)
        self.feed(markup)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags[tag] += 1
        self.links += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data", "xlink:href")]
        self.section = given["id"] if tag == "section" else self.section
        self.hidden = tag == "style"
        rows = self.tables[self.section]
        if tag == "tr":
            rows.append([])
        elif tag in ("td", "th"):
            rows[-1].append("")
            self.cell = True
        elif tag == "span" and self.cell:
            self.classes[self.section].append((given.get("class"), rows[-1][0].strip()))
        if tag not in ("span", "b", "i", "wbr", "strong", "code"):
            self.handle_data(" ")

    def handle_endtag(self, tag):
        self.hidden = False
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if not self.hidden:
            self.texts[self.section] += data
        if self.cell:
            self.tables[self.section][-1][-1] += data

    def text(self, section):
        return " ".join(self.texts[section].split())

    def rows(self, section):
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[section]]

    def row(self, section, first):
        """The row whose first cell begins with this name."""
        return next(row for row in self.rows(section) if row and row[0].split(" ")[0] == first)


def report(run, **sections):
    path = write_report(run, Config(run=run.uri, **sections))
    assert path == f"{run.uri}/report.html"
    return Page(run.get("report.html").decode())


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / "small"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = Run(str(tmp_path_factory.mktemp("report") / "whole"))
    write_all(run)
    return report(run)


def printed(run, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(headline(run))
    return captured.get()


def mean_of(tasks, system):
    return fmean(SCORES[task][SYSTEMS.index(system)] for task in tasks)


FAMILIES = {"classification": ("topic", "mood"), "generation": ("title", "starved")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_headline_shows_each_systems_mean_over_the_tasks_of_a_family(page, family):
    card = next(card for card in page.markup.split("<article") if f"<h3>{family}" in card)
    shown = re.findall(r'class="who">(\w+).*?class="mean">([\d.]+)<', card, re.DOTALL)
    assert shown == [(system, f"{mean_of(FAMILIES[family], system):.1f}") for system in SYSTEMS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terminals_headline_has_the_same_means(run, family):
    write_all(run)
    line = next(line for line in printed(run).splitlines() if f"mean of 2 {family}" in line)
    assert re.findall(r"\d+\.\d", line) == [f"{mean_of(FAMILIES[family], system):.1f}" for system in SYSTEMS]


def test_the_uplift_is_taken_from_the_better_prompted_system(page):
    # Classification: zero_shot 30.0 and few_shot 37.5, selfguide 55.0; generation: few_shot 18.5, selfguide 22.5.
    assert re.findall(r"<strong>(.*?)</strong>", page.markup) == ["+17.5", "+4.0"]
    assert page.text("headline").count("points, selfguide less few_shot") == 2
    # Differences of two tasks: every resample's mean is one of them or their mean, so the interval's ends are known.
    assert "95 % interval +5.0 to +30.0" in page.text("headline")
    assert "95 % interval +3.5 to +4.5" in page.text("headline")


def test_the_interval_of_the_uplift_is_a_paired_bootstrap_over_tasks(run):
    rng = np.random.default_rng(5)
    tasks = [Task(f"t{n}", "x", (), labels=("a", "b"), metric="exact_match") for n in range(40)]
    given = {task.name: rng.uniform(0, 100, 2) for task in tasks}
    scores = [
        {"task": name, "system": system, "metric": "exact_match", "value": value, "n": 5}
        for name, pair in given.items()
        for system, value in zip(("zero_shot", "selfguide"), pair, strict=True)
    ]
    run.write("tasks", "00000", task_rows(tasks), {})
    run.write("scores", "00000", rows("scores", scores), {})
    low, high = re.search(r"95 % interval (\S+) to (\S+)", report(run).text("headline").replace("−", "-")).groups()
    differences = np.array([tuned - prompted for prompted, tuned in given.values()])
    means = [rng.choice(differences, len(differences)).mean() for _ in range(10_000)]
    assert [float(low), float(high)] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.6)


@pytest.mark.parametrize(
    ("tasks", "low", "high", "said"),
    [
        (1, None, None, "One task cannot show how selfguide and few_shot differ."),
        (9, -2.0, 5.0, "No difference that 9 tasks could show."),
        (9, 0.0, 5.0, "No difference that 9 tasks could show."),
        (2, 1.0, 5.0, "selfguide is above few_shot on these 2 tasks, which are too few to conclude from."),
        (9, 1.0, 5.0, "selfguide is above few_shot."),
        (9, -5.0, -1.0, "selfguide is below few_shot."),
    ],
)
def test_the_verdict_says_what_the_interval_allows(tasks, low, high, said):
    assert verdict("few_shot", tasks, low, high) == said


def test_each_score_is_in_the_table_with_its_interval(page):
    for task in TASKS:
        own = page.row("scores", task.name)
        below = page.rows("scores")[page.rows("scores").index(own) + 1]
        assert own[1:3] == [{"exact_match": "exact match", "rouge_l": "ROUGE-L"}[task.metric], "7"]
        for cell, value in zip(own[3:], SCORES[task.name], strict=True):
            assert cell == f"{value:.1f} {max(0, value - 1.5):.1f}–{value + 2.5:.1f}"
        if task.labels:
            assert below[1:] == ["macro-F1", "", *(f"{value / 2:.1f}" for value in SCORES[task.name])]
    assert "99.0" not in page.text("scores")  # scores in a metric that is not the task's


def test_the_best_cell_and_those_at_the_floor_are_marked(page):
    def marks(name):
        return [(classes or "").split() for classes, row in page.classes["scores"] if row == name]

    assert marks("topic") == [["is-floor"], ["is-floor"], ["floored"], ["floored"], ["best"]]
    assert marks("mood") == [["is-floor"], ["best"], ["best", "floored"], ["floored"], ["best", "floored"]]
    assert "At or below the floor of 45.0 (majority): zero_shot, few_shot." in page.text("headline")


def test_the_funnel_counts_the_rows_of_the_tables(page):
    shown = page.text("trainset")
    for table, kept in ((INPUTS, "accepted"), (TRAINSET, "training pairs")):
        for reason, count in Counter(row["drop_reason"] for row in table).items():
            assert f"{reason or kept} {count} {100 * count / len(table):.1f} %" in shown
    candidates = Counter(verdict for row in TRAINSET for verdict in row["verdicts"])
    for reason, count in candidates.items():
        assert f"{reason or 'voted'} {count} {100 * count / candidates.total():.1f} %" in shown
    assert f"{len(INPUTS)} inputs invented, 12 accepted, 10 answers elected, 9 training pairs" in shown


def test_the_funnel_of_a_task(page):
    assert page.row("trainset", "topic")[2:] == ["9", "6", "4", "3", "33.3 %", "length 3"]
    assert page.row("trainset", "starved")[2:] == ["5", "0", "0", "0", "0.0 %", "noise 5"]
    assert "1 task starved, without a single training pair: starved." in page.text("trainset")


def test_tasks_with_fewer_inputs_than_asked_for_are_named(run, page):
    assert "short of inputs" not in page.text("trainset")
    labelled = [row | {"label": "sport" if row["id"] in ("r0", "r1", "r7") else "sky"} for row in INPUTS[:9]]
    run.write("tasks", "00000", task_rows(TASKS[:2]), {"kept": 2})
    run.write("tasks", "00001", task_rows(TASKS[2:]), {"kept": 2})
    run.write("tasks", "00002", task_rows([Task("due", "Not made yet.", ())]), {"kept": 1})
    run.write("inputs", "00000", rows("inputs", labelled), {"seconds": 1.0})
    run.write("inputs", "00001", rows("inputs", [row for row in INPUTS if row["task"] in ("title", "starved")]), {})

    def told(classification, generation):
        least = {"classification": classification, "generation": generation}
        found = re.search(
            r"[^.]*? short of inputs, .*?\.least: (.*?)\.", report(run, inputs={"least": least}).text("trainset")
        )
        return found and found.group(1)

    assert told(0, 0) is None
    assert told(0, 4) == "starved (0)"
    assert told(0, 5) == "title (4), starved (0)"
    assert told(3, 0) == "topic (sport 2, money 0), mood (good 0, bad 0, <b>odd</b> 0)"


def test_labels_without_a_training_pair_are_named(page):
    assert page.row("trainset", "topic")[0] == "topic no pair for sky"
    assert page.row("trainset", "mood")[0] == "mood no pair for bad, <b>odd</b>"


def test_models_tell_their_losses_or_why_there_is_none(page):
    assert page.row("models", "topic") == ["topic", "3", "9", "3", "1.235", "0.250", "7.0 s"]
    assert "no training pair survived" in page.row("models", "starved")[2]


def test_samples_show_pairs_drops_and_predictions(page):
    shown = page.text("predictions")
    for number in (0, 2, 4, 6, 8):
        assert f"item {number} of title" in shown
    assert "item 1 of title" not in shown
    assert "3 of 4 votes" in shown
    assert "inputs: a reason nobody knew measured 3.5, bound at least 9" in shown
    assert shown.count("nonsense ✗ wrong") == shown.count("yes ✓") == 5 * len(TASKS)


def test_costs_are_summed_over_the_receipts(page):
    assert page.row("made", "inputs") == [
        "inputs", "2 shards", "42.0 s", "2,000", "90 %", "600", "14", "50 %", "–", "1",
    ]  # fmt: skip
    assert page.text("made").count("Engine: scripted") == 1
    assert page.row("made", "scores")[-3:-1] == [
        "–",
        "–",
    ]  # it generates nothing: what others did meanwhile is not its own
    assert page.row("made", "models")[1:3] == ["4 tasks", "21.0 s"]
    assert page.row("made", "all")[2:6] == ["3.9 min", "2,000", "", "600"]  # five tables of 42 s, models of 21 s


def test_settings_are_shown_and_those_that_differ_are_marked(run):
    page = report(run, inputs={"rounds": 4}, student={"engine": "scripted"})
    assert re.search(r'<dt>rounds</dt><dd class="changed">4</dd>', page.markup)
    assert re.search(r'<dt>min_frequency</dt><dd class="">0.3</dd>', page.markup)
    assert "No model spoke here." in page.text("")


def test_text_of_tasks_is_data(page):
    assert not page.tags["script"]
    assert page.markup.count("&lt;script&gt;alert(1)") >= len(TASKS)
    assert "<b>odd</b>" not in page.markup
    assert "Moods <i>" in page.text("scores")
    assert not re.search("[\x00\u2028\u202e]", page.markup)
    assert "␀ [U+2028] [U+202E] &amp;amp;" in page.markup  # made visible, and & is no entity
    assert "w" * 5000 not in page.markup
    assert f"({len(HOSTILE):,} characters)" in page.text("predictions")


def test_nothing_is_loaded_from_elsewhere(page):
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"@import|url\(", page.markup)
    assert "default-src 'none'" in page.markup


def test_failures_and_refused_files_are_listed(run):
    write_all(run)
    run.put("failures/inputs/00007.txt", b"OutOfMemoryError: <b>too large</b>\n\nTraceback\n")
    refused = [
        {"origin": "x", "what": "x.json: Definition is empty.", "why": "It is needed.", "instead": "Fill it in."}
    ]
    run.put("tasks/_plan.json", json.dumps({"refused": refused}).encode())
    page = report(run)
    assert page.row("made", "inputs/00007")[1] == "OutOfMemoryError: <b>too large</b>"
    assert "x.json: Definition is empty." in page.text("made")
    assert "Left behind: 1 failed, 1 task files refused" in page.text("")


def test_a_system_that_was_not_run_is_said_to_be_missing(run):
    write_all(run, systems=("majority", "few_shot"))
    page = report(run)
    assert page.text("headline").count("zero_shot not run") == len(FAMILIES)
    assert page.text("headline").count("No uplift to tell") == len(FAMILIES)
    assert page.rows("scores")[0][3:] == ["majority floor", "few_shot"]
    assert "selfguide" not in printed(run)


def test_floors_alone_are_a_report_too(run):
    write_all(run, systems=("copy", "majority"))
    assert "no system with a model was run" in report(run).text("predictions")


def test_an_empty_run_says_that_nothing_is_made(run):
    page = report(run)
    for section, table in (("headline", "scores"), ("scores", "scores"), ("trainset", "inputs"), ("models", "models")):
        assert f"{table}: not made yet." in page.text(section)
    assert "no scores yet" in printed(run)


@pytest.mark.parametrize("made", [(), ("inputs",), ("inputs", "outputs", "trainset"), ("predictions",)])
def test_a_partial_run_has_a_partial_report(run, made):
    write_all(run, tables=("tasks", *made), models=False)
    page = report(run)
    assert "scores: not made yet." in page.text("scores")
    assert "models: not made yet." in page.text("models")
    assert ("inputs: not made yet." in page.text("trainset")) == ("inputs" not in made)
    assert ("starved" in page.text("trainset")) == ("inputs" in made)
    assert ("1 task starved" in page.text("trainset")) == ("trainset" in made)


def test_a_shard_that_is_due_is_no_starved_task(run):
    write_all(run, tables=("tasks", "inputs"), models=False)
    run.write("trainset", "00000", rows("trainset", [r for r in TRAINSET if r["task"] in ("topic", "mood")]), {})
    page = report(run)
    assert "without a single training pair" not in page.text("trainset")
    assert page.row("trainset", "title")[2:7] == ["4", "4", "–", "–", "–"]
    assert "1 of 2 shards" in page.text("")


def test_of_many_tasks_some_are_sampled_and_the_terminal_shows_means(run):
    tasks = [Task(f"task{n:04d}", "Do it.", (), metric="rouge_l") for n in range(100)]
    scores = [
        {"task": task.name, "system": "few_shot", "metric": "rouge_l", "value": float(n), "n": 3}
        for n, task in enumerate(tasks)
    ]
    run.write("tasks", "00000", task_rows(tasks), {})
    run.write("scores", "00000", rows("scores", scores), {})
    page = report(run)
    assert f"{SAMPLED_TASKS} of 100 tasks, evenly chosen" in page.text("predictions")
    assert page.markup.count("<summary>task0") == SAMPLED_TASKS
    assert "task0001" not in printed(run)
    assert "49.5" in printed(run)


def test_the_terminals_headline_fits_in_100_columns(run):
    long = Task("task1234_" + "very_long_name_" * 10, "x", (), labels=("a",), category="c", metric="exact_match")
    scores = [
        {"task": long.name, "system": s, "metric": "exact_match", "value": v, "n": 100}
        for s, v in zip(SYSTEMS, SCORES["topic"], strict=True)
    ]
    run.write("tasks", "00000", task_rows([long]), {})
    run.write("scores", "00000", rows("scores", scores), {})
    lines = printed(run).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("task1234_" in line and "EM" in line and "100" in line and "60.0" in line for line in lines)


def test_the_same_run_gives_the_same_report(run):
    write_all(run)
    first, second = (re.sub("written .*", "", report(run).markup) for _ in range(2))
    assert first == second


def test_spread_takes_both_ends_and_what_is_evenly_between():
    assert spread(range(9), 5) == [0, 2, 4, 6, 8]
    assert spread("ab", 5) == ["a", "b"]
    assert spread([], 3) == []


# --- held-out items that something learned overlaps


def with_clean(run, left):
    """The run whose scores leave so many of 7 instances; its clean value is the value less 10."""
    write_all(run, tables=tuple(table for table in TABLES if table != "scores"))
    for shard, tasks in (("00000", TASKS[:2]), ("00001", TASKS[2:])):
        scores = [
            row | {"clean_n": left.get(row["task"], 7), "clean_value": row["value"] - 10 if row["task"] in left else row["value"]}
            for row in score_rows(tasks)
        ]  # fmt: skip
        run.write("scores", shard, rows("scores", scores), {"seconds": 1.0})
    return report(run)


def test_suspects_are_told_with_the_means_without_them(run):
    page = with_clean(run, {"topic": 5, "title": 6})
    assert "3 of 28, in 2 tasks: topic 2 of 7, title 1 of 7." in page.text("scores")
    table = [row for row in page.rows("scores") if "with" in row or "without" in row]
    closed, generative = (
        [f"{mean_of(names, system):.1f}" for system in SYSTEMS] for names in (("topic", "mood"), ("title", "starved"))
    )
    assert table[0] == ["classification", "exact match", "with", *closed]
    assert table[1] == ["", "", "without", *(f"{mean_of(('topic', 'mood'), system) - 5:.1f}" for system in SYSTEMS)]
    assert table[2] == ["generation", "ROUGE-L", "with", *generative]
    assert table[3][2:] == ["without", *(f"{mean_of(('title', 'starved'), s) - 5:.1f}" for s in SYSTEMS)]


def test_without_suspects_one_sentence_says_that_it_was_looked(run):
    page = with_clean(run, {})
    assert "No pair that was learned and no example overlaps one of the 28 held-out items." in page.text("scores")
    assert not [row for row in page.rows("scores") if "without" in row]


def test_where_nobody_looked_for_suspects_the_report_says_so(page):
    assert "was not looked for" in page.text("scores")
