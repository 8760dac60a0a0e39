"""Token ids and patches in, token ids out: continuous batching for Qwen2-VL.

Knows token ids, patches and blocks. Knows no text, no files beyond the checkpoint, and no Ray. Runs with torch,
transformers and numpy alone. Importing this package loads neither torch nor transformers; `load_engine` does.

The life of a request
---------------------
1. `Engine.add` checks it (admission.py): ids within the vocabulary, placeholders that match the media, a length
   that fits the context and the cache. What can't be answered becomes an error completion, never an exception.
2. Its positions on three axes are laid out (mrope.py), and each of its n samples becomes a `Sequence` that waits
   (sequence.py).
3. The scheduler admits it (scheduler.py): its prompt goes into the next prefill pass while the pass has tokens
   and patches to spare and the cache has blocks (block_manager.py).
4. Its media are encoded (vision.py), packed with those of other requests; a medium that an earlier request
   brought, and that still waits for someone, is not encoded again (media_ledger.py).
5. Its prompt runs through the text model, packed behind others (text_model.py); keys and values go to its blocks
   (kv_cache.py). A prompt above the budget takes several passes.
6. The last position's logits give its first token (sampler.py). Further samples of the request start from the
   same logits and share the prompt's blocks.
7. Each decode pass feeds the newest token of every running sequence and gives each one more. Runs the cache out,
   the youngest sequence gives up its blocks, waits at the front, and is computed again, output included.
8. An end token, a stop string, repetition or the length ends it (stopping.py). Its blocks are free at once, and
   its `Completion` is what the step returns.

The cache
---------
One tensor of keys and one of values for all layers, cut into blocks; a sequence owns a table of blocks::

    block        0        1        2        3        4        5      scrap
             +--------+--------+--------+--------+--------+--------+--------+
    keys     | b b b b| a a a a| a a a a| c . . .| a a . .| free   | padding|
             +--------+--------+--------+--------+--------+--------+--------+
    tables   a: [1, 2, 4]      b: [0]      c: [1, 2, 3]

    a and c are two samples of one request: they share the full blocks of its prompt (1 and 2, two owners each), and
    each has its own copy of the half-filled last one. Token i of a sequence lies in table[i // size] at i % size.

What a step does
----------------
::

    scheduler.schedule()      a prefill or a decode, never both; blocks are allocated here
    runner.run(plan)          vision if media are new, text model, sampler; nothing waits for the device
    collect                   read tokens: on a CPU those of this pass, on a GPU those of the pass before, while
                              this one still runs; end sequences, free blocks, hand out completions
    out of memory             read what is in flight, preempt this pass's sequences, halve the budgets, go on; a row
                              that fails alone with ever smaller budgets becomes an error completion

On a GPU loading ends with a warm-up (warm_up.py): one row is answered, then decode passes are captured as graphs,
the largest first, for some seconds; what is left is captured when a batch first needs it. `describe` says both.

Two engines, one interface
--------------------------
`native` is all of the above. `transformers` (reference.py) is `model.generate` over left-padded static batches:
the tests compare the first with the second, and the benchmarks measure them side by side.
"""

from pipeline.engine.admission import check_length
from pipeline.engine.interface import Detokenize, Engine
from pipeline.engine.load import load_engine
from pipeline.engine.sequence import PATCH_BYTES, Completion, FinishReason, Medium, Request, RequestId
from pipeline.engine.settings import Dtype, EngineOptions, EngineSettings, SamplingParams, parse_sampling

__all__ = [
    "PATCH_BYTES",
    "Completion",
    "Detokenize",
    "Dtype",
    "Engine",
    "EngineOptions",
    "EngineSettings",
    "FinishReason",
    "Medium",
    "Request",
    "RequestId",
    "SamplingParams",
    "check_length",
    "load_engine",
    "parse_sampling",
]
