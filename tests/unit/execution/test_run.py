"""After a lost node a job that does not recover asks for a restart; one that breaks by itself does not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest

from pipeline.errors import ClusterError, RestartNeeded
from pipeline.execution import run
from pipeline.execution.placement import Node
from pipeline.execution.prepare import CaptionJob

ROW = pa.table({"row": [1]})
NODES = [Node("a", cpus=2, gpus=0), Node("b", cpus=2, gpus=0)]


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes that are alive; a test removes one."""
    alive = list(NODES)
    monkeypatch.setattr(run, "live_nodes", lambda: list(alive))
    monkeypatch.setattr(run, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(run, "_NOTICE_S", 0.0)
    monkeypatch.setenv(run.RESTARTS_VARIABLE, "")  # so that what the tests set is undone
    monkeypatch.delenv(run.RESTARTS_VARIABLE)
    return alive


def job(rows: int = 0, max_flow_restarts: int = 2) -> CaptionJob:
    settings = SimpleNamespace(node_loss_timeout_s=0.05, max_flow_restarts=max_flow_restarts)
    found = SimpleNamespace(config=SimpleNamespace(run=settings), counts=SimpleNamespace(rows=rows))
    return cast(CaptionJob, found)


def tables(alive: list[Node], *, lose: bool, then: str) -> Iterator[pa.Table | None]:
    yield ROW
    if lose:
        alive.pop()
    if then == "break":
        raise ClusterError("Ray gave up: NodeDiedError")
    while then == "hang":
        time.sleep(0.01)
        yield None


def consume(alive: list[Node], **kind: Any) -> int:
    return sum(table is not None for table in run._until_nodes_are_lost(job(rows=1), tables(alive, **kind)))


@pytest.mark.parametrize(
    ("then", "reason"),
    [("break", "NodeDiedError"), ("hang", "no row has finished for 0.05 s since 1 of the cluster")],
)
def test_a_job_that_does_not_recover_from_a_lost_node_is_restarted(nodes: list[Node], then: str, reason: str) -> None:
    with pytest.raises(RestartNeeded, match=reason):
        consume(nodes, lose=True, then=then)


def test_an_error_that_no_lost_node_explains_ends_the_job(nodes: list[Node]) -> None:
    with pytest.raises(ClusterError, match="NodeDiedError") as raised:
        consume(nodes, lose=False, then="break")
    assert not isinstance(raised.value, RestartNeeded)


def test_a_job_that_ends_although_a_node_was_lost_needs_no_restart(nodes: list[Node]) -> None:
    assert consume(nodes, lose=True, then="end") == 1


def test_restarts_without_a_finished_row_are_limited() -> None:
    for _ in range(2):
        assert isinstance(run._restart(job(), "?"), RestartNeeded)
    assert not isinstance(run._restart(job(), "?"), RestartNeeded)
    assert isinstance(run._restart(job(rows=1), "?"), RestartNeeded), "a finished row starts the count afresh"
    assert isinstance(run._restart(job(), "?"), RestartNeeded)
