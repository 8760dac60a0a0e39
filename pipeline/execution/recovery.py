"""Flow after flow until every row is done: the loss of a cluster's node costs what was in flight, not the job.

Ray restarts a lost node's actors elsewhere and makes its blocks again, and mostly that is enough. Where it is not
(the actors no longer fit, blocks that can't be made again, an executor that gives up or waits for ever), the flow is
torn down and a new one is started over the rows that are not done, on the nodes that are left.
Knows flows and nodes; not rows, nor how work is planned.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from pipeline.errors import ClusterError
from pipeline.execution.nodes import NodeWatch

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 3.0
_NOTICE_S = 30.0
"""Seconds that Ray may need to declare a node dead after a flow broke on it: its health checks take about 15."""


class RunningFlow(Protocol):
    """What a flow looks like from here."""

    @property
    def tables(self) -> Iterator[pa.Table | None]:
        """Finished rows as they come; None when a second has passed without any."""

    def stop(self) -> None:
        """Tear it down, whatever state it is in."""


class Watch(Protocol):
    """What `NodeWatch` looks like from here."""

    @property
    def num_nodes(self) -> int:
        """Nodes there were at first."""

    def lost(self) -> set[str]:
        """Those that are gone."""


@dataclass(frozen=True)
class RecoveryLimits:
    """How long to wait, and how often to try."""

    max_restarts: int
    """Flows in a row that may be lost without having finished a row."""
    node_loss_timeout_s: float
    """Seconds without a finished row, after a node was lost, that Ray has to recover by itself."""


def run_flows(
    start: Callable[[int], RunningFlow | None],
    limits: RecoveryLimits,
    say: Callable[[str], None],
    *,
    watch: Callable[[], Watch] = NodeWatch,
) -> Iterator[pa.Table | None]:
    """The tables of as many flows as it takes. `start` is given the flow's number and plans over what is not done yet;
    None means that nothing is left. Raises the flow's error when no lost node explains it, ClusterError when the
    limit is reached.
    """
    fruitless = 0
    again = ""
    for number in itertools.count():
        nodes = watch()
        flow = start(number)
        if flow is None:
            return
        if again:
            say(again)
        found = False
        try:
            for table in _watched(flow, nodes, limits.node_loss_timeout_s):
                found = found or table is not None
                yield table
            what = "the flow ended with rows left over"
        except ClusterError as error:
            if not _node_was_lost(nodes):
                raise
            what = str(error)
            log.exception("the flow broke after a node was lost")
        except _StandsStill as error:
            what = str(error)
        except (GeneratorExit, Exception):
            flow.stop()  # on a Ray that goes on without this job, its actors would keep their CPUs
            raise
        flow.stop()
        fruitless = 0 if found else fruitless + 1
        if fruitless > limits.max_restarts:
            raise ClusterError(
                f"{fruitless} flows one after the other were lost without a finished row (run.max_flow_restarts "
                f"{limits.max_restarts}): {what}; the same command goes on with what is not done"
            )
        lost = len(nodes.lost())
        again = "some rows never came back: they are run again"
        if lost:
            again = f"{lost} of the cluster's {nodes.num_nodes} nodes lost: rows in flight are run again on the others"


@contextlib.contextmanager
def ended_on_error(tables: Iterator[pa.Table | None]) -> Iterator[Iterator[pa.Table | None]]:
    """The tables of `run_flows`, whose flow is torn down when the caller fails over them. An interrupt is not waited
    for: there is little time then, and it is needed to publish what is done."""
    try:
        yield tables
    except Exception:
        if isinstance(tables, Generator):
            tables.close()
        raise


class _StandsStill(Exception):
    """A node was lost, and no row has finished since for too long."""


def _watched(flow: RunningFlow, nodes: Watch, timeout_s: float) -> Iterator[pa.Table | None]:
    """The flow's tables. Raises _StandsStill when they stop coming after a node was lost."""
    looked = last_row = time.monotonic()
    lost_since: float | None = None
    for table in flow.tables:
        yield table
        now = time.monotonic()
        if table is not None:
            last_row = now
            continue
        if now - looked >= _LOOK_EVERY_S:
            looked = now
            if lost_since is None and nodes.lost():
                lost_since = now
        if lost_since is not None and now - max(lost_since, last_row) > timeout_s:
            raise _StandsStill(f"no row has finished for {timeout_s:g} s since a node was lost")


def _node_was_lost(nodes: Watch) -> bool:
    """Whether a node was lost; waits until Ray should have noticed, where there is more than one."""
    deadline = time.monotonic() + _NOTICE_S
    while True:
        if nodes.lost():
            return True
        if nodes.num_nodes < 2 or time.monotonic() > deadline:
            return False
        time.sleep(1.0)
