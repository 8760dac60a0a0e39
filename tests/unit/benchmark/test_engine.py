"""The engine benchmark: what runs before the clock starts, what is reported of a run, and its options."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jobs.benchmark import engine as benchmark
from jobs.benchmark.measure import WorkerFailed
from jobs.benchmark.passes import KINDS, PassTimes, print_shares, shares
from jobs.benchmark.workload import Ceilings
from pipeline.engine import Engine, Request


def parse(*options: str) -> argparse.Namespace:
    return benchmark.parse(options)


@pytest.fixture
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e11))


@pytest.mark.usefixtures("_known_ceilings")
def test_a_measured_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_once = benchmark.run_once
    runs: list[float] = []

    def watched(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
        keys = ["content_key" in vars(medium) for request in requests for medium in request.media]
        assert keys and all(keys), "a medium is hashed while the clock runs"
        # The row of the start-up (64 visual tokens, 27 others) and a pass of full size came before.
        assert runs or engine.stats()["prefill_tokens"] >= 91 + 128
        result = run_once(engine, requests)
        runs.append(result["seconds"])
        return result

    monkeypatch.setattr(benchmark, "run_once", watched)
    options = [
        "--shape",
        "tiny",
        "--images",
        "12",
        "--side",
        "112",
        "--tokens",
        "4",
        "--dtype",
        "float32",
        "--repeats",
        "3",
    ]
    settings = ["--engine.max_batch_tokens", "128", "--engine.max_running", "7", "--engine.attention", "sdpa"]
    result = benchmark.measure("ours", parse(*options, *settings))

    assert result["engine"]["max_running"] == 7
    assert result["all_seconds"] == runs and result["seconds"] == sorted(runs)[1]
    assert result["images_per_s"] == pytest.approx(12 / result["seconds"])
    assert result["peak_memory_gb"] > 0 and result["cache_gb"] > 0

    passes = result["passes"]
    assert list(passes) == [*KINDS, "between"]
    assert sum(share.seconds for share in passes.values()) == pytest.approx(result["seconds"])
    assert sum(share.share_of_run for share in passes.values()) == pytest.approx(1)
    assert all(passes[kind].passes > 0 and passes[kind].seconds > 0 for kind in KINDS)
    assert sum(passes[kind].bound_seconds for kind in KINDS) == pytest.approx(
        result["share_of_limit"] * result["seconds"]
    )
    print_shares(passes, 12)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][-4:] == [*KINDS, "between"]


@pytest.mark.usefixtures("_known_ceilings")
@pytest.mark.parametrize(("shape", "rows"), [("tiny-2.5", "image"), ("tiny-3", "video")])
def test_the_newer_families_give_the_tokens_of_their_peer(shape: str, rows: str) -> None:
    options = ["--images", "2", "--rows", rows, "--side", "64", "--tokens", "3", "--dtype", "float32"]
    args = parse("--shape", shape, *options, "--engine.max_batch_tokens", "128", "--engine.cache_gb", "0.1")
    ours, reference = (benchmark.measure(variant, args) for variant in ("ours", "reference-2"))
    assert ours["tokens"] == reference["tokens"]
    assert all(ours["passes"][kind].bound_seconds > 0 for kind in KINDS)


@pytest.mark.slow
@pytest.mark.usefixtures("_known_ceilings")
def test_a_trace_has_prefill_and_decode_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--shape", "tiny", "--images", "30", "--side", "112", "--tokens", "30", "--engine.max_batch_tokens", "128"]
    benchmark.measure("ours", parse(*size, "--trace", str(tmp_path)))
    names = {}
    for kind in ("prompts", "decode"):
        events = json.loads((tmp_path / f"{kind}.json").read_text())["traceEvents"]
        names[kind] = Counter(event.get("name") for event in events)
        assert names[kind]["engine step"] == 5
        # Sampling once a pass.
        assert names[kind]["aten::argmax"] >= 4
    assert names["prompts"]["aten::gelu"] > 0 == names["decode"]["aten::gelu"], "images are in the prompts alone"
    printed = capsys.readouterr().out
    assert "prompts.json: 5 steps, " in printed and "aten::" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("_known_ceilings")
def test_a_trace_that_fails_costs_no_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        assert "  measured " in capsys.readouterr().out, "the number is printed before the profiler starts"
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(benchmark, "trace_steps", fail)
    size = ["--shape", "tiny", "--images", "2", "--side", "56", "--tokens", "3", "--trace", str(tmp_path)]
    assert benchmark.measure("ours", parse(*size))["images_per_s"] > 0
    assert "not traced: RuntimeError: no profiler here" in capsys.readouterr().out


def test_on_a_gpu_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which everything takes a second of its own time and none of the host's."""
    clock = iter(range(100))

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, later: Event) -> float:
            return (later.at - self.at) * 1000.0

    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    engine: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(device=torch.device("cuda")), runner=SimpleNamespace(also_timed=None)
    )
    times = PassTimes(engine)
    for kind in ("vision", "prefill", "decode", "decode"):
        with engine.runner.also_timed(kind):
            pass
    assert waited == []
    assert times.seconds() == {"vision": 1.0, "prefill": 1.0, "decode": 2.0} and waited
    table = shares(times.seconds(), times.counts(), {"vision": 0.5, "prefill": 1.0, "decode": 1.0}, total=8.0)
    assert table["decode"].passes == 2 and table["decode"].share_of_bound == 0.5
    assert table["between"].seconds == 4.0
    times.reset()
    assert times.seconds() == {"vision": 0, "prefill": 0, "decode": 0}


def test_defaults_on_a_gpu_take_minutes_not_an_hour() -> None:
    args = parse("--device", "cuda", "--shape", "2b")
    assert (args.images, args.peers, args.batch_sizes, args.peer_images) == (1024, "reference", "32", 128)
    args = parse("--device", "cpu")
    assert (args.images, args.peers, args.batch_sizes, args.peer_images) == (64, "reference,vllm", "1,8,32", 64)


def test_engine_settings_are_those_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    options = benchmark._options(
        parse("--engine.gpu_memory_fraction", "0.5", "--engine.cuda_graphs", "false", "--engine.kernels", "eager")
    )
    assert (options.gpu_memory_fraction, options.cuda_graphs, options.kernels) == (0.5, False, "eager")
    with pytest.raises(SystemExit):
        parse("--engine.attention", "flsh")
    assert "--engine.attention is 'flsh'; allowed: auto, flash, torch, simd, sdpa" in capsys.readouterr().err


def test_vllm_is_left_out_of_what_its_comparison_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert not benchmark._has_vllm(parse("--shape", "qwen3-vl-2b"))
    assert not benchmark._has_vllm(parse("--rows", "video"))
    assert capsys.readouterr().out.count("it is compared on Qwen2-VL and rows of one image") == 2


def test_an_engine_that_fails_is_reported_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise WorkerFailed("exit code 1; the end of its stderr:\nCUDA error")

    monkeypatch.setattr(benchmark, "in_own_process", fail)
    assert benchmark.main(["--images", "1"]) == 1
    assert "ours           failed: exit code 1; the end of its stderr:\nCUDA error\n" in capsys.readouterr().out
