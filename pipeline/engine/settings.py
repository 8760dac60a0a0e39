"""Every setting of the engine, declared once with its default, bounds and help.

A setting is a dataclass field whose metadata holds `description` and the bounds `ge`, `gt`, `le` and `lt`. pydantic
reads the same metadata, so the job's config uses `SamplingParams` and `EngineSettings` as its sections `sampling` and
`engine`; the names, types and bounds of a row's own sampling columns come from here too. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pipeline.errors import SettingError

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def setting(default: Any, description: str, **bounds: float) -> Any:
    """A dataclass field with this default, help and bounds."""
    return field(default=default, metadata={"description": description, **bounds})


def within(number: float, bounds: Mapping[str, Any]) -> bool:
    """Whether a number is finite and within the bounds of a setting's metadata."""
    return (
        (isinstance(number, int) or math.isfinite(number))
        and ("ge" not in bounds or number >= bounds["ge"])
        and ("gt" not in bounds or number > bounds["gt"])
        and ("le" not in bounds or number <= bounds["le"])
        and ("lt" not in bounds or number < bounds["lt"])
    )


def allowed(bounds: Mapping[str, Any]) -> str:
    """The bounds in words, as in `1 or more` and `above 0, up to 1`."""
    low = f"above {bounds['gt']}" if "gt" in bounds else f"{bounds['ge']}"
    if "le" in bounds:
        return f"{low}, up to {bounds['le']}" if "gt" in bounds else f"{low} to {bounds['le']}"
    if "lt" in bounds:
        return f"{low}, below {bounds['lt']}"
    return low if "gt" in bounds else f"{low} or more"


@cache
def setting_types(settings: type) -> dict[str, Any]:
    """The type of each setting of a class, by name."""
    return get_type_hints(settings)


def _check(settings: Any) -> None:
    """Raise ValueError for a choice or number that its setting does not allow."""
    types = setting_types(settings.__class__)
    for each in fields(settings):
        value, choices = getattr(settings, each.name), get_args(types[each.name])
        if get_origin(types[each.name]) is Literal and value not in choices:
            raise ValueError(f"{each.name} is {value!r}; allowed: {', '.join(choices)}")
        if isinstance(value, (int, float)) and each.metadata.keys() & {"ge", "gt"} and not within(value, each.metadata):
            raise ValueError(f"{each.name} is {value!r}; allowed: {allowed(each.metadata)}")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end."""

    max_tokens: int = setting(128, "Generate at most this many tokens; the finish reason is then `length`.", ge=1)
    min_tokens: int = setting(
        0, "End tokens, stop tokens and stop strings do not count before this many tokens; at most max_tokens.", ge=0
    )
    temperature: float = setting(0.0, "0 is greedy: always the most likely token. Higher is more random.", ge=0)
    top_k: int = setting(0, "Sample from this many most likely tokens; 0: from all.", ge=0)
    top_p: float = setting(1.0, "Sample from the most likely tokens that together have this probability.", gt=0, le=1)
    min_p: float = setting(
        0.0, "Sample from tokens at least this likely, relative to the most likely one; 0: from all.", ge=0, le=1
    )
    repetition_penalty: float = setting(
        1.0, "Above 1, tokens that the prompt or the answer already contains become less likely; 1: off.", gt=0
    )
    presence_penalty: float = setting(
        0.0, "Subtracted from the logit of every token that the answer already contains; 0: off.", ge=-2, le=2
    )
    frequency_penalty: float = setting(
        0.0, "The same, once for each time that the answer contains the token; 0: off.", ge=-2, le=2
    )
    n: int = setting(1, "Answers for each row; with more than one, `texts` holds them all.", ge=1, le=16384)
    seed: int | None = setting(
        None,
        "Seed of rows without one. The other rows of a batch do not change a row's tokens. Default: random.",
        ge=0,
        le=2**63 - 1,
    )
    stop_strings: tuple[str, ...] = setting((), "Texts that end the answer.")
    stop_token_ids: tuple[int, ...] = setting((), "Token ids that end the answer, besides the checkpoint's end tokens.")
    ignore_eos: bool = setting(False, "Whether to continue past the checkpoint's end tokens.")
    logprobs: bool = setting(False, "Whether to record each token's log-probability, before temperature and filters.")
    stop_on_repetition: bool = setting(
        False, "Whether to end an answer that repeats itself endlessly; its finish reason is then `repetition`."
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; allowed: 0 to max_tokens ({self.max_tokens})")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            found = self.stop_strings if isinstance(self.stop_strings, str) else list(self.stop_strings)
            raise ValueError(f"stop_strings is {found!r}; allowed: a list of texts, none of them empty")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids is {list(self.stop_token_ids)!r}; allowed: 0 or more")

    @property
    def is_penalized(self) -> bool:
        """Whether earlier tokens change the scores of the next one."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)


def parse_sampling(text: str) -> SamplingParams:
    """The parameters in a request row's JSON. Raises SettingError for one that is out of bounds."""
    try:
        values = json.loads(text)
        for name in ("stop_strings", "stop_token_ids"):
            values[name] = tuple(values.get(name) or ())
        return SamplingParams(**values)
    except ValueError as error:
        raise SettingError(f"sampling: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine runs. None of it decides which tokens a row gets."""

    kind: Literal["native", "transformers"] = setting(
        "native", "`native`: continuous batching. `transformers`: `model.generate` in static batches, the reference."
    )
    attention: Literal["auto", "flash", "torch", "simd", "sdpa"] = setting(
        "auto",
        "Attention backend. `auto` takes the first that passes a trial while the engine loads: `flash` (the "
        "flash-attn package), `torch` (torch's own varlen kernels, on CUDA), `simd` (our own for x86 CPUs; needs a C "
        "compiler), `sdpa` (anywhere). "
        "A forced one that fails is an error.",
    )
    kernels: Literal["auto", "eager"] = setting(
        "auto",
        "`auto`: fused kernels on a GPU, and our own for x86 CPUs, where they pass a trial. `eager`: torch's own "
        "operations.",
    )
    cuda_graphs: bool | None = setting(
        None,
        "Whether decode passes are replayed as CUDA graphs. Default: on a GPU, where a trial succeeds. "
        "`true` where it fails is an error.",
    )
    max_context: int | None = setting(
        None,
        "Longest prompt plus answer in tokens; longer rows are error rows. Default: what the checkpoint allows.",
        ge=4,
    )
    batch_size: int = setting(16, "Rows in a static batch; `transformers` only.", ge=1)
    max_running: int | None = setting(
        None, "Sequences that are decoded together. Default: 256, and up to 512 where a GPU's cache holds them.", ge=1
    )
    max_batch_tokens: int | None = setting(
        None, "Prompt tokens in one prefill pass. Default: 16384 on a GPU, 2048 on a CPU.", ge=1
    )
    max_batch_patches: int | None = setting(
        None, "Patches in one vision pass. Default: four for each of max_batch_tokens.", ge=1
    )
    gpu_memory_fraction: float = setting(
        0.9,
        "Share of a GPU's memory for its engines: weights, passes, and the key-value cache, which takes what is left. "
        "Several engines on one GPU divide it.",
        gt=0,
        lt=1,
    )
    cache_gb: float = setting(2.0, "Size of the key-value cache on a CPU, in GB.", gt=0)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class EngineOptions(EngineSettings):
    """The settings, and what the job fills in from elsewhere."""

    model_path: str
    """A checkpoint folder, or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    adapter: str | None = None
    """A folder or hub name of a LoRA in PEFT's form, merged into the weights."""
    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's hub name."""
    dtype: Dtype = "auto"
    """`auto`: the checkpoint's own where the device computes it natively (dtype.py)."""
    device: str = "auto"
    """`auto`: the first GPU, else the CPU; or cpu, cuda, cuda:1."""
    num_devices: int = setting(1, "GPUs over which the layers are spread; without effect on a CPU.", ge=1)
    gpu_share: float = setting(
        1.0, "Share of a GPU that this engine has; below 1 where several have the same.", gt=0, le=1
    )
    num_threads: int | None = setting(None, "Threads for torch on a CPU. None leaves torch's own choice.", ge=1)
    image_mean: tuple[float, ...] | None = None
    """Of each channel, as the checkpoint's processor has it; None: CLIP's. The same for `image_std`."""
    image_std: tuple[float, ...] | None = None
    image_processor: Literal["torch", "pil"] = "torch"
    """Which of transformers' processors the pixel values equal; the two round differently."""
