"""Folders that hold results of earlier runs beside the files that a job reads."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.changes import difference
from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest, recorded_manifest
from pipeline.results.run_folder import RunFolder
from tests.unit.manifest.manifests import names_of, rows_of, write_jsonl, write_parquet


def finish_run(root: str, name: str, partition: str | None = None) -> None:
    """A run folder below a root, with the files of a finished run."""
    folder = RunFolder(storage.join(root, name))
    folder.prepare()
    folder.write_run({"state": "finished"})
    storage.publish(folder.file("errors.jsonl"), b'{"message": "?"}\n')
    part = folder.part(*([partition] if partition else []), "part-00000.parquet")
    storage.make_dir(storage.parent(part))
    storage.publish(part, b"no manifest")
    storage.publish(folder.part("_report.html"), b"")
    folder.mark_finished()


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_a_run_below_its_own_manifest_s_folder_can_be_resumed(where: str, tmp_path: Path) -> None:
    local = write_parquet(tmp_path / "d" / "deep" / "m.parquet", {"id": [1, 2]})
    root = str(tmp_path / "d") if where == "disk" else f"memory://{uuid.uuid4().hex}/d"
    if where == "bucket":
        storage.publish_file(local, f"{root}/deep/m.parquet")
    listing = storage.join(root, "out", "__run", "manifest.parquet")
    first = open_manifest(root, listing_path=listing)
    finish_run(root, "out")
    finish_run(root, "deep/other", "tag=a")
    for path in (root, f"{root}/**/*.parquet"):
        found = open_manifest(path, listing_path=listing)
        assert [storage.name(file.path) for file in found.files] == ["m.parquet"]
        assert difference(first.fingerprint(), found.fingerprint()) == []
        assert found.notes == ("left alone: the results of earlier runs in deep/other, out",)
    versions = [file.version for file in first.files]
    again = recorded_manifest(root, json.loads(json.dumps({"fingerprint": first.fingerprint(), "versions": versions})))
    assert again is not None and again.files == first.files


def test_parts_of_a_folder_that_is_no_run_of_ours_are_a_manifest(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    write_parquet(tmp_path / "d" / "x=1" / "part-00000.parquet", {"id": [1]})
    found = load(tmp_path / "d")
    assert names_of(found) == ["part-00000.parquet"] and found.notes == ()


def test_the_results_of_a_run_can_be_the_manifest_of_the_next(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    finish_run(str(tmp_path), "out")
    write_parquet(tmp_path / "out" / "part-00000.parquet", {"id": [1]})
    finish_run(str(tmp_path), "out/canaries")
    for path in (tmp_path / "out", tmp_path / "out" / "*.parquet", tmp_path / "out" / "part-00000.parquet"):
        assert rows_of(load(path)) == [{"id": 1}]


def test_where_only_results_lie_there_is_nothing_to_read(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    finish_run(str(tmp_path / "d"), "out")
    with pytest.raises(ManifestError, match="found no files"):
        load(tmp_path / "d")
    write_jsonl(tmp_path / "d" / "m.jsonl", [{"id": 1}])
    assert load(tmp_path / "d").num_rows == 1
