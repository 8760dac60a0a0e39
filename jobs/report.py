"""The page of a run folder: `python -m jobs.report RUN [--baseline RUN2] [--output FILE] [--format html|markdown]`.

Works for finished and unfinished runs. Scores are shown where the run has been evaluated (`jobs.evaluate`); where both
runs have, they are compared row by row. Reads folders and writes one file; starts nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import JobError, OutputError, counted
from pipeline.report import ReportOptions, gather, render_html, render_markdown
from pipeline.results.run_folder import REPORT_FILE, RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    options = ReportOptions(
        thumbnails=not arguments.no_thumbnails,
        cards=arguments.cards,
        price_per_gpu_hour=arguments.price_per_gpu_hour,
        currency=arguments.currency,
    )
    try:
        report = gather(arguments.run, baseline=arguments.baseline, options=options)
        if arguments.price_per_gpu_hour and report.speed.cost is None:
            print(f"--price-per-gpu-hour is not used: {report.path} records no GPU time", file=sys.stderr)
        if arguments.format == "markdown" and arguments.output is None:
            print(render_markdown(report))
            return 0
        text = render_html(report) if arguments.format == "html" else render_markdown(report)
        path = arguments.output or RunFolder(arguments.run).part(REPORT_FILE)
        write_text(path, text)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {path}: {len(text.encode()):,} bytes, {counted(report.rows.num_rows, 'row')}")
    return 0


def write_report(run: str, *, storage_options: storage.StorageOptions = None, **options: Any) -> str:
    """Writes _report.html into a run folder and returns its path: what a caption run does at its end."""
    path = RunFolder(run).part(REPORT_FILE)
    report = gather(run, options=ReportOptions(**options), storage_options=storage_options)
    write_text(path, render_html(report), storage_options)
    return path


def write_text(path: str, text: str, storage_options: storage.StorageOptions = None) -> None:
    """Publishes a text file. Raises OutputError."""
    try:
        if path.endswith("/") or (not storage.is_remote(path) and storage.is_dir(path)):
            example = storage.join(path, "report.html")
            raise OutputError(f"can't write {path}: it is a folder; name a file, such as {example}")
        storage.make_dir(storage.parent(path), storage_options)
        storage.publish(path, text.encode(), storage_options)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.report", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("run", metavar="RUN", help="run folder, on disk or in a bucket")
    parser.add_argument("--baseline", metavar="RUN2", help="another run over the same rows, to compare with")
    parser.add_argument(
        "--output", metavar="FILE", help="where to write (default: RUN/_report.html; markdown: the terminal)"
    )
    parser.add_argument("--format", choices=("html", "markdown"), default="html")
    parser.add_argument("--price-per-gpu-hour", type=_price, metavar="PRICE", help="states the run's cost")
    parser.add_argument("--currency", default="$", help="put before prices (default: $)")
    parser.add_argument(
        "--cards", type=_cards, default=6, metavar="N", help="rows in each section of the gallery (default: 6)"
    )
    parser.add_argument("--no-thumbnails", action="store_true", help="leave the pictures out")
    return parser


def _price(text: str) -> float:
    price = float(text)
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a valid price; expected a number, 0 or more")
    return price


def _cards(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 50:
        raise argparse.ArgumentTypeError(f"{text} is not a valid number of rows; expected 1 to 50")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
