"""Which sequences run in the next pass: the policy of continuous batching, in plain Python.

    waiting --admit--> prefilling --last chunk--> running --end--> finished
       ^                   |                        |
       `------preempt------+------------------------'

A pass is either a prefill (prompts packed one after another, up to a token and a patch budget) or a decode (one token
for every running sequence); never both, so that decode passes keep one shape. Prefill has priority, but a small prefill
is put off for some decode passes, so that more rows can join it. Sequences are admitted in the order of arrival. Once
only a few batches of them are left, the longest are admitted first, so that no long row runs alone at the end. Knows no
torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from pipeline.engine.scheduling.block_manager import BlockManager
from pipeline.engine.scheduling.encoded_media import EncodedMedia
from pipeline.engine.scheduling.limit import Limit
from pipeline.engine.sequence import Medium, RequestId, Sequence

MIN_BATCH_TOKENS = 32
"""Halving after out-of-memory stops here."""

LAST_BATCHES = 4
"""Once at most this many times `max_running` sequences wait, they are admitted longest first."""


class Patience(NamedTuple):
    """How long a prefill is put off, so that more rows can join it."""

    share: float
    """Of a budget: so large a prefill comes before the next decode pass."""
    passes: int
    """Decode passes after which one of any size comes."""


SHORT, LONG = Patience(0.25, 8), Patience(0.75, 16)
"""On a CPU, and on a GPU, where to launch a prefill of a few images takes the host as long as the GPU computes."""

DEFAULT_RUNNING, MOST_RUNNING, ROOM_PER_SEQUENCE = 256, 512, 2048


def pick_max_running(cache_tokens: int) -> int:
    """Sequences that a GPU decodes together where the config names no number. More make each weight that is read count
    for more tokens, as long as the cache has this much room for each."""
    return min(MOST_RUNNING, max(DEFAULT_RUNNING, cache_tokens // ROOM_PER_SEQUENCE // 32 * 32))


@dataclass
class PrefillChunk:
    """Tokens [start, stop) of one sequence."""

    sequence: Sequence
    start: int
    stop: int
    forks: list[Sequence] = field(default_factory=list)
    """Further samples of the same request, which share the prompt's blocks from now on."""

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def is_last(self) -> bool:
        return self.stop == self.sequence.num_tokens


@dataclass
class PrefillPlan:
    chunks: list[PrefillChunk]
    media: list[Medium]
    """To be encoded first; each content once."""
    copies: list[tuple[int, int]]
    """Blocks to copy (from, to) after the pass: a fork's own copy of a half-filled block."""

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences of this pass."""
        return [s for chunk in self.chunks for s in (chunk.sequence, *chunk.forks)]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token from this pass."""
        return [s for chunk in self.chunks if chunk.is_last for s in (chunk.sequence, *chunk.forks)]


@dataclass
class DecodePlan:
    sequences: list[Sequence]


Plan = PrefillPlan | DecodePlan


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        media: EncodedMedia,
        *,
        max_running: int,
        max_batch_tokens: int,
        max_batch_patches: int,
        patience: Patience = SHORT,
    ) -> None:
        self.blocks = blocks
        self.media = media
        self.max_running = max_running
        self.decoding = Limit(max_running)
        """Sequences in one decode pass."""
        self.packed = Limit(max_running, wait=1)
        """Sequences in one prefill pass. Grows back at once: it is halved to find a sequence that is too large."""
        self.batch_tokens = Limit(max_batch_tokens, smallest=MIN_BATCH_TOKENS)
        self.batch_patches = Limit(max_batch_patches, smallest=4 * MIN_BATCH_TOKENS)
        self.patience = patience
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: dict[Sequence, None] = {}  # ordered by admission
        self.num_preemptions = 0
        self._free_rows = list(range(max_running - 1, -1, -1))
        self._decodes_since_prefill = 0

    # ---- queues

    def add(self, sequence: Sequence) -> None:
        self.media.retain(sequence)
        self.waiting.append(sequence)

    @property
    def admitted(self) -> list[Sequence]:
        """The sequences that own blocks."""
        return [*self.running, *([self.prefilling] if self.prefilling else [])]

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def retire(self, sequence: Sequence) -> None:
        """Release everything that a finished sequence holds."""
        assert sequence.is_finished
        if sequence in self.running:
            del self.running[sequence]
        elif sequence is self.prefilling:
            self.prefilling = None
            self.media.release(sequence)
        else:
            self.waiting.remove(sequence)
            self.media.release(sequence)
        self._release_cache(sequence)

    def find(self, request_id: RequestId) -> list[Sequence]:
        """The unfinished samples of a request."""
        return [s for s in (*self.waiting, *self.admitted) if s.request.request_id == request_id]

    def preempt(self, sequence: Sequence) -> None:
        """Release the sequence's blocks and put it at the front of the queue, to be recomputed."""
        if sequence is self.prefilling:
            self.prefilling = None
        else:
            del self.running[sequence]
            self.media.retain(sequence)
        self._release_cache(sequence)
        sequence.num_computed = 0
        sequence.num_in_flight = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def ran_out_of_memory(self, plan: Plan) -> None:
        """Plan smaller passes for a while."""
        count = len(plan.sequences)
        if isinstance(plan, DecodePlan):
            self.decoding.halve(count)
            return
        self.packed.halve(count)
        self.batch_tokens.halve()
        self.batch_patches.halve()

    def succeeded(self, plan: Plan) -> None:
        """The plan had enough memory."""
        if isinstance(plan, DecodePlan):
            self.decoding.succeeded(len(plan.sequences))
            return
        self.packed.succeeded(len(plan.sequences))
        self.batch_tokens.succeeded(sum(chunk.num_tokens for chunk in plan.chunks))
        self.batch_patches.succeeded(sum(medium.num_patches for medium in plan.media))

    # ---- planning

    def schedule(self) -> Plan | None:
        """The next pass, with its blocks allocated; None if it has to wait for results in flight."""
        if self._prefill_is_due() and (prefill := self._plan_prefill()):
            return prefill
        if decode := self._plan_decode():
            return decode
        # A decode without blocks needs the results in flight first; further sequences would take its blocks.
        if any(sequence.num_in_flight for sequence in self.running):
            return None
        return self._plan_prefill()

    def _prefill_is_due(self) -> bool:
        """Whether a prefill comes before the next decode pass: at once if it is large, else when patience ends. Only
        waiting sequences for which there is room count."""
        if self.prefilling or not self.running:
            return True
        room = self.decoding.value - len(self.running)
        if not self.waiting or room <= 0:
            return False
        if self._decodes_since_prefill >= self.patience.passes:
            return True
        tokens = patches = 0
        num_free = self.blocks.num_free - self._growth_reserve()
        for count, sequence in enumerate(islice(self.waiting, room), start=1):
            num_free -= self.blocks.blocks_for(sequence.num_tokens)
            if num_free < 0:
                return False
            tokens += sequence.num_tokens
            patches += sum(medium.num_patches for medium in sequence.request.media)
            if tokens >= self.patience.share * self.batch_tokens.value:
                return True
            if patches >= self.patience.share * self.batch_patches.value:
                return True
            if 4 * count >= self.max_running:
                return True
        return False

    def _plan_prefill(self) -> PrefillPlan | None:
        plan = PrefillPlan([], [], [])
        budget = self.batch_tokens.value
        if self.prefilling:
            budget -= self._advance(plan, self.prefilling, budget)
        reserve = self._growth_reserve()
        self._sort_last_waiting()
        planned: set[bytes] = set()
        num_patches = 0
        while self.waiting and budget > 0 and not self.prefilling and self._has_room():
            sequence = self.waiting[0]
            media = self.media.new_media(sequence, planned)
            patches = sum(medium.num_patches for medium in media)
            too_much = sequence.num_tokens > budget or num_patches + patches > self.batch_patches.value
            if plan.chunks and (too_much or len(plan.chunks) >= self.packed.value):
                break  # in a pass of its own it can be cut into chunks, and its media encoded in parts
            needed = self.blocks.blocks_for(sequence.num_tokens)
            alone = not self.running and not plan.chunks
            grows = self.blocks.blocks_for(sequence.max_num_tokens) > needed
            if self.blocks.num_free < needed + (0 if alone else reserve + grows):
                break
            self.waiting.popleft()
            sequence.block_table = self.blocks.allocate(needed)
            sequence.row = self._free_rows.pop()
            self.prefilling = sequence
            plan.media.extend(media)
            planned.update(medium.content_key for medium in media)
            num_patches += patches
            budget -= self._advance(plan, sequence, budget)
            reserve += grows * (1 + len(plan.chunks[-1].forks))
        if not plan.chunks:
            return None
        self._decodes_since_prefill = 0
        return plan

    def _sort_last_waiting(self) -> None:
        """Sort the waiting sequences longest first, once a few batches' worth or less is left.

        Sequences that arrive later are sorted only after all of these are admitted, so that a short row is never
        starved. Preempted sequences stay in front, and the samples of a request together.
        """
        if not self.waiting or self.waiting[0].is_sorted or len(self.waiting) > LAST_BATCHES * self.max_running:
            return
        preempted = [sequence for sequence in self.waiting if sequence.num_preemptions]
        others = [sequence for sequence in self.waiting if not sequence.num_preemptions]
        self.waiting = deque([*preempted, *sorted(others, key=lambda sequence: -sequence.max_num_tokens)])
        for sequence in self.waiting:
            sequence.is_sorted = True

    def _advance(self, plan: PrefillPlan, sequence: Sequence, budget: int) -> int:
        """Plan as much of the sequence as the budget allows, and return the tokens; after its last chunk it runs."""
        stop = min(sequence.num_tokens, sequence.num_computed + budget)
        chunk = PrefillChunk(sequence, sequence.num_computed, stop)
        plan.chunks.append(chunk)
        sequence.num_computed = stop
        if chunk.is_last:
            self.prefilling = None
            self._start_running(sequence)
            self._fork(plan, chunk)
        return chunk.num_tokens

    def _start_running(self, sequence: Sequence) -> None:
        sequence.num_in_flight = 1
        self.running[sequence] = None
        self.media.release(sequence)

    def _fork(self, plan: PrefillPlan, chunk: PrefillChunk) -> None:
        """Start the request's other samples from the prompt just computed, while there is room for them.

        Full blocks are shared; a half-filled last block is copied, since each sample writes to its own.
        A sample for which there is no room stays in the queue and computes the prompt itself later.
        """
        leader = chunk.sequence
        if leader.sampling.n == 1 or leader.output_ids:
            return
        num_full, rest = divmod(leader.num_prompt_tokens, self.blocks.block_size)
        grows = self.blocks.blocks_for(leader.max_num_tokens) > num_full + bool(rest)
        reserve = self._growth_reserve()
        while self.waiting and self.waiting[0].request is leader.request and not self.waiting[0].output_ids:
            if not self._has_room() or self.blocks.num_free < bool(rest) + grows + reserve:
                return
            fork = self.waiting.popleft()
            shared = leader.block_table[:num_full]
            self.blocks.share(shared)
            own = self.blocks.allocate(1) if rest else []
            if own:
                plan.copies.append((leader.block_table[num_full], own[0]))
            fork.block_table = [*shared, *own]
            fork.row = self._free_rows.pop()
            fork.num_computed = leader.num_prompt_tokens
            chunk.forks.append(fork)
            self._start_running(fork)
            reserve += grows

    def _has_room(self) -> bool:
        return bool(self._free_rows) and len(self.running) < self.decoding.value

    def _growth_reserve(self) -> int:
        """One block for each running sequence that may still grow, kept free on admission: preemptions stay rare."""
        size = self.blocks.block_size
        return sum(sequence.max_num_tokens > len(sequence.block_table) * size for sequence in self.running)

    def _plan_decode(self) -> DecodePlan | None:
        planned: list[Sequence] = []
        size = self.blocks.block_size
        for sequence in list(self.running):
            if sequence.row < 0 or sequence.num_computed == sequence.max_num_tokens:
                continue  # just preempted for an older one, or its last token is in flight
            if len(planned) == self.decoding.value:
                break
            if sequence.num_computed == len(sequence.block_table) * size:
                if not self._make_room_for(sequence):
                    break
                sequence.block_table += self.blocks.allocate(1)
            sequence.num_computed += 1
            sequence.num_in_flight += 1
            planned.append(sequence)
        if not planned:
            return None
        self._decodes_since_prefill += 1
        return DecodePlan(planned)

    def _make_room_for(self, sequence: Sequence) -> bool:
        """Free a block by preempting the youngest sequence. False if that is the given sequence, or if it has tokens in
        flight."""
        while self.blocks.num_free == 0:
            victim = self.prefilling or next(reversed(self.running))
            if victim.num_in_flight:
                return False  # the host does not know its tokens yet, so they can't be recomputed
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def _release_cache(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
            sequence.row = -1

    # ---- for tests and debugging

    def check_integrity(self) -> None:
        """No block lost or shared wrongly, every row owned once, every sequence in one queue."""
        everyone = [*self.admitted, *self.waiting]
        assert len(set(map(id, everyone))) == len(everyone), "a sequence is in two queues"
        self.blocks.check_integrity(sequence.block_table for sequence in everyone)
        rows = sorted([*(sequence.row for sequence in self.admitted), *self._free_rows])
        assert rows == list(range(self.max_running)), f"rows lost or owned twice: {rows}"
        for sequence in self.admitted:
            held = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed <= held, f"{sequence.num_computed} tokens in {held} slots"
        assert all(not sequence.block_table for sequence in self.waiting), "a waiting sequence owns blocks"
