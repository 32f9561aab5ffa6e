"""A run on disk or object store: seven folders of shards, and what is missing in them.

A file is whole or absent, and the files are the only state (design, invariants 2, 4, 6): what is left to do is the
difference of two listings, so running the same command again is the resume. A shard's receipt (seconds, tokens, node)
lies in the metadata of its Parquet file, where it cannot disagree with the data.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from selfguide_ray.config import Config
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import agrees, redacted_values
from selfguide_ray.schema import TABLES
from selfguide_ray.storage import opened, publish_whole, shown

T = TypeVar("T")

UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError)  # what damage ends in
RECEIPT = b"selfguide_receipt"
PLACE = b"selfguide_place"  # table/shard, so that a file which was put elsewhere is known
TEMPORARY = ".tmp-"  # readers of Parquet folders pass over names with a leading dot
PLAN = "tasks/_plan.json"  # written last of the table `tasks`: the plan is complete
SETTINGS = "_settings.json"  # and over those with a leading underscore

# What each folder is made from; its settings are its own section, the student where that speaks, and those below it.
READS: dict[str, tuple[str, ...]] = {
    "tasks": (),
    "inputs": ("tasks",),
    "outputs": ("inputs",),
    "trainset": ("outputs",),
    "models": ("trainset",),
    "predictions": ("models",),
    "scores": ("predictions",),
}
SPEAKS = ("inputs", "outputs", "trainset", "models", "predictions")  # tables that depend on the student
BY_METHOD = ("inputs", "outputs", "trainset", "predictions", "scores")  # tables that `method` makes different
# Settings that change no row. (One that finds no room in the memory for keys and values is `too_long`, one that takes
# longer than it may is `timed_out`; a run must be able to go on with less memory or time all the same.)
RESULT_FREE = {"student": {"batch_rows", "kv_memory_gib", "max_adapters", "request_seconds"}, "tasks": {"strict"}}


def model_of(task: str, system: str) -> str:
    """The folder of a task's model in a system: `task`, or `task@system` for a baseline."""
    return task if system == "selfguide" else f"{task}@{system}"


def pairs_of(model: str) -> tuple[str, str]:
    """(task, system) whose training pairs a model learns."""
    task, _, system = model.partition("@")  # no task's name holds one
    return task, system or "selfguide"


class Run:
    """One run's folder, local or remote, through `pyarrow.fs`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.root = opened(uri)
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    # --- tables ---------------------------------------------------------------------------------------------------

    def shards(self, table: str) -> list[str]:
        """Names of the shards of a table that are there, in order."""
        return sorted(name.removesuffix(".parquet") for name in self.names(table) if name.endswith(".parquet"))

    def missing(self, *tables: str) -> list[str]:
        """Shards of the plan that at least one of the tables lacks."""
        done = set.intersection(*(set(self.shards(table)) for table in tables))
        return [shard for shard in self.shards("tasks") if shard not in done]

    def read(self, table: str, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's rows. Raises SelfGuideError if the file is damaged."""
        names = list(columns) if columns is not None else None

        def rows(file: pa.NativeFile) -> pa.Table:
            # Columns side by side are one request to an object store.
            parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
            _check_schema(parquet.schema_arrow, table, shard)
            found = parquet.read(names)
            found.validate(full=True)
            return found

        return self._parsed(f"{table}/{shard}.parquet", rows)

    def read_all(self, table: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a table, shards in order."""
        parts = [self.read(table, shard, columns) for shard in self.shards(table)]
        schema = TABLES[table]
        empty = schema.empty_table().select(list(columns)) if columns is not None else schema.empty_table()
        # A column that shards of an earlier version lack is null in their rows.
        return pa.concat_tables([empty, *(part.replace_schema_metadata() for part in parts)], promote_options="default")

    def write(self, table: str, shard: str, rows: pa.Table, receipt: dict[str, Any]) -> bool:
        """Publish a shard; False, and nothing is touched, if it is already there.

        Raises pa.ArrowInvalid or ValueError if the rows do not fit the table's schema.
        """
        schema = TABLES[table].with_metadata(
            {RECEIPT: json.dumps(receipt).encode(), PLACE: f"{table}/{shard}".encode()}
        )
        buffer = pa.BufferOutputStream()
        pq.write_table(rows.cast(schema), buffer, compression="zstd", write_page_checksum=True)
        return self.put(f"{table}/{shard}.parquet", buffer.getvalue(), replace=False)

    def receipt(self, table: str, shard: str) -> dict[str, Any]:
        """What it took to make a shard. Raises SelfGuideError if the file is damaged."""

        def told(file: pa.NativeFile) -> dict[str, Any]:
            found = json.loads((pq.read_schema(file).metadata or {}).get(RECEIPT, b"{}"))
            if not isinstance(found, dict):
                raise ValueError("its receipt is no mapping")
            return found

        return self._parsed(f"{table}/{shard}.parquet", told)

    def _parsed(self, relative: str, parse: Callable[[pa.NativeFile], T]) -> T:
        """What a file holds; what cannot be made sense of ends in a SelfGuideError, a store that fails in its own error."""
        try:
            with self.fs.open_input_file(self._path(relative)) as file:
                return parse(file)
        except FileNotFoundError:
            raise
        except UNREADABLE:
            data = self.get(relative)  # which fails too if it is the store, and not the file
        try:
            return parse(pa.BufferReader(data or b""))
        except UNREADABLE as error:
            raise self._damaged(relative, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error

    def _damaged(self, relative: str, reason: str) -> SelfGuideError:
        return SelfGuideError(
            f"{shown(self.uri, relative)} is damaged.",
            f"{reason}.",
            "Delete it, and the same command makes it again.",
        )

    # --- models: the one table whose unit is the task --------------------------------------------------------------

    def trained(self) -> list[str]:
        """Tasks whose `model.json` is published."""
        if self.local:
            return sorted(name for name in self.names("models") if self.exists(f"models/{name}/model.json"))
        folder = self._path("models")  # one listing where each look at a file would be a request
        infos = self.fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True, recursive=True))
        names = [info.path.removeprefix(f"{folder}/").partition("/") for info in infos]
        return sorted(name for name, _, file in names if file == "model.json" and not name.startswith((".", "_")))

    @contextlib.contextmanager
    def scratch(self, relative: str) -> Iterator[Path]:
        """A local folder that lasts as long as the block, on the disk of the folder `relative` where that is local."""
        parent = Path(self._path(relative)) if self.local else self._beside
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, relative: str, last: str) -> None:
        """A folder of `scratch` becomes `relative` as a whole, unless that is there; `last` is the file that counts."""
        if self.local:
            target = Path(self._path(relative))
            if not (target / last).exists():
                shutil.rmtree(target, ignore_errors=True)
                os.replace(folder, target)
            return
        if self.exists(f"{relative}/{last}"):
            return
        files = sorted(folder.iterdir(), key=lambda path: path.name == last)
        for name in set(self.names(relative)) - {file.name for file in files}:
            self.remove(f"{relative}/{name}")  # of a process that died here
        for file in files:
            with pa.memory_map(str(file)) as source:
                publish_whole(self.fs, self._path(relative, file.name), source.read_buffer())

    def take(self, other: "Run", relative: str) -> bool:
        """Publish a copy of another run's file, as it is; False if it is here already, or not there."""
        if self.exists(relative):
            return False
        data = other.get(relative)
        return data is not None and self.put(relative, data, replace=False)

    def take_folder(self, other: "Run", relative: str, last: str) -> None:
        """Publish a copy of another run's folder; `last` is the file that counts."""
        with self.scratch(relative.rpartition("/")[0]) as folder, other.local_copy(relative) as theirs:
            for file in theirs.iterdir():
                shutil.copy(file, folder / file.name)
            self.publish(folder, relative, last)

    @contextlib.contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        """The files of a folder as a local path; a remote folder is fetched for as long as the block lasts."""
        if self.local:
            yield Path(self._path(relative))
            return
        with tempfile.TemporaryDirectory() as folder:
            pafs.copy_files(
                self._path(relative), folder, source_filesystem=self.fs, destination_filesystem=pafs.LocalFileSystem()
            )
            yield Path(folder)

    # --- small files ------------------------------------------------------------------------------------------------

    def put(self, relative: str, data: bytes, replace: bool = True) -> bool:
        """Publish a file whole: a temporary name and a rename, or one PUT. False if it is there and may not be replaced."""
        if not replace and self.exists(relative):
            return False
        path = self._path(relative)
        if not self.local:
            publish_whole(self.fs, path, data)
            return True
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("wb") as sink:
                sink.write(data)
                sink.flush()
                os.fsync(sink.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def get(self, relative: str) -> bytes | None:
        """A file's bytes, None if it is absent."""
        if not self.exists(relative):
            return None
        with self.fs.open_input_file(self._path(relative)) as file:
            return file.read()

    def get_json(self, relative: str, kind: type = object) -> Any:
        """A JSON file's content, None if it is absent. Raises SelfGuideError if it is damaged, or of another kind."""
        data = self.get(relative)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._damaged(relative, f"{' '.join(str(error).split())[:300]}") from error
        if not isinstance(found, kind):
            raise self._damaged(relative, f"it holds a {type(found).__name__}, and a {kind.__name__} is wanted")
        return found

    def exists(self, relative: str = "") -> bool:
        """Whether a file or folder is there."""
        return self.fs.get_file_info(self._path(relative)).type != pafs.FileType.NotFound

    def names(self, relative: str) -> list[str]:
        """Names in a folder, hidden ones left out; none if it is absent."""
        try:
            infos = self.fs.get_file_info(pafs.FileSelector(self._path(relative), allow_not_found=True))
        except FileNotFoundError:  # Arrow's answer where the folder is made between its two looks
            return []
        return sorted(info.base_name for info in infos if not info.base_name.startswith((".", "_")))

    def remove(self, relative: str) -> None:
        """Remove a file or folder, if it is there."""
        kind = self.fs.get_file_info(self._path(relative)).type
        if kind == pafs.FileType.Directory:
            self.fs.delete_dir(self._path(relative))
        elif kind != pafs.FileType.NotFound:
            self.fs.delete_file(self._path(relative))

    def sweep(self) -> None:
        """Remove what a killed process left half-written. Only temporary names are touched.

        Of a remote run these are on this node; what it had sent to the store is nowhere to be seen.
        """
        for path in (Path(self.root) if self.local else self._beside).glob(f"**/{TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @property
    def _beside(self) -> Path:
        """Where a node holds what is to become part of a remote run."""
        return Path(tempfile.gettempdir()) / f"selfguide-{digest(self.root)}"

    def _path(self, *parts: str) -> str:
        return "/".join((self.root, *(part for part in parts if part)))

    # --- settings ---------------------------------------------------------------------------------------------------

    def check(self, config: Config, student: dict[str, Any]) -> dict[str, Any]:
        """Each folder's settings under this config; `student` is what identifies the model.

        Raises SelfGuideError if a folder was made by other settings. Nothing is written.
        """
        wanted = {table: made_by(table, config, student) for table in READS}
        for table, settings in wanted.items():
            found = self.get_json(f"{table}/{SETTINGS}", dict)
            if found is not None and not agrees(found, settings):
                self._refuse(table, found, settings)
        return wanted

    def claim(self, config: Config, student: dict[str, Any]) -> None:
        """Check all folders, and only then note in each what makes it (design, invariant 6)."""
        for table, settings in self.check(config, student).items():
            if not self.exists(f"{table}/{SETTINGS}"):
                self.put(f"{table}/{SETTINGS}", json.dumps(redacted_values(settings), indent=1).encode() + b"\n")

    def _refuse(self, table: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        old, new = _flat(found), _flat(wanted)
        changes = [
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} now"
            for k in sorted(old.keys() | new.keys())
            if not agrees(old.get(k), new.get(k))
        ]
        later = [name for name in READS if list(READS).index(name) >= list(READS).index(table)]
        raise SelfGuideError(
            f"{shown(self.uri, table)} was made by other settings: {'; '.join(changes)}.",
            "Rows of two settings in one table could not be told apart.",
            f"Restore the setting, choose another run=DIR, or delete {', '.join(later)} in {shown(self.uri)} to make them again.",
        )


def _check_schema(found: pa.Schema, table: str, shard: str) -> None:
    """Raises TypeError for another table's columns. Another version's has columns too few, or too many, but not both."""
    wanted, place = TABLES[table], f"{table}/{shard}".encode()
    if (told := (found.metadata or {}).get(PLACE, place)) != place:
        raise TypeError(f"it was written as {told[:80].decode(errors='replace')}")
    new, lacking = ([n for n in one.names if n not in other.names] for one, other in ((found, wanted), (wanted, found)))
    if new and lacking:
        raise TypeError(f"it has the column {new[0][:80]}, and {lacking[0]} is wanted")
    for field in found:
        if field.name in wanted.names and field.type != wanted.field(field.name).type:
            raise TypeError(
                f"its column {field.name} holds {field.type}, and {wanted.field(field.name).type} is wanted"
            )


def made_by(table: str, config: Config, student: dict[str, Any]) -> dict[str, Any]:
    """The settings that a folder's rows depend on: its section, the seed, the student, and a digest of what it reads."""
    below = {name: digest(made_by(name, config, student)) for name in READS[table]}
    section = config.model_dump(mode="json")[table]
    settings = {k: v for k, v in section.items() if k not in RESULT_FREE.get(table, ())}
    if table == "trainset":
        settings["taught"] = list(config.predictions.taught)
    speaker = config.student.model_dump(mode="json", exclude=RESULT_FREE["student"] | {"model"}) | student
    return {
        table: settings,
        "seed": config.seed,
        **({"method": config.method} if table in BY_METHOD and config.method != "selfguide" else {}),
        **({"student": speaker} if table in SPEAKS else {}),
        **({"reads": below} if below else {}),
    }


def digest(value: Any) -> str:
    """A short fingerprint of anything JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else key).items()}
