"""Joining or starting Ray, and keeping its chatter out of a person's sight.

Ray, its workers and the libraries below write to the process's own output. While a job runs, that goes to a log
file, and a copy of the real output is kept for the job's own lines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import types
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from pipeline import storage
from pipeline.config import CaptionConfig, ResourcesConfig
from pipeline.errors import ResourceError

_JOINING_HINT = (
    "; a cluster that asks for a token wants RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; "
    "resources.address local starts a Ray of the job's own; log.txt in the run folder has Ray's own lines"
)


@contextlib.contextmanager
def quiet_output(log_path: str, *, verbose: bool) -> Iterator[Console]:
    """A console on the real output, while everything else that is written goes to the log (or both show)."""
    if verbose:
        yield Console(highlight=False)
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = (os.dup(1), os.dup(2))
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    width = None if os.isatty(kept[0]) else 110
    screen = os.fdopen(os.dup(kept[0]), "w", encoding="utf-8", errors="replace")
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield Console(file=screen, highlight=False, width=width)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        screen.close()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)
        os.close(log)


def stop_on_sigterm() -> None:
    """Have SIGTERM, by which a cluster or a container's host stops a job, end it as cleanly as Ctrl-C does."""
    with contextlib.suppress(ValueError):  # not the main thread: then there is nothing to set
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def ray_cluster(resources: ResourcesConfig) -> Iterator[dict[str, float]]:
    """Join the cluster this runs on or start one here; gives its resources, such as `CPU` and `GPU`.

    A Ray that the caller has started already is used and left running. Raises ResourceError when it can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's default hides the GPUs from actors that ask for none; that is what is wanted, and its warning is not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # On a machine that is busy just then, Ray's own 30 seconds for its first daemon were seen not to be enough.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        named = resources.address or os.environ.get("RAY_ADDRESS") or None
        if named and named.startswith("ray://"):
            raise ResourceError(
                f"{named} is for Ray's client, through which no batch job can be run: "
                "`python -m jobs.submit --address http://HOST:8265` runs it on the cluster, or give HOST:6379 from one "
                "of its nodes"
            )
        options: dict[str, Any] = {"address": named}
        if named == "local" or (named is None and resources.num_cpus):
            # Without an address Ray would join one that `ray start` has left running here; that has its own CPUs.
            options = {"address": "local", "num_cpus": resources.num_cpus, "include_dashboard": False}
        elif named is None:
            options = {"include_dashboard": False}
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises that very class where its daemons come too late
            first = str(error).strip().splitlines()[0]
            hint = _JOINING_HINT if isinstance(error, ConnectionError) else ""
            raise ResourceError(f"can't reach or start Ray ({named or 'here'}): {first}{hint}") from error
    stop_on_sigterm()  # again: ray.init has put its own handler there, which would end the process on the spot
    try:
        yield {name: float(value) for name, value in ray.cluster_resources().items()}
    finally:
        if started_here:
            ray.shutdown()


def local_path_notes(config: CaptionConfig, num_nodes: int) -> list[str]:
    """What to know about paths on a disk when the cluster has several nodes; nothing on one node."""
    if num_nodes < 2:
        return []
    notes = []
    if not storage.is_remote(config.input.path):
        notes.append(f"input.path {config.input.path} must be a disk that all {num_nodes} nodes of the cluster share")
    if not storage.is_remote(config.output.path):
        notes.append(f"output.path {config.output.path} is written by this node alone ({socket.gethostname()})")
    return notes
