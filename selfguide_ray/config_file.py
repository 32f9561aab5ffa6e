"""Settings as a user gives them: a YAML file, overrides on the command line, and what is said of wrong ones."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from selfguide_ray.config import Config
from selfguide_ray.documents import check_setting, read_yaml, shown
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.sections import PerFamily, Section

T = TypeVar("T", bound=Section)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a run: a YAML file with `section.key=value` overrides, values written as in YAML."""
    return read(Config, path, overrides)


def read(kind: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Settings of any kind, as `load` reads those of a run."""
    document = _read(Path(path)) if path is not None else {}
    given = [_assignment(override) for override in overrides]
    for keys, value in given:
        _assign(document, keys, value)
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _explain(error, str(path), {".".join(keys) for keys, _ in given}, kind) from error


def fields(kind: type[Section] = Config) -> list[tuple[str, str, str]]:
    """(dotted name, default, meaning) of every setting, in order; for `selfguide settings` and the README."""

    def walk(model: type[Section], prefix: str) -> list[tuple[str, str, str]]:
        rows = []
        for name, field in model.model_fields.items():
            if isinstance(field.default, Section):
                rows += walk(type(field.default), f"{prefix}{name}.")
            else:
                default = field.get_default(call_default_factory=True)
                rows.append((prefix + name, _shown(default), field.description or ""))
        return rows

    return walk(kind, "")


def _shown(default: Any) -> str:
    """A default as a user would write it; a long list is cut."""
    if isinstance(default, dict) and set(default) == {"classification", "generation"}:
        return f"{_shown(default['classification'])} / {_shown(default['generation'])}"
    text = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True, width=9999)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else text[:30] + "…]"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SelfGuideError(
            f"{path}: there is no such file.",
            "The settings are read from it.",
            "Give a file, such as configs/quickstart.yaml.",
        )
    try:
        document = read_yaml(path.read_text(encoding="utf-8-sig"))
        check_setting(document)
    except (ValueError, OSError) as error:  # ValueError: also bad UTF-8 and impossible dates
        raise SelfGuideError(
            f"{path}: cannot be parsed: {' '.join(str(error).split())}.",
            "Settings are YAML in UTF-8.",
            "Correct the file.",
        ) from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SelfGuideError(
            f"{path}: holds a {type(document).__name__}.",
            "Settings are a mapping of sections.",
            "See configs/quickstart.yaml.",
        )
    return document


def _assignment(override: str) -> tuple[list[str], Any]:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise SelfGuideError(
            f"command line: {shown(override)} is not an override.",
            "Overrides have the form section.key=value.",
            "For example inputs.rounds=4.",
        )
    try:
        value = read_yaml(text) if text else ""
    except ValueError:
        value = text  # a bare string such as !task1*, a: b or 2024-31-12
    try:
        check_setting([name, value])
    except ValueError as error:
        raise SelfGuideError(
            f"command line: {shown(override)} is not an override.", f"{error}.", "For example inputs.rounds=4."
        ) from error
    return name.strip().split("."), value


def _assign(document: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = document.setdefault(key, {})
        if inner is None:
            inner = document[key] = {}
        if not isinstance(inner, dict):  # rounds: 4 in the file, inputs.rounds.generation=2 after it
            inner = {"classification": inner, "generation": inner}
            document[key] = inner
        document = inner
    document[keys[-1]] = value


def _explain(error: ValidationError, path: str, given: set[str], kind: type[Section]) -> SelfGuideError:
    """A pydantic error in three parts, naming the file or the command line and the nearest known key."""
    first, *more = error.errors()
    location = [str(part) for part in first["loc"]]
    if location[-1] in PerFamily.model_fields:  # one value was given for both families
        location = location[:-1] if not isinstance(first["input"], dict) else location
    name = ".".join(location)
    origin = (
        "command line" if any(f"{name}.".startswith(f"{g}.") or f"{g}.".startswith(f"{name}.") for g in given) else path
    )
    rest = f" ({len(more)} more: see after correcting this one.)" if more else ""
    table = {field: meaning for field, _, meaning in fields(kind)}
    listed = "`selfguide settings` lists them all." if kind is Config else f"They are: {', '.join(table)}."
    if first["type"] == "extra_forbidden":
        same_key = [known for known in table if known.split(".")[-1] == location[-1]]  # right key, wrong section
        names = [*table, *{known.split(".")[0] for known in table}]
        near = same_key or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        instead = f"Did you mean {near[0]}?" if near else listed
        return SelfGuideError(
            f"{origin}: {name} is not a setting.{rest}", "An unknown key would be ignored silently.", instead
        )
    meaning = f"{name}: {table[name]}" if name in table else listed
    return SelfGuideError(f"{origin}: {name} is {shown(first['input'])}.{rest}", f"{first['msg']}.", meaning)
