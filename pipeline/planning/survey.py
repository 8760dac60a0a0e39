"""Sampled rows as the run will see them, without decoding: the CPU stage's checks and counts, from media headers.

    manifest rows --messages--> conversation --headers--> sizes, frames --template, tokenizer--> exact prompt length

Every size and count comes from the function that the run uses; only pixels are left out. A row that the run would
refuse is refused here with the same error, as far as headers tell. Knows the preprocessing steps and their cost; not
Ray or the figures of a whole manifest (sample.py).
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa

from pipeline.conversation import MediumPart
from pipeline.engine import check_length, parse_sampling
from pipeline.errors import MediaTimeout, as_row_error
from pipeline.planning.sample import SampledRow, kind_of
from pipeline.preprocess.fetch.ranged import RangedFile
from pipeline.preprocess.fetch.source import Fetcher, within
from pipeline.preprocess.header import MediumHeader, read_header, read_listed_header
from pipeline.preprocess.messages.columns import row_id
from pipeline.preprocess.messages.row import conversation
from pipeline.preprocess.messages.values import ManifestRow, manifest_rows
from pipeline.preprocess.prompt import MediumTokens
from pipeline.preprocess.size import fit_row
from pipeline.preprocess.stage import PreprocessOptions, chat_tokenizer

# Seconds of one core for preprocessing, fitted to measurements on 2 cores of an AMD EPYC with AVX2: JPEG decoding goes
# by the file's pixels, resizing and patchifying by those shown. Videos: H.264, decoded frames and shown ones.
_ROW_S, _DECODE_S_PER_PIXEL, _SHOW_S_PER_PIXEL = 1.6e-3, 4.25e-9, 3.2e-9
_VIDEO_DECODE_S_PER_PIXEL, _VIDEO_SHOW_S_PER_PIXEL = 1.5e-9, 4.0e-9

_MAX_FETCH_TIMEOUT_S = 10.0
_MAX_FETCH_RETRIES = 1
_GRACE_S = 5.0
"""Seconds past its own limit after which the thread of a header is abandoned."""


class Survey:
    """Reads the headers of many rows at once. A source that hangs fails its row, not the survey."""

    def __init__(
        self,
        options: PreprocessOptions,
        *,
        max_context: int,
        cache_tokens: int | None = None,
        threads: int = 16,
        header_timeout_s: float = 20.0,
    ) -> None:
        """`max_context` and `cache_tokens` limit a prompt and its answer, as in the engine."""
        fetch = options.fetch
        self._options = options
        self._max_context, self._cache_tokens = max_context, cache_tokens
        self._tokenizer = chat_tokenizer(options, options.model_path)
        self._tokenizing = threading.Lock()
        timeout_s, retries = min(fetch.timeout_s, _MAX_FETCH_TIMEOUT_S), min(fetch.retries, _MAX_FETCH_RETRIES)
        self._fetcher = Fetcher(replace(fetch, timeout_s=timeout_s, retries=retries))
        self._threads, self._header_timeout_s = threads, header_timeout_s

    def rows(self, table: pa.Table, *, until: float = float("inf")) -> list[SampledRow]:
        """The rows of a table of manifest rows with their keys (schema.UnitColumn), in order.

        Those that were not begun by `until` (on the monotonic clock) are left out.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="survey") as pool:
            rows = manifest_rows(table)
            found = pool.map(lambda values: self._row(values) if time.monotonic() < until else None, rows)
            return [row for row in found if row is not None]

    def _row(self, values: ManifestRow) -> SampledRow:
        options = self._options
        row = SampledRow(f"{values.key[0]}:{values.key[1]}", values.key, core_s=_ROW_S)
        try:
            row.id = row_id(values, options.messages, row.row_key)
            asked = conversation(values, options.messages)
            row.kind = kind_of([part.kind for part in asked.media])
            with self._tokenizing:
                prompt = self._tokenizer.render(asked.messages, add_vision_id=options.add_vision_id)
            headers = [self._header(part, row) for part in asked.media]
            fit_row(headers, options.media.max_visual_tokens)
            sampling = parse_sampling(json.dumps({**options.sampling, **asked.sampling}))
            row.max_tokens, row.num_samples, row.ignore_eos = sampling.max_tokens, sampling.n, sampling.ignore_eos
            tokens = [MediumTokens(each.kind, each.size.num_visual_tokens, each.prompt_seconds) for each in headers]
            row.num_visual_tokens = sum(medium.num_visual_tokens for medium in tokens)
            with self._tokenizing:
                row.num_prompt_tokens = len(self._tokenizer.expand(prompt, tokens))
            add_costs(row, headers)
            check_length(
                row.num_prompt_tokens,
                row.num_visual_tokens,
                row.max_tokens,
                max_context=self._max_context,
                cache_tokens=self._cache_tokens,
            )
        except BaseException as error:
            row.error = as_row_error(error)
        return row

    def _header(self, part: MediumPart, row: SampledRow) -> MediumHeader:
        """The header, read in a thread of its own: one that hangs in a parser or a file system is abandoned."""
        try:
            header, bytes_read = within(lambda: self._read(part), self._header_timeout_s + _GRACE_S)
        except TimeoutError:
            raise MediaTimeout(f"the header was not read within {self._header_timeout_s:g} s") from None
        row.bytes_read += bytes_read
        row.media_bytes += header.num_bytes
        row.num_inexact_videos += not header.is_exact
        return header

    def _read(self, part: MediumPart) -> tuple[MediumHeader, int]:
        first = part.source[0] if isinstance(part.source, tuple) else part.source
        file = RangedFile(self._fetcher.open(first), seconds=self._header_timeout_s)
        if isinstance(part.source, tuple):
            header = read_listed_header(file, len(part.source), part.settings, self._options.media)
        else:
            header = read_header(part.kind, file, part.settings, self._options.media)
        return header, file.bytes_read


def add_costs(row: SampledRow, headers: Sequence[MediumHeader]) -> None:
    """Fill in what the row's media take: patches, and seconds of one core to decode, resize and patchify."""
    row.core_s = _ROW_S
    row.grids = tuple(header.size.grid_thw for header in headers)
    for header in headers:
        source_pixels = header.width * header.height
        patch_bytes = math.prod(header.size.grid_thw) * header.size.patch_bytes
        seconds = _SHOW_S_PER_PIXEL * patch_bytes / 3
        if header.kind == "video":
            seconds += source_pixels * _VIDEO_DECODE_S_PER_PIXEL * header.num_decoded
            seconds += source_pixels * _VIDEO_SHOW_S_PER_PIXEL * header.size.num_frames
            row.video_core_s += seconds
        else:
            seconds += source_pixels * _DECODE_S_PER_PIXEL
        row.patch_bytes += patch_bytes
        row.core_s += seconds
