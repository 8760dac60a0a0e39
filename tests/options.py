"""Options of preprocessing as a job has them: the config's defaults, and the bounds of the published checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.checkpoint.families import DEFAULT_FAMILY
from pipeline.checkpoint.families.family import Family
from pipeline.config import InputConfig, MediaConfig
from pipeline.execution import stages
from pipeline.preprocess.limits import FetchOptions, MediaOptions

_PUBLISHED = replace(DEFAULT_FAMILY, max_pixels=16384 * 28 * 28)


def media_options(family: Family = _PUBLISHED, **changes: Any) -> MediaOptions:
    return replace(stages.media_options(MediaConfig(), family), **changes)


def fetch_options(base: str, **changes: Any) -> FetchOptions:
    return replace(stages.fetch_options(InputConfig(path=base), MediaConfig(), base), **changes)
