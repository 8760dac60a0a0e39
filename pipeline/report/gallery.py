"""Result rows as cards: picture, question, answer, reference, score, and the receipt behind them.

Knows a row's columns and what a reader wants of them; strings leave here as they are, the template escapes them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.facts import shown_source, without_secrets
from pipeline.report.thumbnails import Thumbnail, ThumbnailMaker
from pipeline.schema import RESULT_COLUMNS, Status

_MAX_ANSWER = 1_200
_MAX_QUESTION = 600
_MAX_REFERENCES = 6
_MAX_MEDIA = 4
_MAX_KEPT = 12
_MAX_VALUE = 200
_QUESTIONS = ("prompt", "question", "query", "instruction", "messages")
_REFERENCES = ("reference", "references", "answer", "answers", "label", "caption", "captions")


@dataclass(frozen=True)
class Picture:
    """One medium on a card."""

    urls: tuple[str, ...]
    alt: str
    name: str
    missing: str | None


@dataclass(frozen=True)
class Card:
    """One row of the gallery."""

    id: str
    question: str | None
    answer: str | None
    references: tuple[str, ...]
    error: str | None
    metric: str | None
    score: float | None
    pictures: tuple[Picture, ...]
    more_media: int
    facts: tuple[tuple[str, str], ...]
    baseline: str | None = None
    """The other run's answer, in the sections that compare."""


def shorten(text: str, most: int) -> str:
    """The text's beginning, and how much was left out."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


class CardMaker:
    """Makes cards of a run's rows."""

    def __init__(
        self,
        run: Mapping[str, Any],
        columns: Sequence[str],
        *,
        references: str | None,
        thumbnails: ThumbnailMaker | None,
    ) -> None:
        config = run.get("config") or {}
        mapped = ((config.get("input") or {}).get("columns") or {}).get("prompt")
        template = (config.get("prompt") or {}).get("template")
        self._question_columns = [name for name in (mapped, *_QUESTIONS) if name in columns]
        self._template = template if template and "{" not in template else None
        self._reference_column = next((name for name in (references, *_REFERENCES) if name in columns), None)
        known = {*RESULT_COLUMNS, *self._question_columns, self._reference_column}
        self._kept = [name for name in columns if name not in known][:_MAX_KEPT]
        self._thumbnails = thumbnails

    def card(self, row: Mapping[str, Any], score: tuple[str, float] | None, baseline: str | None = None) -> Card:
        """The row's card."""
        failed = row.get("status") != Status.OK.value
        media = row.get("media") or []
        return Card(
            id=shorten(without_secrets(str(row.get("id") or _place(row))), _MAX_VALUE),
            question=self._question(row),
            answer=None if failed else shorten(row.get("text") or "", _MAX_ANSWER),
            references=self._references(row),
            error=_error(row) if failed else None,
            metric=score[0] if score else None,
            score=score[1] if score else None,
            pictures=tuple(self._pictures(row, media[:_MAX_MEDIA])),
            more_media=max(len(media) - _MAX_MEDIA, 0),
            facts=tuple(self._facts(row, media)),
            baseline=shorten(baseline, _MAX_ANSWER) if baseline is not None else None,
        )

    def _question(self, row: Mapping[str, Any]) -> str | None:
        for name in self._question_columns:
            value = row.get(str(name))
            if value:
                return shorten(_message_text(value) if name == "messages" else str(value), _MAX_QUESTION)
        return shorten(self._template, _MAX_QUESTION) if self._template else None

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = row.get(self._reference_column) if self._reference_column else None
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        texts = [str(item.get("answer", item) if isinstance(item, Mapping) else item) for item in values]
        texts = [shorten(text, _MAX_QUESTION) for text in dict.fromkeys(texts)]
        if len(texts) > _MAX_REFERENCES:
            texts = [*texts[:_MAX_REFERENCES], f"and {len(texts) - _MAX_REFERENCES} more"]
        return tuple(texts)

    def _pictures(self, row: Mapping[str, Any], media: Sequence[Mapping[str, Any]]) -> list[Picture]:
        found = self._thumbnails.thumbnails(row, _MAX_MEDIA) if self._thumbnails else []
        pictures = []
        for number, receipt in enumerate(media):
            thumbnail = found[number] if number < len(found) else Thumbnail(missing="thumbnails are switched off")
            name = shorten(shown_source(str(receipt.get("source") or "")), _MAX_VALUE)
            kind = str(receipt.get("kind") or "medium")
            size = f"{receipt.get('source_width')} x {receipt.get('source_height')} pixels"
            what = f"{kind} {number + 1} of {len(row.get('media') or media)}"
            frames = f", {len(thumbnail.pictures)} frames of it" if kind == "video" and thumbnail.pictures else ""
            pictures.append(
                Picture(
                    urls=tuple(
                        "data:image/jpeg;base64," + base64.b64encode(data).decode() for data in thumbnail.pictures
                    ),
                    alt=f"{what[0].upper()}{what[1:]}{frames}: {name}, {size}",
                    name=name,
                    missing=thumbnail.missing,
                )
            )
        return pictures

    def _facts(self, row: Mapping[str, Any], media: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        facts = [
            ("place", f"file {row.get('manifest_file')}, row {row.get('manifest_row')} of the manifest"),
            ("finish reason", row.get("finish_reason")),
            ("output tokens", row.get("num_output_tokens")),
            ("prompt tokens", row.get("num_prompt_tokens")),
            ("visual tokens", row.get("num_visual_tokens")),
            ("preprocessing", _seconds(row.get("preprocess_s"))),
            ("in the engine", _seconds(row.get("generate_s"))),
            ("attempts", row.get("attempts") if (row.get("attempts") or 1) > 1 else None),
        ]
        for number, receipt in enumerate(media[:_MAX_MEDIA], 1):
            facts.append((f"{receipt.get('kind')} {number}", _receipt(receipt)))
        for name in self._kept:
            if row.get(name) is not None:
                facts.append((name, shorten(shown_source(str(row[name])), _MAX_VALUE)))
        return [(name, str(value)) for name, value in facts if value is not None]


def _message_text(value: Any) -> str:
    """The texts of a chat, from either form of `messages`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return str(value)
    texts = []
    for message in value if isinstance(value, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, list) else [content]
        texts += [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(str(text) for text in texts if text)


def _place(row: Mapping[str, Any]) -> str:
    return f"{row.get('manifest_file')}:{row.get('manifest_row')}"


def _error(row: Mapping[str, Any]) -> str:
    kind, stage, message = (row.get(name) or "unknown" for name in ("error_type", "error_stage", "error_message"))
    return f"{kind} in {stage}: {shorten(without_secrets(str(message)), _MAX_QUESTION)}"


def _seconds(value: Any) -> str | None:
    return f"{value:.3g} s" if isinstance(value, int | float) else None


def _receipt(receipt: Mapping[str, Any]) -> str:
    grid = receipt.get("grid_thw") or []
    text: str = (
        f"{receipt.get('source_width')} x {receipt.get('source_height')}, shown at "
        f"{receipt.get('resized_width')} x {receipt.get('resized_height')} (grid {' x '.join(map(str, grid))})"
    )
    times = receipt.get("timestamps") or []
    note: str = receipt.get("note") or ""
    if times:
        text += f", {len(times)} frames from {times[0]:.2f} to {times[-1]:.2f} s"
    return f"{text}; {note}" if note else str(text)
