"""JSON and YAML that others wrote, as plain values: whatever is wrong with a text ends in a ValueError that says it.

A file cannot take more memory or time than its length warrants: aliases that multiply (a "billion laughs") are refused
before they are followed, and nesting is bounded.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from selfguide_ray.redaction import redacted

MAX_DEPTH = 64  # levels of lists and mappings; no task or setting has more than six
MAX_REPEATED = 100_000  # values that aliases may add to those that stand in the text
MAX_SHOWN = 2000  # characters of a value in an error
MAX_BITS = 1 << 10  # of a whole number: far more than any setting holds, and few enough to be printed


class _Shorter(reprlib.Repr):
    """Cuts long values; half a secret is none that `redacted` would know, so it goes before the cut."""

    def repr_str(self, value: str, level: int) -> str:
        return super().repr_str(redacted(value), level)


_shorter = _Shorter()
_shorter.maxlevel, _shorter.maxdict, _shorter.maxlist, _shorter.maxtuple = 4, 24, 24, 24
_shorter.maxstring, _shorter.maxother, _shorter.maxlong = 400, 400, 400


def read_json(text: str) -> Any:
    """The value of a JSON text. Python's bare NaN is read too, as official task files hold it; a key twice is refused."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    _bounded(value)
    return value


def read_yaml(text: str) -> Any:
    """The value of a YAML text, of plain types alone: a tag that asks for anything else is refused."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _look_over(node)
        value = loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML's own constructors stumble over a tag whose text does not fit it, such as !!bool x or !!timestamp x.
    except (LookupError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"a tag does not fit its value ({type(error).__name__}: {error})") from error
    _bounded(value)
    return value


def check_setting(value: Any) -> None:
    """Raises ValueError if something inside, or a key, can be no setting: JSON notes it, and it equals itself later.

    That is text with a NUL or without UTF-8, bytes, and NaN.
    """
    for inner in _inside(value):
        if isinstance(inner, bytes) or inner != inner:
            raise ValueError(f"{shown(inner)} can be no setting")
        if isinstance(inner, str):
            if "\0" in inner:
                raise ValueError(f"{shown(inner)} holds the character NUL")
            inner.encode()  # UnicodeEncodeError is a ValueError


def shown(value: Any) -> str:
    """`repr` of a value of any size and depth, cut where it is long."""
    text = _shorter.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {shown(twice)} stands twice in a mapping")
    return found


def _look_over(root: yaml.Node) -> None:
    """Refuse what would grow: a node's size and height count whatever its aliases repeat, each alias anew."""
    known: dict[int, tuple[int, int]] = {}  # size and height by the node's identity; (0, 0) while it is looked at

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) in known:
            if known[id(node)] == (0, 0):
                raise ValueError("an alias stands inside what it stands for")
            return known[id(node)]
        known[id(node)] = (0, 0)
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _keys_once(node)
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        sizes, heights = zip((0, 0), *map(measure, parts), strict=True)
        if max(heights) >= MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        known[id(node)] = 1 + sum(sizes), 1 + max(heights)
        return known[id(node)]

    if measure(root)[0] - len(known) > MAX_REPEATED:
        raise ValueError(f"its aliases repeat more than {MAX_REPEATED:,} values")


def _keys_once(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if (key.tag, key.value) in seen:
                raise ValueError(
                    f"the key {shown(key.value)} stands twice in a mapping, line {key.start_mark.line + 1}"
                )
            seen.add((key.tag, key.value))


def _bounded(value: Any) -> None:
    for inner in _inside(value):
        if isinstance(inner, int) and inner.bit_length() > MAX_BITS:
            raise ValueError(f"a number of {inner.bit_length():,} bits is too large")


def _inside(value: Any) -> Iterable[Any]:
    """Every value and key inside a value, once; raises ValueError where it is nested too deep."""
    level, seen = [value], set()
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for inner in level:
            if isinstance(inner, dict | list | tuple | set):
                if id(inner) in seen:
                    continue
                seen.add(id(inner))
                below += [*inner, *inner.values()] if isinstance(inner, dict) else inner
            else:
                yield inner
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
