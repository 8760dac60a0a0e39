"""The caption job and its stages, as the benchmarks run them.

Knows the job's command line and config; nothing of what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import CaptionConfig
from pipeline.config_file import load_config
from pipeline.execution.stages import Stages, open_stages
from pipeline.manifest.work import read_work
from pipeline.results.run_folder import RunFolder


def run_caption(settings: Mapping[str, object], *, config: str | None = None) -> dict[str, Any]:
    """Run the caption job with these settings over those of a config file; returns its run.json."""
    from jobs.caption import main  # imports Ray, which most benchmarks do without

    files = [f"--config={config}"] if config else []
    code = main([*files, *(f"--{name}={value}" for name, value in settings.items())])
    if code:
        raise SystemExit(f"the caption job ended with exit code {code}")
    record: dict[str, Any] = json.loads(Path(RunFolder(str(settings["output.path"])).file("run.json")).read_text())
    return record


def stages_and_rows(
    settings: Mapping[str, object], *, config: str | None = None, rows_per_table: int
) -> tuple[Stages, Iterator[pa.Table]]:
    """The stages that the caption job would run with these settings, and its manifest's rows, table by table."""
    overrides = {name: str(value) for name, value in settings.items()}
    opened = open_stages(load_config(CaptionConfig, config, overrides))
    stages, spec = opened.stages, opened.manifest.spec
    work = opened.whole_manifest(rows_per_unit=rows_per_table)
    return stages, (read_work(spec, one, stages.columns) for one in work)
