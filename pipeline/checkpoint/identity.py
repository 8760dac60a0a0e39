"""Whether the model at a path is still the one that a run began with: a fingerprint of each of its files.

A small file's mark is its hash. The mark of weights is their size and a hash of some blocks spread over them, so that
nobody waits for gigabytes to be read; in a bucket a file's mark is its size and version, as listed. A hub name has
one mark, the commit in the hub's local cache. Loads no model library.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from pipeline import storage

_WEIGHTS = ".safetensors"
_SMALL = (".json", ".jinja", ".txt")
"""Configs, tokenizer, chat template, merges."""
_BLOCKS = 16
_BLOCK_BYTES = 4096
_COMMIT = "commit"
_HASH_DIGITS = 16


def model_identity(
    model_path: str, *, revision: str | None = None, storage_options: storage.StorageOptions = None
) -> dict[str, str]:
    """File names to marks. Empty where nothing is known yet: a hub model that has not been downloaded.

    Raises OSError when a folder or bucket can't be read.
    """
    if storage.is_remote(model_path):
        found = storage.list_files(model_path, storage_options, recursive=False)
        marks = {storage.name(file.path): f"{file.size:,} bytes, version {file.version}" for file in found}
        return {name: mark for name, mark in marks.items() if name.endswith((_WEIGHTS, *_SMALL))}
    if not os.path.isdir(model_path):
        commit = _hub_commit(model_path, revision or "main")
        return {_COMMIT: commit} if commit else {}
    marks = {}
    for file in sorted(Path(model_path).iterdir()):
        if file.name.endswith(_WEIGHTS):
            marks[file.name] = _mark_of_weights(file)
        elif file.name.endswith(_SMALL) and not file.name.startswith("."):
            marks[file.name] = _hashed(file.read_bytes())
    return marks


def model_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """What changed, one line per file; empty where one of the two is unknown."""
    if not old or not new:
        return []
    lines = []
    for name in sorted({*old, *new}):
        if name not in new:
            lines.append(f"{name} is gone")
        elif name not in old:
            lines.append(f"{name} is new")
        elif old[name] != new[name]:
            lines.append(f"{name}: was {old[name]}, is {new[name]}")
    return lines


def _mark_of_weights(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for block in range(_BLOCKS):
            digest.update(os.pread(file.fileno(), _BLOCK_BYTES, max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1)))
    return f"{size:,} bytes, {digest.hexdigest()[:_HASH_DIGITS]}"


def _hashed(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HASH_DIGITS]


def _hub_commit(name: str, revision: str) -> str | None:
    """The commit that the hub's cache on this machine holds for a name; None where it has none."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import try_to_load_from_cache  # heavy, and needed for hub names only

    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except ValueError:  # not a hub name either
            return None
        if isinstance(found, str):
            return Path(found).parent.name
    return None
