"""The parts of a path, written alike for local paths and for URLs such as `s3://bucket/folder/file`.

Works on text alone: looks at no disk and no bucket.
"""

from __future__ import annotations

import os
import re

_ONE_SLASH = re.compile(r"(s3|s3a|s3n|gs|gcs|hf|https?):/[^/]", re.IGNORECASE)
_GLOB_MAGIC = frozenset("*?[")


def is_remote(path: str) -> bool:
    """Whether the path is a URL of something other than this machine's disk."""
    scheme, separator, _ = path.partition("://")
    return bool(separator) and scheme not in ("file", "local")


def two_slashes(path: str) -> str | None:
    """How a URI that has one slash, and would be taken for a local file, is written right; None for any other path."""
    return path.replace(":/", "://", 1) if _ONE_SLASH.match(path) else None


def local_path(path: str) -> str:
    """A local path without its `file://`; a leading `~` is the home folder."""
    for prefix in ("file://", "local://"):
        path = path.removeprefix(prefix)
    return os.path.expanduser(path)


def absolute(path: str) -> str:
    """The path as any process on this machine can use it; URLs and the empty path unchanged."""
    return path if is_remote(path) or not path else os.path.abspath(local_path(path))


def join(base: str, *names: str) -> str:
    """`base/name/...`, for URLs and local paths alike."""
    path = base
    for name in names:
        path = path + name if path.endswith("/") or not path else f"{path}/{name}"
    return path


def parent(path: str) -> str:
    """The folder or prefix that holds the path: `s3://bucket` for `s3://bucket/file`, `.` for `file`."""
    if is_remote(path):
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{rest.rstrip('/').rpartition('/')[0]}"
    return os.path.dirname(local_path(path).rstrip("/")) or ("/" if path.startswith("/") else ".")


def name(path: str) -> str:
    """The last part of the path."""
    return path.rstrip("/").rpartition("/")[2]


def escaped(path: str) -> str:
    """The path as text that can be shown and stored: bytes of a local name that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_glob(path: str) -> bool:
    """Whether the path has a wildcard: `*`, `?` or `[`."""
    return not _GLOB_MAGIC.isdisjoint(path)


def glob_base(path: str) -> str:
    """The folder above the first wildcard."""
    fixed = path[: min(path.index(magic) for magic in _GLOB_MAGIC if magic in path)]
    return parent(fixed + "x")
