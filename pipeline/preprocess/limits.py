"""What may be fetched, how media are seen, and what no medium may exceed: plain settings for the rest of this folder.

Settings of the job's config (sections `media` and `input`) have their defaults and explanations there. Knows numbers
and names only: no config file, codec or network. Cheap to import and to send to another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.checkpoint.families.family import Family

MIB = 1024 * 1024
MAX_FETCHES = 256
"""Media of an actor that may be under way at once, slow ones included."""


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How media are seen where their row does not say otherwise, and the limits that hold for every row."""

    family: Family
    """Of the checkpoint."""
    resize: Literal["torch", "pil"]
    min_pixels: int
    max_pixels: int
    video_min_pixels: int | None
    """Of a frame. None where the family bounds all frames together alone."""
    video_max_pixels: int | None
    video_total_pixels: int
    """Of all frames, counted as the family counts them."""
    fps: float
    num_frames: int | None
    min_frames: int
    max_frames: int
    video_frames: Literal["exact", "keyframes"]
    frame_sampling: Literal["transformers", "qwen"]
    truncated_images: Literal["error", "accept"]
    max_visual_tokens: int | None
    timeout_s: float
    memory_limit_mb: int
    max_bytes: int
    max_image_pixels: int
    max_video_s: float
    max_video_frames: int


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Where rows may take their media from, and how patiently."""

    base: str
    """Folder or bucket prefix of the manifest: relative paths start here, and everything below it is allowed."""
    allow: tuple[str, ...]
    """Further places: local folders, bucket prefixes such as `s3://bucket/prefix`, hosts; `*` allows any path,
    bucket and public host. A host that is named here may be in a private network."""
    allow_private_hosts: bool
    storage_options: Mapping[str, Any]
    """fsspec's options for buckets, either flat or for each protocol (`{"s3": {...}}`)."""
    timeout_s: float
    """Seconds for one attempt at fetching one medium."""
    max_bytes: int
    retries: int
    """Further attempts after a fault that may pass: connections, 5xx answers, throttling."""
