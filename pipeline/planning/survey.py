"""What rows will be to the model, learned without decoding: the plan's view of the CPU stage.

    manifest rows --messages--> conversation --headers--> sizes, frames --template, tokenizer--> exact prompt length

Every size and count comes from the function that the run uses; only pixels are left alone. A row that the run would
refuse is refused here with the same error, as far as headers tell. Knows the steps it joins; not Ray, nor what a row
costs (`forecast.py`).
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import pyarrow as pa

from pipeline.conversation import Conversation, MediumPart
from pipeline.engine import SamplingParams, parse_sampling
from pipeline.errors import MediaTimeout, RowError, SettingError
from pipeline.preprocess.fetch import FIRST_BYTES, Fetcher
from pipeline.preprocess.header import VIDEO_BLOCK_BYTES, MediumHeader, read_header
from pipeline.preprocess.messages import conversation, row_id
from pipeline.preprocess.prompt import ChatTokenizer
from pipeline.preprocess.ranged import RangedFile
from pipeline.preprocess.size import fit_row
from pipeline.preprocess.stage import PreprocessOptions
from pipeline.schema import UnitColumn

_FETCH_TIMEOUT_S = 10.0
_FETCH_RETRIES = 1
_GRACE_S = 5.0
"""Seconds past its own limit after which the thread of a header is given up."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class SurveyedRow:
    """A row as the run will see it."""

    number: int
    """Which row of the table it was."""
    id: str
    place: tuple[int, int]
    """(number of the manifest's file, row in it)."""
    conversation: Conversation | None = None
    headers: list[MediumHeader] = field(default_factory=list)
    sampling: SamplingParams | None = None
    num_prompt_tokens: int = 0
    num_visual_tokens: int = 0
    bytes_read: int = 0
    """Bytes of its media that were read for this."""
    error: RowError | None = None


class Survey:
    """Reads the headers of many rows at once. A source that hangs costs its row, not the survey."""

    def __init__(self, options: PreprocessOptions, *, threads: int = 16, header_timeout_s: float = 20.0) -> None:
        fetch = options.fetch
        self._options = options
        self._tokenizer = ChatTokenizer(options.model_path, revision=options.revision)
        self._fetcher = Fetcher(
            replace(
                fetch,
                timeout_s=min(fetch.timeout_s, _FETCH_TIMEOUT_S),
                retries=min(fetch.retries, _FETCH_RETRIES),
            )
        )
        self._threads, self._header_timeout_s = threads, header_timeout_s

    def rows(self, table: pa.Table, *, until: float = float("inf")) -> list[SurveyedRow]:
        """The rows of a table of manifest rows with their places (schema.UnitColumn), in order.

        Those that were not begun by `until` (on the monotonic clock) are left out.
        """
        rows: list[SurveyedRow] = []
        rendered: dict[int, str] = {}
        parts: list[tuple[int, MediumPart]] = []
        for values in (row for batch in table.to_batches(max_chunksize=16) for row in batch.to_pylist()):
            place = (int(values.pop(UnitColumn.FILE)), int(values.pop(UnitColumn.ROW)))
            row = SurveyedRow(len(rows), row_id(values, self._options.messages, place), place)
            rows.append(row)
            try:
                asked = row.conversation = conversation(values, self._options.messages)
                number = row.number
                rendered[number] = self._tokenizer.render(asked.messages, add_vision_id=self._options.add_vision_id)
                parts += [(number, part) for part in asked.media]
            except RowError as error:
                row.error = error
        crew = _Crew(self._read, threads=self._threads, seconds=self._header_timeout_s + _GRACE_S)
        not_begun: set[int] = set()
        for (number, _), found in zip(parts, crew.run([part for _, part in parts], until=until), strict=True):
            row = rows[number]
            if found is None:
                not_begun.add(number)
            elif isinstance(found, RowError):
                row.error = row.error or found
            else:
                header, bytes_read = found
                row.headers.append(header)
                row.bytes_read += bytes_read
        for number, text in rendered.items():
            if rows[number].error is None and number not in not_begun:
                self._count(rows[number], text)
        return [row for number, row in enumerate(rows) if number not in not_begun]

    def _read(self, part: MediumPart) -> tuple[MediumHeader, int]:
        block = VIDEO_BLOCK_BYTES if part.kind == "video" else FIRST_BYTES
        file = RangedFile(self._fetcher.open(part.source), seconds=self._header_timeout_s, block_bytes=block)
        return read_header(part.kind, file, part.settings, self._options.media), file.bytes_read

    def _count(self, row: SurveyedRow, rendered: str) -> None:
        """Fill in what follows from the sizes of the row's media."""
        assert row.conversation is not None
        try:
            fit_row(row.headers, self._options.media.max_visual_tokens)
            sampling: dict[str, Any] = {**self._options.sampling, **row.conversation.sampling}
            row.sampling = parse_sampling(json.dumps(sampling))
        except RowError as error:
            row.error = error
            return
        except ValueError as error:
            row.error = SettingError(f"sampling: {error}")
            return
        counts = [header.size.num_visual_tokens for header in row.headers]
        row.num_visual_tokens = sum(counts)
        row.num_prompt_tokens = len(self._tokenizer.encode(rendered, counts))


class _Crew(Generic[Item, Result]):
    """Threads that work through a list. One that is stuck is left behind, and another takes its place."""

    def __init__(self, work: Callable[[Item], Result], *, threads: int, seconds: float) -> None:
        self._work, self._threads, self._seconds = work, threads, seconds
        self._waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, Result | RowError | BaseException]] = queue.SimpleQueue()
        self._begun: dict[int, float] = {}
        self._stop = threading.Event()
        self._until = float("inf")

    def run(self, items: Sequence[Item], *, until: float) -> list[Result | RowError | None]:
        """A result or an error for each item; None for those that were not begun in time."""
        results: list[Result | RowError | None] = [None] * len(items)
        self._until = until
        for numbered in enumerate(items):
            self._waiting.put(numbered)
        for _ in range(min(self._threads, len(items))):
            self._start()
        left = set(range(len(items)))
        while left:
            if time.monotonic() > until:
                self._stop.set()
                left &= set(self._begun)  # what is under way may end
                if not left:
                    break
            try:
                number, result = self._done.get(timeout=0.1)
            except queue.Empty:
                for number in [n for n in left if time.monotonic() - self._begun.get(n, until) > self._seconds]:
                    left.discard(number)
                    results[number] = MediaTimeout(f"the header was not read within {self._seconds:g} s")
                    self._start()
                continue
            if number not in left:  # given up before
                continue
            left.discard(number)
            if isinstance(result, BaseException) and not isinstance(result, RowError):
                raise result
            results[number] = result
        self._stop.set()
        return results

    def _start(self) -> None:
        threading.Thread(target=self._serve, name="headers", daemon=True).start()

    def _serve(self) -> None:
        while not self._stop.is_set() and time.monotonic() < self._until:
            try:
                number, item = self._waiting.get_nowait()
            except queue.Empty:
                return
            self._begun[number] = time.monotonic()
            try:
                self._done.put((number, self._work(item)))
            except BaseException as error:
                self._done.put((number, error))
