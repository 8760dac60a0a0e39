"""Compare a manifest with the one of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.errors import counted
from pipeline.manifest.files import MEDIA, Manifest

_MAX_DIFFERENCES = 20


class RecordedFile(NamedTuple):
    """A file as a fingerprint has it."""

    size: int
    num_rows: int
    digest: str | None = None
    """None: runs of older versions have recorded none."""


def recorded_files(fingerprint: Mapping[str, Any]) -> dict[str, RecordedFile]:
    """By name, in order."""
    is_listed = fingerprint.get("format") == MEDIA  # runs of older versions have recorded the listings' whole paths
    return {storage.name(name) if is_listed else name: RecordedFile(*facts) for name, *facts in fingerprint["files"]}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one fingerprint to another, a line for each change; empty when nothing did.

    The order of the files is ignored: `keep_file_numbers` restores it, and it differs once a job has added new files.
    """
    lines = []
    if old["format"] != new["format"]:
        lines.append(f"the manifest's format was {old['format']} and is {new['format']}")
    before, after = recorded_files(old), recorded_files(new)
    for name, (size, rows, _) in before.items():
        if name not in after:
            lines.append(f"{name} is gone ({counted(rows, 'row')})")
        elif after[name][1] != rows:
            lines.append(f"{name} had {counted(rows, 'row')} and has {after[name][1]:,}")
        elif after[name][0] != size:
            lines.append(f"{name} had {size:,} bytes and has {after[name][0]:,}, with as many rows")
        elif not _is_same(before[name], after[name]):
            lines.append(f"{name} has other content, with as many bytes and rows")
    lines += [f"{name} is new ({counted(rows, 'row')})" for name, (_, rows, _) in after.items() if name not in before]
    if len(lines) > _MAX_DIFFERENCES:
        lines[_MAX_DIFFERENCES:] = [f"and {len(lines) - _MAX_DIFFERENCES} more changes"]
    return lines


def only_appended(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether every old file is still there unchanged, so that a resumed job can take in the new files."""
    before, after = recorded_files(old), recorded_files(new)
    kept = (name in after and _is_same(file, after[name]) for name, file in before.items())
    return old["format"] == new["format"] and all(kept)


def same_rows(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether a row key means the same row under both fingerprints. None where only digests could tell, and one of the
    two lacks some."""
    mine, theirs = recorded_files(one), recorded_files(other)
    if one.get("format") != other.get("format") or list(mine) != list(theirs):
        return False
    if not all(_is_same(file, theirs[name]) for name, file in mine.items()):
        return False
    return None if any(file.digest is None for file in (*mine.values(), *theirs.values())) else True


def _is_same(old: RecordedFile, new: RecordedFile) -> bool:
    """Whether a file's rows are the same, as far as both fingerprints tell."""
    return old[:2] == new[:2] and (old.digest == new.digest or None in (old.digest, new.digest))


def keep_file_numbers(manifest: Manifest, old: Mapping[str, Any]) -> Manifest:
    """The manifest with the files of an earlier fingerprint first, in their old order, and the new ones behind them.

    File numbers are part of a row's identity, so a new file must not move the old ones.
    """
    numbers = {name: number for number, name in enumerate(recorded_files(old))}
    names = manifest.names
    order = sorted(range(len(names)), key=lambda number: (numbers.get(names[number], math.inf), number))
    return replace(
        manifest,
        files=tuple(manifest.files[number] for number in order),
        offsets=tuple(manifest.offsets[number] for number in order) if manifest.offsets else (),
    )
