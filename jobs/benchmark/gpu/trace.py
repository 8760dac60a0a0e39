"""Which kernels an engine's passes spend their time in: tables of vision and prompts, and of decode passes.

    python3 -m jobs.benchmark.gpu.trace --shape 2b [--engine.attention torch ...]

Takes the options of the engine benchmark. The last line is JSON. Without a GPU: torch's operations by the CPU's clock.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from jobs.benchmark.engine import first_row, make_engine, parse, parts
from jobs.benchmark.measure import print_result
from jobs.benchmark.workload import SHAPES, make_model, make_requests
from pipeline.engine import Request
from pipeline.engine.engine import NativeEngine

MOST_ROWS = 256


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="decode passes in their table")
    parser.add_argument("--top", type=int, default=25, help="lines of a table")
    mine, others = parser.parse_known_args(argv)
    args = parse(others)
    started = time.perf_counter()
    model = make_model(SHAPES[args.shape], args.device, getattr(torch, args.dtype))
    made = time.perf_counter() - started
    engine = make_engine("ours", model, args)
    assert isinstance(engine, NativeEngine)
    print(f"engine: random weights {made:.1f} s, start-up {time.perf_counter() - started - made:.1f} s")
    print("engine:", parts(engine.describe()))
    engine.generate(first_row())
    tables = {}
    side = args.side or 1024
    small: dict[str, Any] = {"side": args.side, "max_pixels": 256 * 28 * 28}
    # About a pass of large images, and one of small ones.
    patches = (side // 14) ** 2
    large = max(1, min(args.images, engine.max_batch_patches // patches))
    rows = {
        f"vision and prompts of {large} images of {side} x {side}": make_requests(large, side=side, tokens=1),
        f"vision and prompts of {min(args.images, 64)} small images": make_requests(
            min(args.images, 64), tokens=1, **small
        ),
    }
    for title, requests in rows.items():
        for turn in ("warm", "traced"):
            _add(engine, requests)
            if turn == "warm":
                _drain(engine)
        tables[title] = table(title, lambda: _drain(engine), top=mine.top)
    _add(engine, make_requests(min(args.images, MOST_ROWS), tokens=mine.steps + 40, **small))
    while engine.stats()["waiting"]:
        engine.step()
    for _ in range(6):
        engine.step()
    title = f"{mine.steps} decode passes of {engine.stats()['running']:.0f} rows"
    tables[title] = table(title, lambda: [engine.step() for _ in range(mine.steps)], top=mine.top)
    _drain(engine)
    print_result("gpu trace", shape=args.shape, engine=engine.describe(), tables=tables)
    return 0


def _add(engine: NativeEngine, requests: Sequence[Request]) -> None:
    for request in requests:
        for medium in request.media:
            _ = medium.content_key
        engine.add(request)


def _drain(engine: NativeEngine) -> None:
    while engine.has_unfinished():
        engine.step()


def table(title: str, body: Callable[[], object], *, top: int) -> dict[str, Any]:
    """Run `body`, and print its kernels by the time that they take."""
    on_gpu = torch.cuda.is_available()
    _synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        started = time.perf_counter()
        body()
        _synchronize()
        wall = time.perf_counter() - started
    kind = "device" if on_gpu else "cpu"
    times = {one.key: (one.count, getattr(one, f"self_{kind}_time_total") / 1e6) for one in trace.key_averages()}
    found = {name: (calls, seconds) for name, (calls, seconds) in times.items() if seconds}
    total = sum(seconds for _, seconds in found.values()) or 1e-9
    count = sum(calls for calls, _ in found.values())
    print(f"\n{title}: wall {wall * 1e3:.1f} ms, {count} kernels taking {total * 1e3:.1f} ms ({total / wall:.0%})")
    print(f"{'share':>6} {'ms':>9} {'count':>7}  kernel")
    ranked = sorted(found.items(), key=lambda entry: -entry[1][1])[:top]
    for name, (calls, seconds) in ranked:
        print(f"{seconds / total:6.1%} {seconds * 1e3:9.2f} {calls:7}  {short_name(name)}", flush=True)
    kernels = [{"name": name, "count": calls, "seconds": seconds} for name, (calls, seconds) in ranked]
    return {"wall_s": wall, "kernels_s": total, "count": count, "kernels": kernels}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def short_name(name: str) -> str:
    """A kernel's name without the namespaces that all have, and without the middle of a long one."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|at::cuda::|cutlass::|std::|void ", "", name)
    name = re.sub(r"\s+", " ", name)
    return name if len(name) <= 100 else f"{name[:64]}…{name[-35:]}"


if __name__ == "__main__":
    sys.exit(main())
