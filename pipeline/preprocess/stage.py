"""Manifest rows in, request rows out: the CPU stage.

For each row: messages, fetch, decode, resize, patchify, tokenize; one pass, one computing thread, with fetches running
ahead. Rows leave as their media come. A row that fails, however it does, becomes a request row that holds its error.
The user's columns that are only kept are passed on as Arrow, untouched.
Knows the steps it joins and the two row schemas; not Ray, nor what the engine does with a request.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.checkpoint.cache import ModelCache
from pipeline.conversation import Conversation
from pipeline.errors import RowError, as_row_error
from pipeline.preprocess.fetch.ahead import FetchAhead, FetchPool
from pipeline.preprocess.fetch.source import Fetcher
from pipeline.preprocess.limits import MAX_FETCHES, FetchOptions, MediaOptions
from pipeline.preprocess.messages.columns import MessageOptions, row_id
from pipeline.preprocess.messages.row import conversation
from pipeline.preprocess.messages.values import ManifestRow, manifest_rows
from pipeline.preprocess.prompt import ChatTokenizer, MediumTokens, Prompt, prompt_hash
from pipeline.preprocess.receipt import SeenMedium, source_name
from pipeline.preprocess.sandbox.client import MediaWorker, MediumFile
from pipeline.preprocess.size import num_visual_tokens
from pipeline.schema import MANIFEST_FILE, MANIFEST_ROW, Status, UnitColumn, error_values, request_schema

_ROWS_PER_HANDOVER = 8
READ_AHEAD = 16
"""Media that are fetched ahead where none is slow."""
_PATIENCE_S = 1.0
"""Seconds without a ready row after which finished rows no longer wait for the unit's last ones."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What the CPU stage needs to know; plain data, so that it travels to the actors."""

    model_path: str
    revision: str | None
    messages: MessageOptions
    add_vision_id: bool
    thinking: bool
    allow_tokens: tuple[str, ...]
    media: MediaOptions
    fetch: FetchOptions
    sampling: Mapping[str, Any]
    """The job's sampling parameters; a row's own win."""
    kept: pa.Schema
    """The user's columns that go through to the results, under their names there."""
    kept_from: Mapping[str, str] = field(default_factory=dict)
    """Their names in the manifest, where these are others."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    """Where this machine keeps a checkpoint that lies in a bucket."""


def chat_tokenizer(options: PreprocessOptions, model_path: str) -> ChatTokenizer:
    """The checkpoint's tokenizer, as the job's prompts are written with it."""
    return ChatTokenizer(
        model_path, revision=options.revision, thinking=options.thinking, allow_tokens=options.allow_tokens
    )


@dataclass
class _Row:
    """A row on its way through the stage."""

    key: tuple[int, int]
    """(manifest file, row in it)."""
    id: str
    attempts: int
    seconds: float = 0.0
    conversation: Conversation | None = None
    sampling: str | None = None
    fetches: list[Future[bytes]] = field(default_factory=list)
    prompt: Prompt | None = None
    input_ids: npt.NDArray[np.int32] | None = None
    media: list[SeenMedium] = field(default_factory=list)
    error: RowError | None = None

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Makes whatever the body raises the row's error."""
        try:
            yield
        except BaseException as error:
            self.error = as_row_error(error)

    @property
    def medium_tokens(self) -> list[MediumTokens]:
        """What each medium becomes in the prompt."""
        receipts = [medium.receipt for medium in self.media]
        return [
            MediumTokens(receipt.kind, num_visual_tokens(receipt.grid_thw), medium.prompt_seconds)
            for receipt, medium in zip(receipts, self.media, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of its patches."""
        return sum(medium.patches.nbytes for medium in self.media)

    @property
    def has_video(self) -> bool:
        return self.conversation is not None and any(part.kind == "video" for part in self.conversation.media)

    def request(self) -> dict[str, Any]:
        """The request row without its patches and the user's columns."""
        values: dict[str, Any] = {
            MANIFEST_FILE: self.key[0],
            MANIFEST_ROW: self.key[1],
            "id": self.id,
            "attempts": self.attempts,
            "sampling": self.sampling,
            "preprocess_s": self.seconds,
            "status": Status.OK.value,
        }
        if self.error is not None:
            values.update(error_values(self.error))
        elif self.input_ids is not None and self.prompt is not None:
            values.update(
                input_ids=self.input_ids,
                num_prompt_tokens=len(self.input_ids),
                num_visual_tokens=sum(medium.num_visual_tokens for medium in self.medium_tokens),
                media=[medium.receipt.as_dict() for medium in self.media],
                seconds_per_step=[medium.seconds_per_step for medium in self.media],
                prompt_hash=prompt_hash(self.prompt.text),
            )
        return values


class PreprocessStage:
    """The CPU stage of one actor: a decoder process, a few fetching threads and a tokenizer."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options
        model_path = options.model_cache.local(options.model_path, weights=False)
        self._tokenizer = chat_tokenizer(options, model_path)
        self._fetcher = Fetcher(options.fetch)
        self._worker = MediaWorker(options.media)
        self._pool = FetchPool(lambda source: self._fetcher.fetch(source), ahead=READ_AHEAD, at_most=MAX_FETCHES)
        self._schema = request_schema(options.kept)
        self._computing = threading.Lock()
        self._busy_s = 0.0
        self._row_bytes = float("inf")
        """Bytes of patches that a row is expected to have."""

    def close(self) -> None:
        """Stop the decoder process and the fetching threads."""
        self._pool.close()
        self._worker.close()

    def stats(self) -> dict[str, float]:
        """Seconds at work, and seconds with nothing to do but wait for fetches."""
        return {"busy_s": self._busy_s, "fetch_wait_s": self._pool.waited_s}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Request rows (schema.request_schema) for manifest rows with their row keys (schema.UnitColumn), in order."""
        tables = self.tables(table, 1 << 62, 1 << 62, patience_s=None)
        return pa.concat_tables(list(tables) or [self._schema.empty_table()])

    def tables(
        self,
        table: pa.Table,
        max_bytes: int,
        max_rows: int,
        *,
        when_begun: Callable[[], object] = lambda: None,
        patience_s: float | None = _PATIENCE_S,
    ) -> Iterator[pa.Table]:
        """The same in several tables, each ended by so many bytes of patches or so many rows, or by slow fetches.

        Which rows are in which table depends on the time that their media take. Threads may run several units; a unit
        that has called `when_begun` has no more fetches to begin.
        """
        rows = FetchAhead(self._pool, self._begun_rows(table), when_begun)
        done: dict[int, _Row] = {}
        num_bytes = 0
        self._pool.count(units=1)
        try:
            # A few at a time, so that handing them to the decoder costs next to nothing each.
            while True:
                most = self._group_size(max_bytes - num_bytes, max_rows - len(done))
                group = rows.take(most, patience_s=patience_s if done else None)
                for piece in _handovers(group or []):
                    self._finish([row for _, row in piece])
                    for place, row in piece:
                        done[place] = row
                        num_bytes += row.num_bytes
                        if num_bytes >= max_bytes or len(done) >= max_rows:
                            yield from self._hand_over(done, table)
                            done, num_bytes = {}, 0
                if done and not group:
                    yield from self._hand_over(done, table)
                    done, num_bytes = {}, 0
                if group == []:
                    return
        finally:
            self._pool.count(units=-1)
            rows.close()

    def _group_size(self, bytes_left: int, rows_left: int) -> int:
        """How many rows to decode before looking at their size."""
        return max(1, min(_ROWS_PER_HANDOVER, rows_left, int(bytes_left / self._row_bytes)))

    def _hand_over(self, done: Mapping[int, _Row], table: pa.Table) -> Iterator[pa.Table]:
        """The request rows of these places. A table may wait long to be taken: that is no time at work."""
        places = sorted(done)
        # As slices of neighbours, which Arrow can take of every type.
        runs = [list(run) for _, run in itertools.groupby(enumerate(places), key=lambda item: item[1] - item[0])]
        slices = [table.slice(run[0][1], len(run)) for run in runs]
        with self._at_work():
            requests = self._request_table([done[place] for place in places], pa.concat_tables(slices))
        self._pool.count(units=-1)
        try:
            yield requests
        finally:
            self._pool.count(units=1)

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """One unit at a time computes."""
        with self._computing:
            started = time.perf_counter()
            try:
                yield
            finally:
                self._busy_s += time.perf_counter() - started

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """Request rows that say why these rows were given up."""
        rows = [self._new_row(values) for values in manifest_rows(table)]
        for row in rows:
            row.error = error
        return self._request_table(rows, table)

    def _new_row(self, values: ManifestRow) -> _Row:
        key = values.key
        row = _Row(key, id=f"{key[0]}:{key[1]}", attempts=values[UnitColumn.ATTEMPTS])
        with row.errors():
            row.id = row_id(values, self._options.messages, key)
        return row

    def _begun_rows(self, table: pa.Table) -> Iterator[_Row]:
        """Rows in order; the fetches of each begin when it is asked for."""
        for values in manifest_rows(table):
            with self._at_work():
                row = self._begin(values)
            yield row

    def _begin(self, values: ManifestRow) -> _Row:
        started = time.perf_counter()
        row = self._new_row(values)
        with row.errors():
            row.conversation = conversation(values, self._options.messages)
            row.sampling = json.dumps({**self._options.sampling, **row.conversation.sampling}, sort_keys=True)
            for part in row.conversation.media:
                row.fetches.append(self._pool.submit(part.source))
        row.seconds = time.perf_counter() - started
        return row

    def _finish(self, rows: Sequence[_Row]) -> None:
        """Decode the media of a few rows, handed to the decoder together, and tokenize their prompts."""
        with self._at_work():
            started = time.perf_counter()
            ready: list[tuple[_Row, list[MediumFile]]] = []
            for row in rows:
                with row.errors():
                    if row.error is None and row.conversation is not None:
                        ready.append((row, self._gather(row, row.conversation)))
                self._pool.release(row.fetches)
                row.fetches = []
            for (row, _), results in zip(ready, self._see([media for _, media in ready]), strict=True):
                with row.errors():
                    row.media = [_seen(result) for result in results]
                    assert row.prompt is not None
                    row.input_ids = self._tokenizer.expand(row.prompt, row.medium_tokens)
            seconds = (time.perf_counter() - started) / len(rows)
            for row in rows:
                row.seconds += seconds
                known = self._row_bytes if self._row_bytes < float("inf") else row.num_bytes
                self._row_bytes = max(1.0, known + (row.num_bytes - known) / _ROWS_PER_HANDOVER)

    def _gather(self, row: _Row, asked: Conversation) -> list[MediumFile]:
        """The row's media, fetched, after its prompt has been rendered. Raises the first RowError met."""
        # Rendering is cheap, and a prompt that is refused saves the decoding.
        row.prompt = self._tokenizer.render(asked.messages, add_vision_id=self._options.add_vision_id)
        return [
            MediumFile(part.kind, fetch.result(), part.settings, part.name or source_name(part.source))
            for part, fetch in zip(asked.media, row.fetches, strict=True)
        ]

    def _see(self, rows: Sequence[Sequence[MediumFile]]) -> list[list[SeenMedium | RowError]]:
        """The media of rows as the model sees them. If the worker fails, each row is tried alone."""
        try:
            return self._worker.see_rows(rows)
        except BaseException as error:
            refusal = as_row_error(error)
            return [[refusal]] if len(rows) == 1 else [result for row in rows for result in self._see([row])]

    def _request_table(self, rows: Sequence[_Row], table: pa.Table) -> pa.Table:
        """The request rows of manifest rows. A row that Arrow refuses is found, and becomes an error too."""
        try:
            return self._build_table(rows, table)
        except BaseException as error:
            as_row_error(error)  # raises what is no row's fault
            for number, row in enumerate(rows):
                with row.errors():
                    self._build_table([row], table.slice(number, 1))
            return self._build_table(rows, table)

    def _build_table(self, rows: Sequence[_Row], table: pa.Table) -> pa.Table:
        requests = [row.request() for row in rows]
        kept_from = self._options.kept_from
        columns = {name: table.column(kept_from.get(name, name)) for name in self._options.kept.names}
        columns["patches"] = _binaries(
            [
                None if row.error is not None or row.input_ids is None else [medium.patches for medium in row.media]
                for row in rows
            ]
        )
        for column in self._schema:
            if column.name not in columns:
                columns[column.name] = pa.array([request.get(column.name) for request in requests], column.type)
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)


def _handovers(group: Sequence[tuple[int, _Row]]) -> Iterator[list[tuple[int, _Row]]]:
    """Rows to hand to the decoder together: one with a video alone, since its patches may fill a table."""
    for has_video, run in itertools.groupby(group, key=lambda item: item[1].has_video):
        rows = list(run)
        yield from ([item] for item in rows) if has_video else [rows]


def _seen(result: SeenMedium | RowError) -> SeenMedium:
    if isinstance(result, RowError):
        raise result
    return result


def _binaries(values: Sequence[Sequence[npt.NDArray[np.uint8]] | None]) -> pa.Array:
    """A large_binary column over one buffer, each value made of several arrays: copied once, where Arrow's own builder
    would copy as it grows."""
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([sum(array.nbytes for array in value or ()) for value in values], out=offsets[1:])
    flat = [array.reshape(-1) for value in values for array in value or ()]
    buffer = np.concatenate(flat) if flat else np.empty(0, dtype=np.uint8)
    valid = np.packbits([value is not None for value in values], bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(offsets), pa.py_buffer(buffer)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)
