"""Which media are encoded, and how many waiting sequences still need each of them. Keys and counts only.

Visual tokens are kept from the pass that encodes them until no waiting sequence needs them any more, so several
questions about one image run the vision tower once. The tensors themselves are the model runner's.
"""

from __future__ import annotations

from collections import Counter

from pipeline.engine.sequence import Medium, Sequence


class EncodedMedia:
    def __init__(self, max_kept_tokens: int = 2**62) -> None:
        """`max_kept_tokens`: visual tokens kept at most; above it the oldest media are forgotten and encoded again."""
        self.max_kept_tokens = max_kept_tokens
        self._waiting: Counter[bytes] = Counter()
        self._encoded: dict[bytes, int] = {}  # key -> visual tokens, in order of encoding

    @property
    def num_kept_tokens(self) -> int:
        return sum(self._encoded.values())

    def retain(self, sequence: Sequence) -> None:
        """The sequence will need its media in a later prefill."""
        self._waiting.update(medium.content_key for medium in sequence.request.media)

    def release(self, sequence: Sequence) -> None:
        """The sequence's prompt is in the cache, or is no longer wanted."""
        for medium in sequence.request.media:
            self._waiting[medium.content_key] -= 1
            if not self._waiting[medium.content_key]:
                del self._waiting[medium.content_key]

    def new_media(self, sequence: Sequence, planned: set[bytes]) -> list[Medium]:
        """Media that a pass must encode for this sequence, besides those already planned in it."""
        media = {medium.content_key: medium for medium in sequence.request.media}
        return [medium for key, medium in media.items() if key not in self._encoded and key not in planned]

    def mark_encoded(self, medium: Medium) -> None:
        self._encoded[medium.content_key] = medium.num_visual_tokens

    def forget(self, in_use: set[bytes]) -> list[bytes]:
        """Drop and return the keys that no sequence waits for, and the oldest above the limit that are not in use."""
        gone = [key for key in self._encoded if key not in self._waiting]
        for key in gone:
            del self._encoded[key]
        excess = self.num_kept_tokens - self.max_kept_tokens
        for key in list(self._encoded) if excess > 0 else ():
            if excess > 0 and key not in in_use:
                excess -= self._encoded.pop(key)
                gone.append(key)
        return gone
