"""What may be fetched, how media are seen, and what no medium may exceed: plain settings for the rest of this folder.

The job's config has their defaults and their explanations (`input`, `media`). Knows numbers and names only: no config
file, codec or network. Cheap to import and to send to another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """How media are seen where their row does not say otherwise, and the limits that hold for every row."""

    resize: Literal["torch", "pil"]
    min_pixels: int
    """Least area of an image after resizing."""
    max_pixels: int
    """Largest area of an image after resizing."""
    video_min_pixels: int
    """Least area of a video's frame after resizing."""
    video_max_pixels: int
    """Largest area of a video's frame after resizing."""
    video_total_pixels: int
    """Largest area of a whole video: half the sum of its resized frames, since two frames make one temporal step."""
    fps: float
    """Frames a second to sample from a video."""
    num_frames: int | None
    """Frames to sample from every video, in place of `fps`."""
    min_frames: int
    """Fewest frames that `fps` may lead to, where the video has them."""
    max_frames: int
    """Most frames that `fps` may lead to."""
    video_frames: Literal["exact", "keyframes"]
    max_visual_tokens: int | None
    """Most visual tokens of one row; its media are shrunk together until they fit, and the receipts say so."""
    timeout_s: float
    """Seconds that decoding one medium may take before its process is killed."""
    memory_limit_mb: int
    """MiB that decoding may take beyond an idle decoder process before it is killed."""
    max_bytes: int
    """Largest encoded medium in bytes."""
    max_image_pixels: int
    """Largest area of an image, or of a video's frame, before resizing."""
    max_video_s: float
    """Longest video in seconds."""
    max_video_frames: int
    """Most frames that a video may have in its file."""


@dataclass(frozen=True, kw_only=True)
class FetchOptions:
    """Where rows may take their media from, and how patiently."""

    base: str
    """Folder or bucket prefix of the manifest: relative paths start here, and everything below it is allowed."""
    allow: tuple[str, ...]
    """Further places: local folders, bucket prefixes such as `s3://bucket/prefix`, hosts; `*` allows any path,
    bucket and public host. A host that is named here may be in a private network."""
    allow_private_hosts: bool
    """Whether http(s) URLs may lead into private networks (10.0.0.0/8, 127.0.0.1, 169.254.169.254, ...)."""
    storage_options: Mapping[str, Any]
    """fsspec's options for buckets, either flat or for each protocol (`{"s3": {...}}`)."""
    timeout_s: float
    """Seconds for one attempt at fetching one medium."""
    max_bytes: int
    """Largest medium in bytes."""
    retries: int
    """Further attempts after a fault that may pass: connections, 5xx answers, throttling."""
