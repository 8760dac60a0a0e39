"""From the config to the options of both stages: the one place that the job, its plan and its benchmarks build from.

Knows the config, the checkpoint's facts and the manifest's columns; nothing of Ray or of where a stage runs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from pipeline.checkpoint.adapter import check_tokens, read_adapter_config, resolve_adapter
from pipeline.checkpoint.cache import DEFAULT_FOLDER, ModelCache
from pipeline.checkpoint.families.family import Family
from pipeline.checkpoint.generation import published_sampling
from pipeline.checkpoint.locate import check_model, read_config, resolve_model
from pipeline.checkpoint.plain import check_plain
from pipeline.checkpoint.processor import read_processor
from pipeline.config import CaptionConfig, InputConfig, MediaConfig
from pipeline.engine import EngineOptions
from pipeline.engine.adapter import check_adapter
from pipeline.errors import ConfigError
from pipeline.generate import GenerateOptions
from pipeline.manifest.files import MEDIA, CsvDialect, Manifest, WorkUnit
from pipeline.manifest.find import open_manifest
from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.manifest.work import plan_work
from pipeline.preprocess.limits import FetchOptions, MediaOptions
from pipeline.preprocess.messages.columns import MessageOptions, check_columns, has_content, needed_columns
from pipeline.preprocess.prompt import ChatTokenizer
from pipeline.preprocess.stage import PreprocessOptions
from pipeline.results.parts import check_partition
from pipeline.results.run_folder import RunFolder


@dataclass(frozen=True)
class Stages:
    """What both stages need to run, here or in actors."""

    preprocess: PreprocessOptions
    generate: GenerateOptions
    columns: tuple[str, ...]
    """Manifest columns to read."""


@dataclass(frozen=True)
class OpenedStages:
    """The stages of a job, and the rows that they are asked for."""

    stages: Stages
    manifest: Manifest
    numbering: RowNumbering
    model_facts: Mapping[str, Any]
    """What run.json is to say of how the model is asked."""

    def whole_manifest(self, *, rows_per_unit: int = 32) -> list[WorkUnit]:
        """Units of work over every row, finished or not."""
        done = RowSet(self.numbering.num_rows)
        return list(
            plan_work(self.manifest, self.numbering, done, actors=1, min_rows=rows_per_unit, max_rows=rows_per_unit)
        )


def open_stages(config: CaptionConfig) -> OpenedStages:
    """Open the manifest and build the stages, for looking at rows or running the stages without Ray.

    Raises JobError where the config, the manifest or the checkpoint does not allow it.
    """
    folder = RunFolder(config.output.path, config.output.storage_options)
    model_path, manifest = resolve_model(config.model.path), open_input(config, folder)
    facts = check_settings(config, manifest, model_path)
    numbering = number_rows(manifest, config.input.limit)
    return OpenedStages(build_stages(config, model_path, manifest), manifest, numbering, facts)


def check_settings(config: CaptionConfig, manifest: Manifest, model_path: str) -> dict[str, Any]:
    """Refuse now what every actor would refuse later: columns, model, settings. Raises JobError.

    Returns what `run.json` is to say of how the model is asked.
    """
    _check_kept(config, manifest)
    by, kept = config.output.partition_by, kept_schema(config, manifest)
    if by is not None and by not in kept.names:
        raise ConfigError(
            f"output.partition_by: {by} is not a kept column; input.keep: {', '.join(kept.names) or 'none'}"
        )
    if by is not None:
        check_partition(kept.field(by))
    if manifest.num_rows:  # an empty JSONL file has no columns to look at, and no rows that would need any
        check_columns(manifest.schema.names, message_options(config))
    local = model_cache(config).local(model_path, weights=False)  # looks at a bucket's listing for the weights
    check_model(local, revision=config.model.revision, weights=local == model_path)
    check_plain(read_config(local, revision=config.model.revision) or {}, local, revision=config.model.revision)
    family = read_processor(local, revision=config.model.revision)
    media_options(config.media, family)
    prompt = config.prompt
    tokenizer = ChatTokenizer(
        local, revision=config.model.revision, thinking=prompt.thinking, allow_tokens=prompt.allow_tokens
    )
    if adapter := resolve_adapter(config.model.adapter):
        folder, revision = model_cache(config).local_adapter(adapter), config.model.adapter_revision
        check_adapter(read_adapter_config(folder, revision=revision), adapter)
        check_tokens(folder, local, revision=revision, model_revision=config.model.revision)
    return {
        "family": family.model_type,
        # Where references disagree: docs/models.md.
        "video_prompt": family.video_prompt + (" in the template's marks" if family.video_prompt != "one run" else ""),
        "text_positions": "largest so far + 1",
        "thinks": tokenizer.thinks,
        # A job's own is config.sampling.
        "published_sampling": asdict(
            published_sampling(local, family, thinks=tokenizer.thinks, revision=config.model.revision)
        ),
    }


def _check_kept(config: CaptionConfig, manifest: Manifest) -> None:
    """Raises ConfigError where the manifest lacks a column that is to be kept, by the setting that names it."""
    missing: dict[str, list[str]] = {}
    for name, theirs in config.input.keep.items():
        if theirs not in manifest.schema.names:
            missing.setdefault(config.keeper(name), []).append(theirs)
    if manifest.format == MEDIA:
        missing.pop("input.keep", None)  # a bare folder has no columns to keep, whatever the config says
    if missing:
        lacks = "; ".join(
            f"{setting}: the manifest has no column {', '.join(map(repr, names))}" for setting, names in missing.items()
        )
        hint = ". Several are written as a list, [a, b], and none as []" if "input.keep" in missing else ""
        raise ConfigError(f"{lacks}; found: {', '.join(manifest.schema.names)}{hint}")


def build_stages(config: CaptionConfig, model_path: str, manifest: Manifest) -> Stages:
    """The stages' options. `model_path` is what `resolve_model` made of the config's."""
    cache = model_cache(config)
    family = read_processor(cache.local(model_path, weights=False), revision=config.model.revision)
    messages, kept = message_options(config), kept_schema(config, manifest)
    preprocess = PreprocessOptions(
        model_path=model_path,
        revision=config.model.revision,
        messages=messages,
        add_vision_id=config.prompt.add_vision_id,
        thinking=config.prompt.thinking,
        allow_tokens=tuple(config.prompt.allow_tokens),
        media=media_options(config.media, family),
        fetch=fetch_options(config.input, config.media, manifest.base),
        sampling=asdict(config.sampling),
        kept=kept,
        kept_from=config.input.keep,
        model_cache=cache,
    )
    engine = EngineOptions(
        model_path=model_path,
        revision=config.model.revision,
        adapter=resolve_adapter(config.model.adapter),
        adapter_revision=config.model.adapter_revision,
        dtype=config.model.dtype,
        device=config.model.device,
        image_mean=family.image_mean,
        image_std=family.image_std,
        image_processor=config.media.resize,
        **asdict(config.engine),
    )
    generate = GenerateOptions(engine, kept, cache)
    kept_from = [config.input.keep[name] for name in kept.names]
    columns = tuple(dict.fromkeys([*needed_columns(manifest.schema.names, messages), *kept_from]))
    return Stages(preprocess, generate, columns)


def open_input(config: CaptionConfig, folder: RunFolder) -> Manifest:
    """The manifest that `input` names; a folder of media is listed into the run folder."""
    return open_manifest(
        config.input.path,
        format=config.input.format,
        storage_options=config.input.storage_options,
        listing_path=folder.file("manifest.parquet"),
        listing_options=folder.storage_options,
        new_media=config.run.on_change == "new-rows",
        csv=CsvDialect(**config.input.csv.model_dump()),
        is_asked=functools.partial(has_content, options=message_options(config)),
    )


def number_rows(manifest: Manifest, limit: int | None) -> RowNumbering:
    """The rows that `input.limit` leaves, file by file."""
    left = manifest.num_rows if limit is None else limit
    counts: list[int] = []
    for file in manifest.files:
        counts.append(min(file.num_rows, left))
        left -= counts[-1]
    return RowNumbering(counts)


def kept_schema(config: CaptionConfig, manifest: Manifest) -> pa.Schema:
    """The manifest columns that go into the results, under their names there."""
    schema, keep = manifest.schema, config.input.keep
    return pa.schema([schema.field(theirs).with_name(name) for name, theirs in keep.items() if theirs in schema.names])


def media_options(media: MediaConfig, family: Family) -> MediaOptions:
    """The config's, with the checkpoint's bounds where it has none. Raises ConfigError when they exclude each other."""
    values = media.model_dump()
    of_frame = family.video_area == "frame"
    for name in ("min_pixels", "max_pixels", *(("video_min_pixels", "video_max_pixels") if of_frame else ())):
        values[name] = values[name] or getattr(family, name)
    values["video_total_pixels"] = media.video_total_pixels or family.video_total_pixels or family.video_max_pixels
    for low, high in (("min_pixels", "max_pixels"), ("video_min_pixels", "video_max_pixels")):
        if values[low] and values[high] and values[low] > values[high]:
            raise ConfigError(
                f"media.{low} is {values[low]} and media.{high} {values[high]}; the first must not be larger "
                "(where the config says nothing, the checkpoint's bound holds)"
            )
    return MediaOptions(family=family, **values)


def fetch_options(source: InputConfig, media: MediaConfig, base: str) -> FetchOptions:
    """The config's, for rows of a manifest in the folder or prefix `base`."""
    return FetchOptions(
        base=base,
        allow=tuple(source.allow),
        allow_private_hosts=source.allow_private_hosts,
        storage_options=source.storage_options,
        timeout_s=source.fetch_timeout_s,
        max_bytes=media.max_bytes,
        retries=source.fetch_retries,
    )


def message_options(config: CaptionConfig) -> MessageOptions:
    return MessageOptions(
        columns=config.input.columns,
        template=config.prompt.template,
        system=config.prompt.system,
        settings=frozenset(config.input.settings),
        allow_missing_media=config.input.allow_missing_media,
    )


def model_cache(config: CaptionConfig) -> ModelCache:
    return ModelCache(config.model.cache_dir or DEFAULT_FOLDER, config.model.storage_options)
