"""Secrets that a text may hold by accident: values of the environment that are secret by name, and passwords in URIs.

What is written or shown goes through here where it may quote settings, addresses or an exception; tables never do.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 8  # characters of a secret: shorter values are in ordinary text too
# A word of a variable's name that makes its value a secret, unless the value is where that lies.
SECRET_NAME = re.compile(r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY)S?(?:_|$)", re.IGNORECASE)
PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR)$", re.IGNORECASE)
# user:password@ behind a scheme; the last @ before the path ends it, since a password may hold one.
CREDENTIALS = re.compile(r"(?<=://)[^\s/?#:@'\"]*:[^\s/?#'\"]*@")


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with every secret in it masked; `environment` is this process's unless given."""
    text = CREDENTIALS.sub(f"{MASK}@", text)
    for secret in _secrets(os.environ if environment is None else environment):
        text = text.replace(secret, MASK)
    return text


def redacted_values(value: Any) -> Any:
    """What JSON can hold, with every text in it `redacted`; keys stay."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_values(inner) for key, inner in value.items()}
    return [redacted_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def agrees(noted: Any, given: Any) -> bool:
    """Whether `given` may be what was noted as `redacted_values(given)`: a mask stands for any text."""
    if isinstance(noted, str) and isinstance(given, str) and MASK in noted:
        parts = map(re.escape, noted.split(MASK))
        return re.fullmatch(".*".join(parts), given, re.DOTALL) is not None
    if isinstance(noted, dict) and isinstance(given, dict):
        return noted.keys() == given.keys() and all(agrees(noted[key], given[key]) for key in noted)
    if isinstance(noted, list) and isinstance(given, list):
        return len(noted) == len(given) and all(map(agrees, noted, given))
    return noted == given


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """The secret values, each also as it looks inside JSON, a repr or a URI; the longest first."""
    found: set[str] = set()
    for name, value in environment.items():
        value = value.strip()
        if len(value) >= SHORTEST and SECRET_NAME.search(name) and not PLACE_NAME.search(name):
            found |= {value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value), quote(value, safe="")}
    return sorted(found, key=len, reverse=True)
