"""Retries with growing pauses, and which faults of storage and networks are worth one.

Knows client libraries' exceptions by their names and messages, so that none has to be installed; no paths or rows.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 8.0

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP status codes that may be gone at the next attempt."""
_TRANSIENT_ERRNO = {
    errno.EBUSY, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs for a server's internal error; macOS has none
}  # fmt: skip
_TRANSIENT_TEXT = re.compile(
    r"timed? ?out|throttl|slow ?down|too ?many ?requests|request ?limit|temporar|unavailable|internal ?(server ?)?error"
    r"|connect|reset by peer|broken pipe|incomplete ?read|payload ?error|response ?streaming ?error|transport ?error"
    r"|http ?client ?error|prior ?request ?not ?complete",
    re.IGNORECASE,
)
"""In the class names, codes and messages of aiohttp, botocore, google-cloud, huggingface_hub and their like."""


class TransientError(Exception):
    """An attempt failed in a way that may pass. Caught by `with_retries` and never seen outside."""

    def __init__(self, error: Exception, wait_s: float = 0.0) -> None:
        """`error` is what to raise if it stays; `wait_s` the least pause, as a server may ask for."""
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s


def with_retries(
    attempt: Callable[[], Result],
    max_attempts: int,
    *,
    sleep: Callable[[float], object] = lambda seconds: time.sleep(seconds),
) -> Result:
    """The result of the first attempt that succeeds.

    An attempt that raises TransientError is repeated after a pause, which doubles each time; its error is raised,
    with the number of attempts, when the last one fails. Any other exception passes through at once.
    """
    for number in range(1, max_attempts + 1):
        try:
            return attempt()
        except TransientError as fault:
            if number == max_attempts:
                tries = f" (tried {number} times)" if number > 1 else ""
                raise type(fault.error)(f"{fault.error}{tries}") from fault.__cause__
            # Jitter: many workers that failed together must not come back together.
            pause = random.uniform(0.5, 1.0) * min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**number)
            sleep(max(pause, fault.wait_s))
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: lost connections, timeouts, throttling, the server's own faults."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    response = getattr(error, "response", None)
    statuses = [getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None)]
    text = str(error)
    if isinstance(response, Mapping):  # botocore's ClientError
        text = str(response.get("Error", {}).get("Code", ""))
        statuses += [response.get("ResponseMetadata", {}).get("HTTPStatusCode"), text]
    known = [int(str(status)) for status in statuses if str(status).isdigit()]
    if any(status in TRANSIENT_STATUS for status in known):
        return True
    names = "" if known else " ".join(kind.__name__ for kind in type(error).__mro__)
    return bool(_TRANSIENT_TEXT.search(f"{names} {text}"))
