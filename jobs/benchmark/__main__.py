"""Time what the README states: python -m jobs.benchmark NAME [options]

    preprocess   JPEG and video bytes to patches, against transformers' processors       (no Ray)
    engine       images/s of the engine, against model.generate and vLLM                 (no Ray)
    stage        preprocessing through Ray, against plain loops
    pipeline     the whole job on the demo world, against its stages in a plain loop
    scale        planning and resuming 100 million rows; the flow past a do-nothing engine
    report       scoring and reporting a million result rows                              (no Ray)

Each prints a table for people, and as its last line JSON. `python -m jobs.benchmark NAME --help` lists its options.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = ("preprocess", "engine", "stage", "pipeline", "scale", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first word names. Loads no other one, so that each needs only its own packages."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if words[0] not in BENCHMARKS:
        print(f"error: found {words[0]!r}; expected one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"jobs.benchmark.{words[0]}")
    code = module.main(words[1:])
    assert isinstance(code, int)
    return code


if __name__ == "__main__":
    sys.exit(main())
