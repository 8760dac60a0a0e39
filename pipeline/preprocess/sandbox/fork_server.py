"""The process that starts decoders. It imports the codecs once, so that a new decoder takes milliseconds, not seconds.

Not multiprocessing's own fork server, because that runs the caller's main module again in each child: under Ray a new
decoder took 0.48 s instead of 0.01 s, and 50 MiB instead of 26. It also can't be ended, nor given an environment.

Serves one request: end the present decoder, if any, report its exit code, and fork another. Ends with the actor, whose
end of the socket closes then, and takes the decoder along. Knows processes; not what a decoder does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

from pipeline.preprocess.patches import Resize
from pipeline.preprocess.sandbox.shared_memory import Segment

REPLY = struct.Struct("<ii")
"""(exit code of the decoder before, or minus the signal that ended it; process id of the new one)"""
# A decoder that closed its connection is about to end: its exit code is worth a moment's wait.
_EXIT_WAIT_S = 1.0


def main(descriptor: int, segment_descriptors: Sequence[int], resize: Resize) -> None:
    """Fork decoders on request from the socket behind `descriptor`; they inherit the shared segments."""
    control = socket.socket(fileno=descriptor)
    segments = [Segment(number) for number in segment_descriptors]
    _import_codecs(resize)
    gc.freeze()  # so that collecting garbage in a decoder does not copy this process's memory
    decoder: ForkProcess | None = None
    context = multiprocessing.get_context("fork")
    with contextlib.suppress(ConnectionError):  # the actor is gone
        while (received := socket.recv_fds(control, 1, 1))[0]:
            (connection,) = received[1]
            exit_code = _end(decoder)
            decoder = context.Process(target=_run_decoder, args=(control, connection, segments), daemon=True)
            decoder.start()
            os.close(connection)
            control.sendall(REPLY.pack(exit_code, decoder.pid))
    _end(decoder)


def _end(decoder: ForkProcess | None) -> int:
    if decoder is None:
        return 0
    decoder.join(_EXIT_WAIT_S)
    decoder.kill()
    decoder.join()
    return decoder.exitcode or 0


def _import_codecs(resize: Resize) -> None:
    import av.logging
    from PIL import Image

    import pipeline.preprocess.sandbox.decoder  # noqa: F401

    av.logging.set_level(None)
    Image.init()
    if resize == "torch":  # with Pillow's it would cost a second and 150 MB for nothing
        import torch

        torch.set_num_threads(1)


def _run_decoder(control: socket.socket, descriptor: int, segments: Sequence[Segment]) -> None:
    from pipeline.preprocess.sandbox.decoder import serve  # loads the codecs, which the actor never needs

    control.close()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # codecs written in C complain there about each broken file
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the actor is gone
        serve(Connection(descriptor), segments)
