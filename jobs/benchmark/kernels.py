"""Compile every Triton kernel for every GPU it is meant for; no GPU is needed.

    python -m jobs.benchmark kernels                      the kernels of the 2b and 7b shapes for sm_80, 89, 90 and 100
    python -m jobs.benchmark kernels --shapes 72b --architectures 90

A kernel is compiled for the arguments that the engine launches it with. Columns: registers of a thread, bytes of shared
memory, bytes of a thread's stack and local memory (where spilled registers go), warps of a program. The exit code is 1
where a kernel spills. The last line is JSON.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.benchmark.measure import command_line, print_result
from pipeline.engine.kernels.sample import Widths, run_every_operation
from pipeline.planning.roofline import SHAPES, ModelShape

ARCHITECTURES = (80, 89, 90, 100)


@dataclass(frozen=True)
class Launch:
    """A kernel as the engine launches it."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).lstrip("_")


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int
    spilled: int
    warps: int
    """Of a program."""


def main(argv: Sequence[str]) -> int:
    parser = command_line("kernels", __doc__)
    parser.add_argument("--shapes", default="2b,7b", help=f"of: {', '.join(SHAPES)}")
    parser.add_argument("--architectures", default=",".join(map(str, ARCHITECTURES)), help="compute capabilities")
    args = parser.parse_args(argv)
    results = []
    print(f"{'kernel':20} {'shape':6} {'target':8} {'registers':>9} {'shared':>7} {'spilled':>7} {'warps':>6}")
    for name, architecture in itertools.product(args.shapes.split(","), map(int, args.architectures.split(","))):
        for launch in launches(SHAPES[name]):
            used = resources(compile_for(launch, architecture))
            print(
                f"{launch.name:20} {name:6} sm_{architecture:<5} {used.registers:9} {used.shared:7} {used.spilled:7} "
                f"{used.warps:6}",
                flush=True,
            )
            results.append({"kernel": launch.name, "shape": name, "architecture": architecture, **vars(used)})
    spilled = sum(result["spilled"] > 0 for result in results)
    print_result("kernels", compiled=len(results), spilled=spilled, kernels=results)
    return int(spilled > 0)


def launches(shape: ModelShape) -> Iterator[Launch]:
    """Every launch that the engine makes for a model of this shape in bfloat16, once."""
    # Imported here: only this benchmark needs triton.
    from pipeline.engine.attention.torch_varlen import TorchAttention
    from pipeline.engine.kernels.fused import FusedKernels
    from pipeline.engine.kernels.paged_decode import cut, paged_decode

    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, arguments, constants))

    widths = Widths(
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.mlp,
        shape.vision_heads,
        shape.vision_width // shape.vision_heads,
        shape.vision_mlp or 4 * shape.vision_width,
    )
    nowhere, dtype = torch.device("meta"), torch.bfloat16
    run_every_operation(FusedKernels(record), widths, nowhere, dtype)
    cache = torch.empty(64, TorchAttention.block_size, shape.kv_heads, shape.head_dim, dtype=dtype, device=nowhere)
    q = torch.empty(16, shape.heads, shape.head_dim, dtype=dtype, device=nowhere)
    tables = torch.empty(16, 64, dtype=torch.int32, device=nowhere)
    lengths = tables[:, 0].contiguous()
    parts = cut(lengths, block_size=TorchAttention.block_size, num_kv_heads=shape.kv_heads)
    paged_decode(q, cache, cache, tables, lengths, parts, launch=record)
    seen = set()
    for launch in found:
        key = (launch.kernel.__name__, str(_signature(launch)))
        if key not in seen:
            seen.add(key)
            yield launch


def compile_for(launch: Launch, architecture: int) -> Any:
    """Triton's CompiledKernel for a compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = _signature(launch)
    source = ASTSource(
        fn=launch.kernel,
        signature=types,
        constexprs=constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled: Any) -> Resources:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
    return Resources(used["REG"], compiled.metadata.shared, used["STACK"] + used["LOCAL"], compiled.metadata.num_warps)


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Types of the arguments by name, constants, and the numbers of the arguments that are multiples of 16. None and 1
    are constants, as Triton has it at a launch."""
    names = launch.kernel.arg_names
    types: dict[str, str] = {}
    constants = {name: value for name, value in launch.constants.items() if name in names}
    aligned = []
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPES[value.dtype]
            aligned.append(index)
        elif isinstance(value, int):
            types[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
        else:
            types[name] = "fp32"
    return {**types, **dict.fromkeys(constants, "constexpr")}, constants, aligned


TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
