"""A manifest row to a Conversation.

    row {messages | image, images, video, videos, prompt, ...}  --conversation-->  Conversation

A row without messages asks one question: its images, then its videos, then its prompt. What wins: a row's messages over
its prompt and the template; a system turn in the messages over the row's `system`, and that over the config's; a part's
settings over the row's. `columns.py` reads columns, `chat.py` the forms of messages, `settings.py` settings. Knows no
tokens, pixels or files: a medium's source is passed on unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias, get_args

from pipeline.conversation import Conversation, MediumKind, MediumPart, Message, Text
from pipeline.errors import MediaMissing, MessageError
from pipeline.preprocess.messages.chat import NO_SOURCE, read_messages
from pipeline.preprocess.messages.columns import MEDIA_COLUMNS, MessageOptions, column_media, fill_template
from pipeline.preprocess.messages.settings import apply_row_settings, medium_settings, parse_setting
from pipeline.preprocess.messages.values import plain, shown
from pipeline.schema import CONTENT_COLUMNS, MANIFEST_ERROR, MEDIUM_SETTING_COLUMNS, SAMPLING_COLUMNS

ColumnMedia: TypeAlias = Mapping[MediumKind, list[MediumPart]]


def conversation(row: Mapping[str, Any], options: MessageOptions) -> Conversation:
    """What the row asks. Raises MessageError, or SettingError for a per-row setting."""
    unreadable = plain(row.get(MANIFEST_ERROR))
    if unreadable is not None:
        raise MessageError(str(unreadable))
    settings = medium_settings({name: _setting(row, options, name) for name in MEDIUM_SETTING_COLUMNS})
    sampling = {name: value for name in SAMPLING_COLUMNS if (value := _setting(row, options, name)) is not None}
    sampling = {name: parse_setting(name, value) for name, value in sampling.items()}
    media = {kind: column_media(row, options, kind) for kind in get_args(MediumKind)}
    messages = options.value(row, "messages")
    if messages is None:
        turns = [_read_question(row, options, media)]
    else:
        turns = _with_column_media(read_messages(messages), media, options)
    turns = _with_system(turns, options.value(row, "system"), options.system)
    if turns[-1].role != "user":
        raise MessageError(f"the last turn is the {turns[-1].role}'s; it must be the user's, for the model answers it")
    return Conversation(apply_row_settings(turns, settings), sampling)


def _setting(row: Mapping[str, Any], options: MessageOptions, name: str) -> Any:
    return options.value(row, name) if options.reads_setting(name) else None


def _read_question(row: Mapping[str, Any], options: MessageOptions, media: ColumnMedia) -> Message:
    """A row without messages: images, videos, then the text."""
    if not any(media.values()) and not options.allow_missing_media:
        names = [options.column(name) for names in MEDIA_COLUMNS.values() for name in names]
        if empty := [name for name in names if name in row]:
            raise MediaMissing(
                f"{' and '.join(empty)} {'is' if len(empty) == 1 else 'are'} empty in this row; "
                "input.allow_missing_media true asks such rows without media"
            )
    prompt = options.value(row, "prompt")
    if prompt is None and options.template is not None:
        prompt = fill_template(options.template, row)
    if prompt is not None and not isinstance(prompt, str):
        raise MessageError(f"{options.column('prompt')} must be text; found {shown(prompt)}")
    parts: list[Text | MediumPart] = [part for of_kind in media.values() for part in of_kind]
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
        raise MessageError(f"system must be text; found {shown(of_row)}")
    system = of_row or of_options
    return [Message("system", (Text(system),)), *turns] if system else turns


def _with_column_media(turns: list[Message], media: ColumnMedia, options: MessageOptions) -> list[Message]:
    """The turns, each part without a source taking the next medium of the columns. They must pair off."""
    parts = [part for turn in turns for part in turn.parts if isinstance(part, MediumPart)]
    for kind, sources in media.items():
        wanted = sum(part.kind == kind and part.source == NO_SOURCE for part in parts)
        if wanted != len(sources):
            names = " and ".join(filter(None, map(options.column, MEDIA_COLUMNS[kind])))
            raise MessageError(
                f"messages has {wanted} {kind} parts without a source, but the row has {len(sources)} in "
                f"{names or 'columns that are switched off'}; each such part takes one. Where a column is not meant "
                f"for the messages, switch it off with `input.columns.{kind}: ''`"
            )
    left = {kind: iter(sources) for kind, sources in media.items()}

    def filled(part: Text | MediumPart) -> Text | MediumPart:
        if isinstance(part, Text) or part.source != NO_SOURCE:
            return part
        medium = next(left[part.kind])
        return replace(part, source=medium.source, name=medium.name)

    return [replace(turn, parts=tuple(map(filled, turn.parts))) for turn in turns]
