"""The engine stage: many threads share one engine, and one row's fault stays that row's."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.engine import Completion, Request, SamplingParams
from pipeline.errors import EngineCrash
from pipeline.generate import EngineThread


class CountingEngine:
    """Answers each request with its own ids, `per_step` requests a step; token 13 makes every step fail."""

    def __init__(self, per_step: int = 2) -> None:
        self.waiting: list[Request] = []
        self.per_step = per_step
        self.largest = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def has_unfinished(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Completion]:
        self.largest = max(self.largest, len(self.waiting))
        if any(13 in request.input_ids for request in self.waiting):
            raise RuntimeError("boom")
        now, self.waiting = self.waiting[: self.per_step], self.waiting[self.per_step :]
        return [
            Completion(request.request_id, index, tuple(request.input_ids.tolist()), "stop")
            for request in now
            for index in reversed(range(request.sampling.n))
        ]

    def abort(self, request_id: int | str) -> None:
        self.waiting = [request for request in self.waiting if request.request_id != request_id]

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        raise AssertionError("the stage steps")

    def describe(self) -> dict[str, Any]:
        return {}

    def stats(self) -> dict[str, float]:
        return {}


def ids(*values: int) -> Any:
    return np.array(values, dtype=np.int32)


def test_requests_of_many_threads_share_the_engine_and_each_gets_its_own_answer() -> None:
    engine = CountingEngine()
    thread = EngineThread(engine)
    barrier = threading.Barrier(16)

    def ask(number: int) -> tuple[int, ...]:
        barrier.wait()
        return thread.submit(ids(number, number + 100), (), SamplingParams()).result(timeout=10)[0].token_ids

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(20, 36)))
    assert answers == [(number, number + 100) for number in range(20, 36)]
    assert engine.largest > 1
    thread.close()


def test_all_samples_of_a_request_come_together_in_order() -> None:
    thread = EngineThread(CountingEngine())
    answers = thread.submit(ids(5), (), SamplingParams(n=3)).result(timeout=10)
    assert [answer.index for answer in answers] == [0, 1, 2]
    thread.close()


def test_a_row_that_breaks_the_engine_is_found_and_the_others_are_answered() -> None:
    thread = EngineThread(CountingEngine())
    futures = [thread.submit(ids(number), (), SamplingParams()) for number in (1, 2, 13, 4, 5)]
    answers = [future.result(timeout=10)[0] for future in futures]
    assert [answer.finish_reason for answer in answers] == ["stop", "stop", "error", "stop", "stop"]
    assert isinstance(answers[2].error, EngineCrash)
    assert "boom" in str(answers[2].error)
    assert thread.submit(ids(7), (), SamplingParams()).result(timeout=10)[0].token_ids == (7,)
    thread.close()
