"""The engine's settings, its interface, and the one function that makes one.

Imports no torch: that happens in `load_engine`, so a job can be planned without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pipeline.engine.sequence import Completion, Request, RequestId

Detokenize = Callable[[Sequence[int]], str]

_CHOICES = {
    "kind": ("native", "transformers"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention": ("auto", "sdpa", "flash", "torch"),
}


@dataclass(frozen=True)
class EngineOptions:
    """Everything that decides how an engine runs; nothing that decides which tokens a row gets."""

    model_path: str
    """A checkpoint folder, or a name on the Hugging Face hub."""
    kind: Literal["native", "transformers"] = "native"
    """`native`: continuous batching. `transformers`: `model.generate` in static batches, the reference."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: str = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU; or float32, bfloat16, float16."""
    device: str = "auto"
    """`auto`: the first GPU, else the CPU; or cpu, cuda, cuda:1."""
    num_devices: int = 1
    """GPUs over which the layers are spread, for a model that does not fit one; on a CPU it means nothing."""
    attention: str = "auto"
    """`auto` takes the first that works here: `flash` (the flash-attn package), `torch` (its built-in
    varlen kernels, on CUDA), `sdpa` (anywhere). Forcing one that is missing is an error."""
    batch_size: int = 16
    """Rows in a static batch; the reference engine alone."""
    max_running: int = 256
    """Sequences that decode together."""
    max_batch_tokens: int | None = None
    """Prompt tokens in one prefill pass. None: 16384 on a GPU, 2048 on a CPU."""
    max_batch_patches: int | None = None
    """Patches in one vision pass. None: four for each prompt token."""
    cache_fraction: float = 0.85
    """Share of the GPU memory that is free after loading that the key-value cache takes."""
    cache_gb: float = 2.0
    """Size of the key-value cache on a CPU."""
    max_context: int | None = None
    """Longest prompt plus output. None: what the checkpoint allows."""
    num_threads: int | None = None
    """Threads for torch on a CPU. None leaves torch's own choice."""
    cuda_graphs: bool = True
    """Replay decode passes as CUDA graphs; only on a GPU."""

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name in (
            "num_devices",
            "batch_size",
            "max_running",
            "max_batch_tokens",
            "max_batch_patches",
            "max_context",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; allowed: 1 or more")
        if not 0 < self.cache_fraction <= 1:
            raise ValueError(f"cache_fraction is {self.cache_fraction!r}; allowed: above 0, up to 1")
        if self.cache_gb <= 0:
            raise ValueError(f"cache_gb is {self.cache_gb!r}; allowed: above 0")
        if self.num_threads is not None and self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads!r}; allowed: 1 or more")


class Engine(Protocol):
    """What the rest of the pipeline sees of either engine. Not thread-safe: one thread owns it."""

    def add(self, request: Request) -> None:
        """Queue a request. One that can't be answered becomes an error completion of a later step."""

    def step(self) -> list[Completion]:
        """Run one pass and return the samples that ended with it; an empty list is normal."""

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to hand out."""

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run the requests to their end: n completions for each, in the order given."""

    def abort(self, request_id: RequestId) -> None:
        """Forget a request and all its samples; it gives no completion. Unknown ids are ignored."""

    def describe(self) -> dict[str, Any]:
        """What was picked: device, dtype, attention, sizes. Fixed over the engine's life; for run.json."""

    def stats(self) -> dict[str, float]:
        """Counters and gauges so far."""
