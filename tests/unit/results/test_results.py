"""Fragments to part files: manifest order, every row once, whatever order and overlap they came in."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.manifest.row_set import RowNumbering, RowSet
from pipeline.results import lease as lease_module
from pipeline.results.lease import Lease
from pipeline.results.run_folder import FragmentWriter, RunFolder, count_errors, finalise, read_finished, take_new
from pipeline.schema import result_schema

SCHEMA = result_schema(pa.schema([("tag", pa.string())]))


def rows(places: list[tuple[int, int]], *, status: str = "ok", attempts: int = 1, text: str = "t") -> pa.Table:
    values = [
        {
            **dict.fromkeys(SCHEMA.names),
            "id": f"{file}/{row}",
            "text": text if status == "ok" else None,
            "status": status,
            "error_type": None if status == "ok" else text,
            "attempts": attempts,
            "tag": f"tag {file}/{row}",
            "manifest_file": file,
            "manifest_row": row,
        }
        for file, row in places
    ]
    return pa.Table.from_pylist(values, schema=SCHEMA)


def new_folder(path: Path) -> RunFolder:
    folder = RunFolder(str(path / "run"))
    folder.prepare()
    return folder


def writer(folder: RunFolder, numbering: RowNumbering, rows_per_fragment: int = 3) -> FragmentWriter:
    return FragmentWriter(folder, numbering, SCHEMA, rows_per_fragment, 60.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.randoms(), st.integers(1, 9), st.integers(1, 7))
def test_parts_hold_every_row_once_in_manifest_order(
    counts: list[int], random, per_part: int, per_fragment: int
) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as path:
        folder, numbering = new_folder(Path(path)), RowNumbering(counts)
        places = [(file, row) for file, count in enumerate(counts) for row in range(count)]
        again = [place for place in places if random.random() < 0.3]  # a crash makes rows come twice
        arriving = places + again
        random.shuffle(arriving)
        out = writer(folder, numbering, per_fragment)
        for place in arriving:
            out.add(rows([place]))
        out.flush()
        finalise(folder, numbering, SCHEMA, rows_per_part=per_part)
        parts = [pq.read_table(part) for part in folder.parts()]
        table = pa.concat_tables(parts)
        assert table.column("id").to_pylist() == [f"{file}/{row}" for file, row in places]
        assert table.column("tag").to_pylist() == [f"tag {file}/{row}" for file, row in places]
        assert all(part.num_rows == per_part for part in parts[:-1])
        assert folder.is_finished()
        assert not os.path.exists(folder.file("fragments"))


def test_a_missing_row_is_refused_and_nothing_is_marked_finished(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([3])
    out = writer(folder, numbering)
    out.add(rows([(0, 0), (0, 2)]))
    out.flush()
    with pytest.raises(OutputError, match="rows 0 to 2 of the manifest have 2 results, expected 3"):
        finalise(folder, numbering, SCHEMA, rows_per_part=10)
    assert not folder.is_finished()
    assert folder.fragments()


def test_an_answer_wins_over_errors_and_a_later_error_over_an_earlier(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([3])
    out = writer(folder, numbering, 1)
    out.add(rows([(0, 0)], status="error", text="Old"))
    out.add(rows([(0, 0)], text="answer", attempts=1))
    out.add(rows([(0, 0)], status="error", text="New", attempts=2))
    out.add(rows([(0, 1)], status="error", text="New", attempts=2))
    out.add(rows([(0, 1)], status="error", text="Old", attempts=1))
    out.add(rows([(0, 2)]))
    finished = read_finished(folder, numbering)
    assert finished.failed.tolist() == [1]
    assert finished.count_failed() == {"New": 1}
    assert finished.failed_attempts.tolist() == [2]
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    table = pq.read_table(folder.parts()[0])
    assert table.column("text").to_pylist() == ["answer", None, "t"]
    assert table.column("error_type").to_pylist() == [None, "New", None]


def test_failed_rows_are_taken_by_type(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([4])
    out = writer(folder, numbering)
    out.add(rows([(0, 0)], status="error", text="FetchError"))
    out.add(rows([(0, 1)], status="error", text="MediaTimeout", attempts=3))
    out.add(rows([(0, 2)]))
    out.flush()
    finished = read_finished(folder, numbering)
    taken, attempts = finished.take_failed(["MediaTimeout"])
    assert (taken.tolist(), attempts.tolist()) == ([1], [3])
    assert finished.done.mask(0, 4).tolist() == [True, False, True, False]
    assert finished.failed.tolist() == [0]


def test_reopening_a_finished_folder_loses_no_row(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([5])
    out = writer(folder, numbering)
    out.add(rows([(0, row) for row in range(5)]))
    finalise(folder, numbering, SCHEMA, rows_per_part=2)
    before = pa.concat_tables([pq.read_table(part) for part in folder.parts()])
    folder.reopen()
    assert not folder.is_finished()
    assert folder.parts() == []
    assert len(read_finished(folder, numbering).done) == 5
    finalise(folder, numbering, SCHEMA, rows_per_part=4)
    assert pa.concat_tables([pq.read_table(part) for part in folder.parts()]).equals(before)


def test_parts_may_be_partitioned_by_a_column_and_reopened_without_loss(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([6])
    out = writer(folder, numbering)
    table = rows([(0, row) for row in range(6)])
    tags = pa.array(["a", "b/c", None, "a", "b/c", "a"])
    table = table.set_column(table.column_names.index("tag"), "tag", tags)
    out.add(table)
    out.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=4, partition_by="tag")
    found = sorted(str(Path(part).relative_to(folder.path)) for part in folder.parts())
    assert found == [
        "tag=__HIVE_DEFAULT_PARTITION__/part-00000.parquet",
        "tag=a/part-00000.parquet",
        "tag=a/part-00001.parquet",
        "tag=b%2Fc/part-00000.parquet",
        "tag=b%2Fc/part-00001.parquet",
    ]
    assert len(read_finished(folder, numbering).done) == 6
    hive = pa.dataset.dataset(folder.parts(), partitioning="hive", partition_base_dir=folder.path).to_table()
    assert sorted(zip(hive["id"].to_pylist(), hive["tag"].to_pylist(), strict=True)) == [
        (f"0/{row}", tags[row].as_py()) for row in range(6)
    ]
    folder.reopen()
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    assert pq.read_table(folder.parts()[0]).column("tag").to_pylist() == tags.to_pylist()


def test_stale_parts_of_an_interrupted_finalise_are_removed(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([4])
    out = writer(folder, numbering)
    out.add(rows([(0, row) for row in range(4)]))
    out.flush()
    Path(folder.file("part-00007.parquet")).write_bytes(b"half")
    finalise(folder, numbering, SCHEMA, rows_per_part=2)
    assert [Path(part).name for part in folder.parts()] == ["part-00000.parquet", "part-00001.parquet"]


def test_an_empty_manifest_finishes_with_one_empty_part(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([])
    assert finalise(folder, numbering, SCHEMA, rows_per_part=10) == 1
    assert pq.read_table(folder.parts()[0]).schema.equals(SCHEMA)


def test_parts_are_readable_by_pandas(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = writer(folder, numbering)
    out.add(rows([(0, 0)]))
    out.add(rows([(0, 1)], status="error", text="FetchError"))
    out.flush()
    finalise(folder, numbering, SCHEMA, rows_per_part=10)
    frame = pd.concat(pd.read_parquet(part) for part in folder.parts())
    assert frame["status"].tolist() == ["ok", "error"]
    assert list(frame.columns) == SCHEMA.names


def test_rows_that_wait_too_long_are_published(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = FragmentWriter(folder, numbering, SCHEMA, 100, 0.05)
    out.add(rows([(0, 0)]))
    out.flush_if_old()
    assert folder.fragments() == []
    time.sleep(0.06)
    out.flush_if_old()
    assert len(folder.fragments()) == 1


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("x")
    with pytest.raises(OutputError, match=r"thesis\.docx"):
        RunFolder(str(tmp_path)).prepare()


def test_a_folder_whose_first_run_was_refused_early_may_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"listing")
    (tmp_path / "log.txt").write_text("")
    RunFolder(str(tmp_path)).prepare()


def test_files_are_read_several_at_once_in_order_and_not_far_ahead(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    together, begun, most = threading.Barrier(3), [], 0
    taken = 0

    def read(path: str) -> str:
        begun.append(path)
        if int(path) < 3:
            together.wait(timeout=60)  # which one at a time would never pass
        return path

    for path in folder.in_order(read, [str(number) for number in range(100)]):
        assert path == str(taken)
        taken += 1
        most = max(most, len(begun) - taken)
    assert taken == 100
    assert most < 20


def test_error_types_of_many_fragments_are_told_apart(tmp_path: Path) -> None:
    folder, numbering = new_folder(tmp_path), RowNumbering([30])
    out = writer(folder, numbering, 3)
    kinds = ["FetchError", "MediaTimeout", "EngineCrash", "MessageError"]
    for row in range(30):  # so that every fragment counts its types anew, in another order
        out.add(rows([(0, row)], status="ok" if row % 5 == 4 else "error", text=kinds[row % 7 % 4]))
    out.flush()
    expected = [kinds[row % 7 % 4] for row in range(30) if row % 5 != 4]
    finished = read_finished(folder, numbering)
    assert [finished.type_names[number] for number in finished.failed_types] == expected
    assert finished.count_failed() == count_errors(folder) == Counter(expected)
    taken, _ = finished.take_failed(["MediaTimeout", "EngineCrash"])
    assert taken.tolist() == [r for r in range(30) if r % 5 != 4 and kinds[r % 7 % 4] in kinds[1:3]]
    assert finished.count_failed().keys() == {"FetchError", "MessageError"}


def test_only_one_run_holds_the_lease(tmp_path: Path) -> None:
    path = str(tmp_path / ".lease")
    with Lease(path), pytest.raises(OutputError, match="another run is writing"):
        Lease(path).acquire()
    with Lease(path):
        assert os.path.exists(path)
    assert not os.path.exists(path)


def test_a_dead_process_does_not_hold_the_lease(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    with Lease(str(path)):
        held = json.loads(path.read_text())
    held["pid"] = 2**22 + 1  # above Linux's largest process id
    path.write_text(json.dumps(held))
    with Lease(str(path)):
        pass


def test_a_lease_of_another_machine_ends_when_it_is_not_renewed(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    held = {"token": "x", "host": "elsewhere", "pid": 1, "renewed": time.time()}
    path.write_text(json.dumps(held))
    with pytest.raises(OutputError, match="elsewhere"):
        Lease(str(path)).acquire()
    path.write_text(json.dumps({**held, "renewed": time.time() - lease_module.STALE_S - 1}))
    with Lease(str(path)):
        pass


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
                    lease.acquire()
                    won.append(lease)

            threads = [threading.Thread(target=begin, args=(lease,)) for lease in leases]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(won) == 1
            won[0].check()
            won[0].release()
            assert list(tmp_path.iterdir()) == []


def test_a_run_that_slept_too_long_finds_its_lease_taken_over_and_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lease"
    sleeper = Lease(str(path))
    sleeper.acquire()
    other = {"token": "other", "host": "elsewhere", "pid": 7, "renewed": time.time()}
    path.write_text(json.dumps(other))
    sleeper.check()  # renewed a moment ago: not asked again before every write
    monkeypatch.setattr(sleeper, "_renewed", time.time() - lease_module.STALE_S - 1)
    folder = new_folder(tmp_path)
    folder.guard = sleeper.check
    for write in (lambda: folder.write_run({}), folder.discard_fragments, folder.reopen):
        with pytest.raises(OutputError, match=r"taken over .*: process 7 on elsewhere"):
            write()
    sleeper.release()
    assert json.loads(path.read_text()) == other


def test_renewing_notices_another_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0.02)
    path = tmp_path / ".lease"
    with Lease(str(path)) as lease:
        storage.publish(str(path), json.dumps({"token": "other", "renewed": time.time()}).encode())
        time.sleep(0.3)
        assert json.loads(path.read_text())["token"] == "other"
        with pytest.raises(OutputError, match="taken over"):
            lease.check()


def test_a_container_that_is_started_again_does_not_wait_for_itself(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    before = {"token": "x", "host": socket.gethostname(), "pid": os.getpid(), "began": "0/1", "renewed": time.time()}
    path.write_text(json.dumps(before))
    with Lease(str(path)):
        pass
    # Nor for a process of its number that is another one by now.
    path.write_text(json.dumps({**before, "pid": os.getppid()}))
    with Lease(str(path)):
        held = json.loads(path.read_text())
    assert held["began"] != "0/1"


def test_a_lease_in_a_bucket_goes_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_SETTLE_S", 0.0)
    path = "memory://leases/.lease"
    with Lease(path), pytest.raises(OutputError, match="another run is writing"):
        Lease(path).acquire()
    first, second = Lease(path), Lease(path)
    monkeypatch.setattr(second, "_read", iter([None, *[{"token": "first", "renewed": time.time()}] * 9]).__next__)
    with first, pytest.raises(OutputError, match="another run is writing"):
        second.acquire()  # it looked before the first one was there
    assert not storage.exists(path)


@given(st.integers(0, 200), st.lists(st.integers(0, 199), max_size=60), st.lists(st.integers(0, 199), max_size=30))
def test_a_row_set_is_a_set(size: int, added: list[int], dropped: list[int]) -> None:
    added, dropped = [i for i in added if i < size], [i for i in dropped if i < size]
    rows_in = RowSet(size)
    rows_in.add(np.array(added, dtype=np.int64))
    rows_in.discard(np.array(dropped, dtype=np.int64))
    expected = set(added) - set(dropped)
    assert len(rows_in) == len(expected)
    assert set(np.flatnonzero(rows_in.mask(0, size)).tolist()) == expected
    low, high = size // 3, size - size // 4
    assert set((np.flatnonzero(rows_in.mask(low, high)) + low).tolist()) == {i for i in expected if low <= i < high}
    assert rows_in.has(np.arange(size)).tolist() == [i in expected for i in range(size)]


def test_a_row_that_comes_twice_is_taken_once() -> None:
    numbering, done = RowNumbering([2, 3]), RowSet(5)
    first = take_new(rows([(0, 1), (1, 0), (0, 1)]), numbering, done)
    assert first.column("id").to_pylist() == ["0/1", "1/0"]
    second = take_new(rows([(1, 0), (1, 2)]), numbering, done)
    assert second.column("id").to_pylist() == ["1/2"]
    assert take_new(rows([(0, 1)]), numbering, done).num_rows == 0
    assert len(done) == 3


def test_a_disk_without_room_is_an_output_error_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder, numbering = new_folder(tmp_path), RowNumbering([2])
    out = writer(folder, numbering, 100)
    out.add(rows([(0, 0), (0, 1)]))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        for write in (out.flush, lambda: folder.write_run({"state": "running"})):
            with pytest.raises(OutputError, match=r"No space left on device.*run the same command"):
                write()
    assert [path for path in Path(folder.path).rglob("*") if path.is_file()] == []
    out.flush()
    assert finalise(folder, numbering, SCHEMA, rows_per_part=10) == 1
