"""What the benchmarks share: the form of their command lines, fresh processes, timing, the last line.

Knows nothing of what is measured, and needs the standard library alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def command_line(name: str, about: str | None) -> argparse.ArgumentParser:
    """A parser for the options of a benchmark; `about` is its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m jobs.benchmark {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def print_result(name: str, **values: Any) -> None:
    """Print a benchmark's last line."""
    print(json.dumps({"benchmark": name, **values}), flush=True)


def in_own_process(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Call a function in a fresh process, which has its own threads and its own peak of memory.

    Raises what the function raises, and BrokenProcessPool where the process dies.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_mb() -> float:
    """The most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Milliseconds(NamedTuple):
    """How long something takes."""

    wall: float
    cpu: float


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, cpu_clock: Callable[[], float] = time.process_time
) -> dict[str, Milliseconds]:
    """Median times of functions that are called in turns, so that whatever slows the machine down slows all of them.

    `cpu_clock` gives processor time in seconds.
    """
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started, cpu_started = time.perf_counter(), cpu_clock()
            function()
            wall[name].append((time.perf_counter() - started) * 1000)
            cpu[name].append((cpu_clock() - cpu_started) * 1000)
    return {name: Milliseconds(statistics.median(wall[name]), statistics.median(cpu[name])) for name in functions}
