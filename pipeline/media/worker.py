"""Plain stand-in, replaced below by the killable process."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.conversation import MediumKind, MediumSettings
from pipeline.errors import RowError
from pipeline.media.decode import OpenMedium, SeenMedium, fit_row
from pipeline.media.limits import MediaOptions

Medium = tuple[MediumKind, bytes, MediumSettings, str]


class MediaWorker:
    """Decodes the media of one row at a time."""

    def __init__(self, options: MediaOptions) -> None:
        self._options = options

    def see_media(self, media: Sequence[Medium]) -> list[SeenMedium | RowError]:
        """One result for each medium, in order."""
        results: list[SeenMedium | RowError | None] = [None] * len(media)
        opened: dict[int, OpenMedium] = {}
        for number, (kind, data, settings, _) in enumerate(media):
            try:
                opened[number] = OpenMedium(kind, data, settings, self._options)
            except RowError as error:
                results[number] = error
        try:
            fit_row(list(opened.values()), self._options.max_visual_tokens)
        except RowError as error:
            return [result or error for result in results]
        for number, medium in opened.items():
            try:
                results[number] = medium.see(source=media[number][3])
            except RowError as error:
                results[number] = error
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Free the decoder."""
