"""Logits in, one token per row out: per-row sampling parameters, without synchronizing with the host.

The order is transformers', with vLLM's penalties: repetition, frequency and presence penalty, forbidden tokens,
temperature, top-k, top-p, min-p. Filters are thresholds on values, so equal logits are kept or dropped together and the
result does not depend on how a sort breaks ties. A row is sampled with one number in [0, 1) that the host derives from
the row's seed, so a row's token does not depend on the other rows.

    R rows   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

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

_LEAST = 1e-6
"""Of temperatures, shares of top-p and penalties: smaller ones (and penalties above 1 / _LEAST) are taken as this,
since they would overflow float32."""

_LARGEST = 2**62
"""`top_k` may be any number; no vocabulary has so many tokens."""

_OF_PARAMS: dict[str, type] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), np.float64),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), np.float64),
    **dict.fromkeys(("top_k", "min_tokens"), np.int64),
    **dict.fromkeys(("is_penalized", "logprobs"), np.bool_),
}
_OF_SEQUENCE: dict[str, type] = {"num_prompt_tokens": np.int64, "draw_key": np.uint64}
_OF_TOKEN: dict[str, type] = {"num_output_tokens": np.int64, "draw": np.float64}
SAMPLE_ROW = np.dtype([*_OF_PARAMS.items(), *_OF_SEQUENCE.items(), *_OF_TOKEN.items()], align=True)

SampleRows = npt.NDArray[np.void]
"""What the sampler needs to know of the rows: [R] SAMPLE_ROW on the host. `draw` is in [0, 1), unused where greedy."""


def sample_rows(sampling: SequenceOf[SamplingParams], sequences: SequenceOf[Sequence] = ()) -> SampleRows:
    """Rows with these parameters, of these sequences where given, before their first token."""
    rows = np.zeros(len(sampling), dtype=SAMPLE_ROW)
    for name in _OF_PARAMS:
        rows[name] = [min(getattr(each, name), _LARGEST) for each in sampling]
    if sequences:
        rows["num_prompt_tokens"] = [sequence.num_prompt_tokens for sequence in sequences]
        seeds = np.asarray([sequence.seed for sequence in sequences], dtype=np.uint64)
        rows["draw_key"] = _mix(_mix(seeds) ^ np.asarray([sequence.index for sequence in sequences], dtype=np.uint64))
    return rows


def set_steps(rows: SampleRows, steps: npt.NDArray[np.int64]) -> None:
    """From now on these are the rows of output tokens of these numbers."""
    rows["num_output_tokens"] = steps
    if rows["temperature"].any():
        # A number in [0, 1) that depends on the seed, the sample's index and the token's number alone.
        keys: npt.NDArray[np.uint64] = rows["draw_key"]
        rows["draw"] = (_mix(keys ^ steps.astype(np.uint64)) >> np.uint64(11)) * 2.0**-53


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64, a cheap integer hash."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def forbidden_tokens(rows: SampleRows, sequences: SequenceOf[Sequence], rules: StopRules) -> list[tuple[int, int]]:
    """(row, token) of the tokens that may not be chosen yet."""
    early = np.flatnonzero(rows["num_output_tokens"] < rows["min_tokens"]).tolist()
    return [(i, token) for i in early for token in rules.end_ids(sequences[i].sampling)]


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

    def add(self, rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], tokens: torch.Tensor) -> None:
        """Each of the rows, which holds so many tokens, holds one more."""
        places = rows * self._ids.shape[1] + lengths
        self._ids.view(-1).index_copy_(0, upload(places, self._ids.device), tokens.to(torch.int32))

    def of(self, rows: torch.Tensor, longest: int) -> torch.Tensor:
        """The first `longest` tokens of these rows [R, longest]."""
        return self._ids.narrow(1, 0, longest).index_select(0, rows)


@torch.no_grad()
def sample(
    logits: torch.Tensor,  # [R, V] in the model's dtype
    rows: SampleRows,
    seen: torch.Tensor | None = None,  # [R, tokens] of SeenTokens; needed where a row is penalized
    forbidden: SequenceOf[tuple[int, int]] = (),  # (row, token)
) -> tuple[torch.Tensor, torch.Tensor | None]:  # tokens [R] int64, log-probabilities [R] or None
    """Choose a token for each row."""
    drawn = np.flatnonzero(rows["temperature"])
    with_penalties, with_logprobs = rows["is_penalized"].any(), rows["logprobs"].any()
    if not (len(drawn) or with_penalties or with_logprobs or forbidden):
        # The common case needs no float32 copy: the cast does not change which logit is the largest.
        return logits.argmax(dim=-1), None
    raw = logits.float()
    scores = raw
    if with_penalties:
        assert seen is not None, "penalties need the tokens seen so far"
        scores = penalize(raw, rows, seen)
    if forbidden:
        scores = _forbid(scores, forbidden)
    if len(drawn) == len(rows):
        tokens = _draw(scores, rows)
    else:
        tokens = scores.argmax(dim=-1)
        if len(drawn):
            index = upload(drawn, logits.device)
            tokens = tokens.index_copy(0, index, _draw(scores[index], rows[drawn]))
    if not with_logprobs:
        return tokens, None
    chosen = raw.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - raw.logsumexp(dim=-1)


def penalize(logits: torch.Tensor, rows: SampleRows, ids: torch.Tensor) -> torch.Tensor:
    """Scores [R, V] after the penalties, for the tokens [R, tokens] of prompts and answers."""
    device, scores, ids = logits.device, logits, ids.long()
    if (rows["repetition_penalty"] != 1).any():
        found, penalty = scores.gather(1, ids), _column(np.clip(rows["repetition_penalty"], _LEAST, 1 / _LEAST), device)
        scores = scores.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))
    if rows["presence_penalty"].any() or rows["frequency_penalty"].any():
        # In its row of `ids`, the answer follows the prompt.
        start = _column(rows["num_prompt_tokens"], device)
        stop = start + _column(rows["num_output_tokens"], device)
        place = torch.arange(ids.shape[1], device=device)
        counts = torch.zeros_like(scores).scatter_add_(1, ids, ((place >= start) & (place < stop)).float())
        scores = scores - _column(rows["frequency_penalty"], device) * counts
        scores = scores - _column(rows["presence_penalty"], device) * (counts > 0)
    return scores


def _column(values: npt.NDArray[Any], device: torch.device, dtype: type = np.float32) -> torch.Tensor:
    return upload(np.array(values, dtype=dtype), device)[:, None]


def _forbid(scores: torch.Tensor, forbidden: SequenceOf[tuple[int, int]]) -> torch.Tensor:
    pairs = [(i, token) for i, token in forbidden if token < scores.shape[1]]
    if not pairs:
        return scores
    index = upload(np.asarray(pairs, dtype=np.int64), scores.device)
    # A Python number as the value would be copied from the host, which waits for that.
    return scores.index_put((index[:, 0], index[:, 1]), scores.new_full((), -torch.inf))


def _draw(scores: torch.Tensor, rows: SampleRows) -> torch.Tensor:
    """Sample [R, V] scores by temperature and filters: tokens [R]."""
    device, vocab_size = scores.device, scores.shape[1]
    scores = scores / _column(np.maximum(rows["temperature"], _LEAST), device)
    top_p, ks = np.maximum(rows["top_p"], _LEAST), rows["top_k"]
    ks = np.where(ks < vocab_size, ks, 0)  # 0: off
    if ks.any():
        # One top-k with the largest k; each row reads its own threshold at its k-th column.
        best = scores.topk(int(ks.max()), dim=-1).values
        threshold = best.gather(1, _column(np.maximum(ks - 1, 0), device, np.int64))
        off = _column(ks == 0, device).bool()
        scores = scores.masked_fill((scores < threshold) & ~off, -torch.inf)
    if (top_p < 1).any():
        mass = scores.softmax(dim=-1)
        # Where top-p is off, a sum that is never reached keeps everything.
        wanted = _column(np.where(top_p < 1, top_p, 2.0), device)
        most = int(np.where(ks > 0, ks, vocab_size)[top_p < 1].max())
        scores = scores.masked_fill(mass < _smallest_kept(mass, wanted, most), -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if rows["min_p"].any():
        floor = probabilities.amax(dim=-1, keepdim=True) * _column(rows["min_p"], device)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    draws = _column(rows["draw"], device, np.float64)
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
