"""`--profile N`: a torch trace of N engine steps from every engine, and Ray's timeline, in the run folder.

    profile/engine-0.json.gz   for chrome://tracing, Perfetto or TensorBoard
    profile/ray.json.gz        what ran on which worker when, the whole run

The engine is not aware of it: its step is wrapped before the engine's thread runs it. The driver, which alone writes to
the run folder, collects the traces.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from pipeline import storage
from pipeline.execution.supervision import Supervision
from pipeline.results.run_folder import RunFolder

WARM_UP_STEPS = 10
"""Steps before the trace begins: the first ones allocate, compile and pick kernels."""
_COLLECT_EVERY_S = 5.0

Result = TypeVar("Result")


def profiled(step: Callable[[], Result], num_steps: int, deliver: Callable[[bytes], None]) -> Callable[[], Result]:
    """A function that one thread calls again and again, traced for so many calls, once. `deliver` is handed the trace:
    Chrome's JSON, gzipped."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    trace = profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
        schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=lambda trace: deliver(_exported(trace)),
    )

    def traced() -> Result:
        if trace.step_num == 0:
            trace.start()  # in the thread that steps
        with record_function("engine step"):
            result = step()
        trace.step()
        return result

    return traced


def _exported(trace: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json.gz"
        trace.export_chrome_trace(str(path))
        return path.read_bytes()


class ProfileFolder:
    """Writes the traces into the run folder as they come."""

    def __init__(self, folder: RunFolder, supervision: Supervision, num_steps: int | None) -> None:
        self._folder, self._supervision, self._num_steps = folder, supervision, num_steps
        self._num_written = 0
        self._looked = time.monotonic()

    def collect(self, *, if_old: bool = False) -> None:
        """Write traces that have come since the last time; with `if_old`, only look when that is a while ago."""
        if self._num_steps is None or (if_old and time.monotonic() - self._looked < _COLLECT_EVERY_S):
            return
        self._looked = time.monotonic()
        for trace in self._supervision.traces(self._num_written):
            self._write(f"engine-{self._num_written}.json.gz", trace)
            self._num_written += 1

    def close(self, console: Console) -> None:
        """Write the rest and Ray's timeline; print where they are."""
        import ray

        if self._num_steps is None:
            return
        self.collect()
        self._write("ray.json.gz", gzip.compress(json.dumps(ray.timeline()).encode()))
        if not self._num_written:
            console.print(
                f"no engine made {WARM_UP_STEPS + self._num_steps} steps, {WARM_UP_STEPS} of them to warm up, so there "
                "is no trace of one: profile fewer steps, or run more rows"
            )
        console.print(f"profile   {self._folder.file('profile')}", markup=False)

    def _write(self, name: str, data: bytes) -> None:
        storage.make_dir(self._folder.file("profile"), self._folder.storage_options)
        storage.publish(self._folder.file("profile", name), data, self._folder.storage_options)
