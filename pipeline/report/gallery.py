"""Result rows as cards: picture, question, answer, reference, score, and the receipt behind them.

Knows a row's columns and which of them a reader wants; text leaves here as it is, and the template escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.columns import answer_texts
from pipeline.preprocess.messages.values import from_json
from pipeline.report.facts import at, shown_source, text_at, without_secrets
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
class CardMedium:
    alt: str
    name: str
    thumbnail: Thumbnail


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
    media: tuple[CardMedium, ...]
    num_more_media: int
    facts: tuple[tuple[str, str], ...]
    baseline: str | None = None
    """The other run's answer, in the sections that compare."""


def shorten(text: str, max_length: int) -> str:
    """The text's beginning, and how much was left out."""
    return text if len(text) <= max_length else f"{text[:max_length]} … ({len(text) - max_length:,} more characters)"


class CardMaker:
    def __init__(
        self,
        run: Mapping[str, Any],
        columns: Sequence[str],
        *,
        references: str | None,
        thumbnails: ThumbnailMaker | None,
    ) -> None:
        template = text_at(run, "config.prompt.template") or ""
        self._template = template if "{" not in template else ""
        self._question_columns = [
            name for name in (text_at(run, "config.input.columns.prompt"), *_QUESTIONS) if name in columns
        ]
        self._reference_column = next((name for name in (references, *_REFERENCES) if name in columns), None)
        known = {*RESULT_COLUMNS, *self._question_columns, self._reference_column}
        self._kept = [name for name in columns if name not in known][:_MAX_KEPT]
        self._thumbnails = thumbnails

    def card(self, row: Mapping[str, Any], scores: Mapping[str, Any], baseline: str | None = None) -> Card:
        """The card of a result row and its row of scores."""
        failed = row["status"] != Status.OK.value
        media = row["media"] or []
        return Card(
            id=shorten(without_secrets(row["id"] or f"{row['manifest_file']}:{row['manifest_row']}"), _MAX_VALUE),
            question=self._question(row),
            answer=None if failed else shorten(row["text"] or "", _MAX_ANSWER),
            references=self._references(row),
            error=_error(row) if failed else None,
            metric=scores.get("metric"),
            score=scores.get("score"),
            media=tuple(self._media(row, media)),
            num_more_media=max(len(media) - _MAX_MEDIA, 0),
            facts=tuple(self._facts(row, media)),
            baseline=shorten(baseline, _MAX_ANSWER) if baseline is not None else None,
        )

    def _question(self, row: Mapping[str, Any]) -> str | None:
        found = ((name, row.get(str(name))) for name in self._question_columns)
        name, value = next(((name, value) for name, value in found if value), ("", self._template))
        return shorten(_message_text(value) if name == "messages" else str(value), _MAX_QUESTION) if value else None

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = row.get(self._reference_column) if self._reference_column else None
        texts = [shorten(text, _MAX_QUESTION) for text in dict.fromkeys(answer_texts(value))]
        more = len(texts) - _MAX_REFERENCES
        return (*texts[:_MAX_REFERENCES], f"and {more} more") if more > 0 else tuple(texts)

    def _media(self, row: Mapping[str, Any], media: Sequence[Mapping[str, Any]]) -> list[CardMedium]:
        thumbnails = [Thumbnail(missing="thumbnails are switched off")] * _MAX_MEDIA
        if self._thumbnails is not None:
            thumbnails = self._thumbnails.thumbnails(row, _MAX_MEDIA)
        shown = []
        for number, (receipt, thumbnail) in enumerate(zip(media, thumbnails, strict=False), 1):
            name = shorten(shown_source(receipt["source"] or ""), _MAX_VALUE)
            kind = receipt["kind"] or "medium"
            frames = f", {len(thumbnail.pictures)} frames of it" if kind == "video" and thumbnail.pictures else ""
            size = f"{receipt['source_width']} x {receipt['source_height']} pixels"
            alt = f"{kind.capitalize()} {number} of {len(media)}{frames}: {name}, {size}"
            shown.append(CardMedium(alt, name, thumbnail))
        return shown

    def _facts(self, row: Mapping[str, Any], media: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        facts = [
            ("place", f"file {row['manifest_file']}, row {row['manifest_row']} of the manifest"),
            ("finish reason", row["finish_reason"]),
            ("output tokens", row["num_output_tokens"]),
            ("prompt tokens", row["num_prompt_tokens"]),
            ("visual tokens", row["num_visual_tokens"]),
            ("preprocessing", _seconds(row["preprocess_s"])),
            ("in the engine", _seconds(row["generate_s"])),
            ("attempts", row["attempts"] if row["attempts"] > 1 else None),
            *(
                (f"{receipt['kind']} {number}", _receipt(receipt))
                for number, receipt in enumerate(media[:_MAX_MEDIA], 1)
            ),
            *((name, _kept_value(row.get(name))) for name in self._kept),
        ]
        return [(name, str(value)) for name, value in facts if value is not None]


def _message_text(value: Any) -> str:
    """The texts of a chat, from either form of `messages`."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError:
            return str(value)
    contents = [at(message, "content") for message in (value if isinstance(value, list) else [])]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "\n".join(str(text) for text in texts if text)


def _error(row: Mapping[str, Any]) -> str:
    kind, stage, message = (row[name] or "unknown" for name in ("error_type", "error_stage", "error_message"))
    return f"{kind} in {stage}: {shorten(without_secrets(message), _MAX_QUESTION)}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g} s"


def _kept_value(value: Any) -> str | None:
    return None if value is None else shorten(shown_source(str(value)), _MAX_VALUE)


def _receipt(receipt: Mapping[str, Any]) -> str:
    source, resized = (f"{receipt[f'{name}_width']} x {receipt[f'{name}_height']}" for name in ("source", "resized"))
    text = f"{source}, shown at {resized} (grid {' x '.join(map(str, receipt['grid_thw'] or []))})"
    if times := receipt["timestamps"]:
        text += f", {len(times)} frames from {times[0]:.2f} to {times[-1]:.2f} s"
    return f"{text}; {receipt['note']}" if receipt["note"] else text
