"""The engine stage: many threads share one engine, and one row's fault stays that row's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.demo import CHECKPOINT
from pipeline.engine import Completion, Engine, EngineOptions, Request, SamplingParams
from pipeline.errors import CheckpointError, DeviceLost, EngineCrash, InternalError
from pipeline.generate import EngineThread, GenerateOptions, GenerateStage, _media, _request_rows
from pipeline.preprocess.messages.columns import MessageOptions
from pipeline.preprocess.stage import PreprocessOptions, PreprocessStage
from pipeline.schema import SAMPLING_COLUMNS, UnitColumn, request_schema
from tests.options import fetch_options, media_options


class CountingEngine(Engine):
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

    def is_usable(self) -> bool:
        return True

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


class DyingEngine(CountingEngine):
    """Its CUDA context dies of token 13 while other rows are in progress: every later call fails, whatever the row."""

    def step(self) -> list[Completion]:
        if any(13 in request.input_ids for request in self.waiting):
            self.is_dead = True
        if self.is_dead:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return super().step()

    is_dead = False

    def is_usable(self) -> bool:
        return not self.is_dead


def test_a_dead_device_is_no_row_s_error_and_whoever_waits_or_comes_later_learns_of_it() -> None:
    thread = EngineThread(DyingEngine(per_step=1))
    futures = [thread.submit(ids(number), (), SamplingParams()) for number in (13, 2, 3)]
    for future in (*futures, thread.submit(ids(4), (), SamplingParams())):
        with pytest.raises(DeviceLost, match="can't be used by this process any more: CUDA error: an illegal memory"):
            future.result(timeout=10)


class RefusingEngine(CountingEngine):
    """Fails on being handed token 17, in a way that no check foresaw; token 19 shows that no row could be answered."""

    def add(self, request: Request) -> None:
        if 17 in request.input_ids:
            raise LookupError("seventeen")
        if 19 in request.input_ids:
            raise CheckpointError("the weights are gone")
        super().add(request)


def test_a_row_that_the_engine_cannot_take_is_an_internal_error_with_its_traceback() -> None:
    thread = EngineThread(RefusingEngine())
    futures = [thread.submit(ids(number), (), SamplingParams()) for number in (1, 17, 3)]
    first, refused, last = (future.result(timeout=10)[0] for future in futures)
    assert (first.token_ids, last.token_ids) == ((1,), (3,))
    assert isinstance(refused.error, InternalError)
    assert str(refused.error).startswith("LookupError: seventeen; not foreseen")
    assert 'raise LookupError("seventeen")' in str(refused.error)
    thread.close()


def test_a_fault_of_the_engine_itself_reaches_whoever_waits_or_comes_later() -> None:
    thread = EngineThread(RefusingEngine())
    for number in (19, 1):
        with pytest.raises(CheckpointError, match="the weights are gone"):
            thread.submit(ids(number), (), SamplingParams()).result(timeout=10)
    thread.close()


def test_the_four_conversations_of_the_documentation_in_one_batch_give_each_engine_s_same_answers(
    photos: Path, clips: Path
) -> None:
    image, other = (photos / "rocket.jpg").read_bytes(), (photos / "coffee.png").read_bytes()
    video = (clips / "bikes.mp4").read_bytes()
    conversations: list[list[dict[str, Any]]] = [
        user({"type": "image", "image": image}, "Describe this image."),
        user({"type": "image", "image": image}, {"type": "image", "image": other}, "What is written in the pictures?"),
        [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Who are you?"}],
        user(
            {"type": "image", "image": image},
            {"type": "video", "video": video, "num_frames": 4},
            "What are the common elements in these medias?",
        ),
    ]
    answers = {}
    for kind in ("native", "transformers"):
        preprocess, generate = stages(kind)
        requests = preprocess(unit(conversations))
        answers[kind] = generate(requests).to_pylist()
        preprocess.close()
        generate.close()
    assert [row["status"] for row in answers["native"]] == ["ok"] * 4
    assert [row["text"] for row in answers["native"]] == [row["text"] for row in answers["transformers"]]
    assert len({row["text"] for row in answers["native"]}) > 1


def test_an_answer_ends_before_its_stop_string() -> None:
    preprocess, generate = stages("native")
    plain = user("What is 2 plus 3?")
    (row,) = generate(preprocess(unit([plain]))).to_pylist()
    assert len(row["text"]) > 1
    stop = row["text"][-1]
    preprocess.close()
    preprocess, _ = stages("native", stop_strings=[stop], engine=False)
    (cut,) = generate(preprocess(unit([plain]))).to_pylist()
    assert cut["text"] == row["text"][: row["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    preprocess.close()
    generate.close()


def user(*parts: Any) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def unit(conversations: list[list[dict[str, Any]]]) -> pa.Table:
    """The conversations as Arrow structs: every part has every key, most of them null."""
    columns: dict[str, Any] = {"messages": whole(conversations)}
    count = len(conversations)
    columns[UnitColumn.FILE] = pa.array([0] * count, pa.int32())
    columns[UnitColumn.ROW] = pa.array(range(count), pa.int64())
    columns[UnitColumn.ATTEMPTS] = pa.array([1] * count, pa.int32())
    return pa.table(columns)


def whole(conversations: list[list[dict[str, Any]]]) -> pa.Array:
    for conversation in conversations:
        for message in conversation:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    return pa.array(conversations)


def stages(kind: Any, *, stop_strings: list[str] | None = None, engine: bool = True) -> tuple[Any, Any]:
    sampling = {"max_tokens": 16, "stop_strings": stop_strings or []}
    preprocess = PreprocessStage(
        PreprocessOptions(
            model_path=str(CHECKPOINT),
            revision=None,
            messages=MessageOptions(settings=frozenset(SAMPLING_COLUMNS), allow_missing_media=True),
            add_vision_id=True,
            thinking=False,
            allow_tokens=(),
            media=media_options(max_pixels=140 * 140, video_min_pixels=84 * 84, video_max_pixels=112 * 112),
            fetch=fetch_options("."),
            sampling=sampling,
            kept=pa.schema([]),
        )
    )
    if not engine:
        return preprocess, None
    options = EngineOptions(model_path=str(CHECKPOINT), kind=kind, cache_gb=0.25)
    return preprocess, GenerateStage(GenerateOptions(options, pa.schema([])))


class PlacesEngine(CountingEngine):
    """Four places; a step takes a while and ends one request."""

    def __init__(self) -> None:
        super().__init__(per_step=1)

    def step(self) -> list[Completion]:
        time.sleep(0.02)
        return super().step()

    def describe(self) -> dict[str, Any]:
        return {"max_running": 4}

    def stats(self) -> dict[str, float]:
        return {"waiting": max(0.0, len(self.waiting) - 4.0)}


def test_an_engine_with_places_free_counts_as_held_back_once_a_later_row_comes() -> None:
    thread = EngineThread(PlacesEngine())
    for _ in range(5):
        thread.submit(ids(1), (), SamplingParams()).result(timeout=10)  # alone: three of four places are free
    kept, busy = thread.unfilled_s, thread.busy_s
    assert 0.5 * busy < kept < 0.75 * busy  # the last row's steps are not counted: nothing came after it
    full = [thread.submit(ids(2), (), SamplingParams()) for _ in range(40)]
    thread.submit(ids(3), (), SamplingParams()).result(timeout=10)
    thread.close()
    assert all(one.done() for one in full)
    assert thread.unfilled_s - kept < 0.1 * (thread.busy_s - busy)


def test_each_medium_gets_its_patches_of_any_size_and_its_seconds_per_step() -> None:
    grids = [("image", (1, 2, 4)), ("video", (3, 2, 2)), ("image", (1, 2, 2))]
    sizes = [8 * 768, 12 * 1536, 4 * 768]
    row = {
        "media": [{"kind": kind, "grid_thw": list(grid)} for kind, grid in grids],
        "patches": np.repeat(np.arange(3, dtype=np.uint8), sizes),
        "seconds_per_step": [1.0, 0.25, 1.0],
    }
    media = _media(row)
    assert [medium.patches.shape for medium in media] == [(8, 768), (12, 1536), (4, 768)]
    assert [set(medium.patches.reshape(-1).tolist()) for medium in media] == [{0}, {1}, {2}]
    assert [medium.seconds_per_step for medium in media] == [1.0, 0.25, 1.0]
    assert _media({"media": [], "patches": np.zeros(0, np.uint8), "seconds_per_step": []}) == ()


def test_a_row_s_token_ids_and_patches_are_views_of_the_table() -> None:
    """A copy would be made with the GIL held, while the engine's thread waits for it."""
    values = {
        "status": ["ok", "error", "ok", "ok", "ok"],
        "input_ids": [[1], None, [2, 3], [4], [5]],
        "patches": [b"aab", None, b"", b"cddd", b"e"],
    }
    fields = [field for field in request_schema(pa.schema([])) if field.nullable or field.name in values]
    whole = pa.table([values.get(field.name, [None] * 5) for field in fields], schema=pa.schema(fields))
    rows = _request_rows(pa.concat_tables([whole.slice(1, 3), whole.slice(4), whole.slice(0, 0), whole.slice(2, 1)]))
    answered = [row for row in rows if row["status"] == "ok"]
    assert [row["patches"].tobytes() for row in answered] == [b"", b"cddd", b"e", b""]
    assert [row["input_ids"].tolist() for row in answered] == [[2, 3], [4], [5], [2, 3]]
    ids_buffer, patches_buffer = (whole[name].chunk(0).buffers()[-1] for name in ("input_ids", "patches"))
    assert all(np.shares_memory(row["input_ids"], np.frombuffer(ids_buffer, np.int32)) for row in answered)
    assert all(np.shares_memory(row["patches"], np.frombuffer(patches_buffer, np.uint8)) for row in answered[1:3])
    nothing = _request_rows(whole.slice(1, 1))
    assert "patches" not in nothing[0]
