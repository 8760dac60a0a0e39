"""What the rest of the pipeline sees of either engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.engine.sequence import Completion, Request, RequestId

Detokenize = Callable[[Sequence[int]], str]


class Engine(ABC):
    """Not thread-safe: one thread owns it."""

    @abstractmethod
    def add(self, request: Request) -> None:
        """Queue a request. One that can't be answered becomes an error completion of a later step."""

    @abstractmethod
    def step(self) -> list[Completion]:
        """Run one pass and return the samples that ended with it; an empty list is normal."""

    @abstractmethod
    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to return."""

    @abstractmethod
    def abort(self, request_id: RequestId) -> None:
        """Forget a request and all its samples; it gives no completion. Unknown ids are ignored."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was picked: device, dtype, attention, sizes. Fixed over the engine's life; for run.json."""

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Counters and gauges so far."""

    @abstractmethod
    def is_usable(self) -> bool:
        """Whether it can still answer. False once its device is dead for this process; only a new one helps."""

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run the requests to their end: n completions for each, in the order given.

        Raises ValueError where two requests have the same id.
        """
        order: dict[RequestId, int] = {}
        for number, request in enumerate(requests):
            if request.request_id in order:
                raise ValueError(f"request id {request.request_id!r} occurs twice; ids must differ")
            order[request.request_id] = number
            self.add(request)
        done: list[Completion] = []
        while self.has_unfinished():
            done.extend(self.step())
        return sorted(done, key=lambda completion: (order[completion.request_id], completion.index))
