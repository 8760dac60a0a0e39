"""Compare a manifest with the one of an earlier run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.errors import counted
from pipeline.manifest.files import Manifest, relative

_MAX_DIFFERENCES = 20


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one fingerprint to another, a line for each change; empty when nothing did.

    The order of the files is ignored: `keep_file_numbers` restores it, and it differs once a job has added new files.
    """
    lines = []
    if old["format"] != new["format"]:
        lines.append(f"the manifest's format was {old['format']} and is {new['format']}")
    before = {name: (size, rows) for name, size, rows in old["files"]}
    after = {name: (size, rows) for name, size, rows in new["files"]}
    for name, (size, rows) in before.items():
        if name not in after:
            lines.append(f"{name} is gone ({counted(rows, 'row')})")
        elif after[name][1] != rows:
            lines.append(f"{name} had {counted(rows, 'row')} and has {after[name][1]:,}")
        elif after[name][0] != size:
            lines.append(f"{name} had {size:,} bytes and has {after[name][0]:,}, with as many rows")
    lines += [f"{name} is new ({counted(rows, 'row')})" for name, (_, rows) in after.items() if name not in before]
    if len(lines) > _MAX_DIFFERENCES:
        lines[_MAX_DIFFERENCES:] = [f"and {len(lines) - _MAX_DIFFERENCES} more changes"]
    return lines


def only_appended(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether every old file is still there unchanged, so that a resumed job can take in the new files."""
    files = {tuple(file) for file in new["files"]}
    return old["format"] == new["format"] and files.issuperset(tuple(file) for file in old["files"])


def keep_file_numbers(manifest: Manifest, old: Mapping[str, Any]) -> Manifest:
    """The manifest with the files of an earlier fingerprint first, in their old order, and the new ones behind them.

    File numbers are part of a row's identity, so a new file must not move the old ones.
    """
    numbers = {name: number for number, (name, _, _) in enumerate(old["files"])}
    names = [relative(file.path, manifest.base) for file in manifest.files]
    order = sorted(range(len(names)), key=lambda number: (numbers.get(names[number], math.inf), number))
    return replace(
        manifest,
        files=tuple(manifest.files[number] for number in order),
        offsets=tuple(manifest.offsets[number] for number in order) if manifest.offsets else (),
    )
