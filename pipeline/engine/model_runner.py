"""Turns a plan into tensors, runs both halves of the model, and samples. Only this file knows sequences and tensors.

Nothing here waits for the device. A pass's tokens stay on it (`last_tokens` feeds the next decode) and are copied to
the host behind the pass; `PassResult.read` waits for that copy, which on a GPU the engine calls one pass later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.engine.attention.interface import AttentionBackend, DecodeInfo, PrefillInfo
from pipeline.engine.cuda_graph import DecodeGraphs
from pipeline.engine.device import upload
from pipeline.engine.kv_cache import KVCache
from pipeline.engine.models.text_model import DeepFeatures, TextModel
from pipeline.engine.models.vision import VisionModel
from pipeline.engine.sampler import SAMPLE_ROW, SeenTokens, forbidden_tokens, sample, sample_rows, set_steps
from pipeline.engine.scheduling.encoded_media import EncodedMedia
from pipeline.engine.scheduling.scheduler import DecodePlan, Plan, PrefillChunk, PrefillPlan
from pipeline.engine.scheduling.stopping import StopRules
from pipeline.engine.sequence import Sequence


@dataclass
class PassResult:
    """Tokens on their way to the host, and the sequences they belong to."""

    sequences: list[Sequence]
    tokens: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    copied: Any = None
    """CUDA event after the copies; None on a CPU."""
    epochs: list[int] = field(default_factory=list)
    """num_preemptions of each sequence at launch; the token of one that was preempted since is dropped."""

    def read(self) -> list[tuple[Sequence, int, float | None]]:
        """(sequence, token, log-probability) of the sequences that still need it. Waits for the copy."""
        if self.tokens is None:
            return []
        if self.copied is not None:
            self.copied.synchronize()
        logprobs = [None] * len(self.sequences) if self.logprobs is None else self.logprobs.tolist()
        return [
            (sequence, token, logprob)
            for sequence, token, logprob, epoch in zip(
                self.sequences, self.tokens.tolist(), logprobs, self.epochs, strict=True
            )
            if sequence.finish_reason is None and sequence.num_preemptions == epoch
        ]


class ModelRunner:
    def __init__(
        self,
        text: TextModel,
        vision: VisionModel,
        attention: AttentionBackend,
        cache: KVCache,
        media: EncodedMedia,
        rules: StopRules,
        *,
        device: torch.device,
        max_running: int,
        max_context: int,
    ) -> None:
        self.text = text
        self.vision = vision
        self.attention = attention
        self.cache = cache
        self.media = media
        self.rules = rules
        self.device = device
        self.graphs: DecodeGraphs | None = None
        self.visual_tokens: dict[bytes, torch.Tensor] = {}
        self.last_tokens = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._max_context = max_context
        self._tables = np.zeros((max_running, -(-max_context // cache.block_size)), dtype=np.int32)
        """The block table of each running sequence, by its row, padded with block 0."""
        self._deltas = np.zeros(max_running, dtype=np.int64)
        """`layout.delta` of each running sequence, by its row."""
        self._sample_rows = np.zeros(max_running, dtype=SAMPLE_ROW)
        self._seen: SeenTokens | None = None
        """Made when the first sequence with a repetition penalty begins to decode."""
        self.also_timed: Callable[[str], AbstractContextManager[None]] | None = None
        """Entered for each part of a pass too: vision, prefill, decode. For benchmarks."""
        self.reset_counts()

    def reset_counts(self) -> None:
        self.seconds = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
        """Host time; on a GPU that is the time to launch the work, not to run it."""
        self.counts = {"prefill_tokens": 0, "decode_tokens": 0, "patches": 0, "passes": 0}

    @torch.inference_mode()
    def run(self, plan: Plan, *, max_batch_patches: int) -> PassResult:
        if isinstance(plan, DecodePlan):
            # Sorted, because backends that pad do so among neighbours.
            sequences = sorted(plan.sequences, key=attrgetter("num_computed"))
            with self._timed("decode"):
                logits = self._decode(sequences)
                result = self._sample(logits, sequences)
            self.counts["decode_tokens"] += len(sequences)
        else:
            if plan.media:
                with self._timed("vision"):
                    self._encode(plan, max_batch_patches)
            with self._timed("prefill"):
                result = self._prefill(plan)
            self.counts["prefill_tokens"] += sum(chunk.num_tokens for chunk in plan.chunks)
        self.counts["passes"] += 1
        return result

    def forget_media(self, keys: SequenceOf[bytes]) -> None:
        for key in keys:
            del self.visual_tokens[key]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.also_timed(phase) if self.also_timed else nullcontext():
            yield
        self.seconds[phase] += time.perf_counter() - started

    def _upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return upload(array, self.device)

    # ---- prefill

    def _encode(self, plan: PrefillPlan, max_batch_patches: int) -> None:
        for medium, tokens in self.vision.encode(plan.media, max_batch_patches):
            self.visual_tokens[medium.content_key] = tokens
            self.media.mark_encoded(medium)
            self.counts["patches"] += medium.num_patches

    def _prefill(self, plan: PrefillPlan) -> PassResult:
        chunks = plan.chunks
        ids = np.concatenate([c.sequence.known_ids(c.start, c.stop) for c in chunks]).astype(np.int64)
        positions = np.concatenate([c.sequence.positions(c.start, c.stop) for c in chunks], axis=1)
        slots = np.concatenate([self._slots(c.sequence, c.start, c.stop) for c in chunks])
        info = PrefillInfo(
            lengths=[c.num_tokens for c in chunks],
            starts=[c.start for c in chunks],
            tables=[c.sequence.block_table for c in chunks],
            slots=self._upload(slots),
        )
        hidden = self.text.embed(self._upload(ids))
        deep = self._place_visual_tokens(hidden, chunks)
        self.attention.begin_prefill(info, self.cache)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.attention.prefill(q, k, v, self.cache, layer)

        ends = np.cumsum(info.lengths) - 1
        last = [end for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last]
        # Of a pass in which no prompt ends nothing is wanted, but kernels take no empty tensors.
        wanted = self._upload(np.asarray(last or ends[:1], dtype=np.int64))
        rotation = self.text.rotation(self._upload(positions))
        hidden = self.text.forward(hidden, rotation, self.cache, info.slots, attend, deep, wanted)
        self.cache.copy_blocks(plan.copies)
        if not last:
            return PassResult([])
        logits = self.text.logits(hidden)
        samples = [1 + len(chunk.forks) for chunk in chunks if chunk.is_last]
        if max(samples) > 1:
            rows = np.repeat(np.arange(len(last)), samples)
            logits = logits.index_select(0, self._upload(rows).to(logits.device))
        self._begin(plan.sampled)
        self._restart_seen(plan.sampled, logits)
        return self._sample(logits, plan.sampled)

    def _begin(self, sequences: SequenceOf[Sequence]) -> None:
        """Note what decode passes need of these sequences, whose prompts are in the cache."""
        rows = [sequence.row for sequence in sequences]
        self._sample_rows[rows] = sample_rows([sequence.sampling for sequence in sequences], sequences)
        for sequence in sequences:
            self._deltas[sequence.row] = sequence.layout.delta
            self._tables[sequence.row] = 0
            self._tables[sequence.row, : len(sequence.block_table)] = sequence.block_table

    def _slots(self, sequence: Sequence, start: int, stop: int) -> npt.NDArray[np.int64]:
        size = self.cache.block_size
        index = np.arange(start, stop)
        return np.asarray(sequence.block_table, dtype=np.int64)[index // size] * size + index % size

    def _place_visual_tokens(self, hidden: torch.Tensor, chunks: SequenceOf[PrefillChunk]) -> DeepFeatures | None:
        """Overwrite the placeholder rows of hidden [N, C] with visual tokens. Returns what later layers get of them."""
        width = hidden.shape[1]
        rows: list[npt.NDArray[np.int64]] = []
        features: list[torch.Tensor] = []
        offset = 0
        for chunk in chunks:
            for run in chunk.sequence.layout.runs:
                start, stop = max(run.start, chunk.start), min(run.stop, chunk.stop)
                if start < stop:
                    tokens = self.visual_tokens[chunk.sequence.request.media[run.medium].content_key]
                    tokens = tokens[run.first + start - run.start : run.first + stop - run.start]
                    row = offset + start - chunk.start
                    hidden[row : row + stop - start] = tokens[:, :width]
                    if self.vision.num_deep:
                        rows.append(np.arange(row, row + stop - start))
                        features.append(tokens[:, width:])
            offset += chunk.num_tokens
        if not rows:
            return None
        deep = torch.cat(features).view(-1, self.vision.num_deep, width)
        return DeepFeatures(self._upload(np.concatenate(rows)), deep)

    # ---- decode

    def _decode(self, sequences: SequenceOf[Sequence]) -> torch.Tensor:
        """Feed each sequence its newest token, number num_computed - 1, whether or not the host knows it yet."""
        lengths = np.asarray([sequence.num_computed for sequence in sequences])
        rows = np.asarray([sequence.row for sequence in sequences])
        blocks, places = np.divmod(lengths - 1, self.cache.block_size)
        for i in np.flatnonzero(places == 0).tolist():  # the token is the first one in its block
            self._tables[rows[i], blocks[i]] = sequences[i].block_table[-1]
        tables = self._tables[rows, : blocks.max() + 1]
        slots = self._tables[rows, blocks].astype(np.int64) * self.cache.block_size + places
        return self.decode_rows(np.stack([rows, lengths - 1 + self._deltas[rows], slots, lengths]), tables)

    def decode_rows(self, numbers: npt.NDArray[np.int64], tables: npt.NDArray[np.int32]) -> torch.Tensor:
        """Logits [R, vocabulary] of one decode pass: a graph's, where there are graphs and the pass fits them.

        The numbers [4, R] of each token are its row in `last_tokens`, its position, its slot and the row's length.
        """
        if self.graphs is not None and self.graphs.fits(*tables.shape):
            return self.graphs.replay(numbers, tables)
        rows, positions, slots, lengths = self._upload(numbers)
        info = DecodeInfo(slots, lengths.int(), self._upload(tables), host_lengths=numbers[3].tolist())
        return self.decode_forward(self.last_tokens.index_select(0, rows), positions, info)

    def decode_forward(
        self,
        tokens: torch.Tensor,  # [R]
        positions: torch.Tensor,  # [R]
        info: DecodeInfo,
    ) -> torch.Tensor:
        """One token of each row through the text model: logits [R, vocabulary]. This is what a graph captures."""
        self.attention.begin_decode(info, self.cache)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.attention.decode(q, self.cache, layer)

        text = self.text
        hidden = text.forward(text.embed(tokens), text.rotation(positions), self.cache, info.slots, attend)
        return text.logits(hidden)

    # ---- sampling

    def _restart_seen(self, sequences: SequenceOf[Sequence], logits: torch.Tensor) -> None:
        """Note the tokens of sequences whose decoding begins; the host knows all of them."""
        penalized = [sequence for sequence in sequences if sequence.sampling.is_penalized]
        if not penalized:
            return
        if self._seen is None:
            self._seen = SeenTokens(len(self.last_tokens), self._max_context + 1, logits.device)
        self._seen.restart(
            [sequence.row for sequence in penalized],
            [sequence.known_ids(0, sequence.num_tokens) for sequence in penalized],
        )

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> PassResult:
        places = np.asarray([sequence.row for sequence in sequences])
        lengths = np.asarray([sequence.num_computed for sequence in sequences])
        rows = self._sample_rows[places]
        set_steps(rows, lengths - rows["num_prompt_tokens"])
        forbidden = forbidden_tokens(rows, sequences, self.rules)
        index = self._upload(places)
        if self._seen is None or not rows["is_penalized"].any():
            tokens, logprobs = sample(logits, rows, forbidden=forbidden)
        else:
            # The head may lie on another device than the embedding, where the next pass begins.
            seen = self._seen.of(index.to(logits.device), int(lengths.max()))
            tokens, logprobs = sample(logits, rows, seen, forbidden)
            self._seen.add(places, lengths, tokens)
        tokens = tokens.to(self.device)
        logprobs = None if logprobs is None else logprobs.to(self.device)
        self.last_tokens.index_copy_(0, index, tokens)
        epochs = [sequence.num_preemptions for sequence in sequences]
        if self.device.type != "cuda":
            return PassResult(sequences, tokens, logprobs, None, epochs)
        tokens = _copy_out(tokens)
        logprobs = None if logprobs is None else _copy_out(logprobs)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return PassResult(sequences, tokens, logprobs, copied, epochs)


def _copy_out(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
