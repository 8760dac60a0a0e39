"""What a caller may rely on: stops, samples, seeds, errors as rows, memory; in both engines where both have it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.engine import Completion, Engine, EngineOptions, Request, SamplingParams
from pipeline.engine.dense import Dense, padded_rows
from pipeline.engine.engine import NativeEngine
from pipeline.engine.loop import MAX_LONE_FAILURES
from pipeline.engine.reference import ReferenceEngine
from pipeline.engine.weights import from_model
from pipeline.errors import EngineOutOfMemory, GenerateError, PromptTooLong
from tests.unit.engine.tiny import IMAGE_PAD, make_medium, make_request, mixed_requests, tokens_of

Build = Callable[..., Engine]


def spell(token_ids: Sequence[int]) -> str:
    """A toy detokenizer: token 17 is the text '<17>'."""
    return "".join(f"<{token}>" for token in token_ids)


@pytest.fixture(params=["native", "native, read late", "transformers"])
def build(request: pytest.FixtureRequest, tiny_model: Any) -> Build:
    def make(**options: Any) -> Engine:
        checkpoint = from_model(tiny_model)
        if request.param == "transformers":
            return ReferenceEngine(checkpoint, EngineOptions("tiny", **options), detokenize=spell)
        overlap = request.param.endswith("late")
        return NativeEngine(checkpoint, EngineOptions("tiny", **options), detokenize=spell, overlap=overlap)

    return make


def native(model: Any, **options: Any) -> NativeEngine:
    return NativeEngine(from_model(model), EngineOptions("tiny", **options), detokenize=spell)


def row(request_id: int = 0, *, picture: bool = True, **sampling: Any) -> Request:
    """The same picture and words for the same id, whatever the sampling."""
    rng = np.random.default_rng(100 + request_id)
    media = [make_medium(rng, "image")] if picture else []
    sampling.setdefault("max_tokens", 12)
    return make_request(request_id, rng, media=media, sampling=SamplingParams(**sampling))


def first(completions: list[Completion]) -> Completion:
    assert completions[0].error is None, completions[0].error
    return completions[0]


def test_length_ends_a_row(build: Build) -> None:
    done = first(build().generate([row(max_tokens=5)]))
    assert (len(done.token_ids), done.finish_reason, done.stop_reason) == (5, "length", None)


def test_a_stop_token_ends_a_row_and_is_its_last_token(build: Build) -> None:
    free = first(build().generate([row()])).token_ids
    done = first(build().generate([row(stop_token_ids=(free[3],))]))
    assert done.token_ids == free[:4]
    assert (done.finish_reason, done.stop_reason) == ("stop", free[3])


def test_min_tokens_forbids_stop_tokens_until_then(build: Build) -> None:
    free = first(build().generate([row()])).token_ids
    done = first(build().generate([row(stop_token_ids=(free[0],), min_tokens=6)]))
    assert len(done.token_ids) >= 6 and free[0] not in done.token_ids[:6]


def test_a_stop_string_may_span_tokens(build: Build) -> None:
    free = first(build().generate([row()])).token_ids
    stop = f"{free[2]}><{free[3]}"
    done = first(build().generate([row(stop_strings=("no such text", stop))]))
    assert done.token_ids == free[:4]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)


def test_end_tokens_of_the_checkpoint_end_a_row_unless_ignored(tiny_model: Any) -> None:
    free = first(native(tiny_model).generate([row()])).token_ids
    engine = native(tiny_model)
    engine.rules = type(engine.rules)(frozenset({free[2]}), spell)
    engine.runner.rules = engine.rules
    assert first(engine.generate([row()])).token_ids == free[:3]
    assert first(engine.generate([row(ignore_eos=True)])).token_ids == free


def test_both_end_tokens_of_the_generation_config_count(tiny_model: Any) -> None:
    assert native(tiny_model).describe()["eos_token_ids"] == [300, 302]


def test_neither_engine_follows_the_checkpoint_s_generation_defaults(
    build: Build, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = first(build().generate([row(max_tokens=8)])).token_ids
    defaults = copy.deepcopy(tiny_model.generation_config)
    defaults.update(repetition_penalty=50.0, suppress_tokens=[free[0]], do_sample=True, temperature=9.0, min_length=99)
    defaults.eos_token_id = free[1]
    engine = build()
    monkeypatch.setattr(tiny_model, "generation_config", defaults)
    assert first(engine.generate([row(max_tokens=8, ignore_eos=True)])).token_ids == free
    assert tiny_model.generation_config is defaults


def test_endless_repetition_ends_a_row_where_asked(tiny_model: Any) -> None:
    engine = native(tiny_model)
    forced = row(max_tokens=200, stop_on_repetition=True)
    # The model is made to say one word for ever.
    head = engine.runner.text.lm_head
    engine.runner.text.lm_head = Dense(torch.zeros(head.out_features, head.in_features), None)
    done = first(engine.generate([forced]))
    assert (done.finish_reason, len(done.token_ids)) == ("repetition", 32)
    assert first(engine.generate([row(max_tokens=60)])).finish_reason == "length"


def test_samples_of_one_request_differ_and_come_in_order(build: Build) -> None:
    done = build().generate([row(3, n=4, temperature=1.0, seed=5), row(4)])
    assert [(c.request_id, c.index) for c in done] == [(3, 0), (3, 1), (3, 2), (3, 3), (4, 0)]
    assert len({c.token_ids for c in done[:4]}) == 4


def test_greedy_samples_of_one_request_are_equal(build: Build) -> None:
    done = build().generate([row(3, n=3)])
    assert done[0].token_ids == done[1].token_ids == done[2].token_ids


def test_a_seed_gives_the_same_tokens_in_any_batch_and_engine(tiny_model: Any) -> None:
    wanted = row(3, n=3, temperature=0.9, top_p=0.95, seed=11, max_tokens=10)
    others = [row(i, temperature=1.0, max_tokens=3 + i) for i in range(4, 12)]
    alone = tokens_of(native(tiny_model).generate([wanted]))
    crowded = native(tiny_model, max_batch_tokens=30, max_running=3).generate([*others, wanted])
    plain = ReferenceEngine(from_model(tiny_model), EngineOptions("tiny", batch_size=2)).generate([wanted])
    assert alone == tokens_of([c for c in crowded if c.request_id == 3]) == tokens_of(plain)


def test_without_a_seed_rows_differ_from_run_to_run(tiny_model: Any) -> None:
    engine = native(tiny_model)
    runs = {tokens_of(engine.generate([row(temperature=1.5)]))[0] for _ in range(4)}
    assert len(runs) > 1


@pytest.mark.parametrize("overlap", [False, True])
def test_repetition_penalty_equals_transformers(tiny_model: Any, overlap: bool) -> None:
    requests = [row(i, repetition_penalty=1.6, picture=i % 2 == 0) for i in range(6)]
    engine = NativeEngine(from_model(tiny_model), EngineOptions("tiny"), overlap=overlap)
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        if request.media:
            continue
        ids = torch.tensor(request.input_ids.astype(np.int64))[None]
        out = tiny_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.6,
        )
        assert completion.token_ids == tuple(out[0, ids.shape[1] :].tolist())


def test_presence_and_frequency_penalties_count_the_tokens_of_the_answer_alone(tiny_model: Any, build: Build) -> None:
    from transformers import LogitsProcessor

    class Plain(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            answer = input_ids[0, num_prompt_tokens:].tolist()
            for token in set(answer):
                scores[0, token] -= 0.8 + 0.5 * answer.count(token)
            return scores

    requests = [row(i, presence_penalty=0.8, frequency_penalty=0.5, picture=False, max_tokens=30) for i in range(3)]
    unpenalized = [
        replace(r, request_id=f"plain {r.request_id}", sampling=SamplingParams(max_tokens=30)) for r in requests
    ]
    expected = []
    for request in requests:
        ids = torch.tensor(request.input_ids.astype(np.int64))[None]
        num_prompt_tokens = ids.shape[1]
        out = tiny_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=30,
            do_sample=False,
            logits_processor=[Plain()],
        )
        expected.append(tuple(out[0, num_prompt_tokens:].tolist()))
    assert tokens_of(build().generate([*requests, *unpenalized]))[:3] == expected
    assert tokens_of(build().generate(unpenalized)) != expected


def test_logprobs_come_on_request_one_for_each_token(build: Build) -> None:
    done = build().generate([row(0, logprobs=True), row(1)])
    assert done[0].logprobs is not None and len(done[0].logprobs) == len(done[0].token_ids)
    assert all(value <= 0 for value in done[0].logprobs)
    assert done[1].logprobs is None


def test_mixed_sampling_in_one_batch_changes_no_greedy_row(build: Build) -> None:
    greedy = [row(i) for i in range(4)]
    expected = tokens_of(build().generate(greedy))
    mixed = [*greedy, row(9, temperature=1.0), row(10, logprobs=True), row(11, repetition_penalty=1.2)]
    assert tokens_of(build().generate(mixed))[:4] == expected


def test_two_requests_with_one_id_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="request id 1 occurs twice"):
        build().generate([row(1), row(1)])


# ---- mistakes are rows


def broken_rows() -> list[tuple[Request, type[Exception], str]]:
    medium = make_medium(np.random.default_rng(0), "image")
    pads = np.full(medium.num_visual_tokens, IMAGE_PAD, dtype=np.int32)
    good = np.arange(5, dtype=np.int32)
    split = np.insert(pads, len(pads) // 2, 1) if len(pads) > 1 else pads
    return [
        (Request("none", np.zeros(0, dtype=np.int32)), GenerateError, "at least one token"),
        (Request("id", np.asarray([5, 999], dtype=np.int32)), GenerateError, "the checkpoint has 320 tokens"),
        (Request("few", good, (medium,)), GenerateError, "0 visual placeholders"),
        (Request("many", pads), GenerateError, "its 0 media need 0"),
        (Request("split", split, (medium,)), GenerateError, "in a row"),
        (
            Request("long", np.ones(4090, dtype=np.int32), (), SamplingParams(max_tokens=64)),
            PromptTooLong,
            "A prompt of 4032 tokens would fit",
        ),
    ]


def test_a_broken_request_is_an_error_row_and_harms_no_other(build: Build) -> None:
    good = [row(i) for i in range(3)]
    expected = tokens_of(build().generate(good))
    broken = broken_rows()
    done = build().generate([good[0], *[request for request, _, _ in broken], *good[1:]])
    assert tokens_of([done[0], *done[-2:]]) == expected
    for (request, error, message), completion in zip(broken, done[1:-2], strict=True):
        assert (completion.request_id, completion.finish_reason) == (request.request_id, "error")
        assert type(completion.error) is error and message in str(completion.error)
        assert completion.token_ids == ()


def test_a_prompt_above_the_cache_says_what_would_fit(tiny_model: Any) -> None:
    engine = native(tiny_model, cache_gb=0.0005)
    room = engine.describe()["cache_tokens"]
    ids = np.ones(room, dtype=np.int32)
    done = engine.generate([Request(0, ids, (), SamplingParams(max_tokens=8, n=2)), row(1, max_tokens=4)])
    assert [type(c.error) for c in done] == [PromptTooLong, PromptTooLong, type(None)]
    assert f"A prompt of {room - 7} tokens would fit" in str(done[0].error)
    fits = Request(0, ids[: room - 7], (), SamplingParams(max_tokens=8))
    assert len(first(engine.generate([fits])).token_ids) == 8


def test_a_decode_pass_gets_each_sequence_s_own_blocks(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences take over rows and blocks of others, samples share blocks, and one is preempted now and then."""
    engine = native(tiny_model, max_running=5, cache_gb=0.0012)
    decode_rows, scheduler, passes = engine.runner.decode_rows, engine.scheduler, []

    def checked(numbers: Any, tables: Any) -> torch.Tensor:
        owners = {sequence.row: sequence for sequence in scheduler.running}
        for (row, _, slot, length), table in zip(numbers.T.tolist(), tables.tolist(), strict=True):
            blocks = owners[row].block_table
            assert (length, table[: len(blocks)], set(table[len(blocks) :])) in [
                (owners[row].num_computed, blocks, padding) for padding in (set(), {0})
            ]
            assert divmod(slot, engine.cache.block_size) == (blocks[-1], (length - 1) % engine.cache.block_size)
        passes.append(len(tables))
        return decode_rows(numbers, tables)

    monkeypatch.setattr(engine.runner, "decode_rows", checked)
    for number in range(8):
        engine.add(row(number, picture=number % 2 == 0, max_tokens=40, n=1 + number % 3, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
        if len(passes) % 15 == 7 and scheduler.running:
            scheduler.preempt(next(reversed(scheduler.running)))
    assert max(passes) == 5 and scheduler.num_preemptions > 0


def test_stop_strings_without_a_detokenizer_are_an_error_row(tiny_model: Any) -> None:
    engine = NativeEngine(from_model(tiny_model), EngineOptions("tiny"))
    assert isinstance(engine.generate([row(stop_strings=("x",))])[0].error, GenerateError)


def test_abort_forgets_a_request_wherever_it_is(build: Build) -> None:
    engine = build(max_running=2, batch_size=2)
    expected = tokens_of(build().generate([row(1)]))
    for i in range(4):
        engine.add(row(i, n=2 if i == 0 else 1))
    done = [] if isinstance(engine, ReferenceEngine) else engine.step()
    for i in (0, 2, 3, 77):
        engine.abort(i)
    while engine.has_unfinished():
        done += engine.step()
    assert [c.request_id for c in done] == [1] and tokens_of(done) == expected
    if isinstance(engine, NativeEngine):
        engine.scheduler.check_integrity()
        assert engine.stats()["cache_use"] == 0


def test_describe_and_stats_are_plain_values(build: Build) -> None:
    import json

    engine = build()
    engine.generate([row()])
    described = json.loads(json.dumps(engine.describe()))
    assert (described["device"], described["dtype"]) == ("cpu", "float32")
    assert described["attention"] in ("simd", "sdpa")
    assert engine.stats()["prefill_tokens"] == len(row().input_ids)


# ---- memory


FULL = torch.OutOfMemoryError("out of memory")


def fail_once_above(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch, limit: int, error: Exception = FULL
) -> list[int]:
    """Prefill passes of more than `limit` tokens run out of memory."""
    sizes: list[int] = []
    prefill = engine.runner._prefill

    def guarded(plan: Any) -> Any:
        size = sum(chunk.num_tokens for chunk in plan.chunks)
        sizes.append(size)
        if size > limit:
            raise error
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "_prefill", guarded)
    return sizes


@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_halves_the_budget_and_goes_on(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    requests = mixed_requests(30, seed=4)
    expected = tokens_of(native(tiny_model).generate(requests))
    engine = NativeEngine(from_model(tiny_model), EngineOptions("tiny"), overlap=overlap)
    sizes = fail_once_above(engine, monkeypatch, 200)
    assert tokens_of(engine.generate(requests)) == expected
    assert max(sizes) > 200 and engine.stats()["out_of_memory"] > 0
    assert engine.stats()["max_batch_tokens"] < engine.describe()["max_batch_tokens"]
    engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            'torch_call_dispatcher( "aten::new_empty", "", stack.data(), 0) API call failed at ops.h, line 933'
        ),
    ],
    ids=["host", "torch on a CPU", "CUDA", "Triton", "cuBLAS", "a package built for torch's stable ABI"],
)
def test_every_library_s_way_of_running_out_of_memory_is_known(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = native(tiny_model)
    fail_once_above(engine, monkeypatch, 200, error)
    assert all(completion.error is None for completion in engine.generate(mixed_requests(12, seed=4)))
    assert engine.stats()["out_of_memory"] > 0


def test_an_error_that_is_not_about_memory_is_raised(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = native(tiny_model)
    fail_once_above(engine, monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        engine.generate(mixed_requests(2, seed=4))


def test_a_row_that_fits_no_memory_even_alone_is_one_error_row(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [row(i, n=2 if i == 2 else 1) for i in range(4)]
    expected = tokens_of(native(tiny_model).generate(requests))
    engine = native(tiny_model)
    prefill = engine.runner._prefill

    def guarded(plan: Any) -> Any:
        if any(chunk.sequence.request.request_id == 2 for chunk in plan.chunks):
            raise torch.OutOfMemoryError("out of memory")
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "_prefill", guarded)
    done = engine.generate(requests)
    assert all(isinstance(completion.error, EngineOutOfMemory) for completion in done[2:4])
    assert tokens_of([done[0], done[1], done[4]]) == [expected[0], expected[1], expected[4]]


def test_a_row_that_had_ended_when_its_batch_ran_out_of_memory_is_answered_anew(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reference(**options: Any) -> ReferenceEngine:
        return ReferenceEngine(from_model(tiny_model), EngineOptions("tiny", **options), detokenize=spell)

    requests = [row(i) for i in range(3)]
    expected = reference(batch_size=1).generate(requests)
    engine = reference(batch_size=3)
    generate = engine._generate

    def guarded(batch: Any) -> None:
        if len(batch) > 1:
            batch[0].output_ids.append(7)
            batch[0].finish("stop", stop_reason="<7>", num_cut=3)
            raise MemoryError
        generate(batch)

    monkeypatch.setattr(engine, "_generate", guarded)
    assert engine.generate(requests) == expected


def test_a_lone_row_that_runs_out_of_memory_now_and_then_is_answered(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [row(0, max_tokens=40, ignore_eos=True)]
    expected = tokens_of(native(tiny_model).generate(requests))
    engine = native(tiny_model)
    decode, passes = engine.runner._decode, itertools.count(1)

    def guarded(sequences: Any) -> Any:
        if next(passes) % 3 == 0:
            raise torch.OutOfMemoryError("out of memory")
        return decode(sequences)

    monkeypatch.setattr(engine.runner, "_decode", guarded)
    assert tokens_of(engine.generate(requests)) == expected
    assert engine.stats()["out_of_memory"] > MAX_LONE_FAILURES


def test_a_row_whose_decode_passes_never_fit_is_soon_an_error_row(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = native(tiny_model)

    def full(sequences: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.runner, "_decode", full)
    (completion,) = engine.generate([row(0, max_tokens=40, ignore_eos=True)])
    assert isinstance(completion.error, EngineOutOfMemory)
    assert engine.stats()["out_of_memory"] == MAX_LONE_FAILURES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_host_memory_is_flat_over_ten_thousand_requests(tiny_model: Any) -> None:
    import ctypes
    import gc
    import resource

    engine = native(tiny_model, max_running=64)

    def run(start: int, count: int) -> None:
        for first_id in range(start, start + count, 250):
            rng = np.random.default_rng(first_id)
            for i in range(first_id, first_id + 250):
                media = [make_medium(rng, "image")] if i % 4 == 0 else []
                engine.add(make_request(i, rng, media=media, sampling=SamplingParams(max_tokens=3)))
            while engine.has_unfinished():
                engine.step()

    def used_mb() -> float:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what glibc keeps of freed memory varies by tens of megabytes
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    for product in [each for each in gc.get_objects() if isinstance(each, Dense)]:
        for rows in sorted({padded_rows(rows) for rows in range(1, 8193)}):
            product(torch.zeros(rows, product.in_features))  # oneDNN keeps compiled code for each shape
    run(0, 3000)
    before, objects = used_mb(), len(gc.get_objects())
    run(3000, 7000)
    grown_mb = used_mb() - before
    assert grown_mb < 10, f"{grown_mb:.0f} MB more after 7,000 requests"
    assert len(gc.get_objects()) - objects < 2000
