"""The border to fsspec: opening a file system, and calling it so that every failure is an OSError.

Knows which package and which extra of ours a scheme needs; not what is read or written.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from pipeline.errors import first_line
from pipeline.storage.credentials import credential_fault
from pipeline.storage.retry import Result, TransientError, is_transient, with_retries

StorageOptions: TypeAlias = Mapping[str, Any] | None

MAX_ATTEMPTS = 5
_GOOGLE = "https://storage.googleapis.com"
_CONNECT_TIMEOUT_S = 10
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme to the extra of this package that installs its file system."""


class StorageError(OSError):
    """The path can't be used. The message is one line."""


class CredentialsRefused(StorageError):
    """The bucket refuses the caller's credentials altogether."""


def file_system(url: str, storage_options: StorageOptions) -> tuple[Any, str]:
    """The URL's file system and its key there. fsspec keeps one for each set of options. Raises StorageError."""
    import fsspec

    scheme = url.partition("://")[0]
    # Other processes write to the same folders, so that a remembered listing is soon a wrong one.
    options = {"use_listings_cache": False, **(storage_options or {})}
    if EXTRAS.get(scheme) == "gcs" and "session_kwargs" not in options:  # which may name a proxy
        _check_google(options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST", "default"))
    try:
        fs, key = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        hint = f"pip install 'qwen2-vl-batch[{extra}]'" if extra else first_line(error)
        raise StorageError(f"can't open {url}: the file system for {scheme}:// is not installed; {hint}") from error
    except Exception as error:  # every file system has exceptions of its own
        fault = credential_fault(error)
        kind = CredentialsRefused if fault else StorageError
        raise kind(f"can't open {url}: {fault or first_line(error)}") from error
    return fs, key.rstrip("/") if isinstance(key, str) else key


@functools.cache
def _check_google(endpoint: str) -> None:
    """Google's client tries for minutes, and without a word, to reach what can't be reached. Raises StorageError."""
    endpoint = _GOOGLE if endpoint in ("", "default") else endpoint
    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StorageError(
            f"can't reach Google Cloud Storage at {host}:{port}: {error.strerror or error}; is this machine online? "
            "Behind a proxy set storage_options {session_kwargs: {trust_env: true}}"
        ) from error


def call(path: str, storage_options: StorageOptions, operation: Callable[[Any, str], Result]) -> Result:
    """The result of `operation(file_system, key)`, with retries.

    Raises OSError alone, whatever the client does: its own where it is one (FileNotFoundError, PermissionError),
    StorageError for anything else.
    """
    fs, key = file_system(path, storage_options)

    def attempt() -> Result:
        try:
            return operation(fs, key)
        except Exception as error:
            fault = credential_fault(error)
            if fault is not None:
                raise CredentialsRefused(f"{path}: {fault}") from error
            described = StorageError(f"{path}: {type(error).__name__}: {first_line(error)}")
            if is_transient(error):
                raise TransientError(described) from error
            if isinstance(error, OSError):
                raise
            raise described from error

    return with_retries(attempt, MAX_ATTEMPTS)
