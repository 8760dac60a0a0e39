"""Which Ray a job joins or starts, and whether one answers there: Ray's own client waits for minutes, in silence.

Knows addresses and environment variables; starts nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray._private.utils import read_ray_address

from pipeline.config import ResourcesConfig
from pipeline.errors import ResourceError

_JOIN_TIMEOUT_S = 60.0
_RECORDED_TIMEOUT_S = 3.0
_ATTEMPT_S = 3.0


def init_options(resources: ResourcesConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Arguments for `ray.init`. `say` prints a line. Raises ResourceError where the named Ray does not answer."""
    source = "resources.address" if resources.address else "RAY_ADDRESS"
    named = resources.address or os.environ.get("RAY_ADDRESS") or None
    if named and named.startswith("ray://"):
        raise ResourceError(
            f"{named} is for Ray's client, through which no batch job can be run: "
            "`python -m jobs.submit --address http://HOST:8265` runs it on the cluster, or give HOST:6379 from one "
            "of its nodes"
        )
    if named not in (None, "local", "auto"):
        say(f"joining the Ray cluster at {named} ({source})")
        if not _answers(named, _JOIN_TIMEOUT_S):
            raise ResourceError(
                f"no Ray answered at {named} ({source}) within {_JOIN_TIMEOUT_S:.0f} s: start the cluster, correct or "
                "unset the address, or set resources.address local for a private Ray on this machine"
            )
        return {"address": named}
    recorded = read_ray_address()  # of the last `ray start` on this machine, which may be gone
    is_gone = bool(recorded) and named != "local" and not _answers(recorded, _RECORDED_TIMEOUT_S)
    if is_gone and named == "auto":
        raise ResourceError(f"{source} is auto, and the Ray at {recorded}, the last started here, no longer answers")
    if named == "local" or (named is None and (resources.num_cpus or is_gone)):
        # Without an address Ray would join one that `ray start` left running here, with CPUs of its own.
        _make_token_without_home()
        return {"address": "local", "num_cpus": resources.num_cpus, "include_dashboard": False}
    _make_token_without_home()
    return {"address": named} if named else {"include_dashboard": False}


def _answers(address: str, timeout_s: float) -> bool:
    """Whether something accepts connections at `host:port`."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        raise ResourceError(f"found the Ray address {address!r}; expected HOST:PORT, auto or local")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ATTEMPT_S).close()
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(min(1.0, timeout_s / 10))


def _make_token_without_home() -> None:
    """Ray writes the token of a Ray that it starts into HOME; where that can't be written, give it one."""
    home = Path.home()
    if not os.access(home, os.W_OK) and not (home / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
