"""The URIs that name media: scheme, local path, bucket, content of a data: URI, and the form for messages.

Works on text alone: looks at no disk and no network, and decides nothing about access.
"""

from __future__ import annotations

import base64
import binascii
import os
import posixpath
import re
import unicodedata
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pipeline import storage
from pipeline.errors import AccessDenied, FetchError

WEB_SCHEMES = ("http", "https")
_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]*):(//)?")
_ALIASES = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{32,}=*\s*")
_BASE64_OF = {
    "image/jpeg": "/9j/", "image/png": "iVBORw0KGgo", "image/gif": "R0lGOD", "image/webp": "UklGR",
    "image/tiff": "SUkqA|TU0AK", "video/mp4": "AAAA.GZ0eX", "video/webm": "GkXfo",
}  # fmt: skip
"""Media types by how the base64 form of such a file begins."""
_HEADER_WITHOUT_SCHEME = re.compile(r"[\w.+-]+/[\w.+-]+;base64,")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_REPOSITORY_KINDS = ("datasets/", "spaces/", "buckets/")


def scheme_of(uri: str) -> str:
    """The scheme in lower case, under its usual name; empty for a local file, also for one with a colon in its name."""
    match = _SCHEME.match(uri)
    if match is None:
        return ""
    scheme = match.group(1).lower()
    if scheme == "file" or (not match.group(2) and scheme != "data"):
        return ""
    return _ALIASES.get(scheme, scheme)


def local_path(uri: str) -> str:
    """The path of a local file, given as a path or a file: URI."""
    if not uri.lower().startswith("file:"):
        return uri
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost"):
        raise AccessDenied(f"{shown(uri)} is on the host {parts.netloc}; only files of this machine can be read")
    return os.fsdecode(unquote_to_bytes(parts.path))  # which may be bytes that are no text


def normal_bucket_uri(uri: str) -> str:
    """A bucket URI without `..` that could lead out of a prefix, and with the usual name of its scheme."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    key = posixpath.normpath("/" + key).lstrip("/") if ".." in key.split("/") else key.rstrip("/")
    return f"{scheme_of(uri)}://{bucket}" + (f"/{key}" if key else "")


def bucket_of(uri: str) -> str:
    """The bucket that a URI lies in: for hf:// the repository, for trees without buckets the folder itself."""
    scheme, _, rest = normal_bucket_uri(uri).partition("://")
    if scheme in ("memory", "hdfs"):
        return f"{scheme}://{rest}"
    depth = 1 if scheme != "hf" else 3 if rest.startswith(_REPOSITORY_KINDS) else 2
    return f"{scheme}://" + "/".join(rest.split("/")[:depth])


def data_uri_content(uri: str) -> bytes:
    """The bytes that a data: URI holds."""
    header, comma, payload = uri.partition(":")[2].partition(",")
    if not comma:
        raise FetchError("the data: URI has no comma: expected data:[type][;base64],content")
    if not header.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FetchError(f"the data: URI's base64 content can't be read: {error}") from error


def base64_header(source: str) -> str | None:
    """What is to be written before a source that is the bare content of a file as base64; None for any other source."""
    if _HEADER_WITHOUT_SCHEME.match(source):
        return "data:"
    # No path is that long without a dot. The rest is not looked at where the beginning rules it out.
    if not _BASE64.match(source[:64]) or not _BASE64.fullmatch(source):
        return None
    known = (kind for kind, start in _BASE64_OF.items() if re.match(start, source))
    kind = next(known, "" if len(source) > 1024 else None)
    return None if kind is None else f"data:{kind};base64,"


def missing_hint(source: str) -> str:
    """What may be wrong with the name of a file or object that is not there, as the end of a message; often nothing."""
    if uri := storage.two_slashes(source):
        return f"; it is taken for a local file: a URI has two slashes, as in {shown(uri)}"
    if _NUMBER.fullmatch(source):
        return "; it is a number: write the path or URI of a medium"
    if "\\" in source:
        return "; the name has backslashes: folders are separated by /"
    if unicodedata.normalize("NFC", source) != source:
        return "; the name is in decomposed Unicode (NFD), as macOS writes names: the file's own may be composed (NFC)"
    if unicodedata.normalize("NFD", source) != source:
        return "; the name is in composed Unicode (NFC): a file that comes from macOS may have it decomposed (NFD)"
    return ""


def shown(uri: str) -> str:
    """A URI for messages: short, and without the signatures and passwords that URLs carry."""
    if scheme_of(uri) == "data":
        return uri[:32] + "..."
    if "://" in uri:
        scheme, _, rest = uri.partition("://")
        host, slash, path = rest.partition("?")[0].partition("/")
        uri = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return uri if len(uri) <= 200 else uri[:120] + "..." + uri[-60:]
