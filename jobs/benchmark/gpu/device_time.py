"""How long a call takes on the device, and lines about it; a measurement that fails does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


def device_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the device, caches cold; by the clock where there is no GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench  # a dry run may lack triton

        return float(do_bench(call, return_mode="median")) / 1e3
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


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
