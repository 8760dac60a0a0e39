"""A flow that a lost node breaks is followed by another over what is left; one that breaks by itself is not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from pipeline.errors import ClusterError
from pipeline.execution import recovery
from pipeline.execution.recovery import RecoveryLimits, run_flows

ROW = pa.table({"row": [1]})


class FakeWatch:
    """Two nodes, of which one may be gone."""

    num_nodes = 2

    def __init__(self, lost: bool) -> None:
        self._lost = lost

    def lost(self) -> set[str]:
        return {"b"} if self._lost else set()


class FakeFlow:
    """Tables from a script: rows, seconds without one, errors."""

    def __init__(self, script: Callable[[], Iterator[pa.Table | None]]) -> None:
        self.tables = script()
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


def broken_after(rows: int) -> Iterator[pa.Table | None]:
    yield from [ROW] * rows
    raise ClusterError("Ray gave up: NodeDiedError")


def silent() -> Iterator[pa.Table | None]:
    while True:
        time.sleep(0.01)
        yield None


def run(
    scripts: list[Callable[[], Iterator[pa.Table | None]]], *, lost: bool = True, max_restarts: int = 2
) -> tuple[int, list[str], list[FakeFlow]]:
    """Rows that came, sentences that were said, flows that were started."""
    flows: list[FakeFlow] = []
    said: list[str] = []

    def start(number: int) -> FakeFlow | None:
        assert number == len(flows)
        if number == len(scripts):
            return None
        flows.append(FakeFlow(scripts[number]))
        return flows[-1]

    limits = RecoveryLimits(max_restarts, node_loss_timeout_s=0.05)
    rows = sum(table is not None for table in run_flows(start, limits, said.append, watch=lambda: FakeWatch(lost)))
    return rows, said, flows


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(recovery, "_NOTICE_S", 0.0)


def test_a_flow_that_broke_on_a_lost_node_is_torn_down_and_followed_by_another() -> None:
    rows, said, flows = run([lambda: broken_after(2), lambda: iter([ROW, None, ROW])])
    assert rows == 4
    assert flows[0].stopped
    assert said == ["1 of the cluster's 2 nodes lost: rows in flight are run again on the others"]


def test_a_flow_that_waits_for_ever_after_a_loss_is_given_up() -> None:
    rows, said, flows = run([silent, lambda: iter([ROW])])
    assert (rows, len(said), flows[0].stopped) == (1, 1, True)


def test_a_flow_that_ends_early_is_followed_by_another_over_what_is_left() -> None:
    rows, said, _ = run([lambda: iter([ROW]), lambda: iter([ROW])], lost=False)
    assert (rows, said) == (2, ["some rows never came back: they are run again"])


def test_an_error_that_no_lost_node_explains_ends_the_job() -> None:
    with pytest.raises(ClusterError, match="NodeDiedError"):
        run([lambda: broken_after(2), lambda: iter([ROW])], lost=False)


def test_flows_that_bring_no_row_are_tried_so_often_and_no_more() -> None:
    with pytest.raises(ClusterError, match=r"3 flows one after the other were lost.*run.max_flow_restarts 2"):
        run([lambda: broken_after(0)] * 4)


def test_flows_that_bring_rows_may_be_lost_again_and_again() -> None:
    rows, said, _ = run([lambda: broken_after(1)] * 9)
    assert (rows, len(said)) == (9, 8)  # after the ninth nothing is left
