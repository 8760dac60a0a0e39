"""A manifest row to a Conversation: column names, the two chat forms, per-row settings.

    row {messages | image, images, video, videos, prompt, ...}  --conversation-->  Conversation

Two forms of `messages` are understood, as Arrow structs or as a JSON string: OpenAI's (`{"type": "image_url",
"image_url": {"url": ...}}`) and Hugging Face's (`{"type": "image", "url" | "path" | "image": ...}`), with Qwen's
settings inside a part (`{"type": "video", "video": ..., "fps": 1}`). A row without messages asks one question: its
images, then its videos, then its prompt. Knows no tokens, pixels or files: a medium's source is handed on unread.

What wins: a row's messages over its prompt and the template; a system turn in the messages over the row's `system`, and
that over the config's; a setting in a part over the row's. Everything that can't be understood or applied is a
MessageError or SettingError that says what was found and what is allowed; nothing is dropped in silence.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, get_args

from pipeline.conversation import Conversation, MediumKind, MediumPart, MediumSettings, Message, Role, Text
from pipeline.engine.settings import SamplingParams, allowed, setting_types, within
from pipeline.errors import ConfigError, ManifestError, MessageError, SettingError
from pipeline.schema import CONTENT_COLUMNS, MANIFEST_COLUMNS, MANIFEST_ERROR, MEDIUM_SETTING_COLUMNS

MEDIA_COLUMNS: tuple[tuple[str, MediumKind], ...] = (
    ("image", "image"),
    ("images", "image"),
    ("video", "video"),
    ("videos", "video"),
)
ROLES: tuple[str, ...] = get_args(Role)

_TEXT_TYPES = {"text", "input_text", "output_text"}
_MEDIUM_TYPES: Mapping[str, MediumKind] = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video",
}  # fmt: skip
_ALLOWED_TYPES = "text, image, video, image_url, video_url"
_SOURCE_KEYS: Mapping[MediumKind, tuple[str, ...]] = {
    kind: (kind, f"{kind}_url", "url", "path", "bytes", "base64") for kind in get_args(MediumKind)
}
_SETTING_ALIASES = {"nframes": "num_frames", "video_start": "start_s", "video_end": "end_s"}
_SETTING_NAMES = {name: name for name in MEDIUM_SETTING_COLUMNS} | _SETTING_ALIASES
_VIDEO_SETTINGS = ("fps", "num_frames", "start_s", "end_s")
# Marks that other software leaves in parts and that say nothing about how a medium is seen.
_IGNORED_KEYS = {"cache_control", "uuid"}


@dataclass(frozen=True)
class MessageOptions:
    """How a manifest's columns are to be read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name to the manifest's. An empty name switches a column off that the manifest happens to have."""
    template: str | None = None
    """The user's text for rows without prompt and messages: a plain format string over the manifest's columns."""
    system: str | None = None
    """System prompt for rows without one."""

    def column(self, name: str) -> str:
        """What the manifest calls one of our columns."""
        return self.columns.get(name, name)


# ---------------------------------------------------------------------------------------------------------------------
# Columns


def check_columns(schema_names: Sequence[str], options: MessageOptions) -> None:
    """Refuse a manifest from whose columns no prompt can be made. Raises ManifestError, ConfigError for a template."""
    found = ", ".join(schema_names) or "none"
    for ours, theirs in options.columns.items():
        if ours not in MANIFEST_COLUMNS:
            raise ManifestError(f"input.columns.{ours} is no column of ours; allowed: {', '.join(MANIFEST_COLUMNS)}")
        if theirs and theirs not in schema_names:
            raise ManifestError(f"input.columns.{ours} names the column {theirs!r}; the manifest's columns: {found}")
    names = () if options.template is None else template_columns(options.template)
    missing = [name for name in names if name not in schema_names]
    if missing:
        raise ManifestError(f"prompt.template names the column {missing[0]!r}; the manifest's columns: {found}")
    usable = [name for name in CONTENT_COLUMNS if options.column(name) in schema_names]
    # A template without columns asks every row the same: with nothing to look at, the media column was not recognised.
    if not usable and not names:
        raise ManifestError(
            f"the manifest has no usable column: found {found}; looked for {', '.join(CONTENT_COLUMNS)}. "
            "Name yours with input.columns, as in `--input.columns.image url`, or use columns in prompt.template"
        )


def needed_columns(schema_names: Sequence[str], options: MessageOptions) -> list[str]:
    """The manifest's columns that `conversation` and `row_id` look at, in the manifest's order."""
    wanted = {options.column(name) for name in MANIFEST_COLUMNS} | {MANIFEST_ERROR}
    if options.template is not None:
        wanted.update(template_columns(options.template))
    return [name for name in schema_names if name in wanted]


@lru_cache(maxsize=16)
def _parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pieces of a template: literal text, and the column that follows it.

    Only `{name}` is let through: attributes, indexes and format specifications reach into Python.
    """
    pieces = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"prompt.template {template!r} is not a format string: {error}; write a literal brace twice"
        ) from error
    for literal, name, specification, conversion in parsed:
        if name is not None and ((not name.isidentifier() and _reaches_into(name)) or specification or conversion):
            raise ConfigError(
                f"prompt.template {template!r} has a field that is not a plain column name; "
                "allowed: {name}, without dots, brackets, colons or exclamation marks"
            )
        pieces.append((literal, name))
    return tuple(pieces)


def _reaches_into(name: str) -> bool:
    return not name.strip() or any(mark in name for mark in ".[]{}")


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that a template names. Raises ConfigError for anything but plain names."""
    return tuple(dict.fromkeys(name for _, name in _parse_template(template) if name is not None))


def _fill_template(template: str, row: Mapping[str, Any]) -> str:
    text = []
    for literal, name in _parse_template(template):
        text.append(literal)
        if name is None:
            continue
        value = _plain(row.get(name))
        if value is None:
            raise MessageError(f"prompt.template needs the column {name}, which is null in this row")
        if not isinstance(value, str | int | float):
            raise MessageError(f"prompt.template needs text or a number in the column {name}; found {_show(value)}")
        text.append(str(value))
    return "".join(text)


def row_id(row: Mapping[str, Any], options: MessageOptions, place: tuple[int, int]) -> str:
    """The row's `id` as text; its place (file number, row number) where it has none. Never fails."""
    value = _plain(row.get(options.column("id")))
    if value is None or value == "":
        return f"{place[0]}:{place[1]}"
    if isinstance(value, float) and value.is_integer():  # whole numbers that passed through pandas beside a null
        return str(int(value))
    return value if isinstance(value, str) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def conversation(row: Mapping[str, Any], options: MessageOptions) -> Conversation:
    """What the row asks. Raises MessageError, or SettingError for a per-row setting."""
    broken = _plain(row.get(MANIFEST_ERROR))
    if broken is not None:
        raise MessageError(str(broken))

    def value_of(name: str) -> Any:
        value = _plain(row.get(options.column(name)))
        return None if isinstance(value, str) and not value.strip() else value

    settings = _settings({name: value_of(name) for name in MEDIUM_SETTING_COLUMNS})
    sampling = {
        name: parse(name, value) for name, parse in _SAMPLING_PARSERS.items() if (value := value_of(name)) is not None
    }
    supply = _Supply(
        {kind: _row_media(value_of, kind) for kind in get_args(MediumKind)},
        {kind: [options.column(name) for name, of in MEDIA_COLUMNS if of == kind] for kind in get_args(MediumKind)},
    )
    messages = value_of("messages")
    if messages is not None:
        turns = _read_messages(messages, supply)
        supply.check_used()
    else:
        turns = [_read_question(value_of("prompt"), row, options, supply)]
    turns = _with_system(turns, value_of("system"), options.system)
    if turns[-1].role != "user":
        raise MessageError(f"the last turn is the {turns[-1].role}'s; it must be the user's, for the model answers it")
    return Conversation(_apply_row_settings(turns, settings), sampling)


def _read_question(prompt: Any, row: Mapping[str, Any], options: MessageOptions, supply: _Supply) -> Message:
    """A row without messages: images, videos, then the text."""
    if prompt is None and options.template is not None:
        prompt = _fill_template(options.template, row)
    if prompt is not None and not isinstance(prompt, str):
        raise MessageError(f"{options.column('prompt')} must be text; found {_show(prompt)}")
    parts: list[Text | MediumPart] = [*supply.rest("image"), *supply.rest("video")]
    if prompt is not None and prompt.strip():
        parts.append(Text(prompt))
    if not parts:
        looked = ", ".join(options.column(name) for name in CONTENT_COLUMNS if options.column(name))
        raise MessageError(f"the row asks nothing: {looked} are all null or empty")
    return Message("user", tuple(parts))


def _with_system(turns: list[Message], of_row: Any, of_options: str | None) -> list[Message]:
    if any(turn.role == "system" for turn in turns):
        return turns
    if of_row is not None and not isinstance(of_row, str):
        raise MessageError(f"system must be text; found {_show(of_row)}")
    system = of_row or of_options
    return [Message("system", (Text(system),)), *turns] if system else turns


class _Supply:
    """The media of a row's own columns, taken in order."""

    def __init__(self, media: Mapping[MediumKind, list[str | bytes]], columns: Mapping[MediumKind, list[str]]) -> None:
        self._media = media
        self._columns = columns
        self._taken: dict[MediumKind, int] = dict.fromkeys(media, 0)

    def take(self, kind: MediumKind) -> str | bytes:
        """The next medium, for a part that names none. Counts on when there are no more, for the message."""
        number = self._taken[kind]
        self._taken[kind] += 1
        return self._media[kind][number] if number < len(self._media[kind]) else b""

    def rest(self, kind: MediumKind) -> list[MediumPart]:
        """All media that were not taken yet."""
        rest = self._media[kind][self._taken[kind] :]
        self._taken[kind] += len(rest)
        return [MediumPart(kind, source) for source in rest]

    def check_used(self) -> None:
        """Refuse a row whose media and placeholders do not pair off."""
        for kind, media in self._media.items():
            if self._taken[kind] != len(media):
                columns = " and ".join(name for name in self._columns[kind] if name) or "columns that are switched off"
                raise MessageError(
                    f"messages has {self._taken[kind]} {kind} parts without a source, but the row has {len(media)} in "
                    f"{columns}; each such part takes one. Where a column is not meant for the messages, switch it "
                    f"off with `input.columns.{kind}: ''`"
                )


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def _read_messages(value: Any, supply: _Supply) -> list[Message]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise MessageError(f"messages is not JSON: {error}; found {_show(value)}") from error
        value = _plain(value)
    if not isinstance(value, list):
        raise MessageError(f"messages must be a list of turns; found {_show(value)}")
    if not value:
        raise MessageError("messages is an empty list; expected at least one user turn")
    return [_read_message(message, f"messages[{number}]", supply) for number, message in enumerate(value)]


def _read_message(message: Any, where: str, supply: _Supply) -> Message:
    message = _plain(message)
    if not isinstance(message, dict):
        raise MessageError(f"{where} must be an object with role and content; found {_show(message)}")
    role = message.get("role")
    if role not in ROLES:
        found = f"role {_show(role)}" if role is not None else f"the keys {', '.join(map(str, message)) or 'none'}"
        raise MessageError(f"{where} has {found}; expected a role: {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call", "audio"):
        if message.get(key):
            raise MessageError(f"{where} has {key}, which Qwen2-VL does not know; allowed: role, content")
    content = _plain(message.get("content"))
    if isinstance(content, str):
        parts: list[Text | MediumPart] = [Text(content)]
    elif isinstance(content, dict):
        parts = [_read_part(content, f"{where}.content", supply)]
    elif isinstance(content, list):
        parts = [_read_part(part, f"{where}.content[{number}]", supply) for number, part in enumerate(content)]
    else:
        raise MessageError(f"{where}.content must be text or a list of parts; found {_show(content)}")
    if role == "user" and not any(isinstance(part, MediumPart) or part.text.strip() for part in parts):
        raise MessageError(f"{where} is a user turn without text or media")
    return Message(role, tuple(parts))


def _read_part(part: Any, where: str, supply: _Supply) -> Text | MediumPart:
    part = _plain(part)
    if isinstance(part, str):
        return Text(part)
    if not isinstance(part, dict):
        raise MessageError(f"{where} must be text or an object with a type; found {_show(part)}")
    # Arrow gives every part all keys of all parts, null where it had none.
    part = {key: value for key, raw in part.items() if not _absent(value := _plain(raw))}
    kind = part.pop("type", None) or _implied_type(part, where)
    if isinstance(kind, str) and kind in _TEXT_TYPES:
        return _read_text(part, where)
    if isinstance(kind, str) and kind in _MEDIUM_TYPES:
        return _read_medium(_MEDIUM_TYPES[kind], part, where, supply)
    raise MessageError(f"{where} has the type {_show(kind)}; allowed: {_ALLOWED_TYPES}")


def _implied_type(part: Mapping[str, Any], where: str) -> str:
    """The type of a part that names none, as Qwen's examples do: `{"image": "a.jpg"}`."""
    implied = [key for key in ("text", "image", "video", "image_url", "video_url") if part.get(key) not in (None, "")]
    if len(implied) != 1:
        keys = ", ".join(map(str, part)) or "none"
        raise MessageError(f"{where} has no type, and its keys ({keys}) do not imply one; allowed: {_ALLOWED_TYPES}")
    return implied[0]


def _read_text(part: Mapping[str, Any], where: str) -> Text:
    text = part.get("text", part.get("content"))
    if not isinstance(text, str):
        raise MessageError(f"{where} is a text part whose text is {_show(text)}; expected a string")
    for key, value in part.items():
        if key in _SETTING_NAMES and not _empty(value):
            raise SettingError(f"{where} sets {key} to {_show(value)} on a text part; it applies to media only")
        if key in _MEDIUM_TYPES and not _empty(value):
            raise MessageError(f"{where} has the type text but also {key}; write the medium as a part of its own")
    return Text(text)


def _read_medium(kind: MediumKind, part: Mapping[str, Any], where: str, supply: _Supply) -> MediumPart:
    sources, rest = _split_sources(kind, part)
    settings = _part_settings(rest, where)
    wrong = [name for name in _VIDEO_SETTINGS if kind == "image" and getattr(settings, name) is not None]
    if wrong:
        raise SettingError(f"{where} sets {wrong[0]} on an image; it applies to videos only")
    source = _one_source(kind, sources, where)
    return MediumPart(kind, supply.take(kind) if source is None else source, settings)


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
            for name, raw in value.items():
                (sources if name in keys else rest)[f"{key}.{name}" if name in keys else name] = _plain(raw)
        else:
            sources[key] = value
    return {key: value for key, value in sources.items() if not _empty(value)}, rest


def _part_settings(rest: Mapping[str, Any], where: str) -> MediumSettings:
    """The settings among a part's keys; whatever else is set there is refused."""
    settings: dict[str, Any] = {}
    for key, value in rest.items():
        if _empty(value) or key in _IGNORED_KEYS:
            continue
        if key == "detail":
            if value != "auto":
                raise SettingError(f"{where} sets detail to {_show(value)}; set min_pixels or max_pixels in its place")
        elif key not in _SETTING_NAMES:
            raise SettingError(
                f"{where} sets {key} to {_show(value)}, which can't be applied; allowed besides the source: "
                f"{', '.join(_SETTING_NAMES)}"
            )
        elif _SETTING_NAMES[key] in settings:
            raise SettingError(f"{where} sets {_SETTING_NAMES[key]} twice, once as {key}; leave one")
        else:
            settings[_SETTING_NAMES[key]] = value
    return _settings(settings, f"{where}.")


def _one_source(kind: MediumKind, sources: Mapping[str, Any], where: str) -> str | bytes | None:
    """The part's own source; None where it has none and takes the row's next medium."""
    if not sources:
        return None
    found = {key: value for key, value in sources.items() if key.rpartition(".")[2] == "bytes"}  # bytes win over path
    found = found or dict(sources)
    if len(set(map(_identity, found.values()))) > 1:
        raise MessageError(f"{where} has several sources: {', '.join(found)}; leave one")
    key, value = next(iter(found.items()))
    if key.rpartition(".")[2] == "base64":
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise MessageError(f"{where}.{key} is not base64: {error}") from error
    if isinstance(value, str | bytes):
        if key.rpartition(".")[2] == "bytes" and isinstance(value, str):
            raise MessageError(f"{where}.{key} is text; JSON can't hold bytes: use base64 or a data: URL")
        return value
    if isinstance(value, list) and kind == "video":
        raise MessageError(f"{where}.{key} is a list of frames; give a video file, or the frames as images")
    raise MessageError(f"{where}.{key} must be a URI, a path or bytes; found {_show(value)}")


def _identity(value: Any) -> Any:
    return value if isinstance(value, str | bytes) else id(value)


# ---------------------------------------------------------------------------------------------------------------------
# Media columns


def _row_media(value_of: Callable[[str], Any], kind: MediumKind) -> list[str | bytes]:
    return [
        medium
        for name, of in MEDIA_COLUMNS
        if of == kind and (value := value_of(name)) is not None
        for medium in _column_media(value, name)
    ]


def _column_media(value: Any, name: str) -> list[str | bytes]:
    """The media of one column's value: one, or a list of them, which text formats hold as JSON."""
    if isinstance(value, str):
        value = _from_json_text(value, name)
    if not isinstance(value, list):
        return [_column_medium(value, name)]
    # A null in a list would move the media behind it: `Picture 2` must stay the second one.
    return [_column_medium(_plain(item), f"{name}[{number}]") for number, item in enumerate(value)]


def _from_json_text(text: str, name: str) -> Any:
    stripped = text.strip()
    if (stripped[:1], stripped[-1:]) not in (("[", "]"), ("{", "}")):
        return text
    try:
        return _plain(json.loads(stripped))
    except (ValueError, RecursionError) as error:
        raise MessageError(
            f'{name} looks like a list but is not JSON ({error}); write ["a.jpg", "b.jpg"] with double quotes'
        ) from error


def _column_medium(value: Any, where: str) -> str | bytes:
    if isinstance(value, dict):
        items = {key: item for key, raw in value.items() if (item := _plain(raw)) not in (None, "", b"")}
        unknown = sorted(str(key) for key in items if key not in ("bytes", "path", "url"))
        if unknown:
            raise MessageError(f"{where} has the keys {', '.join(unknown)}; allowed: bytes, path, url")
        value = items.get("bytes", items.get("path", items.get("url")))
        if "bytes" in items and not isinstance(value, bytes):
            raise MessageError(f"{where}.bytes is text; JSON can't hold bytes: use a data: URL")
    if isinstance(value, str | bytes) and value:
        return value
    raise MessageError(f"{where} must be a URI, bytes or a struct of bytes and path; found {_show(value)}")


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def _settings(values: Mapping[str, Any], where: str = "") -> MediumSettings:
    """Checked settings of one medium or row. Raises SettingError."""
    found = {
        name: _MEDIUM_PARSERS[name](where + name, value)
        for name, value in values.items()
        if value is not None and value != ""
    }
    settings = MediumSettings(**found)
    if settings.fps is not None and settings.num_frames is not None:
        raise SettingError(f"{where}fps and num_frames are both set; they exclude each other")
    _check_order(settings, where)
    return settings


def _check_order(settings: MediumSettings, where: str = "") -> None:
    low, high = settings.min_pixels, settings.max_pixels
    if low is not None and high is not None and low > high:
        raise SettingError(f"{where}min_pixels is {low} and max_pixels {high}; the first must not be larger")
    start, end = settings.start_s, settings.end_s
    if start is not None and end is not None and start >= end:
        raise SettingError(f"{where}start_s is {start} and end_s {end}; the segment must end after it starts")


def _apply_row_settings(turns: Iterable[Message], of_row: MediumSettings) -> tuple[Message, ...]:
    """The turns with the row's settings on every medium that they can apply to."""
    turns = tuple(turns)
    used = [item.name for item in fields(of_row) if getattr(of_row, item.name) is not None]
    if not used:
        return turns
    kinds = {part.kind for turn in turns for part in turn.parts if isinstance(part, MediumPart)}
    for name in used:
        if not kinds:
            raise SettingError(f"{name} is {getattr(of_row, name)} on a row without media; leave it null")
        if name in _VIDEO_SETTINGS and "video" not in kinds:
            raise SettingError(f"{name} is {getattr(of_row, name)} on a row without videos; leave it null")

    def settled(part: Text | MediumPart) -> Text | MediumPart:
        return part if isinstance(part, Text) else MediumPart(part.kind, part.source, _merged(part, of_row, used))

    return tuple(Message(turn.role, tuple(map(settled, turn.parts))) for turn in turns)


def _merged(part: MediumPart, of_row: MediumSettings, used: Sequence[str]) -> MediumSettings:
    values = dict(vars(part.settings))
    own_rate = part.settings.fps is not None or part.settings.num_frames is not None
    for name in used:
        if part.kind == "image" and name in _VIDEO_SETTINGS:
            continue
        if name in ("fps", "num_frames") and own_rate:  # they exclude each other: the part's choice stands alone
            continue
        if values[name] is None:
            values[name] = getattr(of_row, name)
    merged = MediumSettings(**values)
    _check_order(merged)
    return merged


Parser = Callable[[str, Any], Any]


def _number(allowed: str, accepts: Callable[[Any], bool], *, whole: bool) -> Parser:
    def parse(name: str, value: Any) -> int | float:
        number: Any = value
        if isinstance(number, str):  # CSV has nothing but text
            try:
                number = int(number) if whole else float(number)
            except ValueError:
                number = None
        if whole and isinstance(number, float) and number.is_integer():  # pandas makes floats of ints beside nulls
            number = int(number)
        if not whole and isinstance(number, int) and not isinstance(number, bool):
            number = float(number) if abs(number) < 2**1000 else None
        if isinstance(number, bool) or not isinstance(number, int if whole else float) or not accepts(number):
            raise SettingError(f"{name} is {_show(value)}; allowed: {allowed}")
        return number

    return parse


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, int | float) and value in (0, 1):  # pandas makes numbers of booleans beside nulls
        return bool(value)
    raise SettingError(f"{name} is {_show(value)}; allowed: true, false")


def _list(allowed: str, item: Parser | None) -> Parser:
    def parse(name: str, value: Any) -> tuple[Any, ...]:
        found = value
        if isinstance(found, str):
            try:
                found = json.loads(found)
            except ValueError:
                found = [value]  # a stop string alone
            if not isinstance(found, list):
                found = [value]
        elif isinstance(found, int) and not isinstance(found, bool):
            found = [found]
        if not isinstance(found, list):
            raise SettingError(f"{name} is {_show(value)}; allowed: {allowed}")
        if item is not None:
            return tuple(item(f"{name}[{number}]", part) for number, part in enumerate(found))
        if not all(isinstance(part, str) and part for part in found):
            raise SettingError(f"{name} is {_show(value)}; allowed: {allowed}")
        return tuple(found)

    return parse


def _whole(low: int, allowed: str) -> Parser:
    return _number(allowed, lambda number: low <= number < 2**63, whole=True)


def _real(allowed: str, accepts: Callable[[float], bool]) -> Parser:
    return _number(allowed, lambda number: math.isfinite(number) and accepts(number), whole=False)


_MEDIUM_PARSERS: Mapping[str, Parser] = {
    "min_pixels": _whole(1, "a whole number, 1 or more"),
    "max_pixels": _whole(1, "a whole number, 1 or more"),
    "fps": _real("a number above 0", lambda number: number > 0),
    "num_frames": _whole(1, "a whole number, 1 or more"),
    "start_s": _real("seconds, 0 or more", lambda number: number >= 0),
    "end_s": _real("seconds, above 0", lambda number: number > 0),
}


def _sampling_parser(kind: Any, bounds: Mapping[str, Any]) -> Parser:
    """The parser of a sampling parameter that has this type and these bounds."""
    if kind is bool:
        return _flag
    if kind is float:
        return _number(f"a number, {allowed(bounds)}", lambda number: within(number, bounds), whole=False)
    if kind == tuple[str, ...]:
        return _list("text or a list of texts, none empty", None)
    if kind == tuple[int, ...]:
        return _list("a list of token ids", _whole(0, "a token id: a whole number, 0 or more"))
    return _number(
        f"a whole number, {allowed(bounds)}", lambda number: number < 2**63 and within(number, bounds), whole=True
    )


_SAMPLING_PARSERS: Mapping[str, Parser] = {
    each.name: _sampling_parser(setting_types(SamplingParams)[each.name], each.metadata)
    for each in fields(SamplingParams)
}
assert set(_MEDIUM_PARSERS) == set(MEDIUM_SETTING_COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def _plain(value: Any) -> Any:
    """The value as plain Python: numpy, pandas and Arrow scalars unwrapped; NaN and the like are None."""
    if value is None or isinstance(value, str | bytes | bool | int | dict):
        return value if not isinstance(value, str | int) or type(value) in (str, int, bool) else _unwrap(value)
    if isinstance(value, float):
        return None if math.isnan(value) else float(value)
    if isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if type(value).__name__ in ("NAType", "NaTType"):  # pandas' nulls
        return None
    return _unwrap(value)


def _unwrap(value: Any) -> Any:
    for method in ("as_py", "tolist"):  # an Arrow scalar; a numpy scalar or array
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    return value


def _absent(value: Any) -> bool:
    """Null, or a struct of nothing but nulls, which is how some writers spell a null struct."""
    if isinstance(value, dict):
        return all(_absent(_plain(inner)) for inner in value.values())
    return value is None


def _empty(value: Any) -> bool:
    """Null or nothing, as Arrow and other writers pad the parts of a message."""
    return _absent(value) or (isinstance(value, str | bytes | list) and not value)


def _show(value: Any) -> str:
    """A value for an error message: short, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
