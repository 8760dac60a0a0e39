"""Which errors of buckets' clients mean that the job's credentials were refused, and not one object."""

from __future__ import annotations

import pytest

from pipeline.storage.credentials import credential_fault
from tests.unit.storage.test_retry import ClientError, HttpError


class RefreshError(Exception):
    """As google.auth's error of this name."""


def caused_by(cause: Exception) -> Exception:
    error = OSError("can't read the object")
    error.__cause__ = cause
    return error


def http_error(code: int, message: str) -> HttpError:
    error = HttpError(code)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ClientError("ExpiredToken", 400), "ExpiredToken: ExpiredToken"),
        (caused_by(ClientError("InvalidAccessKeyId", 403)), "InvalidAccessKeyId"),
        (ClientError("AccessDenied", 403), None),
        (ClientError("SignatureDoesNotMatch", 403), None),
        (RefreshError("the grant is invalid"), "RefreshError: the grant is invalid"),
        (RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."), "refreshed"),
        (RuntimeError("cannot schedule new futures after shutdown"), None),
        (http_error(401, "Invalid Credentials"), "Invalid Credentials"),
        (http_error(401, "Anonymous caller does not have storage.objects.get access"), None),
        (http_error(403, "no access to this object"), None),
    ],
)
def test_refused_credentials_are_told_from_a_refused_object(error: Exception, words: str | None) -> None:
    fault = credential_fault(error)
    assert fault is None if words is None else words in str(fault)


def test_a_chain_of_causes_that_leads_back_ends() -> None:
    first, second = OSError("a"), OSError("b")
    first.__cause__, second.__cause__ = second, first
    assert credential_fault(first) is None
