"""Runs that are killed at random moments, and finished: every row once, the same answers, no stray files.

`make test-faults` runs these: FAULT_RUNS says how many (40), FAULT_SEED=17 repeats one alone, and after FAULT_MINUTES
no more are begun, save for the first few (on a slow machine). Two go on side by side, each on a Ray of its own. The
last printed line of JSON: runs, kills, rows, rows lost, rows doubled.

Every run has good, slow and bad rows, a row that hangs while it is fetched and one that eats its decoder's memory.
By its seed it also has one of: the real engine; a row that kills its preprocessing actor; one that kills its engine
actor; one that hangs in the engine until the watchdog comes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.faults import job
from tests.integration.late_pictures import late_pictures

ROOT = Path(__file__).resolve().parents[2]
RUNS = int(os.environ.get("FAULT_RUNS", "40"))
SEEDS = [int(os.environ["FAULT_SEED"])] if "FAULT_SEED" in os.environ else list(range(RUNS))
MINUTES = float(os.environ.get("FAULT_MINUTES", "inf"))
SIDE_BY_SIDE = 2
VICTIMS = ("driver", "PreprocessActor", "EngineActor")
# Ray guards a cluster with a token that its first head writes; what joins it must say that it has one.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token"}
# Drivers are forked from a process that has their imports done, which are a good part of so small a run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.job"])

pytestmark = [pytest.mark.timeout(7200)]

HEAD = """
import ray, sys
from tests.ray_start import started

init = lambda: ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
context = started(init)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Kind:
    """What a run has besides the rows that all have."""

    stages: str
    prompt: str | None
    errors: frozenset[str] = frozenset({"UnsupportedMedia", "MediaNotFound", "MediaMemoryError", "FetchTimeout"})


KINDS = {
    "real engine": Kind("real", None),
    "kills preprocessing": Kind("marked", "kill preprocessing", Kind.errors | {"EngineCrash"}),
    "kills the engine": Kind("marked", "kill the engine", Kind.errors | {"EngineCrash"}),
    "hangs in the engine": Kind("marked", "hang in the engine", Kind.errors | {"EngineCrash"}),
}


def kind_of(seed: int) -> str:
    """A row that hangs costs its run three time-outs, so fewer runs have one."""
    real, preprocessing, engine, hangs = KINDS
    return (real, preprocessing, engine, preprocessing, real, engine, engine, hangs)[seed % 8]


@pytest.fixture(scope="module")
def slow_server(photos: Path) -> Iterator[str]:
    """`/slow` answers after a while, `/hang` never does."""
    picture = (photos / "rocket.jpg").read_bytes()
    with late_pictures(picture, lambda path: time.sleep(60.0 if "hang" in path else 0.3)) as url:
        yield url


@dataclass
class Head:
    """A Ray, in a process of its own."""

    process: subprocess.Popen[str]
    address: str

    def pids_of(self, name: str) -> list[int]:
        """Its workers that run an actor of a class whose name ends so."""
        parents, names = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
                    stat = (entry / "stat").read_text()
                except OSError:
                    continue
                parents[int(entry.name)] = int(stat[stat.rindex(")") + 2 :].split()[1])
        return [
            pid
            for pid, command in names.items()
            if command.startswith("ray::") and name in command and self.process.pid in _ancestors(pid, parents)
        ]


def _ancestors(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def heads() -> Iterator[list[Head]]:
    found: list[Head] = []
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for _ in range(min(SIDE_BY_SIDE, len(SEEDS))):
        process = subprocess.Popen([sys.executable, "-c", HEAD], cwd=ROOT, env=environment, text=True, **pipes)
        assert process.stdout is not None
        found.append(Head(process, process.stdout.readline().strip()))
    assert all(head.address for head in found), "Ray did not start"
    yield found
    for head in found:
        head.process.communicate()  # closes its input, at which it ends


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory, photos: Path, slow_server: str) -> dict[str, Path]:
    """Of each kind: good, slow, bad, hanging and memory-hungry rows, and the kind's own."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(photos / "rocket.jpg", folder / "rocket.jpg")
    (folder / "page.png").write_text("<html>")
    Image.new("RGB", (9000, 9000)).save(folder / "huge.png")
    found = {}
    for name, kind in KINDS.items():
        rows: list[dict[str, Any]] = []
        for number in range(48):
            rows.append({"prompt": f"Question {number}?"})
            if number % 6 == 0:
                rows.append({"image": "rocket.jpg", "prompt": "?"})
            if number % 12 == 0:
                rows.append({"image": f"{slow_server}/slow/{number}", "prompt": "?"})
        rows += [{"image": "page.png", "prompt": "?"}, {"image": "missing.png", "prompt": "?"}]
        rows += [{"image": "huge.png", "prompt": "?"}, {"image": f"{slow_server}/hang", "prompt": "?"}]
        if kind.prompt is not None:
            rows.append({"prompt": kind.prompt})
        random.Random(0).shuffle(rows)
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(json.dumps(row) for row in rows))
    return found


@dataclass
class Driver:
    """The job's process, and where what it prints goes."""

    process: Any
    log: Path

    def wait(self, seconds: float) -> None:
        """Sleep, unless the process ends before."""
        self.process.join(seconds)

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        self.process.join(600)
        assert self.ended, f"the job has not ended after 600 s: {self.log.read_text()}"
        return self.process.exitcode, self.log.read_text()


def start(kind: str, manifest: Path, output: Path, head: Head) -> Driver:
    words = {
        "input.path": str(manifest),
        "input.keep": "prompt",
        "input.allow_missing_media": "true",
        "input.allow_private_hosts": "true",
        "input.fetch_timeout_s": "6",
        "input.fetch_retries": "0",
        "output.path": str(output),
        "output.report": "false",
        "output.seconds_per_fragment": "0.3",
        "output.rows_per_part": "40",
        "model.path": "demo",
        "media.resize": "pil",
        "media.memory_limit_mb": "200",
        "sampling.max_tokens": "12",
        "sampling.ignore_eos": "true",
        "engine.max_running": "4",
        "resources.address": head.address,
        "resources.min_rows_per_unit": "4",
        "resources.max_rows_per_unit": "8",
        "run.stall_timeout_s": "12" if "hangs" in kind else "120",
    }
    log = output.parent / f"{output.name}.txt"
    flat = [word for name, value in words.items() for word in (f"--{name}", value)]
    process = FORKS.Process(target=job.run, args=(KINDS[kind].stages, flat, str(log)))
    process.start()
    return Driver(process, log)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


@dataclass
class Calm:
    """What an undisturbed run gives."""

    seconds: float
    rows: list[dict[str, Any]]
    files: list[str]


@dataclass
class Disturbed:
    """What became of a disturbed one."""

    seed: int
    seconds: float
    rows: list[dict[str, Any]]
    files: list[str]
    kills: Counter[str] = field(default_factory=Counter)


def calm_run(kind: str, manifest: Path, output: Path, head: Head) -> Calm:
    started = time.monotonic()
    code, printed = start(kind, manifest, output, head).finish()
    assert code == 0, f"{kind}: {printed}"
    calm = Calm(time.monotonic() - started, rows_of(output), sorted(path.name for path in output.iterdir()))
    assert {row["error_type"] for row in calm.rows if row["status"] == "error"} == KINDS[kind].errors
    return calm


def disturbed_run(seed: int, manifest: Path, output: Path, head: Head, usual_s: float) -> Disturbed:
    """Run the job to its end, killing up to three times on the way; an undisturbed run takes `usual_s`."""
    rng, kind = random.Random(seed), kind_of(seed)
    kills: Counter[str] = Counter()
    started = time.monotonic()
    driver = start(kind, manifest, output, head)
    for _ in range(rng.randint(1, 3)):
        victim, fate = rng.choice(VICTIMS), rng.random()
        if victim == "driver":
            driver.wait(fate * 0.9 * usual_s)
        else:  # actors take most of a run to start: a moment chosen before they are there would seldom meet one
            while not driver.ended and not head.pids_of(victim):
                driver.wait(0.2)
            driver.wait(fate * 2.0)
        if driver.ended:
            break
        if victim == "driver":
            driver.kill()
            kills[victim] += 1
            driver = start(kind, manifest, output, head)
            continue
        for pid in head.pids_of(victim)[:1]:
            os.kill(pid, signal.SIGKILL)
            kills[victim] += 1
    code, printed = driver.finish()
    for _ in range(2):  # the promise: run the same command until it says done
        if code == 0:
            break
        code, printed = start(kind, manifest, output, head).finish()
    assert code == 0, f"seed {seed}, {kind}: {printed}"
    files = sorted(path.name for path in output.iterdir())
    return Disturbed(seed, time.monotonic() - started, rows_of(output), files, kills)


def test_killed_runs_end_with_every_row_once_and_the_same_answers(
    manifests: dict[str, Path], heads: list[Head], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free: queue.SimpleQueue[Head] = queue.SimpleQueue()
    for head in heads:
        free.put(head)

    def calm_one(kind: str) -> Calm:
        head = free.get()
        try:
            return calm_run(kind, manifests[kind], tmp_path / kind, head)
        finally:
            free.put(head)

    def disturbed_one(seed: int) -> Disturbed | None:
        if time.monotonic() - calm_at > 60 * MINUTES and seed not in SEEDS[: 2 * SIDE_BY_SIDE]:
            return None
        head = free.get()
        try:
            kind = kind_of(seed)
            run = disturbed_run(seed, manifests[kind], tmp_path / f"run-{seed}", head, calm["real engine"].seconds)
        finally:
            free.put(head)
        with capsys.disabled():
            print(f"\nseed {seed:2d}, {kind}: {run.seconds:.1f} s, {dict(run.kills)}", end="", flush=True)
        return run

    began = time.monotonic()
    with ThreadPoolExecutor(len(heads)) as pool:
        kinds = list(dict.fromkeys(["real engine", *map(kind_of, SEEDS)]))
        calm = dict(zip(kinds, pool.map(calm_one, kinds), strict=True))
        calm_at = time.monotonic()
        runs = [run for run in pool.map(disturbed_one, SEEDS) if run is not None]
    kills: Counter[str] = Counter()
    summary: Counter[str] = Counter()
    wrong = []
    for run in runs:
        undisturbed = calm[kind_of(run.seed)]
        places = Counter((row["manifest_file"], row["manifest_row"]) for row in run.rows)
        kills += run.kills
        summary["rows"] += len(run.rows)
        summary["lost"] += len(undisturbed.rows) - len(places)
        summary["doubled"] += sum(count - 1 for count in places.values())
        wrong += [
            f"seed {run.seed}: {got} in place of {expected}"
            for got, expected in zip(map(_told, run.rows), map(_told, undisturbed.rows), strict=False)
            if got != expected
        ]
        if run.files != undisturbed.files:
            wrong.append(f"seed {run.seed}: {run.files} in place of {undisturbed.files}")
    report: dict[str, Any] = {"runs": len(runs), "kills": kills.total(), "killed": dict(kills)}
    report.update({name: summary[name] for name in ("rows", "lost", "doubled")}, wrong=len(wrong))
    report["seconds"] = round(time.monotonic() - began)
    with capsys.disabled():
        print("\n" + json.dumps(report))
    assert summary["lost"] == summary["doubled"] == 0
    assert not wrong, "\n".join(wrong)
    assert len(runs) == 1 or kills.total() >= len(runs) // 2


def _told(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["id"], row["status"], row["text"], row["error_type"]
