"""Pack what a GPU machine without network lacks: python -m jobs.benchmark.gpu.prepare

    python -m jobs.benchmark.gpu.prepare          FlashAttention 3 (9 MiB): tests, benchmarks, kernels
    python -m jobs.benchmark.gpu.prepare job      and Ray, av, pydantic (38 MiB more): the whole job too

Run it in the checkout, where pip reaches a package index. It fills `.gpu/`, which git ignores: take that folder along
with the checkout, and run `python3 -m jobs.benchmark.gpu.run` there. The wheels are those of that machine's Python;
torch, Triton and transformers are expected to be installed there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

GLIBC_VERSIONS = (17, 24, 27, 28, 31, 34, 35, 39)
"""pip takes a platform literally, so every one that a wheel may name is listed."""
FLASH_ATTENTION_3 = "fa3-fwd==0.0.3"
"""For torch's stable ABI, CUDA 13 and sm_90: bfloat16, forward only, without a paged cache."""
JOB_PACKAGES = (
    *("ray", "av", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "jsonschema"),
    *("jsonschema-specifications", "referencing", "rpds-py", "tzdata"),
)
UNUSED_FOLDERS = ("jars", "dashboard/client", "rllib", "serve", "tune")
"""Of Ray: Java, the dashboard's pages and the libraries beside ray.data."""
EXECUTABLES = ("ray/core/src/ray/gcs/gcs_server", "ray/core/src/ray/raylet/raylet")
ARCHIVES = {"engine": ("fa3",), "job": ("fa3", "job")}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = ARCHIVES[args.what]
    for old in folder.glob("*.tar.xz"):
        if old.name.removesuffix(".tar.xz") not in wanted:
            old.unlink()
    for name in wanted:
        archive = folder / f"{name}.tar.xz"
        if not archive.exists():
            print(f"{archive} ...", flush=True)
            with tempfile.TemporaryDirectory() as build:
                contents = Path(build, name)
                {"fa3": _fa3, "job": _job}[name](contents, args.python_version)
                pack(contents, archive)
    return report_sizes(folder, args.limit_mib)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=ARCHIVES, default="engine")
    parser.add_argument("--folder", default=".gpu")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine")
    parser.add_argument("--limit-mib", type=float, default=61, help="of the folder and the checkout together")
    return parser.parse_args(argv)


def _fa3(folder: Path, python_version: str) -> None:
    fetch([FLASH_ATTENTION_3], folder, python_version)


def _job(folder: Path, python_version: str) -> None:
    fetch(pinned(JOB_PACKAGES, Path("constraints.txt").read_text()), folder, python_version)
    for name in UNUSED_FOLDERS:
        shutil.rmtree(folder / "ray" / name, ignore_errors=True)
    strip = shutil.which("strip")
    if strip is None:
        print("strip is missing (Debian: binutils): the archive grows", file=sys.stderr)
        return
    for path in [*folder.rglob("*.so*"), *(folder / name for name in EXECUTABLES)]:
        # Some libraries can't be stripped; they stay as they are.
        subprocess.run([strip, "--strip-unneeded", str(path)], check=False, stderr=subprocess.DEVNULL)


def pinned(packages: Sequence[str], constraints: str) -> list[str]:
    """`name==version` of each package, as the project is tested with. Raises SystemExit for a missing one."""
    versions = {_canonical(line.partition("==")[0]): line for line in constraints.splitlines() if "==" in line}
    missing = [package for package in packages if _canonical(package) not in versions]
    if missing:
        raise SystemExit(f"constraints.txt has no {', '.join(missing)}: run this in the project's root")
    return [versions[_canonical(package)].strip() for package in packages]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower().strip()


def fetch(packages: Sequence[str], folder: Path, python_version: str) -> None:
    """Unpack the wheels of these packages for x86-64 and that Python, none of what they need besides."""
    platforms = [f"manylinux_2_{version}_x86_64" for version in GLIBC_VERSIONS]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python_version, "--target", str(folder)]
    command += [part for platform in platforms for part in ("--platform", platform)]
    done = subprocess.run([*command, *packages], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"pip can't install {', '.join(packages)}: {done.stderr.strip()}")


def pack(folder: Path, archive: Path) -> None:
    """The folder's files as one .tar.xz, which appears whole or not at all."""

    def entry(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if "__pycache__" in info.name:
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    partial = archive.with_suffix(".part")
    with tarfile.open(partial, "w:xz", preset=9) as tar:
        tar.add(folder, arcname=".", filter=entry)
    partial.rename(archive)


def report_sizes(folder: Path, limit_mib: float) -> int:
    """Print what travels; 1 where it is more than the limit."""
    carried = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0")
    checkout = sum(Path(name).stat().st_size for name in names if name and Path(name).is_file())
    for path in sorted(folder.glob("*.tar.xz")):
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path}")
    total = (carried + checkout) / 2**20
    print(f"{folder} {carried / 2**20:.1f} MiB, checkout {checkout / 2**20:.1f} MiB, together {total:.1f} MiB")
    if total > limit_mib:
        print(f"that is above the limit of {limit_mib:g} MiB: prepare less, or raise --limit-mib", file=sys.stderr)
        return 1
    print(f"take {folder} along with the checkout; there: python3 -m jobs.benchmark.gpu.run")
    return 0


if __name__ == "__main__":
    sys.exit(main())
