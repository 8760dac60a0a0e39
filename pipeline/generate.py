"""Request rows in, result rows out: the engine stage.

One `GenerateStage` lives in each engine actor. Ray calls it from many threads at once; all of them hand their rows
to the one thread that owns the engine and wait for the answers, so rows of many calls share a batch.
Knows the request and result schemas, text and the engine's interface; not Ray, nor how an engine works inside.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.checkpoint.cache import ModelCache
from pipeline.engine import (
    PATCH_BYTES,
    Completion,
    Engine,
    EngineOptions,
    Medium,
    Request,
    SamplingParams,
    load_engine,
    parse_sampling,
)
from pipeline.errors import EngineCrash, RowError, SettingError
from pipeline.preprocess.patches import Resize
from pipeline.preprocess.prompt import ChatTokenizer
from pipeline.schema import ANSWER_FIELDS, Status, result_schema

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """What the engine stage needs to know; plain data, so that it travels to the actors."""

    engine: EngineOptions
    image_mean: tuple[float, ...] | None
    """As the checkpoint says; None is CLIP's, as for `image_std`."""
    image_std: tuple[float, ...] | None
    resize: Resize
    kept: pa.Schema
    """The user's columns that go through to the results."""
    model_cache: ModelCache = field(default_factory=ModelCache)
    """Where this machine keeps a checkpoint that lies in a bucket."""


Step = Callable[[], Sequence[Completion]]
WrapStep = Callable[[Step], Step]
"""What is put around the engine's step, such as a profiler."""


@dataclass
class _Job:
    """A request inside the engine thread: its samples so far, and who waits for them."""

    request: Request
    answers: list[Completion] = field(default_factory=list)
    future: Future[list[Completion]] = field(default_factory=Future)


class EngineThread:
    """Owns an engine: takes requests from any thread, steps, and hands back each request's completions.

    An exception out of a step would take every row in the engine with it. The rows are run again one at a time
    instead; one that fails alone too is answered with EngineCrash, and the others never notice.
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
        """Seconds of steps with no row waiting, by the share of the engine's places that were free. Like `idle_s`
        counted only once a later row comes, so that the end of the job is no fault of preprocessing."""
        self._unfilled = 0.0
        self._places = float(engine.describe().get("max_running") or 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self, input_ids: npt.NDArray[np.int32], media: tuple[Medium, ...], sampling: SamplingParams
    ) -> Future[list[Completion]]:
        """Queue a request; the future gives its `n` completions in order of their index."""
        with self._id_lock:
            request_id = self._next_id
            self._next_id += 1
        job = _Job(Request(request_id, input_ids, media, sampling))
        self._inbox.put(job)
        return job.future

    def close(self) -> None:
        """Let the thread end once it has finished what it holds."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_ or self._jobs:
            open_ = self._take_new() and open_
            if not self._jobs:
                continue
            started = time.perf_counter()
            free = self._free_share()
            try:
                completions = self._step()
            except Exception:
                log.exception("engine step failed with %d rows; running them one at a time", len(self._jobs))
                self._run_alone(list(self._jobs.values()))
                completions = []
            seconds = time.perf_counter() - started
            self.busy_s += seconds
            self._unfilled += free * seconds
            self._deliver(completions)  # last: whoever has the answer may ask for the seconds that it took

    def _free_share(self) -> float:
        """Share of the engine's places that no row is there for; 0 while rows wait, as for room in a prefill."""
        if not self._places or self._engine.stats().get("waiting"):
            return 0.0
        return max(0.0, 1.0 - len(self._jobs) / self._places)

    def _take_new(self) -> bool:
        """Move new requests into the engine; wait for one when it has nothing else to do. False: closed."""
        open_ = True
        while True:
            started = time.perf_counter()
            try:
                job = self._inbox.get(block=not self._jobs)
            except queue.Empty:
                return open_
            if not self._jobs and self.busy_s:
                self.idle_s += time.perf_counter() - started
            if job is None:
                return False
            self.unfilled_s += self._unfilled
            self._unfilled = 0.0
            self._jobs[self._key(job)] = job
            self._engine.add(job.request)

    @staticmethod
    def _key(job: _Job) -> int:
        assert isinstance(job.request.request_id, int)
        return job.request.request_id

    def _deliver(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            assert isinstance(completion.request_id, int)
            job = self._jobs[completion.request_id]
            job.answers.append(completion)
            if len(job.answers) == job.request.sampling.n:
                del self._jobs[completion.request_id]
                job.future.set_result(sorted(job.answers, key=lambda answer: answer.index))

    def _run_alone(self, suspects: Sequence[_Job]) -> None:
        for job in suspects:
            self._engine.abort(job.request.request_id)
            job.answers.clear()
        for job in suspects:
            try:
                self._engine.add(job.request)
                while self._key(job) in self._jobs:
                    self._deliver(self._engine.step())
            except Exception as error:
                log.exception("the engine failed on a row alone")
                self._engine.abort(job.request.request_id)
                del self._jobs[self._key(job)]
                crash = EngineCrash(f"the engine failed on this row, alone too: {type(error).__name__}: {error}")
                job.future.set_result(
                    [
                        Completion(job.request.request_id, index, (), "error", error=crash)
                        for index in range(job.request.sampling.n)
                    ]
                )


@dataclass
class _Answer:
    """A row's answer, or why there is none."""

    error: RowError | None = None
    completions: Sequence[Completion] = ()
    seconds: float = 0.0


class GenerateStage:
    """The engine stage of one actor. Thread-safe: call it from as many threads as there are batches under way."""

    def __init__(self, options: GenerateOptions, wrap_step: WrapStep | None = None) -> None:
        self._options = options
        engine = options.engine
        engine = replace(engine, model_path=options.model_cache.local(engine.model_path, weights=True))
        self._tokenizer = ChatTokenizer(engine.model_path, revision=engine.revision)
        from pipeline.engine.pixels import pixel_table  # loads torch, which the driver does not need

        table = pixel_table(options.image_mean, options.image_std, processor=options.resize)
        self._engine = load_engine(engine, pixel_table=table, detokenize=self._tokenizer.decode)
        log.info("engine ready: %s", self._engine.describe())
        self._thread = EngineThread(self._engine, wrap_step)
        self._schema = result_schema(options.kept)

    def describe(self) -> dict[str, Any]:
        """What the engine picked; for run.json."""
        return self._engine.describe()

    def stats(self) -> dict[str, float]:
        """The engine's counters, and the seconds it was busy and starved."""
        thread = self._thread
        times = {"busy_s": thread.busy_s, "idle_s": thread.idle_s, "unfilled_s": thread.unfilled_s}
        return {**self._engine.stats(), **times}

    def close(self) -> None:
        """Finish what the engine holds and stop its thread."""
        self._thread.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Result rows (schema.result_schema) for request rows (schema.request_schema), in the same order."""
        waiting = [self._submit(row) for row in _request_rows(table)]
        answers = [self._wait(one) for one in waiting]
        return self._result_table(answers, table)

    def crashed(self, table: pa.Table, error: RowError) -> pa.Table:
        """Result rows that say why these requests were given up."""
        return self._result_table([_Answer(error=error) for _ in range(table.num_rows)], table)

    def _submit(self, row: dict[str, Any]) -> _Answer | tuple[float, Future[list[Completion]]]:
        if row["status"] != Status.OK:
            return _Answer()
        try:
            sampling = parse_sampling(row["sampling"])
        except ValueError as error:
            return _Answer(error=SettingError(f"sampling: {error}"))
        media = _media(row)
        for medium in media:
            _ = medium.content_key  # computed here and kept, so that the engine's thread need not hash
        return time.perf_counter(), self._thread.submit(row["input_ids"], media, sampling)

    @staticmethod
    def _wait(pending: _Answer | tuple[float, Future[list[Completion]]]) -> _Answer:
        if isinstance(pending, _Answer):
            return pending
        started, future = pending
        completions = future.result()
        error = next((one.error for one in completions if one.error is not None), None)
        return _Answer(error, completions, time.perf_counter() - started)

    def _result_table(self, answers: Sequence[_Answer], table: pa.Table) -> pa.Table:
        columns = {name: table.column(name) for name in self._schema.names if name in table.column_names}
        written = [self._written(answer) for answer in answers]
        for answer_field in ANSWER_FIELDS:
            values = [row.get(answer_field.name) for row in written]
            columns[answer_field.name] = pa.array(values, answer_field.type)
        if any(answer.error for answer in answers):
            columns.update(_with_errors(answers, table))
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _text(self, completion: Completion) -> str:
        """The answer as text, without the stop string that ended it and what came with its last token."""
        text = self._tokenizer.decode(completion.token_ids)
        return _before(text, completion.stop_reason) if isinstance(completion.stop_reason, str) else text

    def _written(self, answer: _Answer) -> dict[str, Any]:
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


def _before(text: str, stop: str) -> str:
    return text[: text.index(stop)] if stop in text else text


def _with_errors(answers: Sequence[_Answer], table: pa.Table) -> dict[str, pa.Array]:
    """The status columns, with the errors of this stage written over what preprocessing left."""
    columns = {
        name: table.column(name).to_pylist() for name in ("status", "error_stage", "error_type", "error_message")
    }
    for index, answer in enumerate(answers):
        if answer.error is not None:
            columns["status"][index] = Status.ERROR.value
            columns["error_stage"][index] = "generate"
            columns["error_type"][index] = type(answer.error).__name__
            columns["error_message"][index] = str(answer.error)
    return {name: pa.array(values, pa.string()) for name, values in columns.items()}


def _request_rows(table: pa.Table) -> list[dict[str, Any]]:
    """What the engine needs of each row; token ids and patches are views of the table's own memory."""
    small: list[dict[str, Any]] = table.select(["status", "sampling", "media"]).to_pylist()
    ids = [scalar for chunk in table.column("input_ids").chunks for scalar in chunk]
    patches = [scalar for chunk in table.column("patches").chunks for scalar in chunk]
    for row, ids_scalar, patches_scalar in zip(small, ids, patches, strict=True):
        if row["status"] == Status.OK:
            row["input_ids"] = ids_scalar.values.to_numpy(zero_copy_only=True)
            row["patches"] = np.frombuffer(patches_scalar.as_buffer(), dtype=np.uint8)
    return small


def _media(row: dict[str, Any]) -> tuple[Medium, ...]:
    """The row's media, cut from its one run of patches: each one's share follows from its kind and grid."""
    media: list[Medium] = []
    position = 0
    for receipt in row["media"]:
        t, grid_h, grid_w = receipt["grid_thw"]
        shape = (t * grid_h * grid_w, PATCH_BYTES[receipt["kind"]])
        size = shape[0] * shape[1]
        patches = row["patches"][position : position + size].reshape(shape)
        media.append(Medium(receipt["kind"], (t, grid_h, grid_w), patches))
        position += size
    assert position == len(row["patches"]), (position, len(row["patches"]))
    return tuple(media)
