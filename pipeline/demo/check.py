"""Compare a finished demo run with the right answers: exact match for each task.

    python -m pipeline.demo.check RUN_FOLDER [--at-least 0.95]

Exits 1 when a task is below that share, or when the folder does not hold every manifest row once, in order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--at-least", type=float, default=0.95)
    args = parser.parse_args(argv)
    problems, scores = check(args.run, args.at_least)
    for task, (right, rows) in scores.items():
        print(f"{task:<16} {right:>4} of {rows:<4} exact ({right / rows:.1%})")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def check(run: Path, at_least: float) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The problems of a run folder, and (right, rows) for each task."""
    problems = []
    if not (run / "_SUCCESS").exists():
        problems.append(f"{run} has no _SUCCESS: the run is not finished")
    record = json.loads((run / "__run" / "run.json").read_text())
    rows = [row for part in sorted(run.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    row_keys = [(row["manifest_file"], row["manifest_row"]) for row in rows]
    files = record["manifest"]["fingerprint"]["files"]
    if row_keys != [(file, row) for file, (_, _, count, *_) in enumerate(files) for row in range(count)]:
        problems.append(f"{run} does not hold every manifest row once, in manifest order")
    scores: dict[str, tuple[int, int]] = {}
    for row in rows:
        right, count = scores.get(row["task"], (0, 0))
        scores[row["task"]] = (right + (row["text"] == row["reference"]), count + 1)
    problems += [
        f"{task}: {right} of {count} exact, below {at_least:.0%}"
        for task, (right, count) in scores.items()
        if right < at_least * count
    ]
    return problems, scores


if __name__ == "__main__":
    sys.exit(main())
