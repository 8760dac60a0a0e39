"""Every attention kernel that imports here, by error and speed, beside what this GPU's products and copies reach.

    vision    eleven frames of 5,476 patches, 16 heads of 80, as a full pass of 1024 x 1024 images has them
    prompts   sixteen prompts of 1,024 tokens, causal, with the heads of 2b and 7b
    decode    one token of each row over the paged cache, as TB/s of keys and values
    eager, fused    the operations between them, in torch and in Triton

    python3 -m jobs.benchmark.gpu.kernels [--seconds 90]

A line a measurement; what fails says why in one line. The last line is JSON. Without a GPU: tiny shapes, as a dry run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jobs.benchmark.workload import measure_ceilings
from pipeline.engine.kernels.choose import kernel_candidates
from pipeline.engine.kernels.eager import EagerKernels
from pipeline.engine.kv_cache import KVCache

WRONG = 1e-2


def device_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the device, caches cold; by the clock where there is no GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench  # a dry run may lack triton

        return float(do_bench(call, return_mode="median")) / 1e3
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@dataclass
class Measurements:
    """Measurements by name, within a limit of time."""

    max_seconds: float
    values: dict[str, float | None] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def measure(self, name: str, body: Callable[[], tuple[float, str]]) -> None:
        """Print a line: `body` gives the value for the JSON and the text for people. It may fail in any way, as
        kernels that were never tried here do; the reason is then the line."""
        if time.perf_counter() - self.started > self.max_seconds:
            print(f"{name:44} left out: no time", flush=True)
            return
        try:
            with torch.inference_mode():
                value, text = body()
        except Exception as error:
            print(f"{name:44} FAILED {type(error).__name__}: {' '.join(str(error).split())[:160]}", flush=True)
            self.values[name] = None
        else:
            print(f"{name:44} {text}", flush=True)
            self.values[name] = round(value, 4)


class Packed(NamedTuple):
    """Attention over rows of equal length, packed: q [N, H, D], k and v [N, K, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ends: torch.Tensor
    length: int
    causal: bool
    scale: float
    """Of the scores; the same where heads are padded."""

    @property
    def rows(self) -> int:
        return len(self.ends) - 1

    @property
    def flop(self) -> float:
        """Of scores and weighted values; a causal row sees half of them."""
        whole = 4 * self.length**2 * self.q.shape[1] * self.q.shape[2] * self.rows
        return whole / 2 if self.causal else whole

    def truth(self, row: int) -> torch.Tensor:
        """[length, H, D] of one row in float32."""
        part = slice(row * self.length, (row + 1) * self.length)
        q, k, v = (x[part].float() for x in (self.q, self.k, self.v))
        return _attention(q, k, v, self.causal, self.scale)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """torch's plain attention: q [Q, H, D], k and v [K, G, D] give [Q, H, D]."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True).transpose(0, 1)


Kernel = Callable[[Packed], torch.Tensor]


def torch_varlen(case: Packed) -> torch.Tensor:
    """torch's own flash kernel, which the engine uses."""
    q, k, v, ends, length, causal, scale = case
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, length, length, 0.0, causal, False, scale=scale
    )[0]
    return out


def cudnn_varlen(case: Packed) -> torch.Tensor:
    """torch's packed cuDNN kernel."""
    q, k, v, ends, length, causal, scale = case
    out: torch.Tensor = torch.ops.aten._cudnn_attention_forward(
        q, k, v, None, ends, ends, length, length, False, 0.0, causal, False, scale=scale
    )[0]
    return out


def sdpa(backend: SDPBackend) -> Kernel:
    """scaled_dot_product_attention over a batch of the rows, which must be of equal length."""

    def run(case: Packed) -> torch.Tensor:
        q, k, v = (x.view(case.rows, case.length, *x.shape[1:]).transpose(1, 2) for x in case[:3])
        with sdpa_kernel(backend):
            grouped = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.scale, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(case.q.shape)

    return run


def flash_package(function: Callable[..., Any]) -> Kernel:
    """A function with flash-attn's names."""

    def run(case: Packed) -> torch.Tensor:
        q, k, v, ends, length, causal, scale = case
        lengths = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": length, "max_seqlen_k": length}
        out = function(q, k, v, **lengths, causal=causal, softmax_scale=scale)
        first: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return first

    return run


def padded(kernel: Kernel, width: int) -> Kernel:
    """A kernel over heads padded with zeros, padding included in the time."""

    def run(case: Packed) -> torch.Tensor:
        head_dim = case.q.shape[-1]
        q, k, v = (F.pad(x, (0, width - head_dim)) for x in case[:3])
        return kernel(case._replace(q=q, k=k, v=v))[..., :head_dim]

    return run


def kernels(on_gpu: bool) -> Iterator[tuple[str, Kernel]]:
    """Whatever can be tried here, the kernels that the engine never calls last."""
    if not on_gpu:
        yield "sdpa math", sdpa(SDPBackend.MATH)
        return
    yield "torch varlen (the engine's)", torch_varlen
    for name in ("FLASH", "CUDNN", "EFFICIENT"):
        yield f"sdpa {name.lower()}", sdpa(getattr(SDPBackend, f"{name}_ATTENTION"))
    yield "sdpa cudnn, padded to 128", padded(sdpa(SDPBackend.CUDNN_ATTENTION), 128)
    for name, module in (
        ("flash-attn 2", "flash_attn"),
        ("fa3-fwd", "fa3_fwd_interface"),
        ("flash-attn-4", "flash_attn.cute"),
    ):
        try:
            function = importlib.import_module(module).flash_attn_varlen_func
        except Exception as error:  # a package may fail to import in any way
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:120]}")
            continue
        yield name, flash_package(function)
        yield f"{name}, padded to 128", padded(flash_package(function), 128)
    yield "cudnn varlen", cudnn_varlen


def check(case: Packed, kernel: Kernel, truths: dict[int, torch.Tensor]) -> tuple[float, str]:
    """TFLOP/s, and the line about them."""
    out = kernel(case).view(case.q.shape)
    errors = [_error(out[row * case.length : (row + 1) * case.length], truth) for row, truth in truths.items()]
    seconds = device_seconds(lambda: kernel(case))
    tflops = case.flop / seconds / 1e12
    note = "" if max(errors) < WRONG else "   WRONG"
    return tflops, f"{seconds * 1e3:8.3f} ms {tflops:6.0f} TFLOP/s   error {max(errors):.1e}{note}"


def _error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.float() - truth).norm() / truth.norm())


def vision_case(device: torch.device, frames: int, patches: int) -> Packed:
    """Laid out as the engine has them: q, k and v are parts of the joined product, in which q and k were rotated."""
    total = frames * patches
    q, k, v = torch.randn(total, 3, 16, 80, device=device, dtype=torch.bfloat16).unbind(1)
    ends = torch.arange(0, total + 1, patches, dtype=torch.int32, device=device)
    return Packed(q, k, v, ends, patches, False, 80**-0.5)


def prompt_case(device: torch.device, heads: int, kv_heads: int, prompts: int, length: int) -> Packed:
    total = prompts * length
    q, k, v = (torch.randn(total, n, 128, device=device, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    ends = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
    return Packed(q, k, v, ends, length, True, 128**-0.5)


def decode(found: Measurements, device: torch.device, name: str, lengths: Sequence[int], kv_heads: int) -> None:
    """One token of rows with these lengths, with the heads of 2b or 7b."""
    from pipeline.engine.kernels.paged_decode import cut, paged_decode  # needs triton, which a dry run may lack

    heads = {2: 12, 4: 28}[kv_heads]
    rows, size, width = len(lengths), 64, -(-max(lengths) // 64)
    cache = torch.randn(2, rows * width + 1, size, kv_heads, 128, device=device, dtype=torch.bfloat16)
    tables = torch.randperm(rows * width, device=device).to(torch.int32).view(rows, width)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    q = torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16)
    keys, values = (part[tables[0].long()].flatten(0, 1)[: lengths[0]].float() for part in cache)
    truth = _attention(q[:1].float(), keys, values, False, 128**-0.5)[0]
    moved = 2 * sum(lengths) * kv_heads * 128 * 2
    parts = cut(on_device, block_size=size, num_kv_heads=kv_heads)  # once a pass

    def body() -> tuple[float, str]:
        def call() -> torch.Tensor:
            return paged_decode(q, cache[0], cache[1], tables, on_device, parts)

        error = _error(call()[0], truth)
        seconds = device_seconds(call)
        speed = moved / seconds / 1e12
        return speed, f"{seconds * 1e6:8.1f} us {speed:6.2f} TB/s of keys and values   error {error:.1e}"

    found.measure(f"decode {name}, {heads}/{kv_heads}", body)


DECODES = (
    ("512 rows x 320", [320] * 512, 2),
    ("256 rows x 512", [512] * 256, 2),
    ("64 rows x 400", [400] * 64, 2),
    ("256 rows x 1450", [1450] * 256, 2),
    ("256 rows x 1450", [1450] * 256, 4),
    ("16 rows x 24000 and 48 x 400", [24000] * 16 + [400] * 48, 2),
    ("1 row x 24000 and 255 x 400", [24000] + [400] * 255, 2),
    ("8 rows x 16384", [16384] * 8, 2),
    ("1 row x 30000", [30000], 2),
)


def elementwise(found: Measurements, device: torch.device, kernels: EagerKernels, num_rows: int) -> None:
    """What lies between products and attention, for a pass of 7b: TB/s counting each input and output once."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(num_rows, *shape, device=device, dtype=torch.bfloat16)

    def body(num_values: int, call: Callable[[], object]) -> tuple[float, str]:
        seconds = device_seconds(call)
        speed = 2 * num_rows * num_values / seconds / 1e12  # bfloat16
        return speed, f"{seconds * 1e3:8.3f} ms   {speed:.3g} TB/s counting each input and output once"

    norm = torch.nn.LayerNorm(1280, eps=1e-6, device=device, dtype=torch.bfloat16).requires_grad_(False)
    weight = torch.ones(3584, device=device, dtype=torch.bfloat16)
    cos, sin = (torch.rand(num_rows, 1, 1, 80, device=device) for _ in range(2))
    text_cos, text_sin = (random(1, 128) for _ in range(2))
    cache = KVCache([device], num_blocks=num_rows, block_size=1, num_kv_heads=4, head_dim=128, dtype=torch.bfloat16)
    slots = torch.randperm(num_rows, device=device)
    joined, text, wide, gated = random(3, 16, 80), random(36, 128), random(5120), random(2 * 18944)
    hidden, text_hidden = random(1280), random(3584)
    delta, text_delta = random(1280), random(3584)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "add + LayerNorm": (4 * 1280, lambda: kernels.add_layer_norm(hidden, delta, norm)),
        "vision rotation": (4 * 1280, lambda: kernels.rotate_vision(joined, cos, sin)),
        "QuickGELU": (2 * 5120, lambda: kernels.quick_gelu(wide)),
        "add + RMSNorm": (4 * 3584, lambda: kernels.add_rms_norm(text_hidden, text_delta, weight, 1e-6)),
        "rotation + cache": (
            (36 + 32 + 8) * 128,
            lambda: kernels.rotate_and_cache(text, text_cos, text_sin, 28, cache, 0, slots),
        ),
        "SiLU x up": (3 * 18944, lambda: kernels.silu_times_up(gated)),
    }
    for name, (num_values, call) in calls.items():
        found.measure(f"{kernels.name} {name}", partial(body, num_values, call))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=100, help="begin nothing new after these")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    found = Measurements(args.seconds)
    ceilings = measure_ceilings(device, torch.bfloat16)
    found.measure("matmul bf16", lambda: (ceilings.flops / 1e12, f"{ceilings.flops / 1e12:.3g} TFLOP/s"))
    found.measure("copy", lambda: (ceilings.bytes_per_s / 1e12, f"{ceilings.bytes_per_s / 1e12:.3g} TB/s"))
    found.measure("upload", lambda: upload(device))
    cases = {"vision": vision_case(device, *((11, 5476) if on_gpu else (2, 100)))}
    for heads, kv_heads in ((12, 2), (28, 4)):
        cases[f"prompts {heads}/{kv_heads}"] = prompt_case(
            device, heads, kv_heads, *((16, 1024) if on_gpu else (2, 32))
        )
    if on_gpu:
        for name, lengths, kv_heads in DECODES:
            decode(found, device, name, lengths, kv_heads)
    for each in reversed([candidate.load() for candidate in kernel_candidates("auto", device, torch.bfloat16)]):
        with torch.inference_mode():
            elementwise(found, device, each, 16384 if on_gpu else 8)
    with torch.inference_mode():
        truths = {title: {row: case.truth(row) for row in {0, case.rows - 1}} for title, case in cases.items()}
    # Last, since a kernel that was never tried here may leave the device unusable for this process.
    for name, kernel in kernels(on_gpu):
        for title, case in cases.items():
            if title == "vision" or "padded" not in name:
                found.measure(f"{title}: {name}", partial(check, case, kernel, truths[title]))
    print(json.dumps({"benchmark": "gpu kernels", **found.values}), flush=True)
    return 0


def upload(device: torch.device) -> tuple[float, str]:
    """GB/s from pinned memory."""
    num_bytes = 2**26
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    speed = num_bytes / device_seconds(lambda: target.copy_(host, non_blocking=True)) / 1e9
    return speed, f"{speed:.1f} GB/s"


if __name__ == "__main__":
    sys.exit(main())
