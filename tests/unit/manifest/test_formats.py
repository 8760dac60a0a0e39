"""Reading units, whatever the format."""

from __future__ import annotations

import csv
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.config import InputConfig
from pipeline.errors import ManifestError
from pipeline.manifest.changes import difference, only_appended, same_rows
from pipeline.manifest.files import MEDIA, Manifest, WorkUnit
from pipeline.manifest.find import open_manifest
from pipeline.manifest.formats import FORMATS, read_units
from tests.unit.manifest.manifests import (
    cut,
    read_unit,
    rows_of,
    write,
    write_jsonl,
    write_parquet,
    write_rows,
)


def test_the_config_offers_every_format() -> None:
    offered = InputConfig.model_fields["format"].annotation
    assert get_args(offered) == ("auto", *FORMATS, MEDIA)


def test_a_column_that_does_not_exist_is_refused(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_parquet(tmp_path / "m.parquet", {"image": ["a"]}))
    with pytest.raises(ManifestError, match="no column label; its columns: image"):
        read_unit(found.spec, WorkUnit(0, found.files[0].path, 0, 1), columns=["label"])


@pytest.mark.parametrize("format", ["jsonl", "csv"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6), max_size=300),
    rows_per_unit=st.integers(1, 200),
    data=st.data(),
)
def test_text_units_hold_exactly_their_rows(
    format: str, texts: list[str], rows_per_unit: int, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"m.{format}"
    if format == "jsonl":
        write_jsonl(path, [{"id": str(number), "text": text} for number, text in enumerate(texts)])
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(texts))])
    found = open_manifest(str(path), listing_path=str(tmp_path / "listing.parquet"))
    expected = [(str(number), (text or None) if format == "csv" else text) for number, text in enumerate(texts)]
    assert [(row["id"], row["text"]) for row in rows_of(found, rows_per_unit=rows_per_unit)] == expected
    if texts:  # any unit alone, read first
        unit = data.draw(st.sampled_from(cut(found, rows_per_unit)))
        assert read_unit(found.spec, unit, columns=["id"])["id"].to_pylist() == [
            str(number) for number in range(unit.start, unit.stop)
        ]


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv"])
def test_scattered_units_of_several_files_are_read_in_one_go(
    format: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    for number in range(3):
        path = tmp_path / "d" / f"{number}.{format}"
        ids = [f"{number}-{row}" for row in range(1000)]
        if format == "parquet":
            write_parquet(path, {"id": ids, "data": ["x" * 50] * 1000}, row_group_size=300)
        else:
            write(path, "\n".join(["id", *ids] if format == "csv" else [json.dumps({"id": name}) for name in ids]))
    found = load(tmp_path / "d")
    wanted = {0: [0, 1, 299, 300, 999], 2: [5, 6, 7, 400, 401, 998]}
    runs = {0: [(0, 2), (299, 301), (999, 1000)], 2: [(5, 7), (7, 8), (400, 402), (998, 999)]}
    units = [found.unit(number, start, stop) for number, spans in runs.items() for start, stop in spans]
    tables = list(read_units(found.spec, units, columns=["id"]))
    assert [table.num_rows for table in tables] == [unit.num_rows for unit in units]
    read = [name for table in tables for name in table["id"].to_pylist()]
    assert read == [f"{number}-{row}" for number, rows in wanted.items() for row in rows]


@pytest.mark.parametrize("where", ["disk", "bucket"])
@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "csv.gz"])
def test_a_file_that_was_replaced_since_the_manifest_was_opened_is_noticed(
    format: str, where: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path = str(tmp_path / f"m.{format}") if where == "disk" else f"memory://{uuid.uuid4().hex}/m.{format}"

    def replace_by(ids: list[str]) -> None:
        storage.publish_file(write_rows(tmp_path / f"local.{format}", ids), path)

    replace_by(["a", "b"])
    found = load(path)
    assert [row["id"] for row in rows_of(found)] == ["a", "b"]
    for ids, reason in ((["b", "a"], "has as many bytes, but another"), (["z", "y", "x"], "bytes now but had")):
        replace_by(ids)
        with pytest.raises(ManifestError, match=rf"{reason}.* when the job began: it was changed in the meantime"):
            rows_of(found)


@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "jsonl.gz"])
def test_other_content_of_the_same_size_is_another_manifest(
    format: str, tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    path, ids = tmp_path / f"m.{format}", [f"{number:05d}" for number in range(20_000)]
    first = load(write_rows(path, ids)).fingerprint()
    shuffled = load(write_rows(path, ids[::-1])).fingerprint()
    name, size, num_rows, _ = first["files"][0]
    assert shuffled["files"] != first["files"] and shuffled["files"][0][:3] == [name, size, num_rows]
    assert difference(first, shuffled) == [f"m.{format} has other content, with as many bytes and rows"]
    assert not only_appended(first, shuffled) and same_rows(first, shuffled) is False
    write_rows(path, ids)
    os.utime(path, ns=(0, 0))
    again = load(path).fingerprint()
    assert again == json.loads(json.dumps(first)) and difference(first, again) == []
    assert only_appended(first, again) and same_rows(first, again)
    old = {**first, "files": [[name, size, num_rows]]}  # as earlier versions wrote it
    assert difference(old, shuffled) == [] and only_appended(old, shuffled) and same_rows(old, first) is None


def test_secrets_in_the_storage_options_are_not_shown(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(write_jsonl(tmp_path / "m.jsonl", [{"id": 1}]), storage_options={"secret": "hunter2"})
    assert "hunter2" not in repr(found) + repr(found.spec) + json.dumps(found.fingerprint())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "jsonl", "csv", "media"])
def test_s3_manifests_of_every_format_are_read_through_faults(format: str, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    from tests.servers.s3 import Fault, s3_server

    with s3_server() as server:
        server.make_bucket("bucket")
        options, root = server.storage_options, f"s3://bucket/{uuid.uuid4().hex}"
        ids = [f"{number:03d}.jpg" for number in range(300)]
        if format == "parquet":
            path = write_parquet(tmp_path / "m.parquet", {"id": ids}, row_group_size=50)
            storage.publish_file(path, f"{root}/m.parquet", options)
        elif format == "media":
            ids = ids[:5]
            for name in ids:
                storage.publish(f"{root}/{name}", b"x", options)
        else:
            lines = [json.dumps({"id": name}) for name in ids] if format == "jsonl" else ["id", *ids]
            storage.publish(f"{root}/m.{format}", "\n".join(lines).encode(), options)
        server.faults += [Fault(503, method="GET"), Fault(cut_after=100, method="GET")]
        listing = f"{root}-run/listing.parquet"
        for _ in range(2):  # the second time as a resumed job
            found = open_manifest(root, listing_path=listing, storage_options=options, listing_options=options)
            assert (found.format, found.base) == (format, root)
            server.faults += [Fault(503, method="GET"), Fault(cut_after=100, method="GET")]
            assert [row["id"] for row in rows_of(found, rows_per_unit=70)] == ids
