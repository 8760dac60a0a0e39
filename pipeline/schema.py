"""Arrow schemas and column names of the rows: manifest, request, result.

    manifest row --messages, preprocess--> request row --generate--> result row

One result schema serves good and bad rows alike. Knows names and types; not how any of them is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import pyarrow as pa

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.engine import SamplingParams
from pipeline.errors import RowError

# Names in a run folder by which a manifest knows it again.
RECORDS_FOLDER = "__run"
"""Everything but the part files, the page and the mark of success."""
PART_FILE = re.compile(r"part-\d+\.parquet")


class Status(StrEnum):
    """Whether a row was answered."""

    OK = "ok"
    ERROR = "error"


# The row key: the manifest file (by number, in the order of the manifest) and the row in that file.
MANIFEST_FILE = "manifest_file"
MANIFEST_ROW = "manifest_row"
ROW_KEY_SCHEMA = pa.schema([pa.field(MANIFEST_FILE, pa.int32(), False), pa.field(MANIFEST_ROW, pa.int64(), False)])

MANIFEST_ERROR = "_manifest_error"
"""Column of manifest rows in text formats: why the row can't be read; null where it can."""


class UnitColumn(StrEnum):
    """Columns that the reader adds to a unit's manifest rows."""

    FILE = "__manifest_file"
    ROW = "__manifest_row"
    ATTEMPTS = "__attempts"


READER_COLUMNS = frozenset({MANIFEST_ERROR, *UnitColumn})
"""Names that no manifest's own column can have."""


# Names that a manifest row may use; the config's `input.columns` maps other names to these.
CONTENT_COLUMNS = ("messages", "image", "images", "video", "videos", "prompt")
MEDIUM_SETTING_COLUMNS = tuple(each.name for each in fields(MediumSettings) if not each.metadata.get("part_only"))
SAMPLING_COLUMNS = tuple(each.name for each in fields(SamplingParams))
MANIFEST_COLUMNS = ("id", "system", *CONTENT_COLUMNS, *MEDIUM_SETTING_COLUMNS, *SAMPLING_COLUMNS)


@dataclass(frozen=True)
class MediumReceipt:
    """What the model saw of one medium."""

    kind: MediumKind
    source: str
    """The URI; where the manifest carried the file itself, the path or URL beside it, or `bytes`."""
    source_width: int
    source_height: int
    resized_width: int
    resized_height: int
    grid_thw: tuple[int, int, int]
    timestamps: tuple[float, ...] | None = None
    """Seconds of the frames shown; None for an image."""
    note: str | None = None
    """What was done otherwise than asked, such as a pixel budget that shrank the medium."""

    def as_dict(self) -> dict[str, Any]:
        """The Arrow form of the receipt: a value of the `media` column."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


MEDIUM_TYPE = pa.struct(
    [
        ("kind", pa.string()),
        ("source", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("resized_width", pa.int32()),
        ("resized_height", pa.int32()),
        ("grid_thw", pa.list_(pa.int32())),
        ("timestamps", pa.list_(pa.float64())),
        ("note", pa.string()),
    ]
)

# Columns that preprocessing fills and the engine hands on unchanged.
RECEIPT_FIELDS = [
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_visual_tokens", pa.int32()),
    pa.field("media", pa.list_(MEDIUM_TYPE)),
    pa.field("prompt_hash", pa.string()),
    pa.field("preprocess_s", pa.float32()),
]
STATUS_FIELDS = [
    pa.field("status", pa.string(), False),
    pa.field("error_stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32(), False),
]

_MAX_MESSAGE = 8000


def error_values(error: RowError, stage: str | None = None) -> dict[str, str]:
    """The status columns of a row with this error. A message may quote what is no valid text: Arrow would refuse it."""
    message = str(error)[:_MAX_MESSAGE].encode("utf-8", "backslashreplace").decode()
    values = (Status.ERROR.value, stage or error.stage, type(error).__name__, message)
    return dict(zip(("status", "error_stage", "error_type", "error_message"), values, strict=True))


# Between the actors: what the engine needs. `patches` holds the row's media one after the other, uint8; each one's
# share follows from its kind and grid. `seconds_per_step` has one number for each medium, as SeenMedium. `sampling` is
# JSON, since rows may set any parameter.
REQUEST_FIELDS = [
    pa.field("input_ids", pa.large_list(pa.int32())),
    pa.field("patches", pa.large_binary()),
    pa.field("seconds_per_step", pa.list_(pa.float64())),
    pa.field("sampling", pa.string()),
]

ANSWER_FIELDS = [
    pa.field("text", pa.string()),
    pa.field("texts", pa.list_(pa.string())),
    pa.field("finish_reason", pa.string()),
    pa.field("num_output_tokens", pa.int32()),
    pa.field("logprobs", pa.list_(pa.float32())),
    pa.field("generate_s", pa.float32()),
]


def request_schema(kept: pa.Schema) -> pa.Schema:
    """Rows between the CPU actors and the engine; `kept` are the user's columns, carried along untouched."""
    return pa.schema(
        [*ROW_KEY_SCHEMA, pa.field("id", pa.string()), *REQUEST_FIELDS, *RECEIPT_FIELDS, *STATUS_FIELDS, *kept]
    )


def result_schema(kept: pa.Schema) -> pa.Schema:
    """Rows of the fragments and part files: the same for answered rows and error rows."""
    return pa.schema(
        [pa.field("id", pa.string()), *ANSWER_FIELDS, *STATUS_FIELDS, *RECEIPT_FIELDS, *kept, *ROW_KEY_SCHEMA]
    )


RESULT_COLUMNS = tuple(result_schema(pa.schema([])).names)
ROW_COLUMNS = tuple(dict.fromkeys([*RESULT_COLUMNS, *request_schema(pa.schema([])).names]))
"""Names that no kept column can have."""
