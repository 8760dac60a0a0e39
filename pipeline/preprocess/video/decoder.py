"""A decoder that moves forward through a video's packets, and on to a keyframe where that skips some.

One thread: throughput comes from processes. Knows packets and FFmpeg's decoders; not which frames are shown or why.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import av
from av.video.frame import PictureType

from pipeline.preprocess.video.packets import PacketIndex

# What a decoder raises for a damaged packet: what it would have shown is missing, the rest may be fine.
_DAMAGE = (av.error.InvalidDataError, av.error.EOFError, av.error.ArgumentError, av.error.UnknownError)

# Packets after which no decoder holds a frame back any longer.
_MAX_DELAY = 100


def open_decoder(stream: av.VideoStream) -> av.VideoCodecContext:
    """The stream's decoder; for transparent VP8 and VP9 libvpx, since FFmpeg's own leave the transparency out."""
    decoder = stream.codec_context
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
    if name is not None and stream.metadata.get("alpha_mode") == "1" and name in av.codecs_available:
        decoder = av.VideoCodecContext.create(name, "r")
        decoder.extradata = stream.codec_context.extradata
    decoder.thread_count = 1
    decoder.thread_type = "NONE"
    return decoder


class ForwardDecoder:
    """Gives the wanted frames of a video, asked for in their order.

    Containers also call packets keyframes at which decoding can't start: those where H.264 begins to refresh the
    picture bit by bit, or simply all of them. Then the first frame that comes is another one, or refers to others, and
    decoding starts at an earlier keyframe.
    """

    def __init__(self, decoder: Any, index: PacketIndex, frame_indices: list[int]) -> None:
        self._decoder = decoder
        self._index = index
        self._wanted_packets = {index.packet_of[frame] for frame in frame_indices}
        self._start = self._next = 0
        """Packets: at which decoding started, and which comes next."""
        self._is_keyframe: bool | None = True
        """Whether decoding can start there; None until the first frame has come."""
        self._refers = False
        """Whether it can't, because the frame there refers to others."""
        self._any_keyframe = False
        """Whether it could start at any packet but the first."""
        self._num_passed = 0
        self._ready: deque[Any] = deque()
        self.before: Any = None
        """The last frame that was passed on the way; None after a restart."""
        self.ended = False
        self.num_decoded = 0
        """Packets that were decoded."""
        # Wrappers of other libraries (libdav1d, libvpx) read `skip_frame` once, when they are opened.
        self._skipping = index.by_time and not decoder.name.startswith("lib")
        """Whether frames that nothing refers to, and nobody wants, are left undecoded."""
        self.damaged: set[int] = set()
        """Frames that were decoded and are damaged."""

    @property
    def ahead(self) -> Any:
        """The first decoded frame that is not yet passed."""
        return self._ready[0] if self._ready else None

    def keyframe(self, frame_index: int) -> Any:
        """A frame whose packet can be decoded alone, or None if that fails."""
        packet = self._index.packet_of[frame_index]
        self._restart(packet)
        self._decoder.skip_frame = "DEFAULT"  # nothing may refer to it
        self._decode(self._index.packets[packet])
        self._decode(None)  # nothing that follows is of use, so the decoder need not wait for it
        if self._ready and self._is_keyframe:
            return self._ready[0]
        self._restart(self._index.key_before(frame_index))
        return self.frame(frame_index)

    def frame(self, frame_index: int) -> Any:
        """A frame, or None if it can't be decoded."""
        index = self._index
        key = index.key_before(frame_index)
        if key > self._next:
            self._restart(key)
        frame = self._reach(frame_index)
        if not self._is_keyframe:
            index.keyframes.remove(self._start)
            self._restart(index.key_before(frame_index))
            frame = self._reach(frame_index)
        if not self._is_keyframe and (self._refers or not self._any_keyframe):  # else it's damage to a part of the file
            index.keyframes = [0]
            self._restart(0)
            frame = self._reach(frame_index)
        return frame

    def _restart(self, packet: int) -> None:
        """Continue at a packet, as if nothing had been decoded."""
        self._decoder.flush_buffers()
        self._start = self._next = packet
        self._is_keyframe = None if packet and self._index.by_time else True
        self._refers = False
        self.before, self.ended = None, False
        self._ready.clear()

    def _reach(self, frame_index: int) -> Any:
        frame = self._move_to(frame_index)
        if frame is None and self._skipping:
            # Some decoders need the skipped frames to learn how far output is reordered: once more, with them.
            self._skipping = False
            self._restart(self._start)
            frame = self._move_to(frame_index)
        return frame

    def _move_to(self, frame_index: int) -> Any:
        tick, packet = self._index.ticks[frame_index], self._index.packet_of[frame_index]
        while True:
            while self._ready:
                frame = self._ready[0]
                at = frame.pts if self._index.by_time else self._num_passed
                if at == tick:
                    return frame
                if at is not None and at > tick:
                    return None
                self.before = self._ready.popleft()
                self._num_passed += 1
            if self.ended or self._next > packet + _MAX_DELAY:
                return None
            self._decode_next()

    def _decode_next(self) -> None:
        packets = self._index.packets
        self.ended = self._next >= len(packets)
        if self.ended:
            self._decode(None)
            return
        skip = self._skipping and self._next not in self._wanted_packets
        self._decoder.skip_frame = "NONREF" if skip else "DEFAULT"
        self._decode(packets[self._next])
        self._next += 1
        self.num_decoded += 1

    def _decode(self, packet: av.Packet | None) -> None:
        try:
            frames = self._decoder.decode(packet)
        except _DAMAGE:
            if packet is not None and self._counts(packet.pts):
                self.damaged.add(self._next if packet.pts is None else packet.pts)
            return
        self._ready.extend(frames)
        for frame in frames:
            if not self._counts(frame.pts):
                continue
            if frame.is_corrupt:
                self.damaged.add(self._next if frame.pts is None else frame.pts)
            if self._is_keyframe is None:
                self._refers = not frame.key_frame and frame.pict_type not in (PictureType.I, PictureType.SI)
                self._is_keyframe = frame.pts == self._first_pts and not self._refers
                self._any_keyframe |= self._is_keyframe

    @property
    def _first_pts(self) -> int | None:
        pts: int | None = self._index.packets[self._start].pts
        return pts

    def _counts(self, pts: int | None) -> bool:
        """Whether a frame must come out well. Those that follow a keyframe and are shown before it refer to others."""
        return pts is None or self._first_pts is None or pts >= self._first_pts
