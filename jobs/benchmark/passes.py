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
from pathlib import Path
from typing import Any

import torch

from pipeline.engine import Request
from pipeline.engine.engine import NativeEngine

TRACED_STEPS = 5
SHOWN_KERNELS = 12
KINDS = ("vision", "prefill", "decode")


class PassTimes:
    """Times the passes of one engine from when it is made."""

    def __init__(self, engine: NativeEngine) -> None:
        self._on_gpu = engine.checkpoint.device.type == "cuda"
        self._spans: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        engine.runner.also_timed = self._timed

    def reset(self) -> None:
        self._spans.clear()

    def seconds(self) -> dict[str, float]:
        """Of each kind of pass so far. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {kind: sum(start.elapsed_time(stop) for start, stop in self._spans[kind]) / 1000 for kind in KINDS}
        return {kind: sum(stop - start for start, stop in self._spans[kind]) for kind in KINDS}

    def counts(self) -> dict[str, int]:
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
    for kind, share in table.items():
        line = f"  {kind:8} {share.seconds:9.3f} s {share.share_of_run:6.1%} of the run"
        line += f" {share.seconds / num_rows * 1000:9.2f} ms/row"
        if kind != "between":
            line += f"   {share.passes:5} passes   bound {share.bound_seconds:8.3f} s = {share.share_of_bound:6.1%}"
        print(line, flush=True)


def trace_steps(engine: NativeEngine, requests: Sequence[Request], folder: Path) -> None:
    """Trace some passes with prompts in them, then some of decoding alone: a Chrome trace of each in the folder, and a
    table of its kernels, or on a CPU of torch's operations."""
    wanted, taken = engine.max_batch_tokens * TRACED_STEPS, 0
    for request in requests:
        if taken >= wanted:
            break
        engine.add(request)
        taken += len(request.input_ids)
    folder.mkdir(parents=True, exist_ok=True)
    _trace(engine, folder / "prompts.json")
    while engine.stats()["waiting"]:
        engine.step()
    _trace(engine, folder / "decode.json")
    while engine.has_unfinished():
        engine.step()


def _trace(engine: NativeEngine, path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile, record_function

    device, steps = engine.checkpoint.device.type.upper(), 0
    on_gpu = device == "CUDA"
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as trace:
        while steps < TRACED_STEPS and engine.has_unfinished():
            with record_function("engine step"):
                engine.step()
            steps += 1
        if on_gpu:
            torch.cuda.synchronize()
    wall = time.perf_counter() - started
    trace.export_chrome_trace(str(path))
    seconds: dict[str, tuple[float, int]] = {}
    for one in trace.key_averages():
        if one.device_type.name == device and not one.is_user_annotation:
            seconds[one.key] = ((one.self_device_time_total or one.self_cpu_time_total) / 1e6, one.count)
    total = sum(spent for spent, _ in seconds.values()) or 1e-9
    print(f"  {path.name}: {steps} steps, {wall * 1e3:.1f} ms, the device busy {total / wall:.0%} of it")
    for name, (spent, count) in sorted(seconds.items(), key=lambda entry: -entry[1][0])[:SHOWN_KERNELS]:
        print(f"  {spent / total:6.1%} {spent * 1e3:9.2f} ms {count:7} x  {name[:100]}", flush=True)
