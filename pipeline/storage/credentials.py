"""Whether a bucket refused a request because the job's credentials are missing, have expired or are wrong.

No object is at fault then: every other request is refused too, until somebody renews them. A "forbidden" for one object
is something else. Knows the error codes and exceptions of S3, Google Cloud and their Python clients, by name, so that
none has to be installed; nothing of paths, rows or retries.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

_CODES = {
    "expiredtoken", "expiredtokenexception", "tokenrefreshrequired", "requestexpired", "invalidtoken",
    "invalidaccesskeyid", "invalidclienttokenid", "unrecognizedclientexception", "requesttimetooskewed",
}  # fmt: skip
"""S3's error codes, in lower case. Not SignatureDoesNotMatch: some stores say so of an odd key, which is one row's."""
_NAMES = {
    "CredentialRetrievalError", "TokenRetrievalError", "SSOError", "LoginError",  # botocore: they can't be renewed
    "RefreshError", "UserAccessTokenError",  # google.auth
}  # fmt: skip
_NONE_NAMES = {"NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "DefaultCredentialsError"}
"""Of both: there are none on this machine."""


def credential_fault(error: BaseException) -> str | None:
    """What to do about credentials that are missing or were refused, as half a sentence; None for any other error."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    if missing := next((link for link in chain if _is_of(link, _NONE_NAMES)), None):
        text = _short(f"{type(missing).__name__}: {missing}")
        return (
            f"the machine {socket.gethostname()} has no credentials ({text}): give them to every machine of the job, "
            "by environment variables, a file in the home folder, the machine's role or "
            "storage_options; for a public bucket set storage_options {anon: true} (s3) or {token: anon} (gs)"
        )
    refusal = next((found for link in chain if (found := _refusal(link))), None)
    if refusal is None:
        return None
    return (
        f"the credentials were refused ({_short(refusal)}): renew them and run the same command, which goes on with "
        "the unfinished rows"
    )


def _short(text: str) -> str:
    first = text.strip().splitlines()[0]
    return first if len(first) <= 200 else first[:197] + "..."


def _is_of(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _refusal(error: BaseException) -> str | None:
    """The client's own words, if this error says that the credentials were refused."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's ClientError
        details = response.get("Error", {})
        code = str(details.get("Code", ""))
        return f"{code}: {details.get('Message') or code}" if code.lower() in _CODES else None
    text = f"{type(error).__name__}: {error}"
    if _is_of(error, _NAMES):
        return text
    if isinstance(error, RuntimeError) and "credentials are still expired" in text:  # botocore, after renewing them
        return str(error)
    # gcsfs' HttpError. A caller without credentials is refused as "anonymous", which renewing would not help.
    return text if str(getattr(error, "code", "")) == "401" and "anonymous" not in text.lower() else None
