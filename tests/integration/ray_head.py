"""A real Ray cluster of one node for a test: `ray start --head` with token authentication, on free loopback ports.

It has a session folder and a process group of its own and is ended by that group, since `ray stop` would end every
Ray on the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_START_S = 600.0
# A busy machine is no failure: Ray's own limits are 60 s, 60 s and 10 s.
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": str(round(_START_S)),
    "RAY_worker_register_timeout_seconds": str(round(_START_S)),
    "RAY_health_check_timeout_ms": "100000",
}


@dataclass(frozen=True)
class RayHead:
    """A running head node."""

    address: str
    """Of its dashboard, as `http://127.0.0.1:PORT`."""
    gcs_address: str
    """For drivers that join directly."""
    metrics_url: str
    token_path: Path
    session: Path
    """Its session folder."""
    environment: dict[str, str]
    """Variables of a person who knows the token."""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(one.getsockname()[1])
        return found


@contextmanager
def ray_head(*, num_cpus: int = 2) -> Iterator[RayHead]:
    """Start a head node, wait until its dashboard answers, and end it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: the paths of its sockets may have 107 characters
    token_path = folder / "token"
    token_path.write_text("a-token-of-this-test-alone")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **clean,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
        **_PATIENCE,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    gcs, dashboard, client, metrics, agent, agent_grpc, node, objects, runtime = free_ports(9)
    process = subprocess.Popen(
        [
            *("ray", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--temp-dir", str(folder)),
            *("--num-cpus", str(num_cpus), "--num-gpus", "0", "--object-store-memory", str(300_000_000)),
            *("--port", str(gcs), "--ray-client-server-port", str(client)),
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--metrics-export-port", str(metrics), "--runtime-env-agent-port", str(runtime)),
            *("--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)),
            *("--node-manager-port", str(node), "--object-manager-port", str(objects)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    head = RayHead(
        f"http://127.0.0.1:{dashboard}",
        f"127.0.0.1:{gcs}",
        f"http://127.0.0.1:{metrics}/metrics",
        token_path,
        folder / "session_latest",
        {name: value for name, value in environment.items() if name != "RAY_AUTH_MODE"},
    )
    try:
        _wait(head, process)
        yield head
    finally:
        process.terminate()  # it ends the processes that it started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    """Until jobs can be submitted: the dashboard's job manager and the node's agent answer."""
    request = urllib.request.Request(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token_path.read_text()}"}
    )
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            assert process.stdout is not None
            raise RuntimeError(f"ray start ended: {process.stdout.read().decode()}")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"no Ray dashboard at {head.address} after {_START_S:.0f} s")
