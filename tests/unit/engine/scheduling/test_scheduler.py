"""The policy with integers alone: no model, no torch."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Set as AbstractSet

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.scheduling.block_manager import BlockManager
from pipeline.engine.scheduling.encoded_media import EncodedMedia
from pipeline.engine.scheduling.limit import Limit
from pipeline.engine.scheduling.scheduler import LONG, SHORT, DecodePlan, Patience, PrefillPlan, Scheduler
from pipeline.engine.sequence import Medium, PromptLayout, Request, Sequence
from pipeline.engine.settings import SamplingParams


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_running: int = 8,
    tokens: int = 64,
    patches: int = 256,
    patience: Patience = SHORT,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, block_size),
        EncodedMedia(),
        max_running=max_running,
        max_batch_tokens=tokens,
        max_batch_patches=patches,
        patience=patience,
    )


def make_sequences(prompt: int, max_tokens: int = 4, *, n: int = 1, media: tuple[Medium, ...] = ()) -> list[Sequence]:
    request = Request(0, np.zeros(prompt, dtype=np.int32), media, SamplingParams(max_tokens=max_tokens, n=n))
    layout = PromptLayout(np.zeros((3, prompt), dtype=np.int32), 0, ())
    return [Sequence(request, index, 0, layout) for index in range(n)]


def image(value: int, side: int = 4) -> Medium:
    return Medium("image", (1, side, side), np.full((side * side, 588), value, dtype=np.uint8))


def give_tokens(scheduler: Scheduler, plan: PrefillPlan | DecodePlan, ends: AbstractSet[int] = frozenset()) -> None:
    """What the engine does with a pass's tokens."""
    sampled = plan.sequences if isinstance(plan, DecodePlan) else plan.sampled
    for sequence in sampled:
        if sequence.is_finished or not sequence.num_in_flight:
            continue
        sequence.num_in_flight -= 1
        sequence.output_ids.append(7)
        if len(sequence.output_ids) == sequence.sampling.max_tokens or id(sequence) in ends:
            sequence.finish("length")
            scheduler.retire(sequence)


def test_prompts_are_packed_up_to_the_token_budget() -> None:
    scheduler = make_scheduler(tokens=20)
    for _ in range(4):
        scheduler.add(make_sequences(8)[0])
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan)
    assert [chunk.num_tokens for chunk in plan.chunks] == [8, 8]


def test_a_prompt_above_the_budget_is_cut_into_chunks_and_samples_once() -> None:
    scheduler = make_scheduler(tokens=20)
    sequence = make_sequences(50)[0]
    scheduler.add(sequence)
    cuts, sampled = [], []
    for _ in range(3):
        plan = scheduler.schedule()
        assert isinstance(plan, PrefillPlan)
        cuts += [(chunk.start, chunk.stop) for chunk in plan.chunks]
        sampled += plan.sampled
    assert cuts == [(0, 20), (20, 40), (40, 50)]
    assert sampled == [sequence]


def test_media_fill_the_patch_budget_and_equal_media_count_once() -> None:
    scheduler = make_scheduler(tokens=1000, patches=40)
    first, second, third = image(1), image(2), image(3)
    for media in ((first,), (first, second), (third,)):
        scheduler.add(make_sequences(10, media=media)[0])
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan)
    assert plan.media == [first, second]  # 32 patches; the third would make 48


def test_equal_bytes_in_different_objects_are_one_medium() -> None:
    scheduler = make_scheduler()
    for _ in range(3):
        scheduler.add(make_sequences(10, media=(image(5),))[0])
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan)
    assert len(plan.media) == 1 and len(plan.chunks) == 3


def test_encoded_media_are_kept_while_a_waiting_sequence_needs_them() -> None:
    scheduler = make_scheduler(tokens=10)
    shared = image(1)
    for _ in range(2):
        scheduler.add(make_sequences(10, media=(shared,))[0])
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan)
    scheduler.media.mark_encoded(shared)
    assert scheduler.media.forget(set()) == []
    plan = scheduler._plan_prefill()
    assert plan is not None and plan.media == []
    assert scheduler.media.forget(set()) == [shared.content_key]


def test_a_row_that_ends_makes_place_for_a_waiting_one_at_once() -> None:
    scheduler = make_scheduler(max_running=2)
    for prompt, max_tokens in ((12, 2), (4, 9), (4, 9)):
        scheduler.add(make_sequences(prompt, max_tokens)[0])
    running_sizes = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        give_tokens(scheduler, plan)
        running_sizes.append(len(scheduler.running))
    assert running_sizes[:4] == [2, 1, 2, 2]


def next_kind(scheduler: Scheduler) -> type:
    plan = scheduler.schedule()
    assert plan is not None
    give_tokens(scheduler, plan)
    return type(plan)


def decoding_scheduler(running: int = 1, patience: Patience = SHORT, **options: int) -> Scheduler:
    """Some long answers are being decoded."""
    sizes = {"tokens": 1000, "patches": 4000, "max_running": 64, "num_blocks": 2000, **options}
    scheduler = make_scheduler(patience=patience, **sizes)
    for _ in range(running):
        scheduler.add(make_sequences(100, 200)[0])
    assert next_kind(scheduler) is PrefillPlan
    return scheduler


def test_a_small_prefill_is_put_off_for_some_decode_passes_and_no_longer() -> None:
    scheduler = decoding_scheduler()
    scheduler.add(make_sequences(10, 4)[0])
    kinds = [next_kind(scheduler) for _ in range(9)]
    assert kinds == [DecodePlan] * 8 + [PrefillPlan]


@pytest.mark.parametrize(
    ("patience", "prompts", "kind"),
    [
        *[(SHORT, prompts, DecodePlan) for prompts in ([249], [100, 149])],
        *[(SHORT, prompts, PrefillPlan) for prompts in ([250], [100, 150])],
        (LONG, [600, 149], DecodePlan),
        (LONG, [600, 150], PrefillPlan),
    ],
)
def test_a_large_share_of_the_token_budget_is_prefilled_at_once(
    patience: Patience, prompts: list[int], kind: type
) -> None:
    scheduler = decoding_scheduler(patience=patience)
    for prompt in prompts:
        scheduler.add(make_sequences(prompt)[0])
    assert next_kind(scheduler) is kind


@pytest.mark.parametrize(
    ("patience", "patches", "kind"),
    [(SHORT, 257, DecodePlan), (SHORT, 256, PrefillPlan), (LONG, 86, DecodePlan), (LONG, 85, PrefillPlan)],
)
def test_a_large_share_of_the_patch_budget_is_prefilled_at_once(patience: Patience, patches: int, kind: type) -> None:
    scheduler = decoding_scheduler(patience=patience, patches=patches)
    for value in range(4):  # 16 patches each
        scheduler.add(make_sequences(10, media=(image(value),))[0])
    assert next_kind(scheduler) is kind


@pytest.mark.parametrize(("rows", "kind"), [(15, DecodePlan), (16, PrefillPlan)])
def test_a_quarter_of_the_running_rows_is_prefilled_at_once(rows: int, kind: type) -> None:
    scheduler = decoding_scheduler()
    for _ in range(rows):
        scheduler.add(make_sequences(2)[0])
    assert next_kind(scheduler) is kind


def test_only_rows_for_which_there_is_room_make_a_prefill_large() -> None:
    scheduler = decoding_scheduler(running=7, max_running=8)  # room for one
    for _ in range(10):
        scheduler.add(make_sequences(100)[0])
    scheduler.max_running = 64  # so that one row is not a quarter of them
    assert [next_kind(scheduler) for _ in range(3)] == [DecodePlan] * 3
    crowded = decoding_scheduler(num_blocks=100)  # 25 blocks are taken, and a prompt takes 25
    for _ in range(10):
        crowded.add(make_sequences(100)[0])
    assert [next_kind(crowded) for _ in range(3)] == [DecodePlan] * 3


@pytest.mark.parametrize("num_blocks", [15, 16])
def test_sequences_that_grow_keep_blocks_free_so_that_none_is_preempted(num_blocks: int) -> None:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=4, max_running=16, tokens=1000)
    for _ in range(16):
        scheduler.add(make_sequences(4, 5)[0])  # one block for the prompt, one for the answer
    passes_to_the_end(scheduler)
    assert scheduler.num_preemptions == 0


def test_samples_that_share_a_prompt_keep_blocks_free_too() -> None:
    scheduler = make_scheduler(num_blocks=12, block_size=4, max_running=16, tokens=1000)
    for sequence in make_sequences(4, 5, n=16):
        scheduler.add(sequence)
    passes_to_the_end(scheduler)
    assert scheduler.num_preemptions == 0


def test_with_all_tokens_in_flight_the_results_come_first() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequences(4, 1)[0])
    first = scheduler.schedule()
    assert isinstance(first, PrefillPlan)
    scheduler.add(make_sequences(4, 1)[0])
    assert scheduler.schedule() is None
    give_tokens(scheduler, first)
    assert isinstance(scheduler.schedule(), PrefillPlan)


def test_prefills_are_halved_by_out_of_memory_and_grow_back() -> None:
    scheduler = make_scheduler(tokens=1000, patches=4000, max_running=64, num_blocks=2000)
    for _ in range(12):
        scheduler.add(make_sequences(8)[0])
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan) and len(plan.chunks) == 12
    scheduler.ran_out_of_memory(plan)
    limits = (scheduler.packed, scheduler.batch_tokens, scheduler.batch_patches)
    assert [limit.value for limit in limits] == [6, 500, 2000]
    assert scheduler.decoding.value == 64
    scheduler.succeeded(plan)
    assert [limit.value for limit in limits] == [12, 500, 2000]
    for _ in range(200):
        scheduler.succeeded(plan)  # its 96 tokens say nothing of 500
    assert [limit.value for limit in limits] == [48, 500, 2000]
    for limit in limits:
        for _ in range(64):
            limit.succeeded(limit.value)
    assert [limit.value for limit in limits] == [64, 1000, 4000]


def test_decode_passes_are_halved_by_out_of_memory_and_grow_back() -> None:
    scheduler = decoding_scheduler(running=9)
    plan = scheduler.schedule()
    assert isinstance(plan, DecodePlan)
    scheduler.ran_out_of_memory(plan)
    assert (scheduler.decoding.value, scheduler.batch_tokens.value) == (4, 1000)
    for _ in range(32):
        scheduler.succeeded(plan)
    assert scheduler.decoding.value == 8
    for _ in range(3 * 32):
        scheduler.decoding.succeeded(scheduler.decoding.value)
    assert scheduler.decoding.value == 64


def test_a_limit_that_fails_again_waits_longer_and_stays_within_its_bounds() -> None:
    limit = Limit(1000, smallest=100, wait=4)

    def passes_to_grow() -> int:
        value, passes = limit.value, 0
        while limit.value == value:
            limit.succeeded(value)
            passes += 1
        return passes

    waits = []
    for _ in range(4):
        limit.halve()
        waits.append(passes_to_grow())
    assert waits == [4, 8, 16, 32] and limit.value == 1000
    for _ in range(20):
        limit.halve()
    assert limit.value == 100
    for _ in range(20):
        passes_to_grow()
        limit.halve()
    assert limit.value == 100 and passes_to_grow() == 1024
    assert Limit(20, smallest=100).value == 20
    short = Limit(20, smallest=100)
    short.halve()
    assert short.value == 20


def test_failures_that_come_at_any_size_leave_a_limit_large() -> None:
    limit, values = Limit(256), []
    for number in range(20_000):
        if number % 200 == 199:
            limit.halve()
        else:
            limit.succeeded(limit.value)
        values.append(limit.value)
    assert sum(values[-10_000:]) / 10_000 > 100


@pytest.mark.parametrize("usual", [60, 200])
def test_failures_above_a_size_become_rare_whatever_size_is_usual(usual: int) -> None:
    """Passes of over 100 fail; every 150th would be one of 200."""
    limit, failures = Limit(256), 0
    for number in range(20_000):
        used = min(limit.value, 200 if number % 150 == 0 else usual)
        if used > 100:
            limit.halve(used)
            failures += 1
        else:
            limit.succeeded(used)
    assert failures < 40


def test_the_newest_sequence_is_preempted_and_computed_again_with_its_output() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    old, new = make_sequences(7, 12)[0], make_sequences(7, 12)[0]
    scheduler.add(old)
    scheduler.add(new)
    while not new.num_preemptions:
        plan = scheduler.schedule()
        assert plan is not None
        give_tokens(scheduler, plan)
        scheduler.check_integrity()
    kept = list(new.output_ids)
    assert kept and old.num_preemptions == 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        for sequence in plan.sequences:
            if sequence is new and isinstance(plan, PrefillPlan):
                assert plan.chunks[0].start == 0 and plan.chunks[0].stop == 7 + len(kept)
        give_tokens(scheduler, plan)
        scheduler.check_integrity()
    assert len(old.output_ids) == len(new.output_ids) == 12


def test_samples_of_one_request_share_full_prompt_blocks_and_copy_the_half_filled_one() -> None:
    scheduler = make_scheduler(block_size=4)
    sequences = make_sequences(10, 8, n=3)
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert isinstance(plan, PrefillPlan)
    assert len(plan.chunks) == 1 and plan.sampled == sequences
    leader, *forks = (sequence.block_table for sequence in sequences)
    for table in forks:
        assert table[:2] == leader[:2] and table[2] != leader[2]
        assert (leader[2], table[2]) in plan.copies
    scheduler.check_integrity()


def test_no_preemption_while_a_token_is_in_flight() -> None:
    """Its tokens aren't known on the host, so it could not be computed again."""
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    for _ in range(2):
        scheduler.add(make_sequences(3, 8)[0])
    unread = []
    while plan := scheduler.schedule():  # the cache is full after a few passes
        unread.append(plan)
    assert len(unread) == 4 and scheduler.num_preemptions == 0
    for plan in unread:
        give_tokens(scheduler, plan)
    scheduler.schedule()
    assert scheduler.num_preemptions == 1


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(12, 60),
    block_size=st.integers(1, 8),
    max_running=st.integers(1, 9),
    tokens=st.integers(1, 80),
    patches=st.integers(1, 64),
    lag=st.integers(0, 1),
)
def test_every_request_finishes_once_and_no_block_is_lost(
    seed: int, num_blocks: int, block_size: int, max_running: int, tokens: int, patches: int, lag: int
) -> None:
    """Any budgets, arrivals at any time, rows ending early, results read late, preemptions out of the blue."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=num_blocks, block_size=block_size, max_running=max_running, tokens=tokens, patches=patches
    )
    capacity = num_blocks * block_size
    pictures = [image(value) for value in range(3)]
    everyone: list[Sequence] = []
    arrivals: list[list[Sequence]] = []
    for _ in range(rng.randint(1, 12)):
        prompt = rng.randint(1, max(1, capacity // 2))
        max_tokens = rng.randint(1, max(1, capacity - prompt + 1))
        media = tuple(rng.sample(pictures, rng.choice([0, 0, 1, 2])))
        arrivals.append(make_sequences(prompt, min(max_tokens, 20), n=rng.choice([1, 1, 3]), media=media))
        everyone += arrivals[-1]
    in_flight: list[PrefillPlan | DecodePlan] = []
    steps = 0
    preemptions_left = 30  # bounded, or tiny budgets would never catch up
    while arrivals or scheduler.has_unfinished:
        steps += 1
        assert steps < 20_000, "no progress"
        while arrivals and (rng.random() < 0.3 or not scheduler.has_unfinished):
            for sequence in arrivals.pop():
                scheduler.add(sequence)
        plan = scheduler.schedule()
        scheduler.check_integrity()
        if isinstance(plan, PrefillPlan):
            assert sum(chunk.num_tokens for chunk in plan.chunks) <= tokens
            assert sum(m.num_patches for m in plan.media) <= max(
                patches, sum(m.num_patches for m in plan.chunks[0].sequence.request.media)
            )
            for medium in plan.media:
                scheduler.media.mark_encoded(medium)
        if plan is not None:
            in_flight.append(plan)
            scheduler.media.forget(set())
        while len(in_flight) > (lag if plan is not None else 0):
            ends = {id(s) for s in everyone if rng.random() < 0.05}
            give_tokens(scheduler, in_flight.pop(0), ends)
        if preemptions_left and not in_flight and scheduler.running and rng.random() < 0.1:
            preemptions_left -= 1
            scheduler.preempt(rng.choice(list(scheduler.running)))
        scheduler.check_integrity()
    assert all(sequence.is_finished for sequence in everyone)
    assert scheduler.blocks.num_free == num_blocks
    scheduler.media.forget(set())
    assert scheduler.media.num_kept_tokens == 0


def test_blocks_can_not_be_released_twice_nor_shared_when_free() -> None:
    blocks = BlockManager(4, 2)
    taken = blocks.allocate(3)
    blocks.release([taken.pop()])
    assert (blocks.num_used, blocks.num_free) == (2, 2)
    with pytest.raises(AssertionError, match="is free and can't be shared"):
        blocks.share([next(block for block in range(4) if block not in taken)])
    blocks.share(taken)
    blocks.release(taken)
    assert blocks.num_free == 2  # the other table still lists them
    blocks.release(taken)
    assert blocks.num_free == 4
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(taken)


def test_the_policy_loads_no_torch() -> None:
    code = (
        "import sys, pipeline.engine.scheduling.scheduler, pipeline.engine.scheduling.stopping; "
        "import pipeline.engine.models.mrope; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def passes_to_the_end(scheduler: Scheduler) -> int:
    passes = 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        give_tokens(scheduler, plan)
        scheduler.check_integrity()
        passes += 1
    return passes


def test_the_last_rows_are_admitted_longest_first_so_that_none_runs_on_alone() -> None:
    scheduler = make_scheduler(num_blocks=400, max_running=8, tokens=256)
    for number in range(64):  # the long rows come last
        scheduler.add(make_sequences(4, max_tokens=60 if number >= 60 else 10)[0])
    # 840 tokens in eight places are 105 passes at least; as they came, the rows take 130.
    assert passes_to_the_end(scheduler) <= 115


def test_a_row_that_came_early_is_overtaken_by_the_rows_that_waited_with_it_and_by_no_others() -> None:
    scheduler = make_scheduler(num_blocks=400, max_running=2, tokens=256)
    for length in (30, 30, 3, 20):  # two run; of those that wait the shorter came first
        scheduler.add(make_sequences(4, max_tokens=length)[0])
    started: list[int] = []
    short_started = None
    for step in range(400):
        if not scheduler.has_unfinished:
            break
        plan = scheduler.schedule()
        assert plan is not None
        if isinstance(plan, PrefillPlan):
            started += [chunk.sequence.sampling.max_tokens for chunk in plan.chunks]
            if 3 in started and short_started is None:
                short_started = len(started)
        give_tokens(scheduler, plan)
        if step % 5 == 0 and step < 200:  # long rows keep coming
            scheduler.add(make_sequences(4, max_tokens=25)[0])
    assert short_started is not None
    assert short_started <= 6
