"""Metrics on Ray's real endpoint, and the dashboard that queries them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.execution.telemetry import METRICS, PREFIX, Definition, Meter
from pipeline.schema import result_schema
from tests.ray_start import started

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "configs" / "cluster" / "grafana.json"


def samples(url: str) -> dict[str, float]:
    """Our metrics on an endpoint: `name{our tags}` to value, processes added up."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            match = re.match(rf"(ray_{PREFIX}\w+)(?:\{{(.*)\}})? (\S+)$", line)
            if match:
                tags = re.findall(r'(stage|phase|error_type|le)="([^"]*)"', match[2] or "")
                name = match[1] + (
                    "{" + ",".join(f"{key}={value}" for key, value in sorted(tags)) + "}" if tags else ""
                )
                found[name] = found.get(name, 0.0) + float(match[3])
    return found


def queried() -> set[str]:
    """Names that the dashboard's panels and variables ask for."""
    return set(re.findall(rf"ray_{PREFIX}\w+", DASHBOARD.read_text()))


def name_on_endpoint(one: Definition) -> str:
    """A histogram's has `_bucket`, `_count` or `_sum` after it."""
    return f"ray_{PREFIX}{one.name}" + ("_total" if one.kind == "counter" else "")


def exported() -> set[str]:
    """Names that the code can put on the endpoint."""
    return {
        name_on_endpoint(one) + suffix
        for one in METRICS.values()
        for suffix in (("_bucket", "_count", "_sum") if one.kind == "histogram" else ("",))
    }


def test_every_metric_is_on_the_dashboard_and_the_dashboard_asks_for_no_other() -> None:
    assert queried() <= exported()
    shown = {name.removesuffix("_bucket") for name in queried()}
    assert shown == set(map(name_on_endpoint, METRICS.values()))


def test_the_dashboard_s_panels_are_whole_and_lie_beside_each_other() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    places = set()
    for panel in panels:
        assert panel["title"] and panel["targets"] and all(target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places and place["x"] + place["w"] <= 24, panel["title"]
        places |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The metrics endpoint of a Ray that exports every second and has run nothing else."""
    import ray

    ray.shutdown()
    started(
        lambda: ray.init(
            "local",
            num_cpus=1,
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            _system_config={"metrics_report_interval_ms": 1000},
        )
    )
    node = ray.nodes()[0]
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def finished() -> pa.Table:
    schema = result_schema(pa.schema([]))
    good = {
        "status": "ok",
        "num_prompt_tokens": 50,
        "num_visual_tokens": 40,
        "num_output_tokens": 10,
        "generate_s": 2.0,
    }
    bad = {"status": "error", "error_stage": "fetch", "error_type": "MediaNotFound"}
    rows = [
        {**dict.fromkeys(schema.names), "preprocess_s": 0.05, **row}
        for row in (good, good, good, bad, bad, {"status": "error"})
    ]
    for number, row in enumerate(rows):
        row.update(attempts=1, manifest_file=0, manifest_row=number)
    return pa.Table.from_pylist(rows, schema=schema)


def test_what_the_meter_is_told_stands_on_ray_s_endpoint(endpoint: str) -> None:
    meter = Meter()
    meter.rows(finished())
    engine = {
        **{"running": 3.0, "waiting": 2.0, "cache_use": 0.5, "busy_s": 4.0, "idle_s": 1.0, "passes": 9.0},
        **{"patches": 100.0, "prefill_tokens": 20.0, "decode_tokens": 5.0, "preemptions": 1.0, "out_of_memory": 1.0},
        **{"seconds_vision": 1.0, "seconds_prefill": 2.0, "seconds_decode": 3.0, "describe": {"kind": "native"}},
    }
    meter.actor("engine", engine)
    meter.actor("engine", {**engine, "busy_s": 6.0, "patches": 150.0, "running": 1.0})
    meter.actor("preprocess", {"busy_s": 8.0, "fetch_wait_s": 2.0})
    meter.progress(5, 20)
    expected = {
        "rows_total": 6,
        "row_errors_total{error_type=MediaNotFound,stage=fetch}": 2,
        "row_errors_total{error_type=unknown,stage=unknown}": 1,
        "prompt_tokens_total": 150,
        "visual_tokens_total": 120,
        "output_tokens_total": 30,
        "answered_rows": 5,
        "manifest_rows": 20,
        "row_seconds_count{stage=preprocess}": 6,
        "row_seconds_count{stage=generate}": 3,
        "row_seconds_bucket{le=1.0,stage=generate}": 0,
        "row_seconds_bucket{le=3.0,stage=generate}": 3,
        "row_output_tokens_count": 3,
        "busy_seconds_total{stage=engine}": 6,
        "busy_seconds_total{stage=preprocess}": 8,
        "starved_seconds_total": 1,
        "fetch_wait_seconds_total": 2,
        "phase_seconds_total{phase=decode}": 3,
        "running_sequences": 1,
        "waiting_sequences": 2,
        "cache_use": 0.5,
        "patches_total": 150,
        "prefill_tokens_total": 20,
        "decode_tokens_total": 5,
        "preemptions_total": 1,
        "out_of_memory_total": 1,
    }
    end = time.monotonic() + 60
    while True:
        found = samples(endpoint)
        seen = {name: found.get(f"ray_{PREFIX}{name}") for name in expected}
        if seen == expected or time.monotonic() > end:
            break
        meter.progress(5, 20)  # a gauge that is not shown again goes stale
        meter.actor("engine", {**engine, "busy_s": 6.0, "patches": 150.0, "running": 1.0})
        time.sleep(1.0)
    assert seen == expected
    assert {name.partition("{")[0] for name in found} >= queried(), "the dashboard's names are all there"
