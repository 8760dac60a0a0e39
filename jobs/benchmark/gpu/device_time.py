"""How long a call takes on the device, and lines about it; a measurement that fails does not stop the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from pipeline.engine.attention.vision import seconds_by_events

Call = Callable[[], object]
SHORT_S = 2e-3
"""A shorter call is replayed as a graph of several, or the host's launches would be what is measured."""


def device_seconds(call: Call, *, repeats: int = 8) -> float:
    """Median seconds of a call, by the device's events; by the clock where there is no GPU."""
    for _ in range(2):
        call()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    once = seconds_by_events(call)
    calls, run = 1, call
    if once < SHORT_S:
        calls = max(2, min(50, int(SHORT_S / max(once, 1e-5))))
        run = _several(call, calls)
    run()
    return statistics.median(seconds_by_events(run) for _ in range(repeats)) / calls


def _several(call: Call, calls: int) -> Call:
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except Exception:  # not every kernel can be captured
        torch.cuda.synchronize()
        return lambda: [call() for _ in range(calls)]
    return graph.replay


@dataclass
class Measurements:
    """Measurements by name, within a limit of time."""

    max_seconds: float
    values: dict[str, float | None] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def measure(self, name: str, body: Callable[[], tuple[float, str]]) -> None:
        """Print a line: `body` gives the value for the JSON and the text for people. It may fail in any way, as
        kernels that were never tried here do; the reason is then the line."""
        if time.perf_counter() - self.started > self.max_seconds:
            print(f"{name:44} left out: no time", flush=True)
            return
        try:
            with torch.inference_mode():
                value, text = body()
        except Exception as error:
            print(f"{name:44} FAILED {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
            self.values[name] = None
        else:
            print(f"{name:44} {text}", flush=True)
            self.values[name] = round(value, 4)
