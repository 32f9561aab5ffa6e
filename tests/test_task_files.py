"""Task files: official ones, older and third-party ones, a user's own, and broken ones."""

import csv
import io
import json
import tarfile

import pytest

from selfguide_ray.errors import SelfGuideError
from selfguide_ray.schema import Example, Instance
from selfguide_ray.task_files import TaskFile, label_set, read_task, task_files

OFFICIAL = {
    "Definition": ["Name the colour."],
    "Categories": ["Word Analogy"],
    "Input_language": ["English"],
    "Output_language": ["French"],
    "Source": ["made up"],
    "Positive Examples": [{"input": "grass", "output": "green"}, {"input": "sky", "output": "blue"}],
    "Instances": [{"id": "t-1", "input": "snow", "output": ["white", "bright"]}],
}
OWN = {"instruction": "Name the colour.", "examples": [{"input": "grass", "output": "green"}]}


def read(document, name="task1", suffix=".json"):
    """A task out of a mapping, or of a file's text."""
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    return read_task(TaskFile(name, f"folder/{name}{suffix}", text if isinstance(text, bytes) else text.encode()))


def refusal(document, **how):
    with pytest.raises(SelfGuideError) as caught:
        read(document, **how)
    return caught.value


def official(**changes):
    return OFFICIAL | {key.replace("_", " ") if key == "Positive_Examples" else key: v for key, v in changes.items()}


def with_outputs(*outputs):
    """Instances with one output each."""
    return [Instance(str(index), f"text {index}", (output,)) for index, output in enumerate(outputs)]


def suite_index(folder):
    with (folder / "suite_index.csv").open(encoding="utf-8", newline="") as file:
        return {row["task"]: row for row in csv.DictReader(file)}


# --- the suite -------------------------------------------------------------------------------------------------------


def test_every_sample_file_reads_with_the_examples_and_the_label_set_of_the_index(natural_instructions):
    index = suite_index(natural_instructions)
    tasks = [read_task(file) for file in task_files(natural_instructions / "sample" / "tasks")]
    assert len(tasks) == 55
    for task in tasks:
        row = index[task.name]
        assert len(task.examples) == int(row["n_positive_examples"])
        assert len(task.instances) >= 40 or len(task.instances) == int(row["n_instances_official"])
        assert task.category == row["category"]
        assert bool(task.labels) == (row["closed_label_lt15"] == "1"), task.name
        if row["official_category_metric"]:
            assert task.metric == {"exact_match": "exact_match", "rougeL": "rouge_l"}[row["official_category_metric"]]


def test_every_partial_file_reads_even_the_one_without_examples(natural_instructions):
    tasks = {task.name: task for task in map(read_task, task_files(natural_instructions / "tasks_partial"))}
    assert len(tasks) == 7
    assert {name for name, task in tasks.items() if not task.examples} == {"task396_persianqa_classification"}
    assert {name: len(task.instances) for name, task in tasks.items() if len(task.instances) != 100} == {
        "task1728_web_nlg_data_to_text": 106
    }
    assert tasks["task396_persianqa_classification"].labels == ("False", "True")


@pytest.mark.parametrize(
    ("file", "examples", "labels", "metric", "first_id"),
    [
        ("v1/subtask018_mctaco_temporal_reasoning_presence", 2, 2, "exact_match", None),
        ("v1/subtask029_winogrande_full_object", 7, 0, "rouge_l", None),
        ("v1/subtask052_multirc_identify_bad_question", 2, 2, "exact_match", None),
        ("early_v2/task156_codah_classification_adversarial", 3, 4, "exact_match", None),
        ("early_v2/task307_jeopardy_answer_generation_final", 3, 0, "rouge_l", None),
        ("third_party_minimal/task1732_bbh_boolean_expressions", 3, 2, "exact_match", "task1732_9"),
        (
            "third_party_output_string/task363_sst2_polarity_classification",
            2,
            2,
            "exact_match",
            "task363-cc98eef53f2b4fe492c7b2f19e804ed8",
        ),
    ],
)
def test_older_and_third_party_files_read(natural_instructions, file, examples, labels, metric, first_id):
    (found,) = task_files(natural_instructions / "schema_variants" / f"{file}.json")
    task = read_task(found)
    assert (len(task.examples), len(task.labels), len(task.instances), task.metric) == (examples, labels, 20, metric)
    assert task.instances[0].id == (first_id or f"{task.name}-00000")
    assert task.instruction == task.instruction.strip() != ""


@pytest.mark.slow
def test_all_1451_tasks_of_the_archive_read_with_the_label_set_of_the_index(natural_instructions):
    index = suite_index(natural_instructions)
    names, wrong = [], []
    for file in task_files(natural_instructions / "tasks.tar.xz"):
        task, row = read_task(file), index[file.name]
        names.append(task.name)
        if bool(task.labels) != (row["closed_label_lt15"] == "1") or len(task.labels) > 14:
            wrong.append(task.name)
        assert len(task.instances) == len(json.loads(file.data)["Instances"])
        assert len(task.examples) == int(row["n_positive_examples"])
    assert wrong == []
    assert len(names) == len(set(names)) == 1451


# --- text ------------------------------------------------------------------------------------------------------------


def test_an_official_task_keeps_what_its_file_says():
    task = read(OFFICIAL)
    assert (task.name, task.instruction, task.category, task.metric) == (
        "task1", "Name the colour.", "Word Analogy", "exact_match",
    )  # fmt: skip
    assert task.examples == (Example("grass", "green"), Example("sky", "blue"))
    assert task.instances == (Instance("t-1", "snow", ("white", "bright")),)
    assert (task.languages, task.sources, task.labels) == (("English", "French"), ("made up",), ())


def test_a_bare_nan_is_read_as_nothing():
    text = json.dumps(OFFICIAL | {"URL": [float("nan")], "Source": [float("nan")]})
    assert '"URL": [NaN]' in text
    assert read(text).sources == ()


def test_the_first_of_two_definitions_is_the_instruction():
    assert read(official(Definition=["First.", "Second."])).instruction == "First."


def test_a_definition_may_be_a_string_and_v1_advice_follows_it():
    older = {
        "Definition": " Name it. ",
        "Emphasis & Caution": "Be brief.",
        "Things to Avoid": "-",
        "Examples": {"Positive Examples": OFFICIAL["Positive Examples"]},
        "Instances": [{"input": "snow", "output": "white"}],
    }
    task = read(older)
    assert task.instruction == "Name it.\nBe brief."
    assert task.examples[1] == Example("sky", "blue")
    assert task.instances == (Instance("task1-00000", "snow", ("white",)),)


@pytest.mark.parametrize(
    ("escaped", "meant"),
    [
        ("a\\u0000b", "a\x00b"),
        ("a\\u2028b\\u0085c", "a\u2028b\u0085c"),
        ("\\ufeffa", "\ufeffa"),
        ("\\ud800abc", "\ufffdabc"),
        ("abc\\ud800", "abc\ufffd"),
        ("\\udc00abc", "\ufffdabc"),
        ("\\ud83d\\ude00", "\U0001f600"),
        ("a\\r\\nb\\n", "a\r\nb\n"),
        (" ", " "),
        ("", ""),
    ],
)
def test_odd_characters_survive_and_lone_surrogates_are_replaced(escaped, meant):
    text = json.dumps(OFFICIAL).replace('"snow"', f'"{escaped}"').replace('"white"', f'"{escaped}"')
    (instance,) = read(text).instances
    assert (instance.input, instance.references) == (meant, (meant, "bright"))
    assert instance.input.encode().decode() == meant  # UTF-8, as Parquet wants it


def test_a_byte_order_mark_and_crlf_line_ends_are_no_part_of_the_task():
    data = b"\xef\xbb\xbf" + json.dumps(OFFICIAL, indent=1).replace("\n", "\r\n").encode()
    assert read(data) == read(OFFICIAL)


def test_an_output_string_is_a_list_of_one():
    task = read(official(Instances=[{"id": "a", "input": "x", "output": "one"}, {"input": "y", "output": [""]}]))
    assert [instance.references for instance in task.instances] == [("one",), ("",)]


def test_missing_ids_are_numbered_and_double_ids_are_refused():
    two = [{"input": "x", "output": "1"}, {"input": "y", "output": "2"}]
    assert [i.id for i in read(official(Instances=two)).instances] == ["task1-00000", "task1-00001"]
    error = refusal(official(Instances=[item | {"id": "same"} for item in two]))
    assert error.what == "folder/task1.json: two Instances have the same id."


# --- broken files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "suffix", "what"),
    [
        (json.dumps(OFFICIAL)[:-20], ".json", "cannot be parsed"),
        (b'{"Definition": "caf\xe9"}', ".json", "cannot be parsed"),
        ("", ".json", "cannot be parsed"),
        pytest.param("[" * 100_000, ".json", "cannot be parsed", id="too deep"),
        pytest.param('{"Definition": ' + "9" * 5000 + "}", ".json", "cannot be parsed", id="too many digits"),
        ("a: b: c", ".yaml", "cannot be parsed"),
        ("instruction: Do it\nexamples: [{input: 2024-31-12, output: a}]", ".yaml", "cannot be parsed"),
        ([OFFICIAL], ".json", "holds a list"),
        ("", ".yaml", "holds a NoneType"),
        ({"prompt": "x", "answer": "y"}, ".json", "not in a task schema we know; its keys are prompt, answer"),
        ({}, ".json", "its keys are none"),
        (official(Definition=[]), ".json", "Definition is empty"),
        (official(Definition=["  "]), ".json", "Definition is empty"),
        (official(Definition=None), ".json", "Definition holds a NoneType"),
        (official(Instances={"a": 1}), ".json", "Instances is a dict"),
        (official(Instances=[{"id": "a", "input": "x", "output": []}]), ".json", "Instances[0] has no output"),
        (official(Instances=[{"id": "a", "input": "x"}]), ".json", "Instances[0] has no output"),
        (official(Instances=[{"id": "a", "output": ["x"]}]), ".json", "Instances[0] has no 'input'"),
        (official(Instances=["x"]), ".json", "Instances[0] has no output"),
        (official(Instances=[{"input": "x", "output": [1]}]), ".json", "Instances[0].output holds 1"),
        (official(Positive_Examples=[{"input": "x"}]), ".json", "Positive Examples[0] has no 'output'"),
        (
            official(Positive_Examples=[{"input": None, "output": "x"}]),
            ".json",
            "Positive Examples[0] holds a NoneType",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(document, suffix, what):
    error = refusal(document, suffix=suffix)
    assert error.what.startswith(f"folder/task1{suffix}: ")
    assert what in error.what
    assert error.why
    assert error.instead


@pytest.mark.parametrize("name", ["../x", ".hidden", "", "a/b", "a b", "-x", "_x", "a\n", "é", "x" * 201])
def test_a_name_that_is_no_safe_file_name_is_refused(name):
    assert refusal(OFFICIAL, name=name).what == f"{name!r} cannot be a task's name."


def test_only_the_last_suffix_is_no_part_of_a_name(tmp_path):
    for name in ("task1640_aqa1.0_x.json", "task602_wikitext-103_y.json", ".hidden.json", "notes.txt", "b.v2.yml"):
        (tmp_path / name).write_text(json.dumps(OFFICIAL if name.endswith("json") else OWN))
    names = [read_task(file).name for file in task_files(tmp_path)]
    assert names == ["b.v2", "task1640_aqa1.0_x", "task602_wikitext-103_y"]


def test_a_source_may_be_one_file_and_a_missing_or_foreign_one_is_refused(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(OWN))
    assert [(file.name, file.origin) for file in task_files(path)] == [("one", str(path))]
    with pytest.raises(SelfGuideError, match="does not exist"):
        list(task_files(tmp_path / "none"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SelfGuideError, match="neither a directory, an archive nor a task file"):
        list(task_files(tmp_path / "notes.txt"))


def test_a_folder_whose_name_ends_like_a_task_file_is_passed_over(tmp_path):
    (tmp_path / "old.json").mkdir()
    (tmp_path / "task1.json").write_text(json.dumps(OWN))
    assert [file.name for file in task_files(tmp_path)] == ["task1"]


# --- archives --------------------------------------------------------------------------------------------------------


def archive(path, *names, mode="w:xz"):
    with tarfile.open(path, mode) as file:
        for name in names:
            data = json.dumps(OWN).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.xz", "w:xz")])
def test_an_archive_is_read_member_by_member_wherever_a_member_says_it_belongs(tmp_path, suffix, mode):
    names = ("../../etc/b.json", "/nowhere/a.json", "x/.hid.json", "x/README.md")
    path = archive(tmp_path / f"t.{suffix}", *names, mode=mode)
    files = list(task_files(path))
    assert [read_task(file).name for file in files] == ["b", "a"]
    assert files[0].origin == f"{path}:../../etc/b.json"
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


def test_links_in_an_archive_are_not_followed(tmp_path):
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as file:
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    assert list(task_files(path)) == []


@pytest.mark.parametrize("suffix", ["tar.xz", "tar.gz", "tar"])
def test_a_damaged_archive_is_refused(tmp_path, suffix):
    mode = {"tar.xz": "w:xz", "tar.gz": "w:gz", "tar": "w"}[suffix]
    whole = archive(tmp_path / f"whole.{suffix}", *(f"t{i}.json" for i in range(50)), mode=mode).read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: len(whole) // 2 - 100])
    with pytest.raises(SelfGuideError, match="cannot be read to its end"):
        list(task_files(cut))
    cut.write_bytes(b"no archive at all")
    with pytest.raises(SelfGuideError, match="cannot be read to its end"):
        list(task_files(cut))


# --- a task of one's own ---------------------------------------------------------------------------------------------

OWN_YAML = """
instruction: |
  Say whether it is good.
examples:
  - {input: fine, output: "yes"}
  - {input: bad, output: "no"}
labels: ["yes", " no "]
category: Sentiment
noise_words: [Review]
instances:
  - {input: great, output: "yes"}
  - {id: x, input: awful, references: ["no", "No"]}
"""


def test_a_task_of_ones_own_reads_from_yaml():
    task = read(OWN_YAML, suffix=".yaml")
    assert (task.instruction, task.category, task.metric) == ("Say whether it is good.", "Sentiment", "exact_match")
    assert (task.labels, task.noise_words) == (("yes", "no"), ("Review",))
    assert task.instances == (Instance("task1-00000", "great", ("yes",)), Instance("x", "awful", ("no", "No")))
    assert read(OWN_YAML + "metric: rouge_l\n", suffix=".yaml").metric == "rouge_l"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("label: [a, b]", "'label' is not a key of a task"),
        ("labels: [a]", "labels are ['a']"),
        ("labels: [a, a]", "labels are ['a', 'a']"),
        ("labels: [yes, no]", "labels holds True, which is not text"),
        ("labels: [1, 2]", "labels holds 1, which is not text"),
        ("noise_words: 1.5", "noise_words holds 1.5, which is not text"),
        ("category: 3", "category holds 3, which is not text"),
        ("metric: bleu", "metric is 'bleu'"),
        ("instances: [{input: 3, output: a}]", "instances[0] holds 3, which is not text"),
        ("instances: [{input: a, output: 7}]", "instances[0].output holds 7, which is not text"),
        ("instances: [{input: a, output: []}]", "instances[0] has no output"),
        ("instances: [{id: 1, input: a, output: b}]", "instances[0].id holds 1, which is not text"),
    ],
)
def test_a_mistake_in_a_task_of_ones_own_is_refused(line, what):
    error = refusal(f"instruction: Do it\nexamples: [{{input: a, output: b}}]\n{line}\n", suffix=".yaml")
    assert error.what == f"folder/task1.yaml: {what}."


# --- label sets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (["yes", "no"] * 3, ("no", "yes")),
        (["Yes.", "Yes.", "yes", "no", "No", "no"], ("Yes.", "no")),  # the commonest spelling, a final dot set aside
        (["  No  ", "No", "Yes"] * 2, ("No", "Yes")),
        (["Agent", "agent", "agent", "x", "x", "x"], ("agent", "x")),
        (["b", "B", "a", "a", "a", "b", "B"], ("B", "a")),  # a tie goes to the alphabet
        (["1", "-1"] * 3, ("-1", "1")),
        ([".", ","] * 3, (",", ".")),
        (["a b", "a  b", "ab", "ab", "a b", "ab"], ("a b", "ab")),
        (["yes", "no"] * 2 + ["yes"], ()),  # fewer than three instances a label
        (["yes"] * 9, ()),
        (["yes", "no", ""] * 5, ()),  # an empty answer is right: no label set
        ([f"label {i % 14}" for i in range(42)], tuple(sorted(f"label {i}" for i in range(14)))),
        ([f"label {i % 15}" for i in range(45)], ()),
        ([], ()),
    ],
)
def test_labels_are_the_distinct_outputs_of_a_task_with_few_of_them(outputs, labels):
    assert label_set(with_outputs(*outputs)) == labels
    assert label_set(reversed(with_outputs(*outputs))) == labels  # whatever the order of the instances
