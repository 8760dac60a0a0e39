"""Every error this package raises, in one tree.

    PipelineError
    |-- JobError          ends the job: ConfigError, ManifestError, CheckpointError, OutputError, CredentialError,
    |                     ResourceError (exit 2), ClusterError, DeviceLost, RestartNeeded (exit 1),
    |                     TooManyErrors (exit 3)
    `-- RowError          becomes a result row; the job goes on
        |-- MessageError  stage prompt: MediaMissing, ReservedTokenError, SettingError
        |-- FetchError    stage fetch: MediaNotFound, AccessDenied, FetchTimeout, MediaTooLarge
        |-- MediaError    stage decode: UnsupportedMedia, TruncatedMedia, DecompressionBomb, AspectRatioError,
        |                 NoVideoStream, MediaTimeout, DecoderCrash, MediaMemoryError
        |-- GenerateError stage generate: PromptTooLong, EngineOutOfMemory, EngineCrash
        `-- InternalError stage preprocess or generate: not foreseen, a fault of the code

Knows no other module. A result row has the class's name as `error_type`, the message as `error_message`, and the
`stage` as `error_stage`.
"""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger(__name__)

_MAX_TRACEBACK = 4000
_logged: set[str] = set()
"""Tracebacks that this process has logged."""


class PipelineError(Exception):
    """Anything this package raises on purpose."""


class JobError(PipelineError):
    """Ends the job. The message is one line that says what was found, expected, and what to change."""

    exit_code = 2


class ConfigError(JobError):
    """A config file or command-line override is wrong; lists every mistake at once."""


class ManifestError(JobError):
    """The manifest can't be found, read or understood."""


class CheckpointError(JobError):
    """The model folder or name can't be loaded."""


class OutputError(JobError):
    """The output folder can't be written, or holds another run."""


class CredentialError(JobError):
    """A bucket refuses the job's credentials, whatever is asked of it: not the fault of any row."""


class ResourceError(JobError):
    """The cluster has less than the config asks for."""


class ClusterError(JobError):
    """Ray, or an actor on it, failed in a way that is no row's fault."""

    exit_code = 1


class DeviceLost(ClusterError):
    """A process can't use its GPU any more, after an illegal memory access for example; another process can."""


class RestartNeeded(ClusterError):
    """Nodes or rows were lost and Ray does not recover. Running the command again does, on the nodes that are left."""


class TooManyErrors(JobError):
    """More rows failed than `max_error_fraction` allows."""

    exit_code = 3


class RowError(PipelineError):
    """A row that can't be answered. Becomes a result row with status `error`."""

    stage = "row"


class MessageError(RowError):
    """The row's messages, prompt or media columns can't be turned into a prompt."""

    stage = "prompt"


class MediaMissing(MessageError):
    """The manifest has media columns, and this row has nothing in them: the model would answer without its picture."""


class ReservedTokenError(MessageError):
    """A user's text contains a token that only the pipeline may write."""


class SettingError(MessageError):
    """A per-row setting has a wrong type or value, or can't be applied to this row."""


class FetchError(RowError):
    """The medium's bytes could not be fetched. Transient unless a subclass says otherwise."""

    stage = "fetch"


class MediaNotFound(FetchError):
    """No such file or object."""


class AccessDenied(FetchError):
    """The path or host is outside what `input.allow` permits, or the server refused."""


class FetchTimeout(FetchError):
    """The source did not deliver in time."""


class MediaTooLarge(FetchError):
    """More bytes than `media.max_bytes`."""


class MediaError(RowError):
    """The bytes are not a medium that can be used."""

    stage = "decode"


class UnsupportedMedia(MediaError):
    """Not an image or a video in a format that can be decoded."""


class TruncatedMedia(MediaError):
    """The file ends before its data does."""


class DecompressionBomb(MediaError):
    """More pixels, frames, text or seconds than the limits allow."""


class AspectRatioError(MediaError):
    """The long side is more than 200 times the short side."""


class NoVideoStream(MediaError):
    """A container without a video stream: audio only, or just an attached picture."""


class MediaTimeout(MediaError):
    """Decoding exceeded `media.timeout_s`; its process was killed."""


class DecoderCrash(MediaError):
    """The decoder's process died, most likely of a fault in a codec."""


class MediaMemoryError(MediaError):
    """Decoding outgrew `media.memory_limit_mb`; its process was killed."""


class GenerateError(RowError):
    """The engine could not answer the row."""

    stage = "generate"


class PromptTooLong(GenerateError):
    """The prompt can never fit the cache or the model's context."""


class EngineOutOfMemory(GenerateError):
    """The row does not fit into memory even alone."""


class EngineCrash(GenerateError):
    """The engine died on this row, twice."""


class InternalError(RowError):
    """Code failed on this row in a way that nobody foresaw. The message ends with the traceback."""

    stage = "preprocess"


def as_row_error(error: BaseException) -> RowError:
    """What an exception is to the row that caused it: a RowError itself, any other an InternalError, whose traceback is
    logged once per process. Raises the exception where it concerns all rows, or ends the process."""
    if isinstance(error, RowError):
        return error
    # Panics of libraries written in Rust are no `Exception`.
    if isinstance(error, JobError | KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    text = "".join(traceback.format_exception(error, limit=-8))
    if text not in _logged and len(_logged) < 1000:
        _logged.add(text)
        log.error("a row failed in a way that was not foreseen\n%s", text)
    name, message = type(error).__name__, first_line(error)[:300]
    summary = name if message == name else f"{name}: {message}"
    return InternalError(f"{summary}; not foreseen, please report it with this traceback:\n{text[-_MAX_TRACEBACK:]}")


def row_error_types(kind: type[RowError] = RowError) -> dict[str, type[RowError]]:
    """Error types of rows by name: the given one and all below it in the tree."""
    found: dict[str, type[RowError]] = {kind.__name__: kind}
    for below in kind.__subclasses__():
        if below.__module__ == __name__:
            found.update(row_error_types(below))
    return found


def counted(number: float, noun: str, *, form: str = ",.0f") -> str:
    """As in `1 row` and `2,000 rows`."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """An error's message for use inside another: one line, and never empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
