"""Starting and leaving Ray on a busy machine, and signals that come at any moment."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.config import ResourcesConfig
from pipeline.errors import OutputError, ResourceError
from pipeline.execution import cluster
from pipeline.execution.cluster import job_output, ray_cluster, stop_on_signals
from pipeline.results.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]


class FakeRay:
    """Counts starts and ends; fails as often as it is told."""

    def __init__(self) -> None:
        self.faults: list[Exception] = []
        self.calls: list[str] = []
        self.during_shutdown: list[int] = []

    def init(self, **options: Any) -> None:
        self.calls.append("init")
        if self.faults:
            raise self.faults.pop(0)

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        for number in self.during_shutdown:
            os.kill(os.getpid(), number)
        self.calls.append("is down")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    made = FakeRay()
    monkeypatch.setattr(ray, "init", made.init)
    monkeypatch.setattr(ray, "shutdown", made.shutdown)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.4, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return made


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_workers_that_ray_kills_for_memory_are_said_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_EVERY_S", 0.01)
    folder = RunFolder(str(tmp_path))
    folder.prepare()
    with job_output(folder, verbose=False):
        for _ in range(2):
            print(
                "(raylet) Task _map_task failed due to oom. Error: 2 worker(s) were killed due to the node running low "
                "on memory. Memory on the node (IP: 192.0.2.2, ID: 8c) was 2.09GB used / 23.54GB limit (0.088965)",
                file=sys.__stderr__,
                flush=True,
            )
            time.sleep(0.1)
    screen = " ".join(capfd.readouterr().out.split())
    assert screen.count("a node runs low on memory (2.09GB used / 23.54GB)") == 1


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "pass"])
def test_a_process_that_ray_s_core_ends_leaves_its_last_words_on_the_screen(tmp_path: Path, end: str) -> None:
    code = f"""
import os, signal, sys
from pipeline.execution.cluster import job_output
from pipeline.results.run_folder import RunFolder

folder = RunFolder(sys.argv[1])
folder.prepare()
with job_output(folder, verbose=False):
    os.write(2, b"Failed to connect to GCS. The program will terminate.\\n")
    {end}
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if end == "pass":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode != 0
        assert "ended without a word; the same command resumes. How" in done.stderr
        assert "log.txt ends:\nFailed to connect to GCS. The program will terminate.\n" in done.stderr


def test_a_screen_that_is_gone_ends_the_job_with_a_reason_that_is_not_left_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with `| head`, or standard output on a disk that is full."""
    folder, kept, full = RunFolder(str(tmp_path)), os.dup(1), os.open("/dev/full", os.O_WRONLY)
    folder.prepare()
    os.dup2(full, 1)
    try:
        with pytest.raises(OutputError, match="No space left"), job_output(folder, verbose=False) as console:
            console.print("12 of 480 rows")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(full)
    print("what is said afterwards", file=sys.__stderr__, flush=True)
    assert "afterwards" in capfd.readouterr().err


def test_a_log_on_a_full_disk_does_not_keep_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(str(tmp_path))
    folder.prepare()
    Path(folder.file("log.txt")).symlink_to("/dev/full")
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))
    with job_output(folder, verbose=False):
        print("a worker's own line")
    print("what is said afterwards", file=sys.__stderr__, flush=True)
    assert "afterwards" in capfd.readouterr().err


def test_a_ray_that_starts_too_late_is_started_once_more_and_the_machine_is_called_busy(fake: FakeRay) -> None:
    fake.faults = [Exception("The current node timed out during startup.\nMore.")]
    said: list[str] = []
    with ray_cluster(ResourcesConfig(), said.append):
        assert fake.calls == ["init", "shutdown", "is down", "init"]
    assert said == [
        "Ray did not start (this machine is busy: load 99 on 2 cores): The current node timed out during startup.; "
        "starting it once more"
    ]


def test_a_ray_that_does_not_start_twice_is_an_error_that_calls_the_machine_busy(fake: FakeRay) -> None:
    fake.faults = [Exception("timed out"), Exception("timed out again")]
    again = r"busy: load 99 on 2 cores\): timed out again"
    with pytest.raises(ResourceError, match=again), ray_cluster(ResourcesConfig(), print):
        raise AssertionError("never")
    assert fake.calls.count("init") == 2


@pytest.mark.parametrize(
    ("address", "error"), [("10.0.0.1:6379", Exception("refused")), (None, ConnectionError("refused"))]
)
def test_a_cluster_that_cannot_be_joined_is_not_asked_twice(
    fake: FakeRay, address: str | None, error: Exception
) -> None:
    fake.faults = [error]
    with pytest.raises(ResourceError, match="refused"), ray_cluster(ResourcesConfig(address=address), print):
        raise AssertionError("never")
    assert fake.calls == ["init"]


def test_sigterm_while_ray_starts_interrupts_like_any_other(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt), ray_cluster(ResourcesConfig(), print):
        raise AssertionError("never")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_further_signals_do_not_break_off_the_clean_up(fake: FakeRay, number: int) -> None:
    fake.during_shutdown = [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt), ray_cluster(ResourcesConfig(), print):
        os.kill(os.getpid(), number)
        raise AssertionError("never")
    assert fake.calls[-1] == "is down"
    os.kill(os.getpid(), signal.SIGINT)  # nor what comes after it


def test_a_first_signal_while_ray_ends_interrupts_afterwards(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    fake.during_shutdown = [signal.SIGINT, signal.SIGINT]
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt), ray_cluster(ResourcesConfig(), print):
        os.environ["RAY_AUTH_MODE"] = "token"  # as a Ray does that starts here
    assert fake.calls[-1] == "is down"
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "taken back before the interruption"


@pytest.mark.parametrize("interrupted", [False, True])
def test_ray_s_core_cannot_take_the_handlers_away_while_ray_ends(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    restored: list[bool] = []

    def until(is_so: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 5
        while not is_so() and time.monotonic() < deadline:
            time.sleep(0.001)
        return time.monotonic() < deadline

    def shutdown() -> None:
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert until(lambda: cluster._signals._first is not None)
        default = int(signal.SIG_DFL)
        set_handler(signal.SIGTERM, default)  # as Ray's core does
        restored.append(until(lambda: set_handler(signal.SIGTERM, default) != default))
        fake.shutdown()

    monkeypatch.setattr(ray, "shutdown", shutdown)
    stop_on_signals()
    with contextlib.suppress(KeyboardInterrupt), ray_cluster(ResourcesConfig(), print):
        pass
    assert fake.calls[-1] == "is down" and restored == [True]


def test_a_clean_up_that_never_ends_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(cluster, "_CLEAN_UP_S", -1.0)
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append(number))
    signal.raise_signal(signal.SIGINT)
    assert killed == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
