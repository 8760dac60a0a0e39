"""Whether a bucket's client was refused because the job's credentials are over or wrong.

That is no fault of the object that was asked for: every other one will be refused too, until somebody renews them.
A mere "forbidden" on one object is something else. Knows the error codes and exceptions of S3's, Google's and their
Python clients, by name, so that none has to be installed; nothing of paths, rows or retries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_CODES = {
    "expiredtoken", "expiredtokenexception", "tokenrefreshrequired", "requestexpired", "invalidtoken",
    "invalidaccesskeyid", "invalidclienttokenid", "unrecognizedclientexception", "requesttimetooskewed",
}  # fmt: skip
"""S3's error codes, in lower case. Not SignatureDoesNotMatch: some stores say so of an odd key, which is one row's."""
_NAMES = {
    # botocore: there are none, or those that there were can't be renewed
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
    "TokenRetrievalError", "SSOError", "LoginError",
    # google.auth
    "RefreshError", "DefaultCredentialsError", "UserAccessTokenError",
}  # fmt: skip
_UNAUTHENTICATED = 401


def credential_fault(error: BaseException) -> str | None:
    """What to do about credentials that were refused, as half a sentence; None where it is not that."""
    for link in _chain(error):
        what = _refused(link)
        if what:
            return (
                f"the credentials were refused ({what}): renew them and run the same command, which goes on with what "
                "is not done"
            )
    return None


def _refused(error: BaseException) -> str | None:
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, Mapping):
        details: Any = response.get("Error", {})
        code = str(details.get("Code", ""))
        return _short(f"{code}: {details.get('Message') or code}") if code.lower() in _CODES else None
    name = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _NAMES), None)
    if name is not None:
        return _short(f"{type(error).__name__}: {error}")
    if isinstance(error, RuntimeError) and "credentials are still expired" in str(error):  # botocore, after renewing
        return _short(str(error))
    # gcsfs' HttpError. Nobody in particular was refused by name where the caller came without credentials.
    code = str(getattr(error, "code", ""))
    if code == str(_UNAUTHENTICATED) and "anonymous" not in str(error).lower():
        return _short(f"{type(error).__name__}: {error}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__


def _short(text: str) -> str:
    first = text.strip().splitlines()[0]
    return first if len(first) <= 200 else first[:197] + "..."
