"""Products by one weight, plain and packed for oneDNN, and MLPs over all rows and in slices, on this CPU.

    python -m jobs.benchmark dense
    python -m jobs.benchmark dense --dtype float32 --rows 1,16 --rounds 30

The weights are those of layers of the 2b shape. What a line compares runs in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from jobs.benchmark.measure import command_line, print_result, time_in_turns
from pipeline.engine.dense import Dense, can_pack, multiply_packed, pack
from pipeline.engine.kernels.eager import EAGER
from pipeline.engine.models.mlp import GatedMlp, PlainMlp
from pipeline.planning.roofline import SHAPES, ModelShape

Mlp = Callable[[torch.Tensor], torch.Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("dense", __doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--rows", default="1,4,16,64,512", help="of the inputs")
    parser.add_argument("--mlp-rows", type=int, default=5476, help="5,476 are the patches of a 1024x1024 image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype: torch.dtype = getattr(torch, args.dtype)
    if not can_pack(dtype):
        print(f"this torch packs no weights of {args.dtype} on this CPU")
        return 1
    shape = SHAPES["2b"]
    sizes = {"gate and up": (2 * shape.mlp, shape.hidden), "down": (shape.hidden, shape.mlp)}
    results = []
    print("products: plain, packed; MLPs: whole, in slices")
    print(f"{'':12} {'rows':>5} {'ms':>9} {'ms':>10} {'ratio':>6}")
    for name, size in sizes.items():
        weight = torch.randn(size).to(dtype)
        packed = pack(weight)
        for rows in map(int, args.rows.split(",")):
            x = torch.randn(rows, size[1]).to(dtype)
            products = {"plain": partial(F.linear, x, weight), "packed": partial(multiply_packed, x, packed, None)}
            times = {each: time.wall for each, time in time_in_turns(products, args.rounds).items()}
            ratio = times["plain"] / times["packed"]
            print(f"{name:12} {rows:5} {times['plain']:9.2f} {times['packed']:10.2f} {ratio:6.2f}", flush=True)
            results.append({"weight": name, "rows": rows, **times})
    mlps = [_time_mlp(*each, dtype, args) for each in _mlps(shape, dtype)]
    print_result("dense", dtype=args.dtype, threads=args.threads, products=results, mlps=mlps)
    return 0


def _mlps(shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[str, Mlp, Mlp, int]]:
    """(name, the MLP as a function of all rows at once, the engine's, input width)"""

    def product(inputs: int, outputs: int) -> Dense:
        return Dense((torch.randn(outputs, inputs) * inputs**-0.5).to(dtype), None)

    width = shape.vision_width
    plain = PlainMlp(product(width, 4 * width), None, product(4 * width, width), has_quick_gelu=True)
    yield "vision", lambda x: plain.fc2(EAGER.quick_gelu(plain.fc1(x))), partial(plain, kernels=EAGER), width
    gated = GatedMlp(product(shape.hidden, 2 * shape.mlp), product(shape.mlp, shape.hidden))
    yield (
        "text",
        lambda x: gated.down(EAGER.silu_times_up(gated.gate_up(x))),
        partial(gated, kernels=EAGER),
        shape.hidden,
    )


def _time_mlp(
    name: str, whole: Mlp, slices: Mlp, width: int, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, Any]:
    x = torch.randn(args.mlp_rows, width).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(whole(x), slices(x), rtol=0.02, atol=0.02)
        runs = {"whole": partial(whole, x), "slices": partial(slices, x)}
        times = {each: time.wall for each, time in time_in_turns(runs, args.rounds).items()}
    ratio = times["whole"] / times["slices"]
    print(f"{name + ' MLP':12} {len(x):5} {times['whole']:9.2f} {times['slices']:10.2f} {ratio:6.2f}", flush=True)
    return {"mlp": name, "rows": len(x), **times}


if __name__ == "__main__":
    sys.exit(main())
