"""Keep one engine busy under everything that a long job meets, and check that it loses no row and leaks no memory.

    python -m jobs.benchmark soak                             shape tiny-3 on this machine, one minute
    python -m jobs.benchmark soak --shape 2b --seconds 300    on a GPU

Mixed rows arrive in bursts, between which the engine sometimes runs dry. Its cache is kept too small for those that run
together, so rows are preempted; some are aborted; and in the second half, every now and then a pass runs out of memory.
On a GPU the process gets no more memory than it holds until a pass fails; on a CPU the model raises what torch would.

Every interval has a line. The last line is JSON: rows that were added, answered, aborted, lost, answered twice or with
the wrong number of tokens or an error; preemptions for want of blocks; failed passes; memory before and after. The exit
code is 1 if any row went wrong, if a block of the cache or a visual token is not given back, if memory grew, or if no
pass failed.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from jobs.benchmark.measure import command_line, print_result
from jobs.benchmark.model import SHAPES, family_of, make_model
from jobs.benchmark.workload import make_requests
from pipeline.engine import Completion, EngineOptions, Request, SamplingParams
from pipeline.engine.engine import NativeEngine
from pipeline.engine.weights import from_model

BACKLOGS = (0, 4, 32, 128, 400)
"""Rows that are unfinished at a time; another number is drawn every few seconds."""
BACKLOG_S = 3.0
MOST_TOKENS = 512
"""Of an answer."""
LINES = 12
MOST_GROWTH_MB = 384
"""Of memory, while the engine has nothing to do: for late graphs, and for what oneDNN compiles for new shapes."""
MOST_FULL_STEPS = 100
"""In which a pass fails; decode passes of a GPU's graphs need no memory."""
_TEXT = np.arange(8, 16, dtype=np.int32)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    engine = NativeEngine(
        from_model(make_model(SHAPES[args.shape], args.device, getattr(torch, args.dtype))), EngineOptions("random")
    )
    on_gpu = args.device.startswith("cuda")
    soak = Soak(engine, _pool(args), seed=args.seed, fails=_no_free_memory if on_gpu else _as_if_full)
    soak.add_rows(max(BACKLOGS))  # what is allocated once, such as a GPU's graphs, is allocated then
    before = soak.drain()
    soak.hold_blocks(args.cache_tokens)
    started = time.monotonic()
    for line in range(LINES):
        fail_every = args.fail_every if line >= LINES // 2 else 0  # failures make passes small, which hides preemptions
        soak.run(started + (line + 1) * args.seconds / LINES - time.monotonic(), fail_every=fail_every)
        print(f"  {time.monotonic() - started:6.1f} s   {soak.line()}", flush=True)
    soak.release_blocks()
    after = soak.drain()
    kept = {"blocks": engine.scheduler.blocks.num_used, "media": len(engine.runner.visual_tokens)}
    wrong = {name: soak.counts[name] for name in ("lost", "twice", "wrong length", "error")}
    failed_passes = engine.stats()["out_of_memory"]
    passed = not any((*wrong.values(), *kept.values())) and after - before <= MOST_GROWTH_MB
    passed = passed and (failed_passes > 0 or not args.fail_every)
    print_result(
        "soak",
        shape=args.shape,
        device=args.device,
        dtype=args.dtype,
        seconds=args.seconds,
        passed=passed,
        rows={name: soak.counts[name] for name in ("added", "answered", "aborted")} | wrong,
        preemptions=soak.num_preemptions,
        failed_passes=failed_passes,
        kept=kept,
        memory_mb=[round(before), round(after)],
        engine=engine.describe(),
    )
    return 0 if passed else 1


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line("soak", __doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="2b" if on_gpu else "tiny-3")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cache-tokens", type=int, default=60_000 if on_gpu else 8_000, help="left of the cache")
    parser.add_argument("--fail-every", type=int, default=200, help="passes between two that fail, 0 for none")
    parser.add_argument("--max-pixels", type=int, help="of an image or a frame. Default: on a CPU 12544")
    parser.add_argument("--rows", type=int, default=128, help="different rows, which come again and again")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_pixels is None and not on_gpu:
        args.max_pixels = 112 * 112
    return args


def _pool(args: argparse.Namespace) -> list[Request]:
    family = family_of(SHAPES[args.shape])
    return make_requests(args.rows, family=family, rows="mixed", max_pixels=args.max_pixels, seed=args.seed)


class Soak:
    """An engine, and what is owed to its rows."""

    def __init__(
        self,
        engine: NativeEngine,
        pool: Sequence[Request],
        *,
        seed: int,
        fails: Callable[[NativeEngine], AbstractContextManager[None]],
    ) -> None:
        self.engine = engine
        self.counts: Counter[str] = Counter()
        self._pool = pool
        self._fails = fails
        self._random = random.Random(seed)
        self._owed: dict[int, int] = {}
        """Output tokens of each unfinished row, by its request id."""
        self._held: list[int] = []
        self._backlog, self._drawn_at = 0, 0.0
        self._until_failure = 0
        self._preempted_by_failures = 0

    @property
    def num_preemptions(self) -> int:
        """Without those of failed passes."""
        return self.engine.scheduler.num_preemptions - self._preempted_by_failures

    def run(self, seconds: float, *, fail_every: int = 0) -> None:
        """Add, answer and abort rows for that long. About one pass in `fail_every` runs out of memory; none if 0."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if time.monotonic() - self._drawn_at > BACKLOG_S:
                self._backlog, self._drawn_at = self._random.choice(BACKLOGS), time.monotonic()
            self.add_rows(self._backlog - len(self._owed))
            if self._owed and self._random.random() < 0.01:
                self._abort_one()
            if fail_every and self._until_failure <= 0 and self.engine.has_unfinished():
                # Not again at once: a row that fails alone several times and gets no further is rightly an error.
                self._until_failure = self._random.randint(fail_every // 2 + 1, 3 * fail_every // 2 + 1)
                self._fail_once()
            else:
                self._step()

    def add_rows(self, count: int) -> None:
        for _ in range(count):
            number = self.counts["added"]
            max_tokens = self._random.randint(1, MOST_TOKENS)
            sampling = SamplingParams(
                temperature=self._random.choice([0.0, 0.0, 0.8]), max_tokens=max_tokens, ignore_eos=True
            )
            self.engine.add(replace(self._random.choice(self._pool), request_id=number, sampling=sampling))
            self._owed[number] = max_tokens
            self.counts["added"] += 1

    def _fail_once(self) -> None:
        """Go on with full memory until a pass has failed."""
        before = self.engine.stats()["out_of_memory"]
        with self._fails(self.engine):
            for _ in range(MOST_FULL_STEPS):
                preemptions = self.engine.scheduler.num_preemptions
                self._step()
                if self.engine.stats()["out_of_memory"] > before:
                    self._preempted_by_failures += self.engine.scheduler.num_preemptions - preemptions
                    return

    def drain(self) -> float:
        """Answer what is left; returns the memory that is then in use, in megabytes."""
        while self.engine.has_unfinished():
            self._step()
        # A last pass, since visual tokens of rows that were aborted are given back behind the next one.
        self.engine.generate([replace(self._pool[0], request_id="last", media=(), input_ids=_TEXT)])
        self.counts["lost"] += len(self._owed)
        self._owed.clear()
        self.engine.scheduler.check_integrity()
        return memory_mb(self.engine)

    def hold_blocks(self, tokens_left: int) -> None:
        """Take blocks out of the idle engine's cache until only that many tokens are left, or enough for the longest
        row."""
        blocks = self.engine.scheduler.blocks
        longest = max(len(each.input_ids) for each in self._pool) + MOST_TOKENS
        left = blocks.blocks_for(max(tokens_left, longest)) + 1
        self._held = blocks.allocate(max(0, blocks.num_free - left))

    def release_blocks(self) -> None:
        self.engine.scheduler.blocks.release(self._held)
        self._held = []

    def line(self) -> str:
        stats = self.engine.stats()
        shown = "   ".join(f"{name} {stats[name]:.0f}" for name in ("running", "waiting", "passes", "out_of_memory"))
        preempted = f"preemptions {self.num_preemptions}"
        return f"answered {self.counts['answered']}   {shown}   {preempted}   memory {memory_mb(self.engine):.0f} MB"

    def _abort_one(self) -> None:
        number = self._random.choice(list(self._owed))
        self.engine.abort(number)
        del self._owed[number]
        self.counts["aborted"] += 1

    def _step(self) -> None:
        if not self.engine.has_unfinished():
            time.sleep(0.01)
            return
        self._until_failure -= 1
        for completion in self.engine.step():
            self._count(completion)

    def _count(self, completion: Completion) -> None:
        assert isinstance(completion.request_id, int)
        wanted = self._owed.pop(completion.request_id, None)
        if wanted is None:
            self.counts["twice"] += 1
        elif completion.error is not None:
            self.counts["error"] += 1
        elif len(completion.token_ids) != wanted:
            self.counts["wrong length"] += 1
        else:
            self.counts["answered"] += 1


def memory_mb(engine: NativeEngine) -> float:
    """What this process has allocated on the GPU, or holds of the machine's memory."""
    device = engine.checkpoint.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def _no_free_memory(engine: NativeEngine) -> Iterator[None]:
    """The process gets no more of the GPU's memory than it holds."""
    device = engine.checkpoint.device
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def _as_if_full(engine: NativeEngine) -> Iterator[None]:
    """The text model fails where a pass has written to the cache already."""

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("as if memory was full")

    engine.text.__dict__["logits"] = logits
    try:
        yield
    finally:
        del engine.text.__dict__["logits"]
