"""Which media are encoded already, and who still waits for them. Keys and counts; the tensors live in vision.py.

A medium's visual tokens are kept from the pass that encodes it until no waiting sequence needs it any
more, so several questions on one image cost one run of the vision tower.
"""

from __future__ import annotations

from pipeline.engine.sequence import Medium, Sequence


class MediaLedger:
    def __init__(self, max_kept_tokens: int = 2**62) -> None:
        self.max_kept_tokens = max_kept_tokens
        self._waiting: dict[bytes, int] = {}
        self._encoded: dict[bytes, int] = {}  # key -> visual tokens, in order of encoding

    @property
    def num_kept_tokens(self) -> int:
        return sum(self._encoded.values())

    def retain(self, sequence: Sequence) -> None:
        """The sequence will need its media in a prefill to come."""
        for medium in sequence.request.media:
            self._waiting[medium.content_key] = self._waiting.get(medium.content_key, 0) + 1

    def release(self, sequence: Sequence) -> None:
        """The sequence's prompt is in the cache, or nobody wants it any more."""
        for medium in sequence.request.media:
            key = medium.content_key
            self._waiting[key] -= 1
            if self._waiting[key] == 0:
                del self._waiting[key]

    def new_media(self, sequence: Sequence, planned: set[bytes]) -> list[Medium]:
        """Media that a pass must encode for this sequence, beyond those planned in it already."""
        found: dict[bytes, Medium] = {}
        for medium in sequence.request.media:
            if medium.content_key not in self._encoded and medium.content_key not in planned:
                found[medium.content_key] = medium
        return list(found.values())

    def mark_encoded(self, medium: Medium) -> None:
        self._encoded[medium.content_key] = medium.num_visual_tokens

    def forget(self, in_use: set[bytes]) -> list[bytes]:
        """Keys whose tensors can go: nobody waits for them, or they are the oldest above the limit."""
        gone = [key for key in self._encoded if key not in self._waiting]
        for key in gone:
            del self._encoded[key]
        excess = self.num_kept_tokens - self.max_kept_tokens
        for key in list(self._encoded) if excess > 0 else ():
            if excess > 0 and key not in in_use:
                excess -= self._encoded.pop(key)
                gone.append(key)
        return gone
