"""run.json: what a run was asked to do, on what, by which versions, and how it went.

Also decides whether a run may be continued in its folder: whatever changes the outputs must be the same.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoint.adapter import resolve_adapter
from pipeline.checkpoint.identity import model_changes, model_identity
from pipeline.config import CaptionConfig, written
from pipeline.errors import CheckpointError, OutputError
from pipeline.manifest.changes import difference, keep_file_numbers, only_appended
from pipeline.manifest.files import Manifest

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "flash-attn",
    "ray",
    "pyarrow",
    "pandas",
    "pillow",
    "av",
    "numpy",
    "fsspec",
)
# Settings in these sections change the rows' answers; the others change only how the work is done.
_IDENTITY_SECTIONS = ("prompt", "media", "sampling")
_NO_IDENTITY = {"media.timeout_s", "media.memory_limit_mb"}
_FILES = {"model.files": "model.path", "model.adapter_files": "model.adapter"}
"""Fingerprints of files, and the settings that say where the files are."""
_ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT_VARIABLE = "QWEN2_VL_BATCH_COMMIT"
"""Environment variable with the commit of code that travels without its history."""


def identity(config: CaptionConfig, model_path: str) -> dict[str, Any]:
    """Every setting that alters outputs, by full name, and the model's files. Raises CheckpointError."""
    model, adapter = config.model, resolve_adapter(config.model.adapter)

    def files(setting: str, path: str, revision: str | None) -> dict[str, str]:
        try:
            return model_identity(path, revision=revision, storage_options=model.storage_options)
        except OSError as error:
            raise CheckpointError(f"{setting} {path} can't be read: {error}") from error

    values: dict[str, Any] = {
        "model.path": model_path,
        "model.files": files("model.path", model_path, model.revision),
        "model.revision": model.revision,
        "model.adapter": adapter,
        "model.adapter_files": files("model.adapter", adapter, model.adapter_revision) if adapter else {},
        "model.adapter_revision": model.adapter_revision,
        "model.dtype": config.model.dtype,
        "input.columns": dict(sorted(config.input.columns.items())),
        "input.csv.delimiter": config.input.csv.delimiter,
        "input.csv.quote": config.input.csv.quote,
        "input.csv.escape": config.input.csv.escape,
        "input.settings": sorted(config.input.settings),
        "input.allow_missing_media": config.input.allow_missing_media,
        # A list, since the results' columns have this order.
        "input.keep": [name if name == theirs else {name: theirs} for name, theirs in config.input.keep.items()],
        "input.limit": config.input.limit,
    }
    for section, settings in config.model_dump(mode="json", include=set(_IDENTITY_SECTIONS)).items():
        for key, value in settings.items():
            if f"{section}.{key}" not in _NO_IDENTITY:
                values[f"{section}.{key}"] = value
    return values


def check_unchanged(
    record: Mapping[str, Any], config: CaptionConfig, asked: Mapping[str, Any], manifest: Manifest, *, folder: str
) -> Manifest:
    """The manifest to continue with, its old files first. Raises OutputError that shows what changed."""
    before = {"model.adapter": None, **record.get("identity", {})}  # runs of older versions had none
    names = [name for name, old in before.items() if name not in _FILES and asked.get(name) != old]
    allows_more = config.run.on_change == "new-rows"
    if "input.limit" in names and _limit_grew(before["input.limit"], asked["input.limit"]):
        names.remove("input.limit")
    settings = [f"{name}: was {written(before[name])}, is {written(asked.get(name))}" for name in names]
    if not any(name.startswith("model.") for name in names):  # another model has other files anyway
        for files, path in _FILES.items():
            changes = model_changes(before.get(files, {}), asked.get(files, {}))
            settings += [f"{asked[path]}: {line}" for line in changes]
    old, new = record["manifest"]["fingerprint"], manifest.fingerprint()
    appended = only_appended(old, new)
    rows = [] if allows_more and appended else difference(old, new)
    if settings or rows:
        if settings:
            way_out = f"choose another output.path, or go back to the old settings{' and files' if rows else ''}"
        elif appended:
            way_out = "--on-change=new-rows includes the new files; or choose another output.path"
        else:
            way_out = (
                "leave the old files as they were and put new rows into another file of the folder (input.path: the "
                "folder; --on-change=new-rows), or choose another output.path"
            )
        lines = "\n".join(f"  {line}" for line in [*settings, *rows])
        raise OutputError(f"{folder} holds a run with other settings or rows:\n{lines}\n{way_out}")
    return keep_file_numbers(manifest, old)


def _limit_grew(old: int | None, new: int | None) -> bool:
    return old is not None and (new is None or new > old)


def new_record(config: CaptionConfig, asked: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """The content of run.json when a run begins."""
    return {
        "state": "running",
        "config": _without_secrets(config.model_dump(mode="json")),
        "identity": dict(asked),
        "manifest": {
            "path": manifest.path,
            "fingerprint": manifest.fingerprint(),
            "versions": [file.version for file in manifest.files],
            "notes": list(manifest.notes),
        },
        "model": {name: asked[f"model.{name}"] for name in ("path", "revision", "adapter", "adapter_revision")},
        "versions": versions(),
        "hardware": hardware(),
        "started": now(),
        "finished": None,
    }


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The config without the values of storage options, some of which are credentials."""
    for section in ("input", "model", "output"):
        options = values[section]["storage_options"]
        values[section]["storage_options"] = dict.fromkeys(options, "(not recorded)")
    return values


def now() -> str:
    """The time now, in ISO format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of the software that may change an answer."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, "qwen2-vl-batch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = code_commit(_ROOT)
    return {**found, "commit": commit} if commit else found


def code_commit(root: Path) -> str | None:
    """The commit of the code in a folder, with `-dirty` when tracked files differ from it. None when it is unknown.

    Without a checkout, COMMIT_VARIABLE has it, which is set for submitted jobs.
    """
    if not (root / ".git").exists():  # git would look in the folders above, too
        return os.environ.get(COMMIT_VARIABLE)
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """The driver's machine."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
