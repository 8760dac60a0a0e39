"""Folders of media as manifests."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image

from pipeline import storage
from pipeline.errors import ManifestError
from pipeline.manifest.changes import difference, only_appended
from pipeline.manifest.files import Manifest
from pipeline.manifest.find import open_manifest
from pipeline.manifest.formats import IMAGE_SUFFIXES, REFUSED_SUFFIXES, VIDEO_SUFFIXES
from pipeline.preprocess import image
from pipeline.preprocess.fetch.source import Fetcher
from pipeline.preprocess.limits import FetchOptions
from pipeline.preprocess.video import container
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
    assert found.notes == ("left alone: 1 file that is neither image nor video (1 .txt)",)


def test_every_extension_of_the_decoders_formats_is_listed() -> None:
    Image.init()
    kinds = {*image.FORMATS, "MPO"}  # Pillow opens those as JPEG
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds} == set(IMAGE_SUFFIXES)
    found = set()
    for name in container.FORMATS.split(","):
        for mode in "rw":  # some formats are read by content alone, and name their extensions where they are written
            with contextlib.suppress(ValueError):
                found |= {f".{suffix}" for suffix in av.ContainerFormat(name, mode).extensions}
    no_media = {".m4a", ".m4b", ".isma", ".mka", ".mks", ".wma", ".ism"}  # audio, subtitles, a streaming manifest
    assert found - no_media <= {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES, *REFUSED_SUFFIXES}
    undeclared = {".m4v", ".vob", ".ogv", ".mxf", ".ivf"}
    assert set(VIDEO_SUFFIXES) - found <= undeclared
    assert not set(IMAGE_SUFFIXES) & set(VIDEO_SUFFIXES)


def test_what_is_refused_by_name_is_a_row_and_everything_else_is_counted(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = tmp_path / "phone"
    for name in ("a.HEIC", "b.svg", "c.pdf", "d.TGA", "e.ogg", "f.mpo"):
        write(folder / name, "x")
    for name in ("1.txt", "2.txt", "3.TXT", "sub/n.zip", "LICENSE", "x.parquet/y.bin"):
        write(folder / name, "x")
    note = "left alone: 6 files that are neither images nor videos (3 .txt, 1 without extension, 1 .zip, 1 .bin)"
    for _ in range(2):  # the second time from the listing
        found = load(folder)
        assert [(row["image"], row["video"]) for row in rows_of(found)] == [
            ("a.HEIC", None), ("b.svg", None), ("c.pdf", None), ("d.TGA", None), (None, "e.ogg"), ("f.mpo", None),
        ]  # fmt: skip
        assert found.notes == (note,)
    for name in ("7.txt", "g.png"):
        write(folder / name, "x")
    assert load(folder, new_media=True).notes == (note.replace("6 files", "7 files").replace("3 .txt", "4 .txt"),)


def test_a_document_beside_data_files_does_not_make_them_a_folder_of_media(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    write(tmp_path / "d" / "readme.pdf", "x")
    write_jsonl(tmp_path / "d" / "data" / "m.jsonl", [{"id": 1}])
    assert load(tmp_path / "d").format == "jsonl"


def test_names_that_are_no_plain_paths_become_rows_that_find_their_files(
    tmp_path: Path, load: Callable[..., Manifest]
) -> None:
    folder = str(tmp_path / "photos")
    names = [
        b"caf\xe9.jpg",
        b"\xff\xfe/clip.mp4",
        b"data:x.png",
        b"file:y.png",
        b"50%.png",
        b"\xc3\xa9.png",
        b" new\nline.gif",
    ]
    for name in names:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)
    fetcher = Fetcher(
        FetchOptions(
            base=folder, allow=(), allow_private_hosts=False, storage_options={}, timeout_s=1, max_bytes=99, retries=0
        )
    )
    found = rows_of(load(folder))
    assert {fetcher.fetch(row["image"] or row["video"]) for row in found} == set(names)
    assert {"caf\\xe9.jpg", "\\xff\\xfe/clip.mp4", "data:x.png", "50%.png", "é.png"} <= {row["id"] for row in found}
    assert rows_of(load(folder, new_media=True)) == found, "known by these names the next time"


def test_links_to_files_that_are_not_there_are_rows(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = tmp_path / "photos"
    write(folder / "a.png", "x")
    for name, target in (("gone.png", "/nowhere.png"), ("loop.png", "loop.png"), ("linked.png", "a.png")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    for path in (folder, folder / "*.png"):
        assert [row["image"] for row in rows_of(load(path))] == ["a.png", "gone.png", "linked.png", "loop.png"]
        (tmp_path / "run" / "listing.parquet").unlink()


def test_a_new_name_that_is_shown_like_an_old_one_is_added(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = os.fsencode(tmp_path / "photos")
    os.makedirs(folder)
    for name in (b"caf\xe9.png", rb"caf\xe9.png"):
        with open(os.path.join(folder, name), "wb"):
            pass
        found = load(tmp_path / "photos", new_media=True)
    assert [row["id"] for row in rows_of(found)] == [r"caf\xe9.png"] * 2


def test_a_manifest_whose_own_name_is_no_text_says_so(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    os.makedirs(os.path.join(os.fsencode(tmp_path), b"d\xe9"))
    write_jsonl(tmp_path / "m.jsonl", [{"id": 1}])
    os.rename(tmp_path / "m.jsonl", os.path.join(os.fsencode(tmp_path), b"d\xe9", b"m.jsonl"))
    with pytest.raises(ManifestError, match=r"input.path .*d\\xe9 is not UTF-8"):
        load(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"d\xe9")))
    with pytest.raises(ManifestError, match=r"the name .*d\\xe9/m.jsonl is not UTF-8; rename the file"):
        load(tmp_path)


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


def test_a_data_file_that_asks_nothing_is_left_aside_and_named(tmp_path: Path, load: Callable[..., Manifest]) -> None:
    folder = make_media(tmp_path / "photos")
    write(folder / "license.csv", "file,license\nb.JPG,CC0\n")
    for _ in range(2):  # the second time from the listing
        found = load(folder, is_asked=lambda columns: "image" in columns)
        assert found.format == "media" and found.num_rows == 4
        assert [note.count(".csv") for note in found.notes] == [0, 1]
        assert re.search(r"left alone: license\.csv, without .* \(its columns: file, license\)", found.notes[-1])
    (tmp_path / "run" / "listing.parquet").unlink()
    write(folder / "license.csv", "image,license\nb.JPG,CC0\n")
    assert load(folder, is_asked=lambda columns: "image" in columns).format == "csv"


def test_a_bucket_prefix_of_media_is_listed_too(load: Callable[..., Manifest]) -> None:
    root = f"memory://{uuid.uuid4().hex}/photos"
    for name in ("a/b.jpg", "c.mp4", "readme.txt", "a//d.jpg"):
        storage.publish(f"{root}/{name}", b"x")
    found = load(root)
    assert found.base == root
    assert rows_of(found) == [
        {"id": "a//d.jpg", "image": "a//d.jpg", "video": None},
        {"id": "a/b.jpg", "image": "a/b.jpg", "video": None},
        {"id": "c.mp4", "image": None, "video": "c.mp4"},
    ]
