"""Where a checkpoint is, and what its small files say: model type, pixel bounds and normalization.

Knows folders, hub names and `preprocessor_config.json`; not weights, tokenizers or arrays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError

DEMO = "demo"
_DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "checkpoint"
_EXPECTED = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


@dataclass(frozen=True)
class ProcessorFacts:
    """Bounds on the area after resizing, in pixels, and the normalization. The defaults are the published values."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


def resolve_model(path: str) -> str:
    """The folder, hub name or bucket prefix that the config's `model.path` stands for."""
    if path == DEMO:
        return str(_DEMO_FOLDER)
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise CheckpointError(f"no model folder at {path}: set model.path to a checkpoint folder or a hub name")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_model(model_path: str, *, revision: str | None = None, weights: bool = True) -> None:
    """Raise CheckpointError unless the folder or hub name holds a Qwen2-VL checkpoint, with its weights if asked."""
    config = read_config(model_path, revision=revision)
    if config is None:
        raise CheckpointError(
            f"can't find config.json in {model_path!r}: "
            "set model.path to a folder with a Qwen2-VL checkpoint or to a hub name that this machine can reach"
        )
    if config.get("model_type") != "qwen2_vl":
        raise CheckpointError(
            f"{model_path!r} is a checkpoint of model type {config.get('model_type')!r}; this pipeline runs qwen2_vl"
        )
    if weights and Path(model_path).is_dir() and not any(Path(model_path).glob("*.safetensors")):
        raise CheckpointError(f"{model_path!r} has a config.json but no *.safetensors: the weights are missing")


def read_config(model_path: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """The checkpoint's `config.json`; None where there is none."""
    return _read_json(model_path, "config.json", revision)


def read_processor_facts(model_path: str, *, revision: str | None = None) -> ProcessorFacts:
    """Facts from `preprocessor_config.json` (images) and, if there is one, `video_preprocessor_config.json` (videos).

    Raises CheckpointError when the first is missing, or describes another family's patches.
    """
    image = _read_json(model_path, "preprocessor_config.json", revision)
    if image is None:
        raise CheckpointError(
            f"can't find preprocessor_config.json in {model_path!r}: "
            "set model.path to a folder with a Qwen2-VL checkpoint or to a hub name"
        )
    for name, expected in _EXPECTED.items():
        if image.get(name, expected) != expected:
            raise CheckpointError(f"{model_path!r} has {name} {image[name]}; Qwen2-VL has {expected}")
    video = _read_json(model_path, "video_preprocessor_config.json", revision) or {}
    default = ProcessorFacts()
    return ProcessorFacts(
        *_bounds(image, default.min_pixels, default.max_pixels),
        *_bounds(video, default.video_min_pixels, default.video_max_pixels),
        image_mean=tuple(image.get("image_mean", default.image_mean)),
        image_std=tuple(image.get("image_std", default.image_std)),
    )


def _bounds(config: dict[str, Any], min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(min_pixels, max_pixels) in either spelling; `min_pixels` and `max_pixels` win, as they do in transformers."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or min_pixels
    high = config.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or max_pixels
    return int(low), int(high)


def find_file(model_path: str, name: str, *, revision: str | None = None) -> Path | None:
    """One of the checkpoint's files, from its folder or through the hub's cache; None where it has none, or the hub
    can't be reached.

    Raises CheckpointError when the hub refuses: the repository is unknown, private or gated.
    """
    if Path(model_path).is_dir():
        file = Path(model_path, name)
        return file if file.is_file() else None
    from huggingface_hub import errors, hf_hub_download  # a second of imports, for hub names only

    try:
        return Path(hf_hub_download(model_path, name, revision=revision))
    except errors.EntryNotFoundError:  # also when offline, if the cache has no such file
        return None
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model_path!r} is a gated repository: accept its terms on the hub and set HF_TOKEN, or set model.path to "
            "a local folder"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"the hub has no {model_path!r}{f' at revision {revision!r}' if revision else ''}: set model.path to a "
            "folder with a Qwen2-VL checkpoint or to a hub name, and HF_TOKEN if it is private"
        ) from error


def _read_json(model_path: str, name: str, revision: str | None) -> dict[str, Any] | None:
    found = find_file(model_path, name, revision=revision)
    if found is None:
        return None
    values = json.loads(found.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values
