"""Paths on disk and in buckets come apart, and are put together, in the same way."""

from __future__ import annotations

import os

import pytest

from pipeline import storage


@pytest.mark.parametrize(
    ("path", "parent", "name", "remote"),
    [
        ("s3://bucket/folder/file.parquet", "s3://bucket/folder", "file.parquet", True),
        ("s3://bucket/file.parquet", "s3://bucket", "file.parquet", True),
        ("gs://bucket/folder/", "gs://bucket", "folder", True),
        ("/data/file.parquet", "/data", "file.parquet", False),
        ("file:///data/file.parquet", "/data", "file.parquet", False),
        ("/file", "/", "file", False),
        ("/", "/", "", False),
        ("file", ".", "file", False),
        ("data/folder/", "data", "folder", False),
    ],
)
def test_paths_come_apart_the_same_on_disk_and_in_buckets(path: str, parent: str, name: str, remote: bool) -> None:
    assert (storage.parent(path), storage.name(path), storage.is_remote(path)) == (parent, name, remote)


def test_join_puts_one_slash_between_names() -> None:
    assert storage.join("s3://b", "a", "c") == "s3://b/a/c"
    assert storage.join("/data/", "a") == "/data/a"
    assert storage.join("/", "a") == "/a"


@pytest.mark.parametrize(
    ("pattern", "base"),
    [
        ("/data/*.parquet", "/data"),
        ("/data/a*/x.csv", "/data"),
        ("s3://b/p/part-?.parquet", "s3://b/p"),
        ("*.csv", "."),
    ],
)
def test_the_base_of_a_glob_is_the_folder_above_the_first_wildcard(pattern: str, base: str) -> None:
    assert storage.is_glob(pattern) and storage.glob_base(pattern) == base


def test_absolute_paths_are_those_of_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.absolute("a/../b") == os.path.join(os.getcwd(), "b")
    assert storage.absolute("~/data") == storage.absolute("file://~/data") == "/home/me/data"
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"
    assert storage.absolute("") == ""
