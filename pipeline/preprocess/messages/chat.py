"""The chat forms of a row's `messages`: OpenAI's and Hugging Face's, as Arrow structs or JSON text.

    {"type": "image_url", "image_url": {"url": ...}}        OpenAI
    {"type": "image", "url" | "path" | "image": ...}        Hugging Face
    {"type": "video", "video": ..., "fps": 1}               with Qwen's settings inside a part

What can't be understood is a MessageError or SettingError that says where, what was found and what is allowed; nothing
is dropped silently. Knows nothing of the row's other columns.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from pipeline.conversation import VIDEO_SETTINGS, MediumKind, MediumPart, MediumSettings, Message, Role, Source, Text
from pipeline.errors import MessageError, SettingError
from pipeline.preprocess.messages.settings import medium_settings
from pipeline.preprocess.messages.values import from_json, is_empty, is_null, plain, shown

_ROLES: tuple[str, ...] = get_args(Role)
_TEXT_TYPES = {"text", "input_text", "output_text"}
_MEDIUM_TYPES: Mapping[str, MediumKind] = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_ALLOWED_TYPES = ("text", "image", "video", "image_url", "video_url")
_SOURCE_KEYS: Mapping[MediumKind, tuple[str, ...]] = {
    kind: (kind, f"{kind}_url", "url", "path", "bytes", "base64") for kind in get_args(MediumKind)
}
_SETTING_NAMES = {each.name: each.name for each in fields(MediumSettings)} | {
    "nframes": "num_frames",
    "sample_fps": "fps",
    "video_start": "start_s",
    "video_end": "end_s",
}
_IGNORED_KEYS = {"cache_control", "uuid", "raw_fps"}
"""Keys that other software leaves in parts and that say nothing about how a medium is seen."""


NO_SOURCE = b""
"""The source of a part that names none: it takes the next medium of the row's own columns."""


def read_messages(value: Any) -> list[Message]:
    """The turns in a row's `messages`, where parts may have NO_SOURCE.

    Raises MessageError, or SettingError for a setting inside a part.
    """
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise MessageError(f"messages is not JSON: {error}; found {shown(value)}") from error
    if not isinstance(value, list):
        raise MessageError(f"messages must be a list of turns; found {shown(value)}")
    if not value:
        raise MessageError("messages is an empty list; expected at least one user turn")
    return [_read_message(message, f"messages[{number}]") for number, message in enumerate(value)]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise MessageError(f"{where} must be an object with role and content; found {shown(message)}")
    role = message.get("role")
    if role not in _ROLES:
        found = f"role {shown(role)}" if role is not None else f"the keys {', '.join(map(str, message)) or 'none'}"
        raise MessageError(f"{where} has {found}; expected a role: {', '.join(_ROLES)}")
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise MessageError(f"{where} has {key}, which the model does not know; allowed: role, content")
    content = plain(message.get("content"))
    parts: list[Text | MediumPart]
    if isinstance(content, str | dict):
        parts = [_read_part(content, f"{where}.content")]
    elif isinstance(content, list):
        parts = [_read_part(part, f"{where}.content[{number}]") for number, part in enumerate(content)]
    else:
        raise MessageError(f"{where}.content must be text or a list of parts; found {shown(content)}")
    if role == "user" and not any(isinstance(part, MediumPart) or part.text.strip() for part in parts):
        raise MessageError(f"{where} is a user turn without text or media")
    return Message(role, tuple(parts))


def _read_part(part: Any, where: str) -> Text | MediumPart:
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise MessageError(f"{where} must be text or an object with a type; found {shown(plain(part))}")
    # Arrow gives every part all keys of all parts, null where it had none.
    part = {key: plain(value) for key, value in part.items() if not is_null(value)}
    kind = part.pop("type", None) or _implied_type(part, where)
    if isinstance(kind, str) and kind in _TEXT_TYPES:
        return _read_text(part, where)
    if isinstance(kind, str) and kind in _MEDIUM_TYPES:
        return _read_medium(_MEDIUM_TYPES[kind], part, where)
    raise MessageError(f"{where} has the type {shown(kind)}; allowed: {', '.join(_ALLOWED_TYPES)}")


def _implied_type(part: Mapping[str, Any], where: str) -> str:
    """The type of a part that names none, as Qwen's examples do: `{"image": "a.jpg"}`."""
    implied = [key for key in _ALLOWED_TYPES if part.get(key) not in (None, "")]
    if len(implied) != 1:
        raise MessageError(
            f"{where} has no type, and its keys ({', '.join(map(str, part)) or 'none'}) do not imply one; allowed: "
            f"{', '.join(_ALLOWED_TYPES)}"
        )
    return implied[0]


def _read_text(part: Mapping[str, Any], where: str) -> Text:
    text = part.get("text", part.get("content"))
    if not isinstance(text, str):
        raise MessageError(f"{where} is a text part whose text is {shown(text)}; expected a string")
    for key, value in part.items():
        if key in _SETTING_NAMES and not is_empty(value):
            raise SettingError(f"{where} sets {key} to {shown(value)} on a text part; it applies to media only")
        if key in _MEDIUM_TYPES and not is_empty(value):
            raise MessageError(f"{where} has the type text but also {key}; write the medium as a part of its own")
    return Text(text)


def _read_medium(kind: MediumKind, part: Mapping[str, Any], where: str) -> MediumPart:
    sources, rest = _split_sources(kind, part)
    settings = _part_settings(rest, where)
    wrong = [name for name in VIDEO_SETTINGS if kind == "image" and getattr(settings, name) is not None]
    if wrong:
        raise SettingError(f"{where} sets {wrong[0]} on an image; it applies to videos only")
    source = _one_source(kind, sources, where) if sources else NO_SOURCE
    names = [value for key, value in sources.items() if key.rpartition(".")[2] in ("path", "url")]
    name = names[0] if names and isinstance(source, bytes) and isinstance(names[0], str) else None
    return MediumPart(kind, source, settings, name)


def _split_sources(kind: MediumKind, part: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the medium may come from, by key, and what else the part says."""
    keys = _SOURCE_KEYS[kind]
    sources: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in part.items():
        if key not in keys:
            rest[key] = value
        elif isinstance(value, dict):
            # `{"image_url": {"url": ..., "detail": ...}}`: what is inside belongs to the part.
            for name, inner in value.items():
                (sources if name in keys else rest)[f"{key}.{name}" if name in keys else name] = plain(inner)
        else:
            sources[key] = value
    return {key: value for key, value in sources.items() if not is_empty(value)}, rest


def _part_settings(rest: Mapping[str, Any], where: str) -> MediumSettings:
    """The settings among a part's keys; whatever else is set there is refused."""
    settings: dict[str, Any] = {}
    for key, value in rest.items():
        if is_empty(value) or key in _IGNORED_KEYS:
            continue
        if key == "detail":
            if value != "auto":
                raise SettingError(f"{where} sets detail to {shown(value)}; set min_pixels or max_pixels instead")
        elif key not in _SETTING_NAMES:
            raise SettingError(
                f"{where} sets {key} to {shown(value)}, which can't be applied; allowed besides the source: "
                f"{', '.join(_SETTING_NAMES)}"
            )
        elif _SETTING_NAMES[key] in settings:
            raise SettingError(f"{where} sets {_SETTING_NAMES[key]} twice, once as {key}; leave one")
        else:
            settings[_SETTING_NAMES[key]] = value
    return medium_settings(settings, f"{where}.")


def _one_source(kind: MediumKind, sources: Mapping[str, Any], where: str) -> Source:
    """The source that a part names; its bytes, where it has both bytes and a path."""
    found = {key: value for key, value in sources.items() if key.rpartition(".")[2] == "bytes"} or dict(sources)
    (key, value), *others = found.items()
    if any(other != value for _, other in others):
        raise MessageError(f"{where} has several sources: {', '.join(found)}; leave one")
    form = key.rpartition(".")[2]
    if form == "base64":
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise MessageError(f"{where}.{key} is not base64: {error}") from error
    if form == "bytes" and isinstance(value, str):
        raise MessageError(f"{where}.{key} is text; JSON can't hold bytes: use base64 or a data: URL")
    if isinstance(value, str | bytes):
        return value
    if isinstance(value, list) and kind == "video":
        for number, frame in enumerate(value):
            if not isinstance(frame, str | bytes) or not frame:
                raise MessageError(f"{where}.{key}[{number}] must be a URI, a path or bytes; found {shown(frame)}")
        return tuple(value)
    raise MessageError(f"{where}.{key} must be a URI, a path or bytes; found {shown(value)}")
