"""The manifest's columns: which ones are read, the prompt template over them, and the media that they hold.

Knows names and forms of values; not the chat forms of `messages`, nor what a medium's source leads to.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from uuid import UUID

from pipeline.conversation import MediumKind, MediumPart
from pipeline.errors import ConfigError, ManifestError, MessageError
from pipeline.preprocess.messages.values import as_text, from_json, plain, shown
from pipeline.schema import CONTENT_COLUMNS, MANIFEST_COLUMNS, MEDIUM_SETTING_COLUMNS, SAMPLING_COLUMNS

MEDIA_COLUMNS: Mapping[MediumKind, tuple[str, ...]] = {"image": ("image", "images"), "video": ("video", "videos")}


@dataclass(frozen=True)
class MessageOptions:
    """How a manifest's columns are to be read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name to the manifest's. An empty name switches a column off that the manifest happens to have."""
    template: str | None = None
    """The user's text for rows without prompt and messages: a plain format string over the manifest's columns."""
    system: str | None = None
    """System prompt for rows without one."""
    settings: frozenset[str] = frozenset()
    """Settings of sampling and media that are taken from the columns of their names; others only where `columns` maps
    them."""
    allow_missing_media: bool = False
    """Whether a row with nothing in the manifest's media columns is a question without media."""

    def column(self, name: str) -> str:
        """What the manifest calls one of our columns."""
        return self.columns.get(name, name)

    def reads_setting(self, name: str) -> bool:
        """Whether a setting is taken from a column."""
        return name in self.settings or name in self.columns

    def value(self, row: Mapping[str, Any], name: str) -> Any:
        """A row's value in one of our columns; None also for blank text."""
        value = plain(row.get(self.column(name)))
        return None if isinstance(value, str) and not value.strip() else value


def has_content(schema_names: Sequence[str], options: MessageOptions) -> bool:
    """Whether the columns are meant as a manifest's: the options name columns, or these have the names of content."""
    named = {*options.columns.values(), *(() if options.template is None else template_columns(options.template))}
    return bool(named) or any(name in schema_names for name in CONTENT_COLUMNS)


def check_columns(schema_names: Sequence[str], options: MessageOptions) -> None:
    """Refuse a manifest from whose columns no prompt can be made. Raises ManifestError, ConfigError for a template."""
    found = ", ".join(schema_names) or "none"
    for ours, theirs in options.columns.items():
        if theirs and theirs not in schema_names:
            raise ManifestError(f"input.columns.{ours} names the column {theirs!r}; the manifest's columns: {found}")
    names = () if options.template is None else template_columns(options.template)
    missing = [name for name in names if name not in schema_names]
    if missing:
        raise ManifestError(f"prompt.template names the column {missing[0]!r}; the manifest's columns: {found}")
    # A template without columns asks every row the same: without content, the media column was not recognized.
    if not names and not any(options.column(name) in schema_names for name in CONTENT_COLUMNS):
        raise ManifestError(
            f"the manifest has no usable column: found {found}; looked for {', '.join(CONTENT_COLUMNS)}. "
            "Name yours with input.columns, as in `--input.columns.image url`, or use columns in prompt.template"
        )


def needed_columns(schema_names: Sequence[str], options: MessageOptions) -> list[str]:
    """The manifest's columns that are read to make requests, in the manifest's order."""
    settings = {*MEDIUM_SETTING_COLUMNS, *SAMPLING_COLUMNS}
    names = [name for name in MANIFEST_COLUMNS if name not in settings or options.reads_setting(name)]
    wanted = {options.column(name) for name in names}
    if options.template is not None:
        wanted.update(template_columns(options.template))
    return [name for name in schema_names if name in wanted]


def unread_settings(schema_names: Sequence[str], options: MessageOptions) -> list[str]:
    """The manifest's columns that have the name of a setting but are not read as one."""
    return [
        name
        for name in (*MEDIUM_SETTING_COLUMNS, *SAMPLING_COLUMNS)
        if name in schema_names and not options.reads_setting(name) and name not in options.columns.values()
    ]


def row_id(row: Mapping[str, Any], options: MessageOptions, row_key: tuple[int, int]) -> str:
    """The row's `id` as text; its key (file number, row number) where it has none, or none that can be read."""
    try:
        value = plain(row.get(options.column("id")))
    except MessageError:
        value = None
    if value is None or value == "":
        return f"{row_key[0]}:{row_key[1]}"
    return _bytes_as_text(value) if isinstance(value, bytes) else as_text(value) or str(value)


def _bytes_as_text(value: bytes) -> str:
    """The text that the bytes hold, as old writers spell strings; else a UUID, or hexadecimal digits."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if text.isprintable() and text:
        return text
    return str(UUID(bytes=value)) if len(value) == 16 else value.hex()


# ---------------------------------------------------------------------------------------------------------------------
# Template


def template_columns(template: str) -> tuple[str, ...]:
    """The columns that `prompt.template` names. Raises ConfigError for anything but plain names."""
    return tuple(dict.fromkeys(name for _, name in _pieces(template) if name is not None))


def fill_template(template: str, row: Mapping[str, Any]) -> str:
    """The template with the row's values. Raises MessageError where one is null, or neither text, number nor date."""
    text = []
    for literal, name in _pieces(template):
        text.append(literal)
        if name is None:
            continue
        value = plain(row.get(name))
        if value is None:
            raise MessageError(f"prompt.template needs the column {name}, which is null in this row")
        filled = as_text(value)
        if filled is None:
            raise MessageError(
                f"prompt.template needs text, a number or a date in the column {name}; found {shown(value)}"
            )
        text.append(filled)
    return "".join(text)


def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    try:
        return parse_template(template)
    except ValueError as error:
        raise ConfigError(f"prompt.template {error}") from error


@lru_cache(maxsize=64)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """Pieces of a template: literal text, and the column that follows it.

    Only `{name}` is allowed: attributes, indexes and format specifications reach into Python. Raises ValueError for
    any other field, with a message that begins with the template.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"{template!r} is not a format string: {error}; write braces that are text twice: {{{{ }}}}"
        ) from error
    for _, name, specification, conversion in pieces:
        reaches = name is not None and (not name.strip() or any(mark in name for mark in ".[]{}"))
        if reaches or specification or conversion:
            raise ValueError(
                f"{template!r} has a field that is not a plain column name; "
                "allowed: {name}, without dots, brackets, colons or exclamation marks. "
                "Write braces that are text, as in JSON, twice: {{ }}"
            )
    return tuple((literal, name) for literal, name, _, _ in pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Media


def column_media(row: Mapping[str, Any], options: MessageOptions, kind: MediumKind) -> list[MediumPart]:
    """The media in a row's columns of one kind, in order. Raises MessageError."""
    media: list[MediumPart] = []
    for name in MEDIA_COLUMNS[kind]:
        value = options.value(row, name)
        if isinstance(value, str):
            value = _from_json(value, name)
        if isinstance(value, list):
            # A null in a list would move the media behind it: `Picture 2` must stay the second one.
            media += [_medium(kind, item, f"{name}[{number}]") for number, item in enumerate(value)]
        elif value is not None:
            media.append(_medium(kind, value, name))
    return media


def _from_json(text: str, name: str) -> Any:
    """What text formats hold for a list or struct; any other text as it is."""
    stripped = text.strip()
    if (stripped[:1], stripped[-1:]) not in (("[", "]"), ("{", "}")):
        return text
    try:
        return from_json(stripped)
    except ValueError as error:
        raise MessageError(
            f'{name} looks like a list but is not JSON ({error}); write ["a.jpg", "b.jpg"] with double quotes'
        ) from error


def _medium(kind: MediumKind, value: Any, where: str) -> MediumPart:
    name = None
    if isinstance(value, dict):
        items = {key: item for key, item in value.items() if plain(item) not in (None, "", b"")}
        unknown = sorted(str(key) for key in items if key not in ("bytes", "path", "url"))
        if unknown:
            raise MessageError(f"{where} has the keys {', '.join(unknown)}; allowed: bytes, path, url")
        name = items.get("path", items.get("url"))
        value = items.get("bytes", name)
        if "bytes" in items and not isinstance(value, bytes):
            raise MessageError(f"{where}.bytes is text; JSON can't hold bytes: use a data: URL")
    if isinstance(value, str | bytes) and value:
        return MediumPart(kind, value, name=name if isinstance(value, bytes) and isinstance(name, str) else None)
    raise MessageError(f"{where} must be a URI, bytes or a struct of bytes and path; found {shown(plain(value))}")
