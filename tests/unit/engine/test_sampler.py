"""Sampling: each rule by itself, the order they come in, and seeds that no neighbour can disturb."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.sampler import (
    SampleRows,
    SeenTokens,
    _search_smallest_kept,
    _smallest_kept,
    penalize,
    sample,
    sample_rows,
    set_steps,
)
from pipeline.engine.scheduling.stopping import repeats_endlessly
from pipeline.engine.sequence import PromptLayout, Request, Sequence
from pipeline.engine.settings import SamplingParams


def make_rows(*sampling: SamplingParams, **columns: Any) -> SampleRows:
    rows = sample_rows(sampling)
    for name, values in columns.items():
        rows[name] = values
    return rows


def distribution(logits: list[float], **params: Any) -> dict[int, float]:
    """The share of each token over evenly spread draws."""
    draws = (np.arange(2000) + 0.5) / 2000
    sampling = SamplingParams(**{"temperature": 1.0, **params})
    tokens, _ = sample(torch.tensor([logits] * len(draws)), make_rows(*[sampling] * len(draws), draw=draws))
    ids, counts = np.unique(tokens.numpy(), return_counts=True)
    return dict(zip(ids.tolist(), (counts / len(draws)).tolist(), strict=True))


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value) for value in logits]
    return [weight / sum(weights) for weight in weights]


LOGITS = [0.0, 2.0, 1.0, -1.0]


def test_temperature_one_draws_by_probability() -> None:
    shares = distribution(LOGITS)
    assert [shares[i] for i in range(4)] == pytest.approx(softmax(LOGITS), abs=1e-3)


def test_temperature_flattens_and_sharpens() -> None:
    assert distribution(LOGITS, temperature=2.0)[1] == pytest.approx(softmax([x / 2 for x in LOGITS])[1], abs=1e-3)
    assert distribution(LOGITS, temperature=0.05) == {1: 1.0}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-40},
        {"temperature": 1e-300},
        {"top_p": 1e-46},
        {"temperature": 1e-40, "top_p": 1e-46, "top_k": 2, "min_p": 1e-300},
    ],
)
def test_settings_below_what_float32_holds_choose_the_likeliest(params: dict[str, float]) -> None:
    assert distribution(LOGITS, **params) == {1: 1.0}


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_extreme_penalties_leave_numbers_to_draw_from(penalty: float) -> None:
    rows = make_rows(SamplingParams(temperature=0.5, repetition_penalty=penalty), draw=0.5)
    tokens, _ = sample(torch.tensor([LOGITS]), rows, seen=torch.tensor([[2, 2]]))
    assert tokens.tolist() == [2 if penalty < 1 else 1]


def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    tokens, _ = sample(torch.tensor([[1.0, 3.0, 3.0]]), make_rows(SamplingParams(), draw=0.9))
    assert tokens.tolist() == [1]


def test_top_k_keeps_the_k_largest() -> None:
    assert set(distribution(LOGITS, top_k=1)) == {1}
    assert len(distribution(LOGITS, top_k=10**30)) == 4
    shares = distribution(LOGITS, top_k=2)
    assert set(shares) == {1, 2}
    assert shares[1] == pytest.approx(softmax([2.0, 1.0])[0], abs=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    assert set(distribution(LOGITS, top_p=0.5)) == {1}
    assert set(distribution(LOGITS, top_p=0.7)) == {1, 2}
    assert set(distribution(LOGITS, top_p=0.99)) == {0, 1, 2, 3}


def test_top_p_counts_mass_after_top_k() -> None:
    # Of the two that top-k leaves, the first has 73 %, so 0.7 needs it alone; of all four it would need both.
    assert set(distribution(LOGITS, top_k=2, top_p=0.7)) == {1}


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_keeps_what_transformers_keeps(spread: float, top_p: float) -> None:
    """Wider than what top-p looks at first: flat rows need the rest."""
    from transformers import TopPLogitsWarper

    logits = spread * torch.randn(6, 3000, generator=torch.Generator().manual_seed(2))
    mass = logits.softmax(-1)
    wanted = torch.full((6, 1), top_p)
    expected = TopPLogitsWarper(top_p)(None, logits).isfinite()
    for smallest in (_smallest_kept(mass, wanted, 3000), _search_smallest_kept(mass, wanted)):
        # transformers sums float32 in ascending order, so the last token may differ by rounding.
        assert ((mass >= smallest) != expected).sum(-1).max() <= 1
        kept = mass.masked_fill(mass < smallest, 0.0)
        assert (kept.double().sum(-1) >= top_p - 1e-6).all()
        assert (kept.masked_fill(kept <= smallest, 0.0).double().sum(-1) < wanted[:, 0].double()).all()


def test_rows_with_and_without_top_p_in_one_batch_over_a_large_vocabulary() -> None:
    """A flat row beside a steep one, one without top-p, and one that top-k bounds: each as if it were alone."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(4)) * torch.tensor(
        [[0.1], [9.0], [1.0], [1.0]]
    )
    params: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_p": 0.9}, {}, {"top_p": 0.9, "top_k": 7}]
    for draw in (0.0, 0.35, 0.999):
        rows = make_rows(*[SamplingParams(temperature=1.0, **each) for each in params], draw=draw)
        alone = [int(sample(logits[i : i + 1], rows[i : i + 1])[0]) for i in range(len(rows))]
        assert sample(logits, rows)[0].tolist() == alone


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    """Draws on the boundaries: 0, and just where a token's share begins that a filter has dropped."""
    logits = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    draws = [0.0, 0.25, 0.5, 1.0 - 2**-53]
    rows = make_rows(*[SamplingParams(temperature=1.0)] * 4, draw=draws)
    assert sample(torch.tensor([logits] * 4), rows)[0].tolist() == [1, 1, 3, 3]


def test_min_p_drops_what_is_improbable_beside_the_best() -> None:
    assert set(distribution([0.0, 2.0, 2.0, 1.0], min_p=1.0)) == {1, 2}
    best = softmax(LOGITS)[1]
    assert set(distribution(LOGITS, min_p=softmax(LOGITS)[2] / best - 0.01)) == {1, 2}


@pytest.mark.parametrize(
    "params", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.05}]
)
def test_filters_keep_what_transformers_keeps(params: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    kept = logits
    for name, value in params.items():
        kept = warpers[name](value)(None, kept)
    assert set(distribution(logits[0].tolist(), **params)) <= set(kept[0].isfinite().nonzero()[:, 0].tolist())
    expected = kept.softmax(-1)[0]
    for token, share in distribution(logits[0].tolist(), **params).items():
        assert share == pytest.approx(float(expected[token]), abs=2e-3)


def seen_tokens(*ids: list[int]) -> torch.Tensor:
    longest = max(map(len, ids))
    seen = SeenTokens(len(ids) + 1, longest, torch.device("cpu"))
    rows = range(1, len(ids) + 1)
    seen.restart(list(rows), [np.asarray(each, dtype=np.int32) for each in ids])
    return seen.of(torch.tensor(rows), longest)


@pytest.mark.parametrize("penalty", [0.6, 1.7])
def test_repetition_penalty_gives_the_scores_of_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    ids = [3, 3, 7, 12, 29]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[:1].clone())
    shares = expected.softmax(-1)[0]
    draws = (np.arange(4000) + 0.5) / 4000
    sampling = SamplingParams(repetition_penalty=penalty, temperature=1.0)
    rows = make_rows(*[sampling] * 4000, draw=draws)
    tokens, _ = sample(logits[:1].repeat(4000, 1), rows, seen_tokens(ids).repeat(4000, 1))
    found = torch.bincount(tokens, minlength=30) / 4000
    torch.testing.assert_close(found, shares, rtol=0, atol=1e-3)
    # A row without a penalty is not touched, whatever tokens it holds.
    both = make_rows(sampling, SamplingParams(temperature=1.0), draw=0.3)
    alone = sample(logits[1:], both[1:])[0]
    assert sample(logits, both, seen_tokens(ids, list(range(30))))[0][1] == alone[0]


def test_a_row_s_tokens_grow_by_each_one_chosen_and_are_forgotten_when_it_starts_again() -> None:
    seen = SeenTokens(3, 8, torch.device("cpu"))
    seen.restart([2, 0], [np.asarray([1, 4, 5], dtype=np.int32), np.asarray([7], dtype=np.int32)])
    seen.add(np.asarray([0, 2]), np.asarray([1, 3]), torch.tensor([3, 6]))
    assert [set(row) for row in seen.of(torch.tensor([0, 2]), 8).tolist()] == [{3, 7}, {1, 4, 5, 6}]
    seen.restart([2], [np.asarray([9], dtype=np.int32)])
    assert [set(row) for row in seen.of(torch.tensor([2, 0]), 4).tolist()] == [{9}, {3, 7}]


_penalties = st.sampled_from([0.0, 0.7, -1.5, 2.0])
_rows = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), max_size=6),
    _penalties,
    _penalties,
    st.sampled_from([1.0, 1.3]),
)


@given(rows=st.lists(_rows, min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_penalties_equal_a_plain_definition(rows: list[Any], seed: int) -> None:
    """Of rows with drawn prompts, answers and penalties, side by side."""
    logits = 3 * torch.randn(len(rows), 10, generator=torch.Generator().manual_seed(seed))
    wanted = logits.tolist()
    for scores, (prompt, answer, presence, frequency, repetition) in zip(wanted, rows, strict=True):
        for token in {*prompt, *answer}:
            scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
        for token in set(answer):
            scores[token] -= presence + frequency * answer.count(token)
    seen = seen_tokens(*[prompt + answer for prompt, answer, *_ in rows])
    found = penalize(
        logits,
        make_rows(
            *[
                SamplingParams(presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
                for _, _, presence, frequency, repetition in rows
            ],
            num_prompt_tokens=[len(prompt) for prompt, *_ in rows],
            num_output_tokens=[len(answer) for _, answer, *_ in rows],
        ),
        seen,
    )
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def test_forbidden_tokens_are_never_chosen() -> None:
    rows = make_rows(SamplingParams(), SamplingParams())
    assert sample(torch.tensor([LOGITS, LOGITS]), rows, forbidden=[(0, 1)])[0].tolist() == [2, 1]


def test_logprobs_are_of_the_unfiltered_logits() -> None:
    greedy, drawn = SamplingParams(logprobs=True), SamplingParams(logprobs=True, temperature=0.3, top_k=1)
    rows = make_rows(greedy, drawn, greedy, draw=0.5)
    tokens, logprobs = sample(torch.tensor([LOGITS] * 3), rows, forbidden=[(2, 1)])
    assert logprobs is not None and tokens.tolist() == [1, 1, 2]
    expected = [math.log(softmax(LOGITS)[token]) for token in (1, 1, 2)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_rows_token_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.7},
        {},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2, "logprobs": True},
        {"repetition_penalty": 1.5},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9},
        {"temperature": 0.2},
    ]
    rows = make_rows(*[SamplingParams(**kind) for kind in kinds], draw=np.arange(0.05, 1, 0.125))
    seen = seen_tokens(*[[1, 2 + i] for i in range(8)])
    together = sample(logits, rows, seen)[0].tolist()
    alone = [int(sample(logits[i : i + 1], rows[i : i + 1], seen[i : i + 1])[0]) for i in range(len(rows))]
    backwards = sample(logits.flip(0), rows[::-1], seen.flip(0))[0].tolist()[::-1]
    assert together == alone == backwards


def test_draws_depend_on_seed_sample_and_step_and_are_spread_evenly() -> None:
    sampling, layout = SamplingParams(temperature=1.0), PromptLayout(np.zeros((3, 1), dtype=np.int32), 0, ())
    request = Request(0, np.zeros(1, dtype=np.int32), (), sampling)
    sequences = [Sequence(request, index, seed, layout) for seed in range(10) for index in range(10)]
    rows = sample_rows([sampling] * 100, sequences)
    drawn = []
    for step in range(100):
        set_steps(rows, np.full(100, step))
        drawn.append(rows["draw"].copy())
    draws = np.concatenate(drawn)
    assert draws[[0, 1, 9999]].tolist() == [0.13870941014555427, 0.2691303195904541, 0.10084365414430774]
    assert len(set(draws.tolist())) == len(draws)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert counts.min() > 900 and counts.max() < 1100


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (list(range(100)), False),
        ([1, 2, 3] + [5] * 32, True),
        ([1, 2, 3] + [5] * 20, False),
        ([5] * 31, False),
        ([5] * 32, True),
        ([9] + [1, 2, 3, 4, 5] * 8, True),
        ([9] + [1, 2, 3, 4, 5] * 7, False),
        ([1, 2, 3, 4, 5] * 8 + [6], False),
    ],
)
def test_repetition_is_one_phrase_many_times_at_the_end(tokens: list[int], expected: bool) -> None:
    assert repeats_endlessly(tokens) is expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 200),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("n", 0),
        ("seed", -1),
        ("stop_strings", ("",)),
        ("stop_strings", "word"),
        ("stop_token_ids", (-5,)),
    ],
)
def test_a_wrong_setting_says_what_was_found_and_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; allowed: "):
        SamplingParams(**{name: value})
