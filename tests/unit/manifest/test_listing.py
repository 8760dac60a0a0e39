"""Folders of media as manifests."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.changes import difference, only_appended
from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest
from tests.unit.manifest.manifests import (
    make_media,
    names_of,
    rows_of,
    write,
    write_jsonl,
)


def test_a_folder_of_media_is_listed_sorted_and_recursively(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    found = load(make_media(tmp_path / "photos"))
    assert (found.format, found.base) == ("media", str(tmp_path / "photos"))
    assert rows_of(found) == [
        {"id": "a/clip.mp4", "image": None, "video": "a/clip.mp4"},
        {"id": "a/photo.png", "image": "a/photo.png", "video": None},
        {"id": "b.JPG", "image": "b.JPG", "video": None},
        {"id": "c.webm", "image": None, "video": "c.webm"},
    ]
    assert all((tmp_path / "photos" / row["id"]).exists() for row in rows_of(found))


def test_a_resumed_job_uses_the_listing_of_its_first_run(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    first = load(folder)
    write(folder / "aa_new.jpg", "x")
    (folder / "b.JPG").unlink()
    again = load(f"{folder}/")
    assert rows_of(again) == rows_of(first) and again.base == first.base
    assert difference(first.fingerprint(), again.fingerprint()) == []


def test_new_media_are_added_behind_the_old_ones_when_asked(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    first = load(folder, new_media=True)
    write(folder / "aa_new.jpg", "x")
    grown = load(folder, new_media=True)
    assert rows_of(grown)[: first.num_rows] == rows_of(first)
    assert [row["image"] for row in rows_of(grown)[first.num_rows :]] == ["aa_new.jpg"]
    assert only_appended(first.fingerprint(), grown.fingerprint())
    write(folder / "a" / "zz_newer.mp4", "x")
    assert load(folder) == grown, "a run that does not ask sees what an earlier one added, and no more"
    newest = load(folder, new_media=True)
    assert [row["video"] for row in rows_of(newest)][-1] == "a/zz_newer.mp4" and len(newest.files) == 3
    assert load(folder, new_media=True) == newest


def test_a_listing_of_another_folder_is_not_mistaken_for_this_one(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    load(make_media(tmp_path / "photos"))
    with pytest.raises(ManifestError, match=r"lists the media of .*photos, but input.path is .*others"):
        load(make_media(tmp_path / "others"))
    data = load(write_jsonl(tmp_path / "m.jsonl", [{"prompt": "x"}]))
    assert data.format == "jsonl"


def test_a_glob_of_media_and_a_single_medium_are_fine(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    listing = str(tmp_path / "one.parquet")
    found = open_manifest(str(folder / "a" / "*.png"), listing_path=listing)
    assert [row["image"] for row in rows_of(found)] == ["photo.png"] and found.base == str(folder / "a")
    found = load(folder / "b.JPG")
    assert [row["image"] for row in rows_of(found)] == ["b.JPG"] and found.base == str(folder)


def test_data_files_beside_media_are_the_manifest_and_deeper_ones_are_not(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = make_media(tmp_path / "photos")
    write(folder / "a" / "exif.csv", "camera\nx\n")
    assert load(folder).format == "media"
    (tmp_path / "run" / "listing.parquet").unlink()
    write_jsonl(folder / "metadata.jsonl", [{"image": "b.JPG", "prompt": "?"}])
    found = load(folder)
    assert (found.format, names_of(found), found.base) == ("jsonl", ["metadata.jsonl"], str(folder))
    assert load(folder, format="media").num_rows == 4


def test_a_bucket_prefix_of_media_is_listed_too(load: Callable[..., Manifest]) -> None:
    root = f"memory://{uuid.uuid4().hex}/photos"
    for name in ("a/b.jpg", "c.mp4", "readme.txt"):
        storage.publish(f"{root}/{name}", b"x")
    found = load(root)
    assert found.base == root
    assert rows_of(found) == [
        {"id": "a/b.jpg", "image": "a/b.jpg", "video": None},
        {"id": "c.mp4", "image": None, "video": "c.mp4"},
    ]
