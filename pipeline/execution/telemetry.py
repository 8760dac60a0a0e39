"""Metrics of a running job on Ray's endpoint, for Prometheus and the dashboard in configs/cluster/grafana.json.

Every name below begins with PREFIX; on the endpoint Ray puts `ray_` before it, and `_total` after counters. The driver
reports finished rows, and each actor its own stats once a second. There are few tags, with few values each: a stage, a
phase, an error type; Ray adds the node and the process. Knows names and values; not where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.schema import Status

PREFIX = "qwen2_vl_batch_"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Definition:
    """A metric's name (without PREFIX), kind, meaning and tags."""

    name: str
    kind: Kind
    about: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_TOKENS = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)

METRICS: Mapping[str, Definition] = {
    one.name: one
    for one in (
        Definition("rows", "counter", "Rows finished in this run, with an answer or an error"),
        Definition("row_errors", "counter", "Error rows by stage and type", ("stage", "error_type")),
        Definition("prompt_tokens", "counter", "Prompt tokens of finished rows, visual ones included"),
        Definition("visual_tokens", "counter", "Visual tokens of finished rows"),
        Definition("output_tokens", "counter", "Tokens generated for finished rows"),
        Definition("manifest_rows", "gauge", "Rows of the manifest"),
        Definition("answered_rows", "gauge", "Rows that the run folder answers, earlier runs' included"),
        Definition("row_seconds", "histogram", "Seconds that a row spent in a stage", ("stage",), _SECONDS),
        Definition("row_output_tokens", "histogram", "Tokens generated for a row", (), _TOKENS),
        Definition("busy_seconds", "counter", "Seconds that a stage's actors worked", ("stage",)),
        Definition("starved_seconds", "counter", "Seconds that engines waited for rows"),
        Definition("fetch_wait_seconds", "counter", "Seconds that preprocessing had nothing to do but wait for media"),
        Definition("phase_seconds", "counter", "Seconds of the engine's passes by phase", ("phase",)),
        Definition("running_sequences", "gauge", "Sequences in an engine's batch"),
        Definition("waiting_sequences", "gauge", "Sequences waiting for a place in an engine's batch"),
        Definition("cache_use", "gauge", "Share of an engine's key-value cache in use, 0 to 1"),
        Definition("patches", "counter", "Patches through the vision model"),
        Definition("prefill_tokens", "counter", "Prompt tokens through the language model"),
        Definition("decode_tokens", "counter", "Tokens generated, those of rows under way included"),
        Definition("preemptions", "counter", "Sequences put back for want of cache"),
        Definition("out_of_memory", "counter", "Passes that ran out of memory and were run again smaller"),
    )
}

# Actors' stats that are exported: (metric, tags).
_STATS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "busy_s": ("busy_seconds", {}),
    "running": ("running_sequences", {}),
    "waiting": ("waiting_sequences", {}),
    "idle_s": ("starved_seconds", {}),
    "fetch_wait_s": ("fetch_wait_seconds", {}),
    **{f"seconds_{phase}": ("phase_seconds", {"phase": phase}) for phase in ("vision", "prefill", "decode")},
    **{
        name: (name, {})
        for name in ("cache_use", "patches", "prefill_tokens", "decode_tokens", "preemptions", "out_of_memory")
    },
}


class Meter:
    """The metrics of one process, made as they are first used."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._before: dict[tuple[str, str], float] = {}

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics

            one = METRICS[name]
            extra = {"boundaries": list(one.boundaries)} if one.kind == "histogram" else {}
            kind = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}[one.kind]
            self._made[name] = kind(PREFIX + name, description=one.about, tag_keys=one.tags, **extra)
        return self._made[name]

    def count(self, name: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Add to a counter. A counter that never moved is not on the endpoint."""
        if value > 0:
            self._metric(name).inc(value, tags=dict(tags or {}))

    def show(self, name: str, value: float) -> None:
        self._metric(name).set(value)

    def observe(self, name: str, values: pa.ChunkedArray, tags: Mapping[str, str] | None = None) -> None:
        """Put values into a histogram; nulls are left out."""
        metric, fixed = self._metric(name), dict(tags or {})
        for value in values.drop_null().to_pylist():
            metric.observe(value, tags=fixed)

    def actor(self, stage: str, stats: Mapping[str, Any]) -> None:
        """The stats of an actor of a stage, counted since its start."""
        for key in stats.keys() & _STATS.keys():
            (name, tags), value = _STATS[key], stats[key]
            if METRICS[name].kind == "gauge":
                self.show(name, value)
            else:
                tags = {"stage": stage} if "stage" in METRICS[name].tags else tags
                self.count(name, value - self._before.get((key, stage), 0.0), tags)
                self._before[key, stage] = value

    def rows(self, table: pa.Table) -> None:
        """Finished rows (schema.result_schema)."""
        self.count("rows", table.num_rows)
        for kind in ("prompt", "visual", "output"):
            self.count(f"{kind}_tokens", pc.sum(table.column(f"num_{kind}_tokens")).as_py() or 0)
        self.observe("row_seconds", table.column("preprocess_s"), {"stage": "preprocess"})
        self.observe("row_seconds", table.column("generate_s"), {"stage": "generate"})
        self.observe("row_output_tokens", table.column("num_output_tokens"))
        failed = table.filter(pc.not_equal(table.column("status"), Status.OK.value))
        kinds = (
            failed.select(["error_stage", "error_type"])
            .group_by(["error_stage", "error_type"])
            .aggregate([([], "count_all")])
        )
        for kind in kinds.to_pylist():
            tags = {"stage": kind["error_stage"] or "unknown", "error_type": kind["error_type"] or "unknown"}
            self.count("row_errors", kind["count_all"], tags)

    def progress(self, answered: int, total: int) -> None:
        self.show("answered_rows", answered)
        self.show("manifest_rows", total)
