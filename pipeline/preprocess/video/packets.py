"""The list of a video's packets and frames, made without decoding.

One pass over the packets learns every frame's time and every keyframe. The packets are kept (the file is in memory
already), so there is no second read and no seek that lands where a container pleases. Knows packets and frame times;
not which frames are shown.
"""

from __future__ import annotations

from bisect import bisect_right

import av
import numpy as np

from pipeline.errors import UnsupportedMedia, first_line
from pipeline.preprocess.limits import MediaOptions
from pipeline.preprocess.video.container import check_duration, check_num_frames, stated_rate
from pipeline.preprocess.video.timing import Timeline, constant_rate

# Seconds by which decoding order may run ahead of presentation order.
_REORDER_MARGIN_S = 2.0
_RATE_WITHOUT_TIMES = 25.0
# These containers store no presentation times. FFmpeg works them out for some codecs (MPEG-4, MPEG-2), but hands out
# the packets' own order for others, H.264 among them.
_WITHOUT_TIMES = {"avi", "asf", "mxf"}


class PacketIndex:
    """All frames of a video in presentation order: when each is shown, and which packet holds it."""

    def __init__(
        self,
        packets: list[av.Packet],
        hidden: list[bool],
        stream: av.VideoStream,
        container_format: str,
        *,
        num_read: int,
        complete: bool,
    ) -> None:
        self.packets = packets
        """In decoding order."""
        self.num_read = num_read
        """Packets that were read, those included that hold nothing."""
        self.complete = complete
        """Whether the file was read to its end, and not just to the end of the segment."""
        shown = [number for number, is_hidden in enumerate(hidden) if not is_hidden]
        times = [pts for number in shown if (pts := packets[number].pts) is not None]
        in_order = container_format in _WITHOUT_TIMES and stream.codec_context.has_b_frames and times == sorted(times)
        self.by_time = len(set(times)) == len(shown) and not in_order
        """Whether frames can be told apart by their time; else only by the order in which they are decoded."""
        if self.by_time:
            order = np.argsort(times, kind="stable").tolist()
            shown, times = [shown[place] for place in order], [times[place] for place in order]
        self.packet_of = shown
        """Number of the packet that holds each frame."""
        self.ticks = times if self.by_time else list(range(len(shown)))
        """How the decoder identifies each frame: by its time in the stream's own unit, or by its number."""
        self.keyframes = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        """Numbers of the packets at which decoding can start."""
        rate = stated_rate(stream)
        if self.by_time:
            tick_s = float(stream.time_base or 0)
            seconds = (np.array(times, dtype=np.float64) - (times[0] if times else 0)) * tick_s
            last_s = (packets[shown[-1]].duration or 0) * tick_s if shown else 0.0
            self.timeline = Timeline(seconds, constant_rate(seconds, tick_s, rate), last_s)
        else:
            rate = rate or _RATE_WITHOUT_TIMES
            self.timeline = Timeline(np.arange(len(shown)) / rate, rate, 0.0)
        first_s = float(times[0] * (stream.time_base or 0)) if self.by_time and times else 0.0
        self.end_s = max(first_s, 0.0) + self.timeline.duration_s
        """Second at which the last frame is no longer shown, by the file's own clock."""

    def key_before(self, frame: int) -> int:
        """Number of the packet from which decoding must start to get this frame right."""
        if not self.by_time:
            return 0
        # A frame that follows a keyframe in the file but is shown before it still needs the group before.
        number = bisect_right(self.keyframes, self.packet_of[frame])
        while number and (self.packets[self.keyframes[number - 1]].pts or 0) > self.ticks[frame]:
            number -= 1
        return self.keyframes[number - 1] if number else 0


def read_packets(
    container: av.container.InputContainer, stream: av.VideoStream, end_s: float | None, options: MediaOptions
) -> tuple[PacketIndex, str | None]:
    """(index of the stream's packets up to `end_s`, a note where the file is damaged).

    Raises DecompressionBomb for too many frames or seconds, and FFmpeg's error where not even one packet can be read.
    """
    tick_s = float(stream.time_base or 0)
    # VP8 sends reference frames that are never shown as packets of their own; bit 4 of the first byte is show_frame.
    is_vp8 = stream.codec_context.name.startswith(("vp8", "libvpx"))
    packets: list[av.Packet] = []
    hidden: list[bool] = []
    num_read = 0
    origin: int | None = None
    note: str | None = None
    complete = True
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except (av.error.FFmpegError, IndexError) as error:
            if not packets and not isinstance(error, IndexError):
                raise
            # PyAV's way of saying, at the end of a file, that it met streams of which the header does not tell.
            cause = "streams appear inside it" if isinstance(error, IndexError) else first_line(error)
            if not packets:
                raise UnsupportedMedia(f"the file is damaged: {cause}") from error
            note = f"the file is damaged after {len(packets)} frames ({cause})"
            break
        if packet is None:
            break
        num_read += packet.dts is not None or packet.size > 0
        if not packet.size:  # marks the end of the stream, or a frame that was dropped
            continue
        packets.append(packet)
        hidden.append(packet.is_discard or (is_vp8 and not memoryview(packet)[0] & 0x10))
        check_num_frames(len(packets), options)
        if packet.dts is None or not tick_s:
            continue
        origin = packet.dts if origin is None else min(origin, packet.dts)
        seconds = (packet.dts - origin) * tick_s
        check_duration(seconds, end_s, options)
        if end_s is not None and seconds > end_s + _REORDER_MARGIN_S:
            complete = False
            break
    index = PacketIndex(packets, hidden, stream, container.format.name, num_read=num_read, complete=complete)
    return index, note
