"""How long scoring and reporting take, and in how much memory: `python -m jobs.benchmark.report [--rows N]`.

Makes a run folder of synthetic result rows over six tasks, scores it with intervals and slices, compares it with a
copy that answers some rows otherwise, and builds the page, each in a process of its own so that each shows its own
peak. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.evaluation.run_folder import score_folder
from pipeline.evaluation.settings import ScoringSettings
from pipeline.schema import result_schema

_ROWS_PER_PART = 100_000
_KEPT = pa.schema(
    [
        ("prompt", pa.string()),
        ("reference", pa.list_(pa.string())),
        ("choices", pa.list_(pa.string())),
        ("task", pa.string()),
        ("source", pa.string()),
    ]
)
SETTINGS = ScoringSettings(
    references="reference",
    metrics=("exact_match",),
    tasks={
        "vqa": ("vqa_accuracy", "exact_match"),
        "document": ("anls",),
        "chart": ("relaxed_accuracy",),
        "choice": ("multiple_choice",),
        "open": ("token_f1", "rouge_l"),
        "caption": ("cider", "bleu", "rouge_l"),
    },
    task_column="task",
    choices="choices",
    slices=("source", "media_kind", "resolution_bucket"),
)
_TASKS = tuple(SETTINGS.tasks)
_WORDS = (
    "a the red blue green small large cat dog car bus man woman child table chair tree house street field sky water "
    "sits stands runs walks holds on near under behind with and of in two three several white black yellow old young"
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark.report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to make the runs (default: a temporary folder, removed at the end)")
    parser.add_argument("--stage", choices=("make", "score", "report"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.stage:
        print(json.dumps(_stage(arguments.stage, Path(arguments.folder), arguments.rows, arguments.seed)))
        return 0
    if arguments.folder:
        print(json.dumps(measure(Path(arguments.folder), arguments.rows)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments.rows)))
    return 0


def measure(folder: Path, num_rows: int) -> dict[str, Any]:
    """Seconds and peak megabytes of scoring and of the report over `num_rows` rows."""
    found: dict[str, Any] = {"rows": num_rows, "cpus": os.cpu_count()}
    for name, seed in (("run", 0), ("baseline", 1)):
        _in_process("make", folder / name, num_rows, seed)
    _in_process("score", folder / "baseline", num_rows)
    found["score"] = _in_process("score", folder / "run", num_rows)
    found["report"] = _in_process("report", folder / "run", num_rows)
    found["seconds"] = round(found["score"]["seconds"] + found["report"]["seconds"], 1)
    return found


def _in_process(stage: str, folder: Path, num_rows: int, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.benchmark.report", "--stage", stage, "--folder", str(folder)]
    command += ["--rows", str(num_rows), "--seed", str(seed)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _stage(stage: str, folder: Path, num_rows: int, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    if stage == "make":
        make_run(folder, num_rows, seed)
    elif stage == "score":
        score_folder(str(folder), SETTINGS)
    else:
        from jobs.report import write_text
        from pipeline.report import ReportOptions, gather, render_html

        report = gather(str(folder), baseline=str(folder.parent / "baseline"), options=ReportOptions(thumbnails=False))
        write_text(str(folder / "report.html"), render_html(report))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def make_run(folder: Path, num_rows: int, seed: int = 0) -> None:
    """A finished run folder. The rows' questions do not depend on the seed, some of the answers do."""
    folder.mkdir(parents=True, exist_ok=True)
    answers = np.random.default_rng(seed + 1)
    for part, start in enumerate(range(0, num_rows, _ROWS_PER_PART)):
        size = min(_ROWS_PER_PART, num_rows - start)
        pq.write_table(_part(start, size, answers), folder / f"part-{part:05d}.parquet", compression="zstd")
    run = {
        "state": "finished",
        "counts": {"rows": num_rows},
        "manifest": {"path": "made-up", "fingerprint": {"num_rows": num_rows, "files": [["made-up", 0, num_rows]]}},
    }
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "_SUCCESS").touch()


def _part(start: int, size: int, answers: np.random.Generator) -> pa.Table:
    questions = np.random.default_rng(start)
    words = np.array(_WORDS.split())
    schema = result_schema(_KEPT)
    rows: list[dict[str, Any]] = []
    for number in range(size):
        task = _TASKS[number % len(_TASKS)]
        text, references, choices = _question(task, questions, words)
        drawn = answers.random()
        failed = drawn < 0.002
        if drawn > 0.8:
            text = " ".join(answers.choice(words, 3 if task != "caption" else 11))
        rows.append(
            {
                "id": f"row-{start + number}",
                "text": None if failed else text,
                "finish_reason": None if failed else ("length" if drawn > 0.99 else "stop"),
                "num_output_tokens": None if failed else len(text.split()) + 1,
                "generate_s": None if failed else float(drawn),
                "status": "error" if failed else "ok",
                "error_stage": "decode" if failed else None,
                "error_type": "TruncatedMedia" if failed else None,
                "error_message": "the file ends early" if failed else None,
                "attempts": 1,
                "num_prompt_tokens": 300,
                "num_visual_tokens": 256,
                "media": [] if failed else [_MEDIUM | {"source_width": 320 + 40 * (number % 40)}],
                "preprocess_s": 0.01,
                "prompt": f"What is shown in picture {number}?",
                "reference": references,
                "choices": choices,
                "task": task,
                "source": f"source {number % 7}",
                "manifest_file": 0,
                "manifest_row": start + number,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema)


_MEDIUM: dict[str, Any] = {
    "kind": "image", "source": "photos/one.jpg", "source_width": 640, "source_height": 480, "resized_width": 644,
    "resized_height": 476, "grid_thw": [1, 34, 46], "timestamps": None, "note": None,
}  # fmt: skip


def _question(task: str, questions: np.random.Generator, words: Any) -> tuple[str, list[str], list[str] | None]:
    """A right answer, its references, and the options where there are any."""
    some = questions.choice(words, 12).tolist()
    if task == "vqa":
        return some[0], [some[0]] * 7 + some[1:4], None
    if task == "document":
        return " ".join(some[:3]), [" ".join(some[:3]), " ".join(some[:2])], None
    if task == "chart":
        return str(100 + len(some[0])), [str(101 + len(some[0]))], None
    if task == "choice":
        return "The answer is B.", ["B"], some[:4]
    if task == "open":
        return " ".join(some[:6]), [" ".join(some[:5])], None
    return " ".join(some[:10]), [" ".join(some[:9]), " ".join(some[1:11]), " ".join(some[2:12])], None


if __name__ == "__main__":
    sys.exit(main())
