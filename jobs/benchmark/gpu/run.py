"""Measure everything on a GPU machine in minutes: python3 -m jobs.benchmark.gpu.run

    python3 -m jobs.benchmark.gpu.run                        all stages, the most valuable first
    python3 -m jobs.benchmark.gpu.run --only kernels bench_2b

Run it in the checkout, with `.gpu/` from jobs.benchmark.gpu.prepare in it where something is missing on that machine.
Each stage has a limit and a log in $OUT; a summary of one screen comes last. A stage that fails or runs into its limit
stops no other. Without a GPU the stages run with tiny shapes, as a dry run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = (sys.executable, "-m")
ENGINE = (*PYTHON, "jobs.benchmark", "engine")
SOAK = (*PYTHON, "jobs.benchmark", "soak")
INTERRUPTED = (*PYTHON, "jobs.benchmark.gpu.interrupted")
LARGE = ("--side", "1024", "--tokens", "100")
LEAST_S = 20
"""A stage is not begun with less time left."""


@dataclass(frozen=True)
class Stage:
    """Commands that share a limit and a log."""

    name: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]
    shown: str = ""
    """Lines of the log for the summary: a pattern that a line begins with."""
    most_lines: int = 60
    log: str = ""
    """Name of the log, if not the stage's: machines hand few files back, so some share one."""
    environment: Mapping[str, str] = field(default_factory=dict)


# Lines that the summary shows.
_ABOUT = r"(PyTorch version|Python version|CUDA runtime|GPU models|GPU \d|Nvidia driver|cuDNN|\[pip3\] (torch|triton))"
_TESTED = r"(FAILED|ERROR|(\[gw\d+\]|tests/gpu/).* (FAILED|ERROR)|\d+ (passed|failed)|=+ .*in )"
_KERNELS = r"(matmul|copy|upload|vision|prompts|decode|eager|fused)\b"
_TABLE = (
    r"(ours|reference-\d+) |  (measured|parts|vision|prefill|decode|between) |"
    r"  (prompts|decode).json| +[\d.]+% +[\d.]+ ms"
)
_FED = r"(large|small)  |  (parts|steps)"
_SOAKED = r" +[\d.]+ s   answered|\{\"benchmark\""


def stages(on_gpu: bool, site: Path) -> list[Stage]:
    """What runs, in order of value."""
    facts = Stage("facts", 90, ((*PYTHON, "torch.utils.collect_env"), (*PYTHON, "pip", "list")), _ABOUT)
    measured = _on_gpu(site) if on_gpu else _dry(site)
    return [facts, *measured, _demo_job(site, "100" if on_gpu else "10")]


def _with_ray(site: Path) -> dict[str, str]:
    """Only for the jobs: the other stages take the machine's own packages."""
    return _path(site / "fa3", site / "job")


def _demo_job(site: Path, rows_per_task: str) -> Stage:
    world = str(site / "demo-world")
    # A new folder each time: a finished run would only be looked at.
    output = str(site / f"demo-{os.getpid()}")
    # In bfloat16: the checkpoint's float32 would leave out most of a GPU's kernels, and CUDA graphs.
    caption = ("jobs.caption", "--config", "configs/demo.yaml", "--model.dtype", "bfloat16")
    often = ("--output.rows_per_fragment", "10")  # so that a killed run leaves finished rows
    commands = (
        (*PYTHON, "pipeline.demo.manifest", "--output", world, "--rows-per-task", rows_per_task),
        (*INTERRUPTED, output, *caption, "--input.path", world, "--output.path", output, *often),
        (*PYTHON, "pipeline.demo.check", output),
    )
    shown = r"(killed|rows|this run|\w+ +\d+)"
    return Stage("job", 240, commands, shown, 12, log="facts", environment=_with_ray(site))


def _on_gpu(site: Path) -> list[Stage]:
    def ours(shape: str, images: int, *options: str) -> tuple[str, ...]:
        return (*ENGINE, "--shape", shape, "--peers", "none", "--images", str(images), *options)

    pytest = (*PYTHON, "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "--timeout=100", "-vv")
    processes = ("-n", "4") if importlib.util.find_spec("xdist") else ()  # most of the time is Triton's compiler
    families = tuple(ours(shape, 64, *LARGE) for shape in ("qwen2.5-vl-7b", "qwen3-vl-8b"))
    traced = ours("2b", 256, *LARGE, "--trace", str(site / "trace"))
    feed = (*PYTHON, "jobs.benchmark", "feed", "--shape", "2b")
    soak = (*SOAK, "--shape", "2b", "--seconds", "45", "--max-pixels", "100352")
    peer = (*ENGINE, "--shape", "2b", "--peers", "reference", "--images", "128", *LARGE)
    return [
        Stage("tests", 190, ((*pytest, *processes, "--tb=short", "--durations=8"),), _TESTED, 14),
        Stage("kernels", 110, ((*PYTHON, "jobs.benchmark.gpu.kernels", "--seconds", "90"),), _KERNELS),
        Stage("bench_2b", 140, (traced, ours("2b", 256)), _TABLE),
        Stage("bench_7b", 130, (ours("7b", 128, *LARGE),), _TABLE),
        Stage("bench_families", 130, families, _TABLE, log="bench_7b"),
        Stage("job_2b", 220, (feed,), _FED, environment=_with_ray(site)),
        Stage("soak", 150, (soak,), _SOAKED, log="bench_2b"),
        Stage("bench_mixed", 90, (ours("2b", 128, "--rows", "mixed"),), _TABLE, log="bench_2b"),
        Stage("peer", 120, (peer,), _TABLE),
    ]


def _dry(site: Path) -> list[Stage]:
    tiny = ("--shape", "tiny", "--images", "2", "--side", "56", "--tokens", "12", "--threads", "1")
    bench = (*ENGINE, "--peers", "none", *tiny, "--trace", str(site / "trace"))
    few = ("--large", "4", "--small", "8", "--side", "112", "--tokens", "4", "--actors", "1")
    feed = (*PYTHON, "jobs.benchmark", "feed", "--shape", "tiny", *few)
    return [
        Stage("kernels", 60, ((*PYTHON, "jobs.benchmark.gpu.kernels", "--seconds", "30"),), _KERNELS),
        Stage("bench_tiny", 120, (bench,), _TABLE),
        Stage("job_tiny", 250, (feed,), _FED, environment=_with_ray(site)),
        Stage("soak", 150, ((*SOAK, "--seconds", "6"),), _SOAKED),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: that of no stage, since each is reported."""
    args = _parse(argv)
    started = time.monotonic()
    site, out = Path(args.site), Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **unpack(Path(args.packages), site)}
    environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    on_gpu = _has_gpu()
    planned = stages(on_gpu, site)
    unknown = set(args.only) - {stage.name for stage in planned}
    if unknown:
        print(
            f"error: no stage {', '.join(sorted(unknown))}; here are {', '.join(s.name for s in planned)}",
            file=sys.stderr,
        )
        return 2
    summary = []
    for stage in planned:
        if args.only and stage.name not in args.only:
            continue
        left = args.total - (time.monotonic() - started)
        line = f"{stage.name}: left out, no time"
        lines: list[str] = []
        if left >= LEAST_S:
            line, lines = run_stage(
                stage, out / f"{stage.log or stage.name}.log", environment, min(stage.limit_s, left)
            )
        print(line, flush=True)
        summary += [line, *(f"    {shown}" for shown in lines)]
    summary.append(f"all: {time.monotonic() - started:.0f} s; logs in {out}")
    text = "\n".join([f"==== summary ({'GPU' if on_gpu else 'dry run without a GPU'})", *summary])
    print(text, flush=True)
    (out / "summary.txt").write_text(text + "\n")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--total", type=float, default=540, help="begin nothing after these seconds")
    parser.add_argument("--packages", default=".gpu", help="the folder that was prepared")
    parser.add_argument("--output", default=os.environ.get("OUT") or "out/gpu", help="for the logs. Default: $OUT")
    parser.add_argument(
        "--site", default=str(Path(tempfile.gettempdir(), "qwen2-vl-gpu")), help="where packages are unpacked"
    )
    return parser.parse_args(argv)


def _has_gpu() -> bool:
    """Asked in another process: torch is not imported here, so a stage has the memory and the device for itself."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def unpack(packages: Path, site: Path) -> dict[str, str]:
    """Unpack what was prepared, once on a machine; gives the environment variables with which it is found."""
    site.mkdir(parents=True, exist_ok=True)
    for archive in sorted(packages.glob("*.tar.xz")):
        name = archive.name.removesuffix(".tar.xz")
        folder = site / name
        if not folder.exists():
            with tarfile.open(archive, "r:xz") as contents:
                contents.extractall(f"{folder}.part", filter="tar")
            Path(f"{folder}.part").rename(folder)
    return _path(site / "fa3")


def _path(*folders: Path) -> dict[str, str]:
    """PYTHONPATH with these folders, if they exist, behind what is there."""
    added = [str(folder) for folder in folders if folder.exists()]
    return {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *added]))} if added else {}


def run_stage(stage: Stage, log: Path, environment: Mapping[str, str], limit_s: float) -> tuple[str, list[str]]:
    """Run the commands until one fails or the time is up; gives lines for the summary: how it went, what it printed."""
    started = time.monotonic()
    ended = "ok"
    environment = {**environment, **stage.environment}
    with log.open("a+") as output:
        before = output.tell()
        for command in stage.commands:
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            left = max(0.1, limit_s - (time.monotonic() - started))
            limited = ["timeout", "--kill-after=5", f"{left:.1f}", *command]  # ends all processes of the command
            code = subprocess.run(limited, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
            if code:
                ended = f"STOPPED at its limit of {limit_s:.0f} s" if code in (124, -9) else f"exit code {code}"
                break
        output.seek(before)
        lines = output.read().splitlines()
    return f"{stage.name}: {ended}, {time.monotonic() - started:.0f} s", shown_lines(stage, lines)


def shown_lines(stage: Stage, lines: Sequence[str]) -> list[str]:
    """What of a log belongs into the summary; its end where nothing does."""
    found = [line for line in lines if re.match(stage.shown, line)]
    return [line[:260] for line in (found[: stage.most_lines] if found else lines[-5:])]


if __name__ == "__main__":
    sys.exit(main())
