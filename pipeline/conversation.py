"""What is asked of the model in one row: turns of text and media, in the order in which the model reads them.

Plain data that the steps hand to each other. Knows no tokens, pixels or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

MediumKind: TypeAlias = Literal["image", "video"]
Source: TypeAlias = str | bytes | tuple[str | bytes, ...]
"""A URI or path, or the encoded file itself; of a video also the list of its frames, as pictures."""
Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class MediumSettings:
    """How a medium is to be seen. None means: as the job's config says. A field's metadata are its bounds."""

    min_pixels: int | None = field(default=None, metadata={"ge": 1})
    """Least area in pixels after resizing (for a video: of each frame)."""
    max_pixels: int | None = field(default=None, metadata={"ge": 1})
    """Largest area in pixels after resizing (for a video: of each frame)."""
    fps: float | None = field(default=None, metadata={"videos_only": True, "gt": 0})
    """Frames a second to sample; videos only."""
    num_frames: int | None = field(default=None, metadata={"videos_only": True, "ge": 2})
    """Frames to sample in all; videos only, excludes `fps`."""
    start_s: float | None = field(default=None, metadata={"videos_only": True, "ge": 0})
    """Second at which the segment begins; videos only."""
    end_s: float | None = field(default=None, metadata={"videos_only": True, "gt": 0})
    """Second at which the segment ends; videos only."""
    resized_height: int | None = field(default=None, metadata={"ge": 1, "part_only": True})
    """Height in pixels after resizing, with `resized_width` in place of the bounds. Only a part of `messages` can
    set this and the settings below, not a column."""
    resized_width: int | None = field(default=None, metadata={"ge": 1, "part_only": True})
    """Width in pixels after resizing."""
    total_pixels: int | None = field(default=None, metadata={"videos_only": True, "ge": 1, "part_only": True})
    """Largest area of all frames together, counted as `media.video_total_pixels`; videos only."""
    min_frames: int | None = field(default=None, metadata={"videos_only": True, "ge": 1, "part_only": True})
    """Fewest frames to sample by `fps`; videos only."""
    max_frames: int | None = field(default=None, metadata={"videos_only": True, "ge": 2, "part_only": True})
    """Most frames to sample by `fps`; videos only."""


VIDEO_SETTINGS = tuple(each.name for each in fields(MediumSettings) if each.metadata.get("videos_only"))
"""Names of the settings that only videos have."""


@dataclass(frozen=True)
class Text:
    """A piece of text inside a message."""

    text: str


@dataclass(frozen=True)
class MediumPart:
    """An image or a video inside a message: where its bytes are and how they are to be seen."""

    kind: MediumKind
    source: Source = field(repr=False)
    settings: MediumSettings = MediumSettings()
    name: str | None = None
    """What the file is called whose bytes are the source."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Text | MediumPart, ...]


@dataclass(frozen=True)
class Conversation:
    """One row's request, before any of its media has been looked at."""

    messages: tuple[Message, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The row's own sampling parameters; they win over the config's."""

    @property
    def media(self) -> tuple[MediumPart, ...]:
        """All media, in order of appearance."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, MediumPart))
