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
from multiprocessing.connection import Connection
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
    print(json.dumps({"benchmark": name, **values}), flush=True)


class WorkerFailed(RuntimeError):
    """A function in a process of its own raised, or its process died."""


def in_own_process(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Call a function in a fresh process, which has its own threads and its own peak of memory.

    Raises WorkerFailed with the exit code, whether the function raised or the process died; its stderr is ours.
    """
    context = multiprocessing.get_context("spawn")
    results, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(send, function, args, kwargs))
    process.start()
    send.close()
    try:
        result: Result = results.recv()
    except EOFError:
        process.join()
        raise WorkerFailed(f"exit code {process.exitcode}; what it wrote to stderr is above") from None
    process.join()
    return result


def _run(send: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    send.send(function(*args, **kwargs))


def peak_mb() -> float:
    """The most memory that this process has had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Milliseconds(NamedTuple):
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
