"""Manifest rows in, request rows out: the CPU stage.

For each row: messages, fetch, decode, resize, patchify, tokenize; one pass, one thread of computing, with fetches
running ahead. A row that fails becomes a request row with its error in it and goes on beside the others.
Knows the steps it joins and the two row schemas; not Ray, nor what the engine does with a request.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.checkpoint.cache import ModelCache
from pipeline.conversation import Conversation
from pipeline.errors import RowError
from pipeline.preprocess.columns import MessageOptions, row_id
from pipeline.preprocess.fetch import Fetcher
from pipeline.preprocess.limits import FetchOptions, MediaOptions
from pipeline.preprocess.messages import conversation
from pipeline.preprocess.prompt import ChatTokenizer, prompt_hash
from pipeline.preprocess.receipt import SeenMedium
from pipeline.preprocess.sandbox.client import MediaWorker, Medium
from pipeline.preprocess.size import num_visual_tokens
from pipeline.schema import MEDIUM_TYPE, Status, UnitColumn, request_schema

_ROWS_PER_HANDOVER = 8


@dataclass(frozen=True)
class PreprocessOptions:
    """What the CPU stage needs to know; plain data, so that it travels to the actors."""

    model_path: str
    revision: str | None
    messages: MessageOptions
    add_vision_id: bool
    media: MediaOptions
    fetch: FetchOptions
    sampling: Mapping[str, Any]
    """The job's sampling parameters; a row's own win."""
    kept: pa.Schema
    """The user's columns that go through to the results."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    """Where this machine keeps a checkpoint that lies in a bucket."""
    read_ahead: int = 16
    """Media that may be fetched before their turn to be decoded."""


@dataclass
class _Row:
    """A row on its way through the stage."""

    id: str
    attempts: int
    file: int
    row: int
    seconds: float = 0.0
    conversation: Conversation | None = None
    fetches: list[Future[bytes]] = field(default_factory=list)
    input_ids: npt.NDArray[np.int32] | None = None
    seen: list[SeenMedium] = field(default_factory=list)
    prompt_hash: str | None = None
    sampling: str | None = None
    error: RowError | None = None


class PreprocessStage:
    """The CPU stage of one actor: a decoder process, a few fetching threads and a tokenizer."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options
        model_path = options.model_cache.local(options.model_path, weights=False)
        self._tokenizer = ChatTokenizer(model_path, revision=options.revision)
        self._fetcher = Fetcher(options.fetch)
        self._worker = MediaWorker(options.media)
        self._pool = ThreadPoolExecutor(max_workers=min(16, options.read_ahead), thread_name_prefix="fetch")
        self._schema = request_schema(options.kept)

    def close(self) -> None:
        """Stop the decoder process and the fetching threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._worker.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Request rows (schema.request_schema) for manifest rows with their places (schema.UnitColumn)."""
        return pa.concat_tables(list(self.tables(table, 1 << 62, 1 << 62)) or [self._schema.empty_table()])

    def tables(self, table: pa.Table, block_bytes: int, block_rows: int) -> Iterator[pa.Table]:
        """The same, a table each time that so many bytes of patches or so many rows have come together.

        Never by the clock: Ray runs a unit again after its actor died, and counts on the same tables as before.
        """
        rows: list[_Row] = []
        first, size = 0, 0
        ahead = self._read_ahead(table)
        # A few at a time: enough that handing them to the decoder costs next to nothing each.
        while group := list(itertools.islice(ahead, min(_ROWS_PER_HANDOVER, block_rows - len(rows)))):
            self._finish(group)
            rows += group
            size += sum(one.patches.nbytes for row in group for one in row.seen)
            if size >= block_bytes or len(rows) >= block_rows:
                yield self._request_table(rows, table.slice(first, len(rows)))
                first, size, rows = first + len(rows), 0, []
        if rows:
            yield self._request_table(rows, table.slice(first, len(rows)))

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """Request rows that say why these rows were given up."""
        rows = []
        for values in _python_rows(table):
            place = (int(values.pop(UnitColumn.FILE)), int(values.pop(UnitColumn.ROW)))
            attempts = int(values.pop(UnitColumn.ATTEMPTS))
            rows.append(_Row(row_id(values, self._options.messages, place), attempts, *place, error=error))
        return self._request_table(rows, table)

    def _read_ahead(self, table: pa.Table) -> Iterator[_Row]:
        """Rows in order, their media being fetched while earlier rows are decoded."""
        waiting: deque[_Row] = deque()
        under_way = 0
        for values in _python_rows(table):
            row = self._begin(values)
            waiting.append(row)
            under_way += len(row.fetches)
            while waiting and under_way > self._options.read_ahead:
                under_way -= len(waiting[0].fetches)
                yield waiting.popleft()
        yield from waiting

    def _begin(self, values: dict[str, Any]) -> _Row:
        place = (int(values.pop(UnitColumn.FILE)), int(values.pop(UnitColumn.ROW)))
        row = _Row(id="", attempts=int(values.pop(UnitColumn.ATTEMPTS)), file=place[0], row=place[1])
        started = time.perf_counter()
        row.id = row_id(values, self._options.messages, place)
        try:
            row.conversation = conversation(values, self._options.messages)
            row.sampling = json.dumps({**self._options.sampling, **row.conversation.sampling}, sort_keys=True)
            row.fetches = [self._pool.submit(self._fetcher.fetch, part.source) for part in row.conversation.media]
        except RowError as error:
            row.error = error
        row.seconds = time.perf_counter() - started
        return row

    def _finish(self, rows: Sequence[_Row]) -> None:
        """See the media of a few rows, with one hand-over to the decoder, and write their prompts."""
        started = time.perf_counter()
        ready: list[tuple[_Row, str, list[Medium]]] = []
        for row in rows:
            try:
                if row.error is None and row.conversation is not None:
                    ready.append((row, *self._gather(row, row.conversation)))
            except RowError as error:
                row.error = error
            for fetch in row.fetches:
                fetch.cancel()
            row.fetches = []
        seen = self._worker.see_rows([media for _, _, media in ready])
        for (row, rendered, _), results in zip(ready, seen, strict=True):
            row.error = next((result for result in results if isinstance(result, RowError)), None)
            if row.error is not None:
                continue
            row.seen = [result for result in results if isinstance(result, SeenMedium)]
            counts = [num_visual_tokens(one.receipt.grid_thw) for one in row.seen]
            row.input_ids = self._tokenizer.encode(rendered, counts)
            row.prompt_hash = prompt_hash(rendered)
        seconds = (time.perf_counter() - started) / len(rows)
        for row in rows:
            row.seconds += seconds

    def _gather(self, row: _Row, asked: Conversation) -> tuple[str, list[Medium]]:
        """The row's prompt as text, and its media's bytes. Raises the first RowError met."""
        # Rendering comes first: it is cheap, and a prompt that is refused spares the decoding.
        rendered = self._tokenizer.render(asked.messages, add_vision_id=self._options.add_vision_id)
        media: list[Medium] = []
        for part, fetch in zip(asked.media, row.fetches, strict=True):
            source = part.source if isinstance(part.source, str) else "bytes"
            media.append(Medium(part.kind, fetch.result(), part.settings, source))
        return rendered, media

    def _request_table(self, rows: Sequence[_Row], table: pa.Table) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {
            "manifest_file": pa.array([row.file for row in rows], pa.int32()),
            "manifest_row": pa.array([row.row for row in rows], pa.int64()),
            "id": pa.array([row.id for row in rows], pa.string()),
            "input_ids": _lists([row.input_ids for row in rows]),
            "patches": _binaries(
                [None if row.input_ids is None else [one.patches for one in row.seen] for row in rows]
            ),
            "sampling": pa.array([row.sampling for row in rows], pa.string()),
            "num_prompt_tokens": pa.array([_length(row.input_ids) for row in rows], pa.int32()),
            "num_visual_tokens": pa.array(
                [
                    None if row.input_ids is None else sum(num_visual_tokens(one.receipt.grid_thw) for one in row.seen)
                    for row in rows
                ],
                pa.int32(),
            ),
            "media": pa.array(
                [None if row.input_ids is None else [one.receipt.as_dict() for one in row.seen] for row in rows],
                pa.list_(MEDIUM_TYPE),
            ),
            "prompt_hash": pa.array([row.prompt_hash for row in rows], pa.string()),
            "preprocess_s": pa.array([row.seconds for row in rows], pa.float32()),
            "status": pa.array([Status.OK if row.error is None else Status.ERROR for row in rows], pa.string()),
            "error_stage": pa.array([row.error and row.error.stage for row in rows], pa.string()),
            "error_type": pa.array([row.error and type(row.error).__name__ for row in rows], pa.string()),
            "error_message": pa.array([row.error and str(row.error) for row in rows], pa.string()),
            "attempts": pa.array([row.attempts for row in rows], pa.int32()),
        }
        columns.update({name: table.column(name) for name in self._options.kept.names})
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)


def _python_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dicts, a few at a time, so that embedded files are not all copied at once."""
    for batch in table.to_batches(max_chunksize=16):
        yield from batch.to_pylist()


def _length(ids: npt.NDArray[np.int32] | None) -> int | None:
    return None if ids is None else len(ids)


def _lists(values: Sequence[npt.NDArray[np.int32] | None]) -> pa.Array:
    """A large_list<int32> column over one buffer."""
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([0 if value is None else len(value) for value in values], out=offsets[1:])
    present = [value for value in values if value is not None]
    flat = np.concatenate(present) if present else np.empty(0, dtype=np.int32)
    missing = pa.array([value is None for value in values], pa.bool_())
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()), mask=missing)


def _binaries(values: Sequence[Sequence[npt.NDArray[np.uint8]] | None]) -> pa.Array:
    """A large_binary column over one buffer: each row's arrays one after the other."""
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum([sum(array.nbytes for array in value or ()) for value in values], out=offsets[1:])
    buffer = np.empty(int(offsets[-1]), dtype=np.uint8)
    for start, value in zip(offsets, values, strict=False):
        position = int(start)
        for array in value or ():
            buffer[position : position + array.nbytes] = array.reshape(-1)
            position += array.nbytes
    valid = np.packbits([value is not None for value in values], bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(offsets), pa.py_buffer(buffer)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(values), buffers)
