"""Products by one weight, plain and packed for oneDNN, on this CPU.

    python -m jobs.benchmark dense
    python -m jobs.benchmark dense --dtype float32 --rows 1,16 --rounds 30

The weights are those of a text layer of the 2b shape. Both products of a line run in turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional as F

from jobs.benchmark.measure import command_line, print_result, time_in_turns
from pipeline.engine.dense import can_pack, multiply_packed, pack
from pipeline.planning.roofline import SHAPES


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line("dense", __doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--rows", default="1,4,16,64,512", help="of the inputs")
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
    print(f"{'weight':12} {'rows':>5} {'plain ms':>9} {'packed ms':>10} {'ratio':>6}")
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
    print_result("dense", dtype=args.dtype, threads=args.threads, products=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
