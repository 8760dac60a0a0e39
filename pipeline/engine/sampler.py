"""Logits in, one token per row out: per-row sampling parameters, without synchronizing with the host.

The order is transformers', with vLLM's penalties: repetition, frequency and presence penalty, forbidden tokens,
temperature, top-k, top-p, min-p. Filters are thresholds on values, so equal logits are kept or dropped together and the
result does not depend on how a sort breaks ties. A row is sampled with one number in [0, 1) that the host derives from
the row's seed, so a row's token does not depend on the other rows.

    R rows   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.device import upload
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.sequence import Sequence
from pipeline.engine.settings import SamplingParams

MAX_BEST = 1024
"""Top-p looks at this many most likely tokens first; mostly they have the share that is wanted."""

_BITS_OF_ONE = 0x3F800000


@dataclass(frozen=True)
class SampleRow:
    """What the sampler needs to know of one row, as plain host values."""

    sampling: SamplingParams
    draw: float
    """In [0, 1); unused where greedy."""
    forbidden: tuple[int, ...] = ()
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    """In its row of `seen`, the answer follows the prompt."""


def sample_row(sequence: Sequence, rules: StopRules, step: int) -> SampleRow:
    """What the sampler needs for the sequence's output token number `step`."""
    sampling = sequence.sampling
    draw = sequence.draw(step) if sampling.temperature > 0 else 0.0
    return SampleRow(sampling, draw, rules.forbidden_ids(sampling, step), sequence.num_prompt_tokens, step)


class SeenTokens:
    """The tokens of each row's prompt and answer, for the penalties. They lie on the device, so that a token counts
    before the host has read it."""

    def __init__(self, num_rows: int, max_tokens: int, device: torch.device) -> None:
        # Behind its last token a row repeats its first one: a token that occurs twice is penalised once.
        self._ids = torch.zeros(num_rows, max_tokens, dtype=torch.int32, device=device)

    def restart(self, rows: SequenceOf[int], ids: SequenceOf[npt.NDArray[np.int32]]) -> None:
        """From now on these rows hold just these tokens."""
        device, width = self._ids.device, self._ids.shape[1]
        index = upload(np.asarray(rows, dtype=np.int64), device)
        first = upload(np.asarray([each[0] for each in ids], dtype=np.int32), device)
        self._ids.index_copy_(0, index, first[:, None].expand(-1, width))
        places = np.concatenate([row * width + np.arange(len(each)) for row, each in zip(rows, ids, strict=True)])
        self._ids.view(-1).index_copy_(0, upload(places, device), upload(np.concatenate(ids), device))

    def add(self, rows: SequenceOf[int], lengths: SequenceOf[int], tokens: torch.Tensor) -> None:
        """Each of the rows, which holds so many tokens, holds one more."""
        places = np.asarray(rows, dtype=np.int64) * self._ids.shape[1] + np.asarray(lengths)
        self._ids.view(-1).index_copy_(0, upload(places, self._ids.device), tokens.to(torch.int32))

    def of(self, rows: torch.Tensor, longest: int) -> torch.Tensor:
        """The first `longest` tokens of these rows [R, longest]."""
        return self._ids.narrow(1, 0, longest).index_select(0, rows)


@torch.no_grad()
def sample(
    logits: torch.Tensor,  # [R, V] in the model's dtype
    rows: SequenceOf[SampleRow],
    seen: torch.Tensor | None = None,  # [R, tokens] of SeenTokens; needed where a row is penalized
) -> tuple[torch.Tensor, torch.Tensor | None]:  # tokens [R] int64, log-probabilities [R] or None
    """Choose a token for each row."""
    if all(_is_plain(row) for row in rows):
        # The common case needs no float32 copy: the cast does not change which logit is the largest.
        return logits.argmax(dim=-1), None
    raw = logits.float()
    scores = raw
    if any(row.sampling.is_penalized for row in rows):
        assert seen is not None, "penalties need the tokens seen so far"
        scores = penalize(raw, rows, seen)
    if any(row.forbidden for row in rows):
        scores = _forbid(scores, rows)
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        index = upload(np.asarray(drawn), logits.device)
        tokens = tokens.index_copy(0, index, _draw(scores[index], [rows[i] for i in drawn]))
    if not any(row.sampling.logprobs for row in rows):
        return tokens, None
    chosen = raw.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - raw.logsumexp(dim=-1)


def _is_plain(row: SampleRow) -> bool:
    sampling = row.sampling
    return sampling.temperature == 0 and not (sampling.logprobs or sampling.is_penalized or row.forbidden)


def penalize(logits: torch.Tensor, rows: SequenceOf[SampleRow], ids: torch.Tensor) -> torch.Tensor:
    """Scores [R, V] after the penalties, for the tokens [R, tokens] of prompts and answers."""
    device, sampling, scores, ids = logits.device, [row.sampling for row in rows], logits, ids.long()
    if any(s.repetition_penalty != 1.0 for s in sampling):
        found, penalty = scores.gather(1, ids), _column([s.repetition_penalty for s in sampling], device)
        scores = scores.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))
    if any(s.presence_penalty or s.frequency_penalty for s in sampling):
        start = _column([row.num_prompt_tokens for row in rows], device)
        stop = start + _column([row.num_output_tokens for row in rows], device)
        place = torch.arange(ids.shape[1], device=device)
        counts = torch.zeros_like(scores).scatter_add_(1, ids, ((place >= start) & (place < stop)).float())
        scores = scores - _column([s.frequency_penalty for s in sampling], device) * counts
        scores = scores - _column([s.presence_penalty for s in sampling], device) * (counts > 0)
    return scores


def _column(values: SequenceOf[float], device: torch.device) -> torch.Tensor:
    return upload(np.asarray(values, dtype=np.float32), device)[:, None]


def _forbid(scores: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    pairs = [(i, token) for i, row in enumerate(rows) for token in row.forbidden if token < scores.shape[1]]
    if not pairs:
        return scores
    index = upload(np.asarray(pairs, dtype=np.int64), scores.device)
    # A Python number as the value would be copied from the host, which waits for that.
    return scores.index_put((index[:, 0], index[:, 1]), scores.new_full((), -torch.inf))


def _draw(scores: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    """Sample [R, V] scores by temperature and filters: tokens [R]."""
    device, vocab_size = scores.device, scores.shape[1]
    sampling = [row.sampling for row in rows]
    scores = scores / _column([s.temperature for s in sampling], device)
    ks = [s.top_k if 0 < s.top_k < vocab_size else 0 for s in sampling]
    if any(ks):
        # One top-k with the largest k; each row reads its own threshold at its k-th column.
        best = scores.topk(max(ks), dim=-1).values
        last = upload(np.asarray([max(k - 1, 0) for k in ks]), device)[:, None]
        threshold = best.gather(1, last)
        off = _column([float(k == 0) for k in ks], device).bool()
        scores = scores.masked_fill((scores < threshold) & ~off, -torch.inf)
    if any(s.top_p < 1 for s in sampling):
        mass = scores.softmax(dim=-1)
        # Where top-p is off, a sum that is never reached keeps everything.
        wanted = _column([s.top_p if s.top_p < 1 else 2.0 for s in sampling], device)
        most = max(k or vocab_size for k, s in zip(ks, sampling, strict=True) if s.top_p < 1)  # 0: top-k is off
        scores = scores.masked_fill(mass < _smallest_kept(mass, wanted, most), -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if any(s.min_p > 0 for s in sampling):
        floor = probabilities.amax(dim=-1, keepdim=True) * _column([s.min_p for s in sampling], device)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    draws = upload(np.asarray([row.draw for row in rows], dtype=np.float64), scores.device)[:, None]
    # The first token whose cumulative mass exceeds the draw has a probability above 0.
    picked = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(1)
    return picked.clamp_(max=vocab_size - 1)


def _smallest_kept(mass: torch.Tensor, wanted: torch.Tensor, most: int) -> torch.Tensor:
    """The probability [R, 1] of the least likely token that top-p keeps, for probabilities `mass` [R, V] of which the
    `wanted` share [R, 1] is kept, or all where it is above 1. A token is kept where all likelier ones together have
    less than the share. At most `most` different probabilities of a row are above 0."""
    if most <= MAX_BEST:
        return _smallest_of_best(mass, wanted, min(most, mass.shape[1]))[0]
    if mass.device.type != "cpu":  # to see which rows need more than the best would make the host wait
        return _search_smallest_kept(mass, wanted)
    smallest, is_enough = _smallest_of_best(mass, wanted, MAX_BEST)
    rest = (~is_enough).squeeze(1).nonzero().squeeze(1)
    if len(rest):
        smallest[rest] = _smallest_of_best(mass[rest], wanted[rest], mass.shape[1])[0]
    return smallest


def _smallest_of_best(mass: torch.Tensor, wanted: torch.Tensor, num_best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same among the `num_best` most likely tokens, and whether they have the share."""
    best = mass.topk(num_best, dim=-1).values
    before = best.cumsum(dim=-1, dtype=torch.float64) - best
    smallest = best.masked_fill(before >= wanted, torch.inf).amin(dim=-1, keepdim=True)
    is_enough = (before[:, -1:] + best[:, -1:] >= wanted) | (wanted > 1)
    return smallest.masked_fill(wanted > 1, 0.0), is_enough


def _search_smallest_kept(mass: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The same on a GPU, by bisection. Non-negative floats are ordered as their bits are, so 30 halvings between 0 and
    1 leave one float: the smallest above which less than the wanted share lies."""
    bits = mass.view(torch.int32)
    low = torch.full_like(bits[:, :1], -1)
    high = torch.full_like(low, _BITS_OF_ONE)
    for _ in range(30):
        middle = (low + high) >> 1
        above = mass.masked_fill(bits <= middle, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
        is_enough = above < wanted
        high = torch.where(is_enough, middle, high)
        low = torch.where(is_enough, low, middle)
    return high.view(torch.float32)
