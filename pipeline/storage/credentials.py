"""Whether a bucket refused a request because the job's credentials have expired or are wrong.

No object is at fault then: every other request is refused too, until somebody renews them. A "forbidden" for one object
is something else. Knows the error codes and exceptions of S3, Google Cloud and their Python clients, by name, so that
none has to be installed; nothing of paths, rows or retries.
"""

from __future__ import annotations

from collections.abc import Mapping

_CODES = {
    "expiredtoken", "expiredtokenexception", "tokenrefreshrequired", "requestexpired", "invalidtoken",
    "invalidaccesskeyid", "invalidclienttokenid", "unrecognizedclientexception", "requesttimetooskewed",
}  # fmt: skip
"""S3's error codes, in lower case. Not SignatureDoesNotMatch: some stores say so of an odd key, which is one row's."""
_NAMES = {
    # botocore: there are none, or they can't be renewed
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
    "TokenRetrievalError", "SSOError", "LoginError",
    # google.auth
    "RefreshError", "DefaultCredentialsError", "UserAccessTokenError",
}  # fmt: skip


def credential_fault(error: BaseException) -> str | None:
    """What to do about credentials that were refused, as half a sentence; None for any other error."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    refusal = next((found for link in chain if (found := _refusal(link))), None)
    if refusal is None:
        return None
    first = refusal.strip().splitlines()[0]
    return (
        f"the credentials were refused ({first if len(first) <= 200 else first[:197] + '...'}): renew them and run the "
        "same command, which goes on with the unfinished rows"
    )


def _refusal(error: BaseException) -> str | None:
    """The client's own words, if this error says that the credentials were refused."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore's ClientError
        details = response.get("Error", {})
        code = str(details.get("Code", ""))
        return f"{code}: {details.get('Message') or code}" if code.lower() in _CODES else None
    text = f"{type(error).__name__}: {error}"
    if any(kind.__name__ in _NAMES for kind in type(error).__mro__):
        return text
    if isinstance(error, RuntimeError) and "credentials are still expired" in text:  # botocore, after renewing them
        return str(error)
    # gcsfs' HttpError. A caller without credentials is refused as "anonymous", which renewing would not help.
    return text if str(getattr(error, "code", "")) == "401" and "anonymous" not in text.lower() else None
