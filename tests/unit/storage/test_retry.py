"""Which faults are worth another attempt, and how long to wait before it."""

from __future__ import annotations

import errno
import http.client
from typing import Any

import pytest

from pipeline.storage import retry
from pipeline.storage.retry import TransientError, is_transient, with_retries


class ClientError(Exception):
    """As botocore's error of this name."""

    def __init__(self, code: str, status: int | None) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation: Connection details")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status} if status else {}}


class HttpError(Exception):
    """As gcsfs' error of this name."""

    def __init__(self, code: int) -> None:
        super().__init__("Required")
        self.code = code


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.EBUSY, "Please reduce your request rate."), True),
        (OSError(errno.EIO, "We encountered an internal error."), True),
        (OSError(errno.EREMOTEIO, "We encountered an internal error."), True),
        (http.client.IncompleteRead(b"abc", 4), True),
        (ClientError("SlowDown", 503), True),
        (ClientError("InternalError", 500), True),
        (ClientError("SlowDown", None), True),
        (ClientError("RequestTimeout", 400), True),
        (ClientError("503", None), True),
        (ClientError("AccessDenied", 403), False),
        (ClientError("ExpiredToken", 400), False),
        (HttpError(429), True),
        (HttpError(504), True),
        (HttpError(404), False),
        (PermissionError("The provided token has expired."), False),
        (FileNotFoundError("no"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("a bug"), False),
    ],
)
def test_transient_errors_are_told_from_permanent_ones(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("botocore.exceptions", "EndpointConnectionError"),
        ("botocore.exceptions", "ConnectionClosedError"),
        ("botocore.exceptions", "ConnectTimeoutError"),
        ("botocore.exceptions", "ReadTimeoutError"),
        ("botocore.exceptions", "HTTPClientError"),
        ("botocore.exceptions", "IncompleteReadError"),
        ("botocore.exceptions", "ResponseStreamingError"),
        ("aiohttp", "ClientConnectionError"),
        ("aiohttp", "ClientPayloadError"),
        ("aiohttp", "ServerDisconnectedError"),
        ("google.auth.exceptions", "TransportError"),
        ("fsspec.exceptions", "FSTimeoutError"),
        ("urllib3.exceptions", "ReadTimeoutError"),
    ],
)
def test_lost_connections_are_known_by_their_clients_own_classes(module: str, name: str) -> None:
    kind: Any = getattr(pytest.importorskip(module), name)
    made = kind.__new__(kind)  # the class alone must do; what its message says depends on the version
    Exception.__init__(made, "?")
    assert is_transient(made)
    assert is_transient(type("Own", (kind,), {"__init__": lambda self: None, "__str__": lambda self: "?"})())


def fails(times: int, *, wait_s: float = 0.0) -> Any:
    """An attempt that works after so many failures."""
    left = [times]

    def attempt() -> str:
        if left[0]:
            left[0] -= 1
            raise TransientError(OSError("busy"), wait_s) from TimeoutError("slow")
        return "done"

    return attempt


def test_pauses_double_up_to_a_limit_and_differ_between_workers() -> None:
    runs: list[list[float]] = []
    for _ in range(20):
        pauses: list[float] = []
        assert with_retries(fails(8), 9, sleep=pauses.append) == "done"
        runs.append(pauses)
        limits = [min(retry.MAX_PAUSE_S, retry.FIRST_PAUSE_S * 2**number) for number in range(1, 9)]
        assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))
        assert pauses[:5] == sorted(pauses[:5]) and len(set(pauses)) == 8
    assert len({tuple(pauses) for pauses in runs}) == 20


def test_a_server_that_asks_for_a_longer_pause_gets_it() -> None:
    pauses: list[float] = []
    with_retries(fails(2, wait_s=60.0), 3, sleep=pauses.append)
    assert pauses == [60.0, 60.0]


def test_the_last_error_says_how_often_it_was_tried_and_why() -> None:
    with pytest.raises(OSError, match=r"^busy \(tried 3 times\)$") as caught:
        with_retries(fails(3), 3, sleep=lambda seconds: None)
    assert isinstance(caught.value.__cause__, TimeoutError)
    with pytest.raises(OSError, match=r"^busy$"):
        with_retries(fails(1), 1)


def test_any_other_error_passes_at_once() -> None:
    def attempt() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        with_retries(attempt, 5, sleep=lambda seconds: pytest.fail("slept"))
