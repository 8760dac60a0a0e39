"""What a container states of its length, against the packets that were read: is the file whole?

Knows containers and packets; not decoding. A file that states nothing, as browsers record, is taken as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import av

from pipeline.preprocess.video.packets import PacketIndex

# Shares and seconds by which containers are off in files that are whole.
_MISSING_SHARE, _MISSING_S, _MISSING_FRAMES = 0.02, 0.5, 2


def stated_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float, bool]:
    """(duration or 0, whether that is the stream's own and not that of the whole file)."""
    if stream.duration is not None:
        return float(stream.duration * (stream.time_base or 0)), True
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")  # Matroska: 00:01:02.500000000
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds), True
    except ValueError:
        return (container.duration or 0) / 1e6, False


def shortfall(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: PacketIndex,
    reopen: Callable[[], av.container.InputContainer],
) -> str | None:
    """A note where the whole file holds less than it states, or packets that its demuxer knows to be incomplete."""
    num_damaged = sum(packet.is_corrupt for packet in index.packets)
    damaged = f"{num_damaged} packets are incomplete or damaged" if num_damaged else None
    if not index.complete:
        return damaged
    is_indexed = "mov" in container.format.name
    # An edit list may leave out frames that the header counts; the index has them all.
    frames = min(stream.frames, len(stream.index_entries)) if is_indexed else stream.frames
    if frames:
        missing = frames - index.num_read
        if missing >= (1 if is_indexed else max(_MISSING_FRAMES, _MISSING_SHARE * frames)):
            return f"the file states {frames} frames and holds {index.num_read}: it was cut short or is damaged"
        return damaged
    seconds, is_own = stated_seconds(container, stream)
    least_s = seconds - max(_MISSING_S, _MISSING_SHARE * seconds, _MISSING_FRAMES * index.timeline.last_s)
    if index.end_s < least_s and (is_own or _end_of_all_streams(reopen) < least_s):
        return f"the file states {seconds:.4g} s and holds {index.end_s:.4g} s: it was cut short or is damaged"
    return damaged


def _end_of_all_streams(reopen: Callable[[], av.container.InputContainer]) -> float:
    """Second of the last packet of any stream: sound may outlast the picture in a file that is whole."""
    end_s = 0.0
    try:
        with reopen() as container:
            for packet in container.demux():
                if packet.dts is not None:
                    end_s = max(end_s, float((packet.dts + (packet.duration or 0)) * packet.time_base))
    except (av.error.FFmpegError, IndexError):
        pass  # the end of what can be read
    return end_s
