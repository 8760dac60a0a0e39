"""Logits in, one token per row out: per-row sampling parameters, without synchronizing with the host.

The order is transformers': repetition penalty, forbidden tokens, temperature, top-k, top-p, min-p. Filters are
thresholds on values, so equal logits are kept or dropped together, and the vocabulary is never sorted. A row is sampled
with one number in [0, 1) that the host derives from the row's seed, so a row's token does not depend on the other rows.

    R rows   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.device import upload
from pipeline.engine.sequence import Sequence
from pipeline.engine.settings import SamplingParams
from pipeline.engine.stopping import StopRules

MAX_BEST = 1024
"""Top-p looks at this many most likely tokens first. They nearly always have the share that is wanted."""

_BITS_OF_ONE = 0x3F800000


@dataclass(frozen=True)
class SampleRow:
    """What the sampler needs to know of one row, as plain host values."""

    sampling: SamplingParams
    draw: float
    """In [0, 1); unused where greedy."""
    forbidden: tuple[int, ...] = ()


def sample_row(sequence: Sequence, rules: StopRules, step: int) -> SampleRow:
    """What the sampler needs for the sequence's output token number `step`."""
    sampling = sequence.sampling
    draw = sequence.draw(step) if sampling.temperature > 0 else 0.0
    return SampleRow(sampling, draw, rules.forbidden_ids(sampling, step))


class SeenTokens:
    """Which tokens the prompt and the answer of each row contain, for the repetition penalty: a mask on the device, so
    that tokens need not be on the host to count."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._mask = torch.zeros(num_rows, vocab_size, dtype=torch.bool, device=device)

    def restart(self, rows: SequenceOf[int], ids: SequenceOf[npt.NDArray[np.int32]]) -> None:
        """From now on these rows contain just these tokens."""
        device, vocab_size = self._mask.device, self._mask.shape[1]
        places = np.concatenate([row * vocab_size + each.astype(np.int64) for row, each in zip(rows, ids, strict=True)])
        self._mask.index_fill_(0, upload(np.asarray(rows, dtype=np.int64), device), False)
        self._mask.view(-1).index_fill_(0, upload(places, device), True)

    def add(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Each row [R] contains one more token [R]."""
        self._mask.view(-1).index_fill_(0, rows * self._mask.shape[1] + tokens, True)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The mask [R, V] of these rows."""
        return self._mask.index_select(0, rows)


@torch.no_grad()
def sample(
    logits: torch.Tensor,  # [R, V] in the model's dtype
    rows: SequenceOf[SampleRow],
    seen: torch.Tensor | None = None,  # [R, V] bool; needed where a row has a repetition penalty
) -> tuple[torch.Tensor, torch.Tensor | None]:  # tokens [R] int64, log-probabilities [R] or None
    """Choose a token for each row."""
    if all(_is_plain(row) for row in rows):
        # The common case needs no float32 copy: the cast does not change which logit is the largest.
        return logits.argmax(dim=-1), None
    raw = logits.float()
    scores = raw
    penalties = [row.sampling.repetition_penalty for row in rows]
    if any(penalty != 1.0 for penalty in penalties):
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        penalty = _column(penalties, raw.device)
        scores = torch.where(seen, torch.where(raw < 0, raw * penalty, raw / penalty), raw)
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
    return (
        sampling.temperature == 0 and not sampling.logprobs and sampling.repetition_penalty == 1.0 and not row.forbidden
    )


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
        most = max(k or vocab_size for k, s in zip(ks, sampling, strict=True) if s.top_p < 1)
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
    num_best = min(most, mass.shape[1], MAX_BEST)
    if most > num_best and mass.device.type != "cpu":
        return _search_smallest_kept(mass, wanted)  # to see which rows need it would make the host wait
    best = mass.topk(num_best, dim=-1).values
    before = best.cumsum(dim=-1, dtype=torch.float64) - best  # mass of everything larger
    smallest = best.masked_fill(before >= wanted, torch.inf).amin(dim=-1, keepdim=True)
    smallest = smallest.masked_fill(wanted > 1, 0.0)
    if most > num_best:
        unreached = ((before[:, -1:] + best[:, -1:] < wanted) & (wanted < 1)).squeeze(1).nonzero().squeeze(1)
        if len(unreached):
            smallest[unreached] = _search_smallest_kept(mass[unreached], wanted[unreached])
    return smallest


def _search_smallest_kept(mass: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The same by bisection. Floats of 0 and above are ordered as their bits are, so that 30 halvings between 0 and 1
    leave one float: the smallest above which less than the wanted share lies."""
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
