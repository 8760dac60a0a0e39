"""How long scoring and reporting take, and in how much memory.

    python -m jobs.benchmark report [--rows 1000000] [--folder FOLDER]

Makes a run folder of synthetic result rows over six tasks, scores it with intervals and slices, compares it with a
copy that answers some rows otherwise, and builds the page, each in a process of its own so that each shows its own
peak. Last line: JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.benchmark.measure import command_line, in_own_process, peak_mb, print_result
from pipeline.evaluation.settings import ScoringSettings
from pipeline.schema import result_schema

_ROWS_PER_PART = 100_000
_TEXT, _TEXTS = pa.string(), pa.list_(pa.string())
_KEPT = pa.schema([("prompt", _TEXT), ("reference", _TEXTS), ("choices", _TEXTS), ("task", _TEXT), ("source", _TEXT)])
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
_VOCABULARY = (
    "a the red blue green small large cat dog car bus man woman child table chair tree house street field sky water "
    "sits stands runs walks holds on near under behind with and of in two three several white black yellow old young"
)
_WORDS = np.array(_VOCABULARY.split())


def main(argv: Sequence[str]) -> int:
    parser = command_line("report", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to make the runs (default: a temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        run, baseline = folder / "run", folder / "baseline"
        for seed, path in enumerate((run, baseline)):
            in_own_process(make_run, path, args.rows, seed)
        in_own_process(_score, baseline)
        results = {"score": in_own_process(_measured, _score, run), "report": in_own_process(_measured, _report, run)}
    seconds = round(sum(result["seconds"] for result in results.values()), 1)
    for name, result in results.items():
        print(f"{name:6} {result['seconds']:8.1f} s, {result['cpu_seconds']:8.1f} s of CPU, {result['peak_mb']:6} MB")
    print_result("report", rows=args.rows, cpus=os.cpu_count(), **results, seconds=seconds)
    return 0


def _measured(function: Callable[[Path], None], run: Path) -> dict[str, Any]:
    started = time.perf_counter()
    function(run)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_mb": round(peak_mb()),
    }


def _score(run: Path) -> None:
    from pipeline.evaluation.run_folder import score_folder  # each process imports only what it measures

    score_folder(str(run), SETTINGS)


def _report(run: Path) -> None:
    from jobs.report import write_text
    from pipeline.report import ReportOptions, gather, render_html

    report = gather(str(run), baseline=str(run.parent / "baseline"), options=ReportOptions(thumbnails=False))
    write_text(str(run / "_report.html"), render_html(report))


def make_run(folder: Path, num_rows: int, seed: int) -> None:
    """A finished run folder. The rows' questions do not depend on the seed, some of the answers do."""
    (folder / "__run").mkdir(parents=True, exist_ok=True)
    answers = np.random.default_rng(seed + 1)
    for part, start in enumerate(range(0, num_rows, _ROWS_PER_PART)):
        questions = np.random.default_rng(start)
        rows = [_row(number, questions, answers) for number in range(start, min(start + _ROWS_PER_PART, num_rows))]
        table = pa.Table.from_pylist(rows, schema=result_schema(_KEPT))
        pq.write_table(table, folder / f"part-{part:05d}.parquet", compression="zstd")
    run = {
        "state": "finished",
        "counts": {"rows": num_rows},
        "manifest": {"path": "synthetic", "fingerprint": {"num_rows": num_rows, "files": [["synthetic", 0, num_rows]]}},
    }
    (folder / "__run" / "run.json").write_text(json.dumps(run))
    (folder / "_SUCCESS").touch()


def _row(number: int, questions: np.random.Generator, answers: np.random.Generator) -> dict[str, Any]:
    """A result row; columns that are left out are null."""
    task = _TASKS[number % len(_TASKS)]
    text, references, choices = _question(task, questions)
    drawn = answers.random()
    if drawn > 0.8:
        text = " ".join(answers.choice(_WORDS, 3 if task != "caption" else 11))
    row = {
        "id": f"row-{number}",
        "attempts": 1,
        "num_prompt_tokens": 300,
        "num_visual_tokens": 256,
        "preprocess_s": 0.01,
        "prompt": f"What is shown in picture {number}?",
        "reference": references,
        "choices": choices,
        "task": task,
        "source": f"source {number % 7}",
        "manifest_file": 0,
        "manifest_row": number,
    }
    if drawn < 0.002:
        error = {"error_stage": "decode", "error_type": "TruncatedMedia", "error_message": "the file ends early"}
        return {**row, **error, "status": "error", "media": []}
    return {
        **row,
        "status": "ok",
        "text": text,
        "finish_reason": "length" if drawn > 0.99 else "stop",
        "num_output_tokens": len(text.split()) + 1,
        "generate_s": float(drawn),
        "media": [_MEDIUM | {"source_width": 320 + 40 * (number % 40)}],
    }


_MEDIUM: dict[str, Any] = {
    "kind": "image", "source": "photos/one.jpg", "source_width": 640, "source_height": 480, "resized_width": 644,
    "resized_height": 476, "grid_thw": [1, 34, 46], "timestamps": None, "note": None,
}  # fmt: skip


def _question(task: str, questions: np.random.Generator) -> tuple[str, list[str], list[str] | None]:
    """A right answer, its references, and the options where there are any."""
    some = questions.choice(_WORDS, 12).tolist()
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
