"""Whatever a manifest holds, both stages and the plan answer with rows: an answer or a typed error for each."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import generate as generate_module
from pipeline.demo import CHECKPOINT
from pipeline.engine import Completion, EngineOptions
from pipeline.errors import as_row_error, row_error_types
from pipeline.generate import GenerateOptions, GenerateStage
from pipeline.planning.survey import Survey
from pipeline.preprocess.messages.columns import MessageOptions
from pipeline.preprocess.messages.row import conversation
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import MANIFEST_COLUMNS, UnitColumn, request_schema, result_schema
from tests.options import fetch_options, media_options
from tests.unit.test_generate import CountingEngine


class AnsweringEngine(CountingEngine):
    """Answers whatever the prompt is."""

    def step(self) -> list[Completion]:
        now, self.waiting = self.waiting, []
        return [Completion(one.request_id, index, (1,), "stop") for one in now for index in range(one.sampling.n)]


@dataclass
class Stages:
    preprocess: PreprocessStage
    generate: GenerateStage
    survey: Survey

    def run(self, table: pa.Table, kept: list[str]) -> list[dict[str, Any]]:
        """Result rows without the kept columns, which are compared with the manifest's."""
        schema = pa.schema([table.schema.field(name) for name in kept])
        names = [name if name not in kept else f"input {name}" for name in table.column_names]
        columns = {ours: theirs for ours, theirs in zip(table.column_names, names, strict=True) if ours != theirs}
        schema = pa.schema([pa.field(f"input {field.name}", field.type) for field in schema])
        table = with_keys(table.rename_columns(names))
        messages = MessageOptions(columns=columns, template="Describe {x}." if "x" in names else None)
        stage = self.preprocess
        stage._options = options(stage._options.fetch.base, schema, messages)
        stage._schema = request_schema(schema)
        self.generate._schema = result_schema(schema)
        self.survey._options = stage._options
        requests = stage(table)
        results = self.generate(requests)
        assert results.schema.equals(result_schema(schema))
        assert results.column("manifest_row").to_pylist() == list(range(table.num_rows))
        for name in schema.names:
            assert buffers_of(results.column(name)) == buffers_of(table.column(name)), name
        rows: list[dict[str, Any]] = results.drop_columns(schema.names).to_pylist()
        planned = self.survey.rows(table)
        for row, plan in zip(rows, planned, strict=True):
            assert row["status"] == "ok" or row["error_type"] in row_error_types(), row
            assert row["error_type"] != "InternalError", row["error_message"]
            assert plan.id == row["id"]
            # The plan knows what the stages refuse before a medium is decoded.
            if row["error_stage"] in ("prompt", "fetch"):
                assert type(plan.error).__name__ == row["error_type"], (plan, row)
        return rows


def buffers_of(column: pa.ChunkedArray) -> bytes:
    """A column's bytes: its values may be such that Python can't hold or compare them."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("x", column.type)])) as stream:
        stream.write_table(pa.table({"x": column}).combine_chunks())
    return bytes(sink.getvalue())


def options(base: str, kept: pa.Schema, messages: MessageOptions) -> PreprocessOptions:
    return PreprocessOptions(
        model_path=str(CHECKPOINT),
        revision=None,
        messages=messages,
        add_vision_id=False,
        thinking=False,
        allow_tokens=(),
        media=media_options(min_pixels=28 * 28, max_pixels=56 * 56),
        fetch=fetch_options(base),
        sampling={"max_tokens": 5},
        kept=kept,
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "load_engine", lambda *_, **__: AnsweringEngine())
        generate = GenerateStage(GenerateOptions(EngineOptions(model_path=str(CHECKPOINT)), pa.schema([])))
    plain = options(str(tmp_path_factory.mktemp("media")), pa.schema([]), MessageOptions())
    made = Stages(PreprocessStage(plain), generate, Survey(plain, max_context=4096))
    yield made
    made.preprocess.close()
    generate.close()


def with_keys(table: pa.Table) -> pa.Table:
    count = table.num_rows
    table = table.append_column(UnitColumn.FILE, pa.array([0] * count, pa.int32()))
    table = table.append_column(UnitColumn.ROW, pa.array(range(count), pa.int64()))
    return table.append_column(UnitColumn.ATTEMPTS, pa.array([1] * count, pa.int32()))


def reinterpreted(values: list[Any], stored: pa.DataType, meant: pa.DataType) -> pa.Array:
    """Arrow's view of stored values as another type, which checks nothing: as Parquet gives what some writer wrote."""
    array = pa.array(values, stored)
    return pa.Array.from_buffers(meant, len(array), array.buffers())


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


UNREADABLE = {
    "Latin-1": reinterpreted([b"ok", b"caf\xe9"], pa.binary(), pa.string()),
    "large Latin-1": reinterpreted([b"ok", b"caf\xe9"], pa.large_binary(), pa.large_string()),
    "year 12345": reinterpreted([0, 4_000_000], pa.int32(), pa.date32()),
    "year -1": reinterpreted([0, -800_000], pa.int32(), pa.date32()),
    "infinity": reinterpreted([0, 2**63 - 1], pa.int64(), pa.timestamp("us")),
    "unknown zone": reinterpreted([None, 0], pa.int64(), pa.timestamp("us", tz="Mars/Phobos")),
    "long duration": reinterpreted([0, 2**62], pa.int64(), pa.duration("s")),
    "nested": pa.ListArray.from_arrays([0, 1, 2], reinterpreted([b"ok", b"\xff"], pa.binary(), pa.string())),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_value_that_python_cannot_hold_passes_through_kept_and_is_an_error_only_where_it_is_needed(
    stages: Stages, name: str
) -> None:
    table = pa.table({"prompt": ["one", "two"], "x": UNREADABLE[name]})
    assert [row["status"] for row in stages.run(table, ["x"])] == ["ok", "ok"]
    rows = stages.run(pa.table({"x": UNREADABLE[name]}), [])
    assert rows[1]["error_type"] == "MessageError"
    assert "the column x holds a value of type" in rows[1]["error_message"]
    rows = stages.run(table.rename_columns(["prompt", "id"]), ["id"])
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[1]["id"] == "0:1"


def test_a_named_time_zone_needs_no_database_where_it_is_only_kept(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zoneinfo

    monkeypatch.setattr(zoneinfo, "ZoneInfo", None)
    table = pa.table({"prompt": ["one"], "when": pa.array([0], pa.timestamp("us", tz="Europe/Berlin"))})
    assert [row["status"] for row in stages.run(table, ["when"])] == ["ok"]


def answers(stages: Stages, requests: pa.Table) -> list[dict[str, Any]]:
    stages.generate._schema = result_schema(pa.schema([]))
    rows: list[dict[str, Any]] = stages.generate(requests).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert (rows[1]["error_type"], rows[1]["error_stage"], rows[1]["text"]) == ("InternalError", "generate", None)
    return rows


def requests_of(stages: Stages, **columns: list[Any]) -> pa.Table:
    stages.preprocess._options = options(stages.preprocess._options.fetch.base, pa.schema([]), MessageOptions())
    stages.preprocess._schema = request_schema(pa.schema([]))
    return stages.preprocess(with_keys(pa.table({"prompt": ["one", "two", "three"], **columns})))


def test_a_request_row_that_contradicts_itself_is_its_own_error_in_the_engine_stage(stages: Stages) -> None:
    requests = requests_of(stages, image=[png()] * 3)
    patches = requests.column("patches").to_pylist()
    patches[1] = patches[1][:-7]
    at = requests.schema.get_field_index("patches")
    rows = answers(stages, requests.set_column(at, "patches", pa.array(patches, pa.large_binary())))
    assert "Traceback" in rows[1]["error_message"]
    assert rows[1]["num_visual_tokens"] == rows[0]["num_visual_tokens"]  # the receipt stays


def test_an_answer_that_cannot_be_turned_into_text_is_its_row_s_error(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []

    def decode(ids: Any) -> str:
        decoded.append(ids)
        if len(decoded) == 2:
            raise BaseException("a panic")
        return "text"

    monkeypatch.setattr(stages.generate._tokenizer, "decode", decode)
    rows = answers(stages, requests_of(stages))
    assert rows[1]["error_message"].startswith("BaseException: a panic; not foreseen")


def test_a_fault_of_the_code_is_one_row_s_error_in_the_plan_too(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(row: Any, messages: MessageOptions) -> Any:
        if row["prompt"] == "two":
            raise BaseException("a panic")
        return conversation(row, messages)

    monkeypatch.setattr("pipeline.planning.survey.conversation", faulty)
    stages.survey._options = options(stages.preprocess._options.fetch.base, pa.schema([]), MessageOptions())
    rows = stages.survey.rows(with_keys(pa.table({"prompt": ["one", "two", "three"]})))
    assert [type(row.error).__name__ for row in rows] == ["NoneType", "InternalError", "NoneType"]


def test_sixteen_fixed_bytes_are_a_uuid(stages: Stages) -> None:
    key = bytes(range(0x41, 0x51))
    rows = stages.run(pa.table({"id": pa.array([key], pa.binary(16)), "prompt": ["?"]}), [])
    assert rows[0]["id"] == "41424344-4546-4748-494a-4b4c4d4e4f50"


_INT64 = st.integers(-(2**63), 2**63 - 1)
_TEXTS = st.text(st.characters(), max_size=12)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "url", "fps"]) | _TEXTS, inner)
    ),
    max_leaves=8,
)
_TURNS = st.lists(_TEXTS | st.sampled_from(["<|im_", "end|>", "<|image_", "pad|>"]), min_size=1, max_size=4).map(
    lambda texts: [{"role": "user", "content": texts}]
)
_STORED: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): (_JSON | _TURNS).map(json.dumps) | st.text(max_size=12) | st.sampled_from(["", "user", "5", "a.jpg"]),
    pa.large_string(): st.text(max_size=8),
    pa.binary(): st.binary(max_size=8) | st.just(png()),
    pa.binary(16): st.binary(min_size=16, max_size=16),
    pa.int64(): _INT64,
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(),
    pa.float32(): st.floats(width=32),
    pa.bool_(): st.booleans(),
    pa.decimal128(38, 0): st.integers(-(10**37), 10**37),
    pa.null(): st.none(),
}
_MEANT: dict[pa.DataType, list[pa.DataType]] = {
    pa.binary(): [pa.string()],
    pa.int32(): [pa.date32(), pa.time32("s")],
    pa.int64(): [
        pa.date64(), pa.time64("us"), pa.duration("ns"), pa.timestamp("s"), pa.timestamp("ns"),
        pa.timestamp("us", tz="UTC"), pa.timestamp("us", tz="Europe/Berlin"), pa.timestamp("us", tz="nowhere"),
    ],
}  # fmt: skip


@st.composite
def columns(draw: st.DrawFn, num_rows: int) -> pa.Array:
    """A column of any type and any values, also such that no checked way leads to."""
    stored = draw(st.sampled_from(list(_STORED)))
    values = st.none() | _STORED[stored]
    meant = draw(st.sampled_from([stored, *_MEANT.get(stored, [])]))
    count = num_rows
    offsets: list[int] | None = None
    wrap = draw(st.sampled_from(["no", "no", "list", "struct", "dictionary"]))
    if wrap == "list":
        offsets = [0]
        for _ in range(num_rows):
            offsets.append(offsets[-1] + draw(st.integers(0, 3)))
        count = offsets[-1]
    array = reinterpreted(draw(st.lists(values, min_size=count, max_size=count)), stored, meant)
    if offsets is not None:
        return pa.ListArray.from_arrays(offsets, array)
    if wrap == "struct":
        return pa.StructArray.from_arrays([array], [draw(st.sampled_from(["bytes", "path", "role", "x"]))])
    return array.dictionary_encode() if wrap == "dictionary" and meant == pa.large_string() else array


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, list[str]]:
    """A manifest, and which of its columns are kept."""
    num_rows = draw(st.integers(1, 3))
    names = draw(st.lists(st.sampled_from([*MANIFEST_COLUMNS, "x"]), min_size=1, max_size=4, unique=True))
    table = pa.table({name: draw(columns(num_rows)) for name in names})
    return table, draw(st.lists(st.sampled_from(names), unique=True))


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tables())
def test_any_manifest_gives_rows_and_nothing_else(stages: Stages, drawn: tuple[pa.Table, list[str]]) -> None:
    table, kept = drawn
    assert len(stages.run(table, kept)) == table.num_rows


def test_the_traceback_of_an_unforeseen_error_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        try:
            raise ValueError("of this test alone")
        except ValueError as error:
            as_row_error(error)
    (message,) = caplog.messages
    assert "Traceback (most recent call last)" in message and "ValueError: of this test alone" in message


def test_an_unforeseen_error_is_named_by_its_type_and_text_whatever_its_notes() -> None:
    error = ValueError("boom")
    error.add_note("")
    assert str(as_row_error(error)).startswith("ValueError: boom; not foreseen")
    assert str(as_row_error(KeyError())).startswith("KeyError; not foreseen")
