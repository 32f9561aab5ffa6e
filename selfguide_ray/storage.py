"""Where a run may lie, and what an object store needs that a disk does not: patience, and uploads that never tear.

Arrow's streams publish what was written so far when an exception closes them, and also when they are garbage. A file is
whole or absent all the same (design, invariant 4), since everything is published here.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import redacted

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
ATTEMPTS = "AWS_MAX_ATTEMPTS"  # the variable that other tools of AWS heed too
# 0.5, 1, 2, 4, 8, 10, 10 s between them on average: half a minute of an overloaded store is sat out.
DEFAULT_ATTEMPTS = 8
CONNECT_SECONDS, SILENT_SECONDS = 5.0, 30.0  # until an attempt counts as failed
SECRET_KEYS = ("key", "secret", "token", "password", "credential", "sig")  # parts of a query's names


def opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that a path or URI stands for; a local path is made absolute.

    Raises SelfGuideError for a URI that cannot be read, that carries credentials, or whose store does not answer.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    _check(uri)
    try:
        found, root = pafs.FileSystem.from_uri(uri)  # of S3 without an endpoint, this asks for the bucket's region
        return patient(found), root.rstrip("/")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SelfGuideError(
            f"{redacted(uri)} cannot be opened.",
            f"{redacted(str(error))}.",
            "Check the URI, that its store can be reached from here, and the credentials in the environment.",
        ) from error


def _check(uri: str) -> None:
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    user, at, _ = place.partition("/")[0].rpartition("@")
    names = [part.partition("=")[0] for part in query.split("&") if part]
    secret = [name for name in names if any(word in name.lower() for word in SECRET_KEYS)]
    if scheme not in SCHEMES:
        raise SelfGuideError(
            f"{scheme}:// is no place for a run.",
            f"Known are {', '.join(f'{known}://' for known in SCHEMES)}.",
            "Give one of these, such as s3://bucket/run, or a path.",
        )
    if secret or (at and (":" in user or scheme == "s3")):
        where = f"in {secret[0]}=" if secret else "before the @"
        raise SelfGuideError(
            f"the {scheme}:// URI of a run holds credentials, {where}.",
            "A URI is written into settings, logs and reports; credentials come from the environment only.",
            "Leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or the node's role.",
        )
    if "#" in uri:
        raise SelfGuideError(
            f"{redacted(uri)}: has a # in it.", "What follows it would be lost.", "Choose another name."
        )


def patient(found: pafs.FileSystem) -> pafs.FileSystem:
    """An S3 store as it is, but tried more often than thrice, and one request for a small file instead of three."""
    if not isinstance(found, pafs.S3FileSystem):
        return found
    (options,) = found.__reduce__()[1]  # all that the URI and the environment said, as pickling keeps it
    options |= {"allow_delayed_open": True, "connect_timeout": CONNECT_SECONDS, "request_timeout": SILENT_SECONDS}
    return PatientS3(options, attempts())


class PatientS3(pafs.S3FileSystem):
    """S3, tried so many times, also by the process that it is sent to: Arrow's own pickles forget how often."""

    def __init__(self, options: dict[str, Any], most: int) -> None:
        super().__init__(**options, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=most))
        self.most = most

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientS3, (super().__reduce__()[1][0], self.most)


def attempts() -> int:
    """How often a request is tried: AWS_MAX_ATTEMPTS, else 8 times."""
    given = os.environ.get(ATTEMPTS, "").strip() or str(DEFAULT_ATTEMPTS)
    if not given.isdecimal() or int(given) == 0:
        raise SelfGuideError(
            f"{ATTEMPTS} is {given!r}.", "It is how often a request to S3 is tried.", "Set a number from 1 on."
        )
    return int(given)


def publish_whole(store: pafs.FileSystem, path: str, data: bytes | pa.Buffer) -> None:
    """Make a file of an object store out of all these bytes; whatever goes wrong, it is not there or as it was.

    An upload that is not completed stays invisible for good. So a stream that has failed must never be closed, not even
    by the garbage collector: it is given a reference that nobody holds, and goes with the process.
    """
    sink = store.open_output_stream(path)
    whole = False
    try:
        sink.write(data)
        whole = True
    finally:
        if not whole:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
    try:
        sink.close()
    except OSError:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
        raise


def inside(uri: str, *names: str) -> str:
    """The path or URI of what lies inside another; a query stays at the end."""
    place, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join((place.rstrip("/"), *(name for name in names if name))) + mark + query


def shown(uri: str, *names: str) -> str:
    """The same for a reader: without the query, which says how to get there."""
    return inside(uri.partition("?")[0] if "://" in uri else uri, *names)
