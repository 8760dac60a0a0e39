"""The native engine's step: schedule a pass, run it, return what ended.

Knows the order of a step and what to do when memory runs out; the policy is the scheduler's, the tensors are the
runner's. How both are made is assembly.py's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from pipeline.engine.device import current, is_alive, is_out_of_memory
from pipeline.engine.interface import Engine
from pipeline.engine.model_runner import ModelRunner, PassResult
from pipeline.engine.scheduling.admission import AdmissionRules
from pipeline.engine.scheduling.encoded_media import EncodedMedia
from pipeline.engine.scheduling.scheduler import Plan, Scheduler
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.sequence import Completion, Request, RequestId, Sequence, error_completions
from pipeline.engine.weights import Checkpoint
from pipeline.errors import EngineOutOfMemory, RowError

MAX_LONE_FAILURES = 4
"""A row that runs out of memory alone in its pass this often, with ever smaller budgets and without getting further in
between, becomes an error."""


@dataclass
class _LoneFailures:
    """Of one request, since it last got further."""

    count: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """Tokens that each of its samples had when it failed last."""

    def add(self, failed: list[Sequence]) -> None:
        # A prefill alone gives one token: only a second one shows that a decode pass had enough memory.
        got_further = any(each.num_tokens > self.lengths.get(each.index, 0) + 1 for each in failed)
        self.count = 1 if got_further else self.count + 1
        self.lengths |= {each.index: each.num_tokens for each in failed}


class EngineLoop(Engine):
    """Continuous batching. One step is one pass: a packed prefill or a decode of all running sequences."""

    def __init__(self, checkpoint: Checkpoint, rules: StopRules, *, max_lag: int) -> None:
        """A pass's tokens are read after `max_lag` further passes are launched."""
        self.checkpoint = checkpoint
        self.rules = rules
        self.max_lag = max_lag

    def begin(self, scheduler: Scheduler, runner: ModelRunner, media: EncodedMedia, admission: AdmissionRules) -> None:
        """Use these from now on; nothing may be in progress."""
        self.scheduler, self.runner, self.media, self.admission = scheduler, runner, media, admission
        self._done: list[Completion] = []
        self._in_flight: deque[PassResult] = deque()
        self._lone_failures: dict[RequestId, _LoneFailures] = {}
        self._num_out_of_memory = 0

    # ---- the interface

    def add(self, request: Request) -> None:
        try:
            sequences = self.admission.admit(request)
        except RowError as error:
            self._done.extend(error_completions(request, error))
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self) -> list[Completion]:
        with current(self.checkpoint.device):
            self._step()
        done, self._done = self._done, []
        return done

    def has_unfinished(self) -> bool:
        return bool(self._done or self._in_flight or self.scheduler.has_unfinished)

    def abort(self, request_id: RequestId) -> None:
        for sequence in self.scheduler.find(request_id):
            sequence.finish("stop")
            self.scheduler.retire(sequence)
        self._lone_failures.pop(request_id, None)
        self._done = [completion for completion in self._done if completion.request_id != request_id]

    def is_usable(self) -> bool:
        return all(is_alive(device) for device in {self.checkpoint.device, *self.checkpoint.layer_devices})

    def stats(self) -> dict[str, float]:
        blocks = self.scheduler.blocks
        return {
            "running": float(len(self.scheduler.admitted)),
            "waiting": float(len(self.scheduler.waiting)),
            "cache_use": blocks.num_used / blocks.num_blocks,
            "preemptions": float(self.scheduler.num_preemptions),
            "out_of_memory": float(self._num_out_of_memory),
            "max_batch_tokens": float(self.scheduler.batch_tokens.value),
            "graphs": float(len(self.runner.graphs.captured) if self.runner.graphs else 0),
            **{name: float(count) for name, count in self.runner.counts.items()},
            **{f"seconds_{phase}": seconds for phase, seconds in self.runner.seconds.items()},
        }

    # ---- inside a step

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            try:
                self._in_flight.append(self.runner.run(plan, max_batch_patches=self.scheduler.batch_patches.value))
                self.scheduler.succeeded(plan)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._recover(plan, error)
            self.runner.forget_media(self.media.forget(self._media_in_use()))
        self._collect(max_left=self.max_lag if plan is not None else 0)

    def _collect(self, *, max_left: int = 0) -> None:
        """Read the oldest passes in flight until `max_left` are left; their sequences continue or end."""
        while len(self._in_flight) > max_left:
            for sequence, token, logprob in self._in_flight.popleft().read():
                sequence.num_in_flight -= 1
                self.rules.append(sequence, token, logprob)
                if sequence.finish_reason is not None:
                    self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.retire(sequence)
        self._lone_failures.pop(sequence.request.request_id, None)
        self._done.append(sequence.completion())

    def _media_in_use(self) -> set[bytes]:
        prefilling = self.scheduler.prefilling
        return {medium.content_key for medium in prefilling.request.media} if prefilling else set()

    def _recover(self, plan: Plan, error: BaseException) -> None:
        """Out of memory: read what is in flight, preempt this pass's sequences, and continue with smaller passes."""
        self._num_out_of_memory += 1
        self._collect()
        failed = [sequence for sequence in plan.sequences if not sequence.is_finished]
        for sequence in reversed(failed):
            self.scheduler.preempt(sequence)
        self.scheduler.ran_out_of_memory(plan)
        if len({id(sequence.request) for sequence in failed}) == 1:
            self._count_lone_failure(failed, error)
        if self.checkpoint.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_lone_failure(self, failed: list[Sequence], error: BaseException) -> None:
        """The samples of one request were alone in the pass that failed; after several such passes in which they got
        no further they are errors."""
        request = failed[0].request
        failures = self._lone_failures.setdefault(request.request_id, _LoneFailures())
        failures.add(failed)
        if failures.count < MAX_LONE_FAILURES:
            return
        for sequence in failed:
            sequence.error = EngineOutOfMemory(
                f"out of memory with this row alone ({sequence.num_prompt_tokens} prompt tokens, "
                f"{request.num_visual_tokens} visual): use fewer or smaller media, or leave more memory free of the "
                f"cache: {' '.join(str(error).split())[:200]}"
            )
            sequence.finish("error")
            self._retire(sequence)
