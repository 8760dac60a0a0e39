"""Logits in, one token per row out: per-row sampling parameters, without synchronizing with the host.

The order is transformers': repetition penalty, forbidden tokens, temperature, top-k, top-p, min-p. Filters are
thresholds on values, so equal logits are kept or dropped together and the result does not depend on how a sort breaks
ties. A row is sampled with one number in [0, 1) that the host derives from the row's seed, so the other rows of the
batch do not matter.

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


@dataclass(frozen=True)
class SampleRow:
    """What the sampler needs to know of one row, as plain host values."""

    sampling: SamplingParams
    draw: float
    """In [0, 1); unused where greedy."""
    forbidden: tuple[int, ...] = ()
    seen_ids: npt.NDArray[np.int32] | None = None
    """Prompt and output so far; only with a repetition penalty."""


def sample_row(sequence: Sequence, rules: StopRules, step: int) -> SampleRow:
    """What the sampler needs for the sequence's output token number `step`."""
    sampling = sequence.sampling
    seen = None
    if sampling.repetition_penalty != 1.0:
        assert len(sequence.output_ids) == step, "a penalty needs every earlier token on the host"
        seen = sequence.known_ids(0, sequence.num_tokens)
    draw = sequence.draw(step) if sampling.temperature > 0 else 0.0
    return SampleRow(sampling, draw, rules.forbidden_ids(sampling, step), seen)


@torch.no_grad()
def sample(
    logits: torch.Tensor,  # [R, V] in the model's dtype
    rows: SequenceOf[SampleRow],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # tokens [R] int64, log-probabilities [R] or None
    """Choose a token for each row."""
    if all(_is_plain(row) for row in rows):
        # The common case needs no float32 copy: the cast does not change which logit is the largest.
        return logits.argmax(dim=-1), None
    raw = logits.float()
    scores = raw
    if any(row.seen_ids is not None or row.forbidden for row in rows):
        scores = raw.clone()
        _penalise_seen(scores, rows)
        _forbid(scores, rows)
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
    return sampling.temperature == 0 and not sampling.logprobs and row.seen_ids is None and not row.forbidden


def _penalise_seen(scores: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    for i, row in enumerate(rows):
        if row.seen_ids is None:
            continue
        ids = upload(np.unique(row.seen_ids).astype(np.int64), scores.device)
        found = scores[i, ids]
        penalty = row.sampling.repetition_penalty
        scores[i, ids] = torch.where(found < 0, found * penalty, found / penalty)


def _forbid(scores: torch.Tensor, rows: SequenceOf[SampleRow]) -> None:
    pairs = [(i, token) for i, row in enumerate(rows) for token in row.forbidden if token < scores.shape[1]]
    if pairs:
        index = upload(np.asarray(pairs, dtype=np.int64), scores.device)
        # A Python number as the value would be copied from the host, which waits for that.
        scores.index_put_((index[:, 0], index[:, 1]), scores.new_full((), -torch.inf))


def _draw(scores: torch.Tensor, rows: SequenceOf[SampleRow]) -> torch.Tensor:
    """Sample [R, V] scores by temperature and filters: tokens [R]."""

    def column(values: list[float]) -> torch.Tensor:
        return upload(np.asarray(values, dtype=np.float32), scores.device)[:, None]

    sampling = [row.sampling for row in rows]
    scores = scores / column([s.temperature for s in sampling])
    vocab_size = scores.shape[1]
    if any(0 < s.top_k < vocab_size for s in sampling):
        # One top-k with the largest k; each row reads its own threshold at its k-th column.
        ks = [s.top_k if 0 < s.top_k < vocab_size else 0 for s in sampling]
        best = scores.topk(max(ks), dim=-1).values
        last = upload(np.asarray([max(k - 1, 0) for k in ks]), scores.device)[:, None]
        threshold = best.gather(1, last)
        off = column([float(k == 0) for k in ks]).bool()
        scores = scores.masked_fill((scores < threshold) & ~off, -torch.inf)
    if any(s.top_p < 1 for s in sampling):
        mass = scores.softmax(dim=-1)
        ordered = mass.sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered  # mass of everything larger
        kept = before < column([s.top_p for s in sampling])
        kept |= column([float(s.top_p == 1) for s in sampling]).bool()
        smallest = ordered.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
        scores = scores.masked_fill(mass < smallest, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if any(s.min_p > 0 for s in sampling):
        floor = probabilities.amax(dim=-1, keepdim=True) * column([s.min_p for s in sampling])
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    draws = upload(np.asarray([row.draw for row in rows], dtype=np.float64), scores.device)[:, None]
    # The first token whose cumulative mass exceeds the draw has a probability above 0.
    picked = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).squeeze(1)
    return picked.clamp_(max=vocab_size - 1)
