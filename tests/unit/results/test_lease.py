"""One run at a time on a folder, whatever became of the run before."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering
from pipeline.results import lease as lease_module
from pipeline.results.lease import Lease
from pipeline.results.parts import reopen
from tests.unit.results.result_rows import new_folder


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "WATCH_S", 0.05)


def assert_refused(path: Path | str, reason: str = "another run is writing") -> None:
    with pytest.raises(OutputError, match=reason), Lease(str(path)):
        raise AssertionError("two runs hold the lease")


def assert_free(path: Path) -> None:
    with Lease(str(path)):
        pass


def test_a_bucket_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_bucket(*_: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(storage, "create", no_bucket)
    assert_refused(
        "memory://buckte/.lease", "below output.path: The specified bucket .*; make the bucket, or correct its"
    )


def test_only_one_run_holds_the_lease(tmp_path: Path) -> None:
    path = str(tmp_path / ".lease")
    with Lease(path):
        assert_refused(path)
    with Lease(path):
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_dead_process_does_not_hold_the_lease(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    with Lease(str(path)):
        held = json.loads(path.read_text())
    held["pid"] = 2**22 + 1  # above Linux's largest process id
    path.write_text(json.dumps(held))
    assert_free(path)


def test_a_live_process_holds_its_lease_where_nobody_knows_when_it_began(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    held = {"token": "x", "host": socket.gethostname(), "pid": os.getppid(), "renewed": time.time()}
    for began in ({}, {"began": None}):
        path.write_text(json.dumps({**held, **began}))
        assert_refused(path)


def test_a_lease_that_somebody_has_deleted_can_be_left(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    with Lease(str(path)):
        path.unlink()
    assert not path.exists()


def test_a_lease_of_another_machine_ends_when_it_is_not_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    held = {"token": "x", "host": "elsewhere", "pid": 1, "renewed": time.time()}
    path.write_text(json.dumps(held))
    assert_refused(path, "process 1 on elsewhere")
    path.write_text(json.dumps({**held, "renewed": time.time() - lease_module.STALE_S - 1}))
    assert_free(path)


@pytest.mark.parametrize("ahead", [-7200, 7200])
def test_a_lease_counts_by_its_renewals_and_not_by_another_machine_s_clock(
    ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lease"
    monkeypatch.setattr(lease_module, "WATCH_S", 0.5)
    stop = threading.Event()

    def renew() -> None:
        while True:
            held = {"token": "x", "host": "elsewhere", "pid": 1, "renewed": time.time() + ahead}
            storage.publish(str(path), json.dumps(held).encode())
            if stop.wait(0.1):
                return

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        while not path.exists():
            time.sleep(0.01)
        assert_refused(path, "process 1 on elsewhere holds the lease, and is still renewing it; wait for it")
    finally:
        stop.set()
        renewer.join()
    assert_free(path)


def test_a_live_process_of_another_user_holds_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lease"
    held = {"token": "x", "host": socket.gethostname(), "pid": os.getppid(), "began": "0/1", "renewed": time.time()}
    path.write_text(json.dumps(held))

    def not_permitted(pid: int, signal: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as other_user:
        other_user.setattr(os, "kill", not_permitted)
        assert_refused(path)
    assert_free(path)


@pytest.mark.parametrize("content", ["", '{"token": "x", "ho', "[]", "{}"])
def test_a_half_written_lease_counts_until_it_is_old(content: str, tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    path.write_text(content)
    assert_refused(path, r"process \? on \? holds the lease, last renewed \d s ago")
    old = time.time() - lease_module.STALE_S - 1
    os.utime(path, (old, old))
    assert_free(path)


def test_of_runs_that_begin_at_once_one_gets_the_lease(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    dead = {"token": "x", "host": socket.gethostname(), "pid": 2**22 + 1, "renewed": time.time()}
    for before in (None, json.dumps(dead)):
        for _ in range(20):
            if before is not None:
                path.write_text(before)
            leases, won, start = [Lease(str(path)) for _ in range(6)], [], threading.Barrier(6)

            def begin(lease: Lease, won: list[Lease] = won, start: threading.Barrier = start) -> None:
                start.wait()
                with contextlib.suppress(OutputError):
                    lease.__enter__()
                    won.append(lease)

            threads = [threading.Thread(target=begin, args=(lease,)) for lease in leases]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            won[0].check()
            won[0].__exit__()
            assert list(tmp_path.iterdir()) == []


def test_a_run_that_slept_too_long_finds_its_lease_taken_over_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lease"
    other = {"token": "other", "host": "elsewhere", "pid": 7, "renewed": time.time()}
    folder = new_folder(tmp_path)
    with Lease(str(path)) as sleeper:
        path.write_text(json.dumps(other))
        sleeper.check()  # renewed a moment ago: not asked again before every write
        monkeypatch.setattr(sleeper, "_renewed", time.time() - lease_module.STALE_S - 1)
        folder.guard = sleeper.check
        for write in (lambda: folder.write_run({}), folder.delete_fragments, lambda: reopen(folder, RowNumbering([]))):
            with pytest.raises(OutputError, match=r"taken over .*: process 7 on elsewhere"):
                write()
    assert json.loads(path.read_text()) == other


def test_renewing_puts_a_lost_lease_back_with_the_same_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    path = tmp_path / ".lease"
    with Lease(str(path)) as lease:
        before = json.loads(path.read_text())
        path.unlink()
        deadline = time.monotonic() + 10
        while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        after = json.loads(path.read_text())
        assert (after["token"], after["renewed"] > before["renewed"]) == (before["token"], True)
        lease.check()
    assert_free(path)


def test_renewing_notices_another_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    path = tmp_path / ".lease"
    with Lease(str(path)) as lease:
        with lease._lock:  # else a renewal that is under way may follow
            storage.publish(str(path), json.dumps({"token": "other", "renewed": time.time()}).encode())
        deadline = time.monotonic() + 60
        while not lease._lost_to and time.monotonic() < deadline:
            time.sleep(0.02)
        assert json.loads(path.read_text())["token"] == "other"
        with pytest.raises(OutputError, match="taken over"):
            lease.check()


def test_a_container_that_is_started_again_does_not_wait_for_itself(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    before = {"token": "x", "host": socket.gethostname(), "pid": os.getpid(), "began": "0/1", "renewed": time.time()}
    path.write_text(json.dumps(before))
    assert_free(path)
    # Nor for a process of its number that is another one by now.
    path.write_text(json.dumps({**before, "pid": os.getppid()}))
    with Lease(str(path)):
        held = json.loads(path.read_text())
    assert held["began"] != "0/1"


def test_a_lease_in_a_bucket_goes_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)
    path = "memory://leases/.lease"
    with Lease(path):
        assert_refused(path)
    first, second = Lease(path), Lease(path)
    monkeypatch.setattr(second, "_read", iter([None, *[{"token": "first", "renewed": time.time()}] * 9]).__next__)
    with (
        first,
        pytest.raises(OutputError, match="another run is writing"),
        second,
    ):  # it looks before the first is there
        raise AssertionError("two runs hold the lease")
    assert not storage.exists(path)
