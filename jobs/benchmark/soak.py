"""Keep one engine busy for minutes under all that a long job meets, and see that no row is lost and no memory.

    python -m jobs.benchmark soak                             shape tiny-3 on this machine, one minute
    python -m jobs.benchmark soak --shape 2b --seconds 300    on a GPU

Mixed rows arrive in bursts, between which the engine sometimes runs dry. Its cache is kept too small for those that run
together, so rows are preempted; some are aborted; and every now and then a pass runs out of memory. On a GPU it really
does: for one pass the process gets no more memory than it holds. On a CPU a part of the model raises what torch would.

Every interval has a line. The last line is JSON: rows that were added, answered, aborted, lost, answered twice or with
the wrong number of tokens or an error; preemptions and failed passes; memory before and after. The exit code is 1 if
any row went wrong, if a block of the cache or a visual token is not given back, or if memory grew.
"""

from __future__ import annotations

import argparse
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
MOST_TOKENS = 256
"""Of an answer."""
LINES = 12
MOST_GROWTH_MB = 256
"""Of memory between the two moments at which the engine has nothing to do; graphs and libraries take some."""
_TEXT = np.arange(8, 16, dtype=np.int32)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    engine = NativeEngine(
        from_model(make_model(SHAPES[args.shape], args.device, getattr(torch, args.dtype))), EngineOptions("random")
    )
    on_gpu = args.device.startswith("cuda")
    soak = Soak(engine, _pool(args), seed=args.seed, fails=_no_free_memory if on_gpu else _as_if_full)
    soak.run(args.seconds / 6)  # what is allocated once is allocated then
    before = soak.drain()
    soak.hold_blocks(args.cache_tokens)
    started = time.monotonic()
    for line in range(LINES):
        soak.run(started + (line + 1) * args.seconds / LINES - time.monotonic(), fail_every=args.fail_every)
        print(f"  {time.monotonic() - started:6.1f} s   {soak.line()}", flush=True)
    soak.release_blocks()
    after = soak.drain()
    stats = engine.stats()
    kept = {"blocks": engine.scheduler.blocks.num_used, "media": len(engine.runner.visual_tokens)}
    wrong = {name: soak.counts[name] for name in ("lost", "twice", "wrong length", "error")}
    passed = not any(wrong.values()) and not any(kept.values()) and after - before <= MOST_GROWTH_MB
    print_result(
        "soak",
        shape=args.shape,
        device=args.device,
        dtype=args.dtype,
        seconds=args.seconds,
        passed=passed,
        rows={name: soak.counts[name] for name in ("added", "answered", "aborted")} | wrong,
        preemptions=stats["preemptions"],
        failed_passes=stats["out_of_memory"],
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
    parser.add_argument("--fail-every", type=int, default=200, help="passes between two that run out of memory")
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
        # The most at first: a GPU's graphs of all sizes are then captured before memory is looked at.
        self._backlog, self._drawn_at = max(BACKLOGS), time.monotonic()
        self._until_failure = 0

    def run(self, seconds: float, *, fail_every: int = 0) -> None:
        """Add, answer and abort rows for so long. Of about `fail_every` passes one runs out of memory, if not 0."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._add_rows()
            if self._owed and self._random.random() < 0.01:
                self._abort_one()
            if fail_every and self._until_failure <= 0:
                # Not again at once: a row that fails alone several times without a new token is rightly an error.
                self._until_failure = self._random.randint(fail_every // 2 + 1, 3 * fail_every // 2 + 1)
                with self._fails(self.engine):
                    self._step()
            else:
                self._step()

    def drain(self) -> float:
        """Answer what is left; gives the memory that is then in use, in megabytes."""
        while self.engine.has_unfinished():
            self._step()
        # A last pass, since visual tokens of rows that were aborted are given back behind the next one.
        self.engine.generate([replace(self._pool[0], request_id="last", media=(), input_ids=_TEXT)])
        self.counts["lost"] += len(self._owed)
        self._owed.clear()
        self.engine.scheduler.check_integrity()
        return memory_mb(self.engine)

    def hold_blocks(self, tokens_left: int) -> None:
        """Take blocks out of the idle engine's cache until so many tokens, or a row of the longest, are left."""
        blocks = self.engine.scheduler.blocks
        longest = max(len(each.input_ids) for each in self._pool) + MOST_TOKENS
        left = blocks.blocks_for(max(tokens_left, longest)) + 1
        self._held = blocks.allocate(max(0, blocks.num_free - left))

    def release_blocks(self) -> None:
        self.engine.scheduler.blocks.release(self._held)
        self._held = []

    def line(self) -> str:
        stats = self.engine.stats()
        wanted = ("running", "waiting", "preemptions", "out_of_memory", "passes")
        shown = "   ".join(f"{name} {stats[name]:.0f}" for name in wanted)
        return f"answered {self.counts['answered']}   {shown}   memory {memory_mb(self.engine):.0f} MB"

    def _add_rows(self) -> None:
        if time.monotonic() - self._drawn_at > BACKLOG_S:
            self._backlog, self._drawn_at = self._random.choice(BACKLOGS), time.monotonic()
        while len(self._owed) < self._backlog:
            number = self.counts["added"]
            max_tokens = self._random.randint(1, MOST_TOKENS)
            sampling = SamplingParams(
                temperature=self._random.choice([0.0, 0.0, 0.8]), max_tokens=max_tokens, ignore_eos=True
            )
            self.engine.add(replace(self._random.choice(self._pool), request_id=number, sampling=sampling))
            self._owed[number] = max_tokens
            self.counts["added"] += 1

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
    if engine.checkpoint.device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


@contextmanager
def _no_free_memory(engine: NativeEngine) -> Iterator[None]:
    """The process gets no more of the GPU's memory than it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(engine.checkpoint.device).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


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
