"""Where an engine's time goes: seconds of each kind of pass, and a trace of some steps.

On a GPU the seconds are the device's own, between events before and after the work of a pass. What is left of the run
is the time in which the device waits for the host. On a CPU they are the clock's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.engine import Request
from pipeline.engine.engine import NativeEngine

TRACED_STEPS = 10
KINDS = ("vision", "prefill", "decode")


class PassTimes:
    """Times the passes of one engine from when it is made."""

    def __init__(self, engine: NativeEngine) -> None:
        self._on_gpu = engine.checkpoint.device.type == "cuda"
        self._spans: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        engine.runner.also_timed = self._timed

    def reset(self) -> None:
        """Forget all passes so far."""
        self._spans.clear()

    def seconds(self) -> dict[str, float]:
        """Of each kind of pass so far. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {kind: sum(start.elapsed_time(stop) for start, stop in self._spans[kind]) / 1000 for kind in KINDS}
        return {kind: sum(stop - start for start, stop in self._spans[kind]) for kind in KINDS}

    def counts(self) -> dict[str, int]:
        """Passes of each kind so far."""
        return {kind: len(self._spans[kind]) for kind in KINDS}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[kind].append((start, self._now()))


@dataclass(frozen=True)
class PassShare:
    """One kind of pass in a run."""

    seconds: float
    passes: int
    share_of_run: float
    bound_seconds: float
    share_of_bound: float
    """Bound / seconds: 1 is as fast as the device's ceilings allow."""


def shares(
    seconds: Mapping[str, float], passes: Mapping[str, int], bounds: Mapping[str, float], *, total: float
) -> dict[str, PassShare]:
    """The table of a run that took `total` seconds; `between` is what no pass accounts for."""
    table = {
        kind: PassShare(
            seconds[kind],
            passes[kind],
            seconds[kind] / total,
            bounds[kind],
            bounds[kind] / seconds[kind] if seconds[kind] else 0.0,
        )
        for kind in KINDS
    }
    between = max(0.0, total - sum(seconds.values()))
    return {**table, "between": PassShare(between, 0, between / total, 0.0, 0.0)}


def print_shares(table: Mapping[str, PassShare], num_rows: int) -> None:
    """A line for each kind of pass."""
    for kind, share in table.items():
        line = f"  {kind:8} {share.seconds:9.3f} s {share.share_of_run:6.1%} of the run"
        line += f" {share.seconds / num_rows * 1000:9.2f} ms/row"
        if kind != "between":
            line += f"   {share.passes:5} passes   bound {share.bound_seconds:8.3f} s = {share.share_of_bound:6.1%}"
        print(line, flush=True)


def trace_steps(engine: NativeEngine, requests: Sequence[Request], path: str) -> int:
    """Write a Chrome trace of ten steps, about half of them prefill; returns how many steps there were."""
    from torch.profiler import ProfilerActivity, profile, record_function

    wanted, taken = engine.max_batch_tokens * (TRACED_STEPS // 2), 0
    for request in requests:
        if taken >= wanted:
            break
        engine.add(request)
        taken += len(request.input_ids)
    on_gpu = engine.checkpoint.device.type == "cuda"
    steps = 0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        while steps < TRACED_STEPS and engine.has_unfinished():
            with record_function("engine step"):
                engine.step()
            steps += 1
        if on_gpu:
            torch.cuda.synchronize()
    trace.export_chrome_trace(path)
    while engine.has_unfinished():
        engine.step()
    return steps
