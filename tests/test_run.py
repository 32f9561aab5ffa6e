"""A run on disk: files are whole or absent, folders remember what made them."""

import contextlib
import json
import resource

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.run import READS, Run, made_by
from selfguide_ray.schema import TABLES, task_rows, tasks_of

STUDENT = {"model": "none", "fingerprint": "f1"}


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / "run"))


@pytest.fixture
def rows(make_task):
    return task_rows([make_task("one"), make_task("two")])


@contextlib.contextmanager
def full_disk(limit):
    """No file may grow beyond `limit` bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder):
    """Every file and folder below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def scores(count):
    return pa.Table.from_pylist([{"task": f"t{n}", "value": float(n)} for n in range(count)], schema=TABLES["scores"])


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_shard_reads_back_as_it_was_written(run, rows, make_task):
    assert run.write("tasks", "00000", rows, {"kept": 2}) is True
    assert tasks_of(run.read("tasks", "00000")) == [make_task("one"), make_task("two")]
    assert run.read("tasks", "00000", ["task"]).to_pydict() == {"task": ["one", "two"]}
    assert run.receipt("tasks", "00000") == {"kept": 2}


def test_a_shard_is_never_overwritten(run, tmp_path):
    run.write("scores", "00000", scores(1), {"kept": 1})
    before = (tmp_path / "run/scores/00000.parquet").read_bytes()
    assert run.write("scores", "00000", scores(2), {"kept": 2}) is False
    assert (tmp_path / "run/scores/00000.parquet").read_bytes() == before
    assert files(tmp_path / "run") == ["scores", "scores/00000.parquet"]


def test_a_write_that_fails_half_way_leaves_neither_file_nor_temporary(run, tmp_path):
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        run.write("scores", "00000", scores(9999), {})
    assert run.shards("scores") == []
    assert files(tmp_path / "run") == ["scores"]
    assert run.write("scores", "00000", scores(9999), {}) is True


def test_a_put_that_fails_half_way_leaves_the_old_file(run, tmp_path):
    run.put("note.json", b"{}")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        run.put("note.json", b"x" * 5000)
    assert (run.get("note.json"), files(tmp_path / "run")) == (b"{}", ["note.json"])
    assert run.put("note.json", b"[]") is True
    assert run.get_json("note.json") == []


def test_rows_of_another_schema_are_refused_and_nothing_is_written(run, rows, tmp_path):
    for wrong in (rows, scores(1).drop_columns(["n"]), scores(1).append_column("more", pa.array([1]))):
        with pytest.raises((pa.ArrowInvalid, ValueError)):
            run.write("scores", "00000", wrong, {})
    text = pa.table({name: pa.array(["x"]) for name in TABLES["scores"].names})
    with pytest.raises(pa.ArrowInvalid):
        run.write("scores", "00000", text, {})
    assert not (tmp_path / "run").exists()


def test_missing_is_the_plan_less_what_is_there(run, rows):
    assert run.missing("inputs") == []
    for number in range(4):
        run.write("tasks", f"{number:05d}", rows, {})
    run.write("scores", "00002", scores(1), {})
    run.write("scores", "00009", scores(1), {})  # of no plan
    assert run.missing("inputs") == ["00000", "00001", "00002", "00003"]
    assert run.missing("scores") == ["00000", "00001", "00003"]
    assert run.shards("scores") == ["00002", "00009"]


def test_all_shards_read_as_one_table_in_their_order(run):
    assert run.read_all("scores").equals(TABLES["scores"].empty_table())
    assert run.read_all("scores", ["task", "n"]).schema.names == ["task", "n"]
    run.write("scores", "00001", scores(1), {"kept": 1})
    run.write("scores", "00000", scores(2), {"kept": 2})
    assert run.read_all("scores", ["task"])["task"].to_pylist() == ["t0", "t1", "t0"]
    assert run.read_all("scores").schema.equals(TABLES["scores"], check_metadata=True)


def test_a_table_folder_is_a_plain_parquet_data_set(run, tmp_path):
    run.claim(load(), STUDENT)
    for number in range(3):
        run.write("scores", f"{number:05d}", scores(number + 1), {"kept": number})
    (tmp_path / "run/scores/.tmp-00003.parquet-ab").write_bytes(b"half")
    assert (tmp_path / "run/scores/_settings.json").exists()
    assert pq.read_table(tmp_path / "run/scores")["task"].to_pylist() == ["t0", "t0", "t1", "t0", "t1", "t2"]
    assert run.shards("scores") == ["00000", "00001", "00002"]


def test_odd_text_survives_a_table(run, make_task):
    odd = 'a\x00b\u2028\ufeff\U0001f600\r\n"'
    task = make_task(instruction=odd, examples=[(odd, odd), ("", " ")], instances=[(odd, "")])
    run.write("tasks", "00000", task_rows([task]), {"note": odd})
    assert tasks_of(run.read("tasks", "00000")) == [task]
    assert run.receipt("tasks", "00000") == {"note": odd}


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_published_as_a_whole(run, tmp_path):
    with run.scratch("models") as scratch:
        folder = scratch / "one"
        folder.mkdir()
        (folder / "weights").write_text("w")
        (folder / "model.json").write_text("{}")
        assert run.trained() == []
        assert run.names("models") == []  # nobody sees it yet
        run.publish(folder, "models/one", "model.json")
    assert run.trained() == ["one"]
    assert files(tmp_path / "run") == ["models", "models/one", "models/one/model.json", "models/one/weights"]


def test_nothing_is_left_of_a_scratch_folder(run, tmp_path):
    def fail():
        with run.scratch("models") as folder:
            (folder / "weights").write_text("w")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert files(tmp_path / "run") == ["models"]
    assert run.trained() == []


def test_a_whole_model_is_never_replaced_but_one_that_is_not(run):
    for text in ("first", "second"):
        with run.scratch("models") as folder:
            (folder / "model.json").write_text(json.dumps(text))
            run.publish(folder, "models/one", "model.json")
    assert run.get_json("models/one/model.json") == "first"
    run.put("models/two/leftover", b"x")
    assert run.trained() == ["one"]
    with run.scratch("models") as folder:
        (folder / "model.json").write_text("2")
        run.publish(folder, "models/two", "model.json")
    assert run.names("models/two") == ["model.json"]
    assert run.trained() == ["one", "two"]


def test_a_local_copy_is_the_folder_itself(run, tmp_path):
    run.put("models/one/model.json", b"{}")
    with run.local_copy("models/one") as folder:
        assert folder == tmp_path / "run/models/one"


def test_a_sweep_removes_temporaries_and_nothing_else(run, rows, tmp_path):
    run.claim(load(), STUDENT)
    run.write("tasks", "00000", rows, {})
    run.put("models/one/model.json", b"{}")
    run.put("models/one/.hidden", b"{}")
    before = files(tmp_path / "run")
    for relative in ("tasks/.tmp-00001.parquet-aa", ".tmp-x", "models/.tmp-two-bb/deep/w", "models/.tmp-two-bb/.tmp-x"):
        path = tmp_path / "run" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    run.sweep()
    assert files(tmp_path / "run") == before
    Run(str(tmp_path / "none")).sweep()
    assert not (tmp_path / "none").exists()


# --- settings --------------------------------------------------------------------------------------------------------


def test_each_folder_notes_what_makes_it(run, tmp_path):
    run.claim(load(overrides=["seed=3"]), STUDENT)
    assert files(tmp_path / "run") == sorted([*READS, *(f"{table}/_settings.json" for table in READS)])
    noted = {table: run.get_json(f"{table}/_settings.json") for table in READS}
    assert {table: settings["seed"] for table, settings in noted.items()} == dict.fromkeys(READS, 3)
    assert noted["tasks"]["tasks"]["per_shard"] == 8
    assert {table for table, settings in noted.items() if "student" in settings} == set(READS) - {"tasks", "scores"}
    assert noted["inputs"]["student"]["fingerprint"] == "f1"
    assert all(list(noted[table].get("reads", {})) == list(below) for table, below in READS.items())


@pytest.mark.parametrize(
    ("override", "table", "difference"),
    [
        ("tasks.instances=7", "tasks", "tasks.instances: 100 there, 7 now"),
        ("inputs.rounds.generation=3", "inputs", "inputs.rounds.generation: 20 there, 3 now"),
        ("outputs.samples=3", "outputs", "outputs.samples: 20 there, 3 now"),
        ("trainset.keep=3", "trainset", "trainset.keep: 10 there, 3 now"),
        ("models.epochs=4", "models", "models.epochs: 3 there, 4 now"),
        ("models.deepspeed={a: 1}", "models", "models.deepspeed.a: None there, 1 now"),
        ("scores.bootstrap=5", "scores", "scores.bootstrap: 1000 there, 5 now"),
        ("student.max_prompt_tokens=99", "inputs", "student.max_prompt_tokens: 3000 there, 99 now"),
        ("seed=1", "tasks", "seed: 0 there, 1 now"),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_nothing_is_written(
    run, tmp_path, override, table, difference
):
    start = ["inputs.rounds=20"]
    run.claim(load(overrides=start), STUDENT)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(SelfGuideError) as caught:
        run.claim(load(overrides=[*start, override]), STUDENT)
    assert caught.value.what.startswith(f"{tmp_path}/run/{table} was made by other settings: ")
    assert difference in caught.value.what
    assert caught.value.why == "Rows of two settings in one table could not be told apart."
    later = ", ".join(list(READS)[list(READS).index(table) :])
    assert caught.value.instead.endswith(f"delete {later} in {tmp_path}/run to make them again.")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_another_student_is_refused_by_every_table_it_speaks_in(run, tmp_path):
    run.claim(load(), STUDENT)
    with pytest.raises(SelfGuideError, match=r"inputs was made by.*student\.fingerprint: 'f1' there, 'f2' now"):
        run.check(load(), STUDENT | {"fingerprint": "f2"})


def test_a_deleted_folder_may_be_made_again_by_other_settings(run, tmp_path):
    run.claim(load(), STUDENT)
    other = load(overrides=["scores.bootstrap=5"])
    (tmp_path / "run/scores/_settings.json").unlink()
    run.claim(other, STUDENT)
    assert run.get_json("scores/_settings.json")["scores"] == {"bootstrap": 5}


def test_a_claim_refused_by_a_later_folder_writes_nothing_in_earlier_ones(run, tmp_path):
    run.claim(load(), STUDENT)
    for table in ("tasks", "inputs"):
        (tmp_path / f"run/{table}/_settings.json").unlink()
    with pytest.raises(SelfGuideError, match=r"trainset\.keep"):
        run.claim(load(overrides=["trainset.keep=3"]), STUDENT)
    assert not (tmp_path / "run/tasks/_settings.json").exists()
    assert not (tmp_path / "run/inputs/_settings.json").exists()


@pytest.mark.parametrize(
    "override",
    ["cluster.engines=7", "cluster.workers=3", "cluster.cpus_per_engine=2", "student.batch_rows=7", "tasks.strict=true",
     "run=elsewhere"],
)  # fmt: skip
def test_settings_that_change_no_row_may_change_freely(run, override):
    run.claim(load(), STUDENT)
    run.claim(load(overrides=[override]), STUDENT)
    run.check(load(overrides=[override]), STUDENT)


def test_a_setting_reaches_the_tables_made_of_its_own_and_no_others():
    def changed(override):
        one, other = load(), load(overrides=[override])
        return [table for table in READS if made_by(table, one, STUDENT) != made_by(table, other, STUDENT)]

    order = list(READS)
    assert order == ["tasks", "inputs", "outputs", "trainset", "models", "predictions", "scores"]
    assert changed("tasks.instances=7") == order
    assert changed("trainset.keep=3") == order[3:]
    assert changed("scores.bootstrap=7") == ["scores"]
    assert changed("predictions.systems=[copy]") == ["predictions", "scores"]
    assert changed("cluster.groups=9") == []


# --- small files -----------------------------------------------------------------------------------------------------


def test_names_are_sorted_without_hidden_ones_and_absence_is_no_error(run):
    for name in ("b.txt", "a.txt", ".hidden", "_settings.json"):
        run.put(f"notes/{name}", b"x")
    assert run.names("notes") == ["a.txt", "b.txt"]
    assert (run.names("nowhere"), run.get("nowhere/x"), run.get_json("nowhere/x")) == ([], None, None)
    assert run.put("notes/a.txt", b"y", replace=False) is False
    assert run.get("notes/a.txt") == b"x"


def test_removing_takes_a_file_or_a_folder_and_minds_no_absence(run):
    run.put("notes/a.txt", b"x")
    run.put("notes/b.txt", b"x")
    run.remove("notes/a.txt")
    assert run.names("notes") == ["b.txt"]
    run.remove("notes/a.txt")
    run.remove("notes")
    assert (run.exists("notes"), run.exists()) == (False, True)


def test_a_run_may_be_named_by_a_uri(run, rows, tmp_path):
    remote = Run(f"file://{tmp_path}/run")
    remote.write("tasks", "00000", rows, {"kept": 2})
    assert run.shards("tasks") == remote.shards("tasks") == ["00000"]
    assert run.read("tasks", "00000").equals(remote.read("tasks", "00000"))
