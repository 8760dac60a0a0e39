"""Request rows in, result rows out: the engine stage.

Each engine actor has one `GenerateStage`. Ray calls it from many threads at once. Each call passes its rows to the one
thread that owns the engine and waits for the answers, so that rows of many calls share a batch.
Knows the request and result schemas, text and the engine's interface; knows neither Ray nor the inside of an engine.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.checkpoint.cache import ModelCache
from pipeline.engine import (
    Completion,
    Engine,
    EngineOptions,
    Medium,
    Request,
    SamplingParams,
    error_completions,
    load_engine,
    parse_sampling,
)
from pipeline.engine.loading import Report, ignore
from pipeline.engine.sequence import TEMPORAL_PATCH_SIZE
from pipeline.errors import DeviceLost, EngineCrash, RowError, as_row_error, first_line
from pipeline.preprocess.prompt import ChatTokenizer
from pipeline.schema import ANSWER_FIELDS, Status, error_values, result_schema

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """What the engine stage needs to know; plain data, so that it can be sent to the actors."""

    engine: EngineOptions
    kept: pa.Schema
    """The user's columns that are copied to the results."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    """Where this machine keeps a checkpoint that comes from a bucket."""


Step = Callable[[], Sequence[Completion]]
WrapStep = Callable[[Step], Step]
"""Wraps the engine's step, as a profiler does."""


@dataclass
class _Job:
    """A request inside the engine thread: its finished samples, and the future that the caller waits for."""

    request_id: int
    request: Request
    answers: list[Completion] = field(default_factory=list)
    future: Future[list[Completion]] = field(default_factory=Future)


class EngineThread:
    """The thread that runs an engine: it takes requests from any thread and returns each request's completions.

    An exception from a step loses the state of every row in the engine. The rows are then run again one at a time; a
    row that fails alone too gets EngineCrash, and the others are answered as usual. If the failure has made the GPU
    unusable for this process, all requests fail with DeviceLost, and no row is blamed. An exception outside the steps
    is a fault of the engine itself: all waiting and all later requests fail with it.
    """

    def __init__(self, engine: Engine, wrap_step: WrapStep | None = None) -> None:
        self._engine = engine
        self._step = wrap_step(engine.step) if wrap_step else engine.step
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._next_id = 0
        self._id_lock = threading.Lock()
        self.busy_s = 0.0
        self.idle_s = 0.0
        """Seconds without a row, after the first one came."""
        self.unfilled_s = 0.0
        """Seconds of steps in which no row was waiting, times the share of the engine's rows that were free. Like
        `idle_s`, they count only once a later row arrives, so that the end of a job is not taken for slow
        preprocessing."""
        self._unfilled = 0.0
        self._max_running = float(engine.describe().get("max_running") or 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, input_ids: npt.NDArray[np.int32], media: tuple[Medium, ...], sampling: SamplingParams
    ) -> Future[list[Completion]]:
        """Queue a request; the future gives its `n` completions in order of their index."""
        with self._id_lock:
            request_id = self._next_id
            self._next_id += 1
        job = _Job(request_id, Request(request_id, input_ids, media, sampling))
        self._inbox.put(job)
        return job.future

    def close(self) -> None:
        """Finish all requests and end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._run_until_closed()
        except BaseException as error:
            log.exception("the engine's thread failed")
            waiting: Iterable[_Job | None] = itertools.chain([*self._jobs.values()], iter(self._inbox.get, None))
            for job in waiting:
                assert job is not None
                job.future.set_exception(error)

    def _run_until_closed(self) -> None:
        is_open = True
        while is_open or self._jobs:
            is_open = self._take_new() and is_open
            if not self._jobs:
                continue
            started = time.perf_counter()
            free = self._free_share()
            try:
                completions = self._step()
            except BaseException as error:  # also a panic of the tokenizer's library, which is no Exception
                self._check_device(error)
                log.exception("engine step failed with %d rows; running them one at a time", len(self._jobs))
                self._run_alone(list(self._jobs.values()))
                completions = []
            seconds = time.perf_counter() - started
            self.busy_s += seconds
            self._unfilled += free * seconds
            self._deliver(completions)  # last: a caller that has its answer may read the seconds

    def _free_share(self) -> float:
        """Share of the engine's rows that are free; 0 while rows are waiting, for a prefill for example."""
        if not self._max_running or self._engine.stats().get("waiting"):
            return 0.0
        return max(0.0, 1.0 - len(self._jobs) / self._max_running)

    def _take_new(self) -> bool:
        """Move new requests into the engine. If the engine is empty, wait for one. Returns False once closed."""
        while True:
            started = time.perf_counter()
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return True
            if not self._jobs and self.busy_s:
                self.idle_s += time.perf_counter() - started
            if job is None:
                return False
            self.unfilled_s += self._unfilled
            self._unfilled = 0.0
            self._jobs[job.request_id] = job
            try:
                self._engine.add(job.request)
            except BaseException as error:
                refusal = as_row_error(error)
                del self._jobs[job.request_id]
                job.future.set_result(error_completions(job.request, refusal))

    def _deliver(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            assert isinstance(completion.request_id, int)
            job = self._jobs[completion.request_id]
            job.answers.append(completion)
            if len(job.answers) == job.request.sampling.n:
                del self._jobs[job.request_id]
                job.future.set_result(sorted(job.answers, key=lambda answer: answer.index))

    def _run_alone(self, suspects: Sequence[_Job]) -> None:
        for job in suspects:
            self._engine.abort(job.request_id)
            job.answers.clear()
        for job in suspects:
            try:
                self._engine.add(job.request)
                while job.request_id in self._jobs:
                    self._deliver(self._engine.step())
            except BaseException as error:
                self._check_device(error)
                log.exception("the engine failed on a row alone")
                self._engine.abort(job.request_id)
                del self._jobs[job.request_id]
                crash = EngineCrash(f"the engine failed on this row, alone too: {type(error).__name__}: {error}")
                job.future.set_result(error_completions(job.request, crash))

    def _check_device(self, error: BaseException) -> None:
        """Raise DeviceLost where this error has left the device dead: no row can be answered in this process any more,
        and none of them is known to be the cause."""
        if not self._engine.is_usable():
            raise DeviceLost(f"the GPU can't be used by this process any more: {first_line(error)}") from error


@dataclass
class _Answer:
    """A row's completions, or an error; neither where preprocessing has left an error."""

    error: RowError | None = None
    completions: Sequence[Completion] = ()
    seconds: float = 0.0


class GenerateStage:
    """The engine stage of one actor. Thread-safe: it may be called from any number of threads at once."""

    def __init__(self, options: GenerateOptions, wrap_step: WrapStep | None = None, report: Report = ignore) -> None:
        """Load the checkpoint and the engine. `report` takes texts on what is going on meanwhile."""
        report("opening the checkpoint")
        path = options.model_cache.local(options.engine.model_path, weights=True)
        self._tokenizer = ChatTokenizer(path, revision=options.engine.revision)
        adapter = options.engine.adapter and options.model_cache.local_adapter(options.engine.adapter)
        engine = replace(options.engine, model_path=path, adapter=adapter)
        self._engine = load_engine(engine, detokenize=self._tokenizer.decode, report=report)
        log.info("engine ready: %s", self._engine.describe())
        self._thread = EngineThread(self._engine, wrap_step)
        self._schema = result_schema(options.kept)

    def describe(self) -> dict[str, Any]:
        """What the engine picked; for run.json."""
        return self._engine.describe()

    def stats(self) -> dict[str, float]:
        """The engine's counters, and the seconds it was busy, idle and unfilled."""
        thread = self._thread
        times = {"busy_s": thread.busy_s, "idle_s": thread.idle_s, "unfilled_s": thread.unfilled_s}
        return {**self._engine.stats(), **times}

    def close(self) -> None:
        """Finish what the engine holds and stop its thread."""
        self._thread.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Result rows (schema.result_schema) for request rows (schema.request_schema), in the same order."""
        pending = [self._submit(row) for row in _request_rows(table)]
        return self._result_table([wait() for wait in pending], table)

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """Result rows that all have this error."""
        return self._result_table([_Answer(error=error)] * table.num_rows, table)

    def _submit(self, row: dict[str, Any]) -> Callable[[], _Answer]:
        """Queue the row; the returned function waits for its answer."""
        if row["status"] != Status.OK:
            return lambda: _Answer()
        started = time.perf_counter()
        try:
            sampling = parse_sampling(row["sampling"])
            media = _media(row)
            for medium in media:
                _ = medium.content_key  # hashed and cached here, so that the engine's thread need not
        except BaseException as error:
            answer = _Answer(error=as_row_error(error))
            return lambda: answer
        future = self._thread.submit(row["input_ids"], media, sampling)

        def wait() -> _Answer:
            completions = future.result()
            error = next((one.error for one in completions if one.error is not None), None)
            return _Answer(error, completions, time.perf_counter() - started)

        return wait

    def _result_table(self, answers: Sequence[_Answer], table: pa.Table) -> pa.Table:
        columns = {name: table.column(name) for name in self._schema.names if name in table.column_names}
        values = []
        for answer in answers:
            try:
                values.append(self._answer_values(answer))
            except BaseException as error:
                answer.error = as_row_error(error)
                values.append({})
        for each in ANSWER_FIELDS:
            columns[each.name] = pa.array([row.get(each.name) for row in values], each.type)
        if any(answer.error for answer in answers):
            columns.update(_with_errors(answers, table))
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _answer_values(self, answer: _Answer) -> dict[str, Any]:
        """The answer's columns; empty for an error row."""
        if answer.error is not None or not answer.completions:
            return {}
        texts = [self._text(one) for one in answer.completions]
        first = answer.completions[0]
        return {
            "text": texts[0],
            "texts": texts if len(texts) > 1 else None,
            "finish_reason": first.finish_reason,
            "num_output_tokens": sum(len(one.token_ids) for one in answer.completions),
            "logprobs": first.logprobs,
            "generate_s": answer.seconds,
        }

    def _text(self, completion: Completion) -> str:
        """The answer as text, up to the stop string that ended it."""
        text = self._tokenizer.decode(completion.token_ids)
        return text[: len(text) - completion.num_cut]


def _with_errors(answers: Sequence[_Answer], table: pa.Table) -> dict[str, pa.Array]:
    """The status columns of preprocessing, overwritten where this stage has an error."""
    names = ["status", "error_stage", "error_type", "error_message"]
    rows = table.select(names).to_pylist()
    for index, answer in enumerate(answers):
        if answer.error is not None:
            rows[index] = error_values(answer.error, "generate")
    return {name: pa.array([row[name] for row in rows], pa.string()) for name in names}


def _request_rows(table: pa.Table) -> list[dict[str, Any]]:
    """What the engine needs of each row; token ids and patches are views of the table's memory."""
    rows: list[dict[str, Any]] = table.select(["status", "sampling", "media", "seconds_per_step"]).to_pylist()
    ids = [scalar for chunk in table.column("input_ids").chunks for scalar in chunk]
    patches = [view for chunk in table.column("patches").chunks for view in _views(chunk)]
    for row, ids_scalar, view in zip(rows, ids, patches, strict=True):
        if row["status"] == Status.OK:
            row["input_ids"] = ids_scalar.values.to_numpy(zero_copy_only=True)
            row["patches"] = view
    return rows


def _views(binaries: pa.LargeBinaryArray) -> list[npt.NDArray[np.uint8]]:
    """Each value as a view. Arrow's scalars of this type are copies, made with the GIL held: for each of a job's rows
    the engine's thread would wait for as long as it takes to read the patches from shared memory and write them."""
    _, ends, values = binaries.buffers()
    if not values:  # no row has any
        return [np.empty(0, dtype=np.uint8)] * len(binaries)
    edges = np.frombuffer(ends, dtype=np.int64, offset=8 * binaries.offset, count=len(binaries) + 1)
    return np.split(np.frombuffer(values, dtype=np.uint8), edges)[1:-1]


def _media(row: dict[str, Any]) -> tuple[Medium, ...]:
    """The row's media. Their patches lie one after another, and the share of each follows from its kind and grid."""
    media: list[Medium] = []
    # A patch of a video has two frames, that of an image one.
    shares = [
        math.prod(receipt["grid_thw"]) * (TEMPORAL_PATCH_SIZE if receipt["kind"] == "video" else 1)
        for receipt in row["media"]
    ]
    ends = np.cumsum(shares) * (len(row["patches"]) // max(1, sum(shares)))
    pieces = np.split(row["patches"], ends)[:-1]
    for receipt, patches, seconds in zip(row["media"], pieces, row["seconds_per_step"], strict=True):
        t, h, w = receipt["grid_thw"]
        media.append(Medium(receipt["kind"], (t, h, w), patches.reshape(t * h * w, -1), seconds_per_step=seconds))
    return tuple(media)
