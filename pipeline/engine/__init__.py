"""Token ids and patches in, token ids out: continuous batching for Qwen-VL models.

Knows token ids, patches and blocks. Knows no text, no files besides the checkpoint, and no Ray. Needs torch,
transformers and numpy only. Importing this package loads neither torch nor transformers; `load_engine` does.

The life of a request
---------------------
1. `Engine.add` checks the request (scheduling/admission.py): ids within the vocabulary, placeholders that match the
   media, a length that fits the context and the cache. A request that can't be answered becomes an error completion.
2. Its tokens get positions on three axes (models/mrope.py), and each of its n samples becomes a waiting `Sequence`
   (sequence.py).
3. The scheduler admits it (scheduling/scheduler.py): its prompt joins the next prefill pass if the pass has tokens and
   patches to spare and the cache has free blocks (scheduling/block_manager.py).
4. Its media are encoded, packed with those of other requests (models/vision.py). A medium that is already encoded for
   another request and still needed by a waiting one is not encoded again (scheduling/encoded_media.py).
5. Its prompt runs through the text model, packed with other prompts (models/text_model.py); keys and values are written
   to its blocks (kv_cache.py). A prompt above the token budget takes several passes.
6. The logits of the last position give its first token (sampler.py). Further samples of the request start from the same
   logits and share the prompt's blocks.
7. Each decode pass feeds the newest token of every running sequence and produces one more for each. If the cache runs
   out, the youngest sequence is preempted: it releases its blocks and waits at the front of the queue, and its prompt
   and output are computed again.
8. An end token, a stop string, repetition or the length ends it (scheduling/stopping.py). Its blocks are free
   immediately, and the step returns its `Completion`.

The cache
---------
One tensor holds keys and values of all layers, divided into blocks. A sequence owns a table of blocks::

    block        0        1        2        3        4        5      scrap
             +--------+--------+--------+--------+--------+--------+--------+
    keys     | b b b b| a a a a| a a a a| c . . .| a a . .| free   | padding|
             +--------+--------+--------+--------+--------+--------+--------+
    tables   a: [1, 2, 4]      b: [0]      c: [1, 2, 3]

    a and c are two samples of one request. They share the full blocks of its prompt (1 and 2, two owners each); each
    has its own copy of the half-filled last one. Token i of a sequence is in block table[i // size] at i % size.

A step
------
::

    scheduler.schedule()      plan a prefill or a decode, never both, and allocate its blocks
    runner.run(plan)          encode new media, run the text model, sample; nothing waits for the device
    collect                   read tokens: on a CPU those of this pass; on a GPU those of the previous pass, while this
                              one still runs. End sequences, free their blocks, return completions
    out of memory             read what is in flight, preempt this pass's sequences, halve the budgets and continue. A
                              row that fails alone with ever smaller budgets becomes an error completion. After enough
                              passes that do fit, the budgets double again

The parts on a GPU
------------------
Attention, kernels and CUDA graphs are chosen while the engine loads (trial.py). The candidates of a part are tried in
order of preference: one small input of each kind, compared with plain torch, and then, over a small cache, one row and
rows that fill a prefill pass (warm_up.py). One that raises or computes other numbers is replaced by the next; a forced
one is an error. The memory that the full pass took decides how much the cache gets (kv_cache.py). In the end decode
passes are captured as CUDA graphs for some seconds, the largest first; the others are captured when a batch first needs
them. `describe` reports what runs and what was replaced.

Two engines, one interface
--------------------------
`native` is all of the above. `transformers` (reference.py) is `model.generate` over left-padded static batches: the
tests compare `native` with it, and the benchmarks measure both.
"""

from pipeline.engine.interface import Engine
from pipeline.engine.load import load_engine
from pipeline.engine.scheduling.admission import check_length
from pipeline.engine.sequence import (
    Completion,
    Medium,
    Request,
    error_completions,
)
from pipeline.engine.settings import Dtype, EngineOptions, EngineSettings, SamplingParams, parse_sampling

__all__ = [
    "Completion",
    "Dtype",
    "Engine",
    "EngineOptions",
    "EngineSettings",
    "Medium",
    "Request",
    "SamplingParams",
    "check_length",
    "error_completions",
    "load_engine",
    "parse_sampling",
]
