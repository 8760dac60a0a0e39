"""C code that is compiled on the machine where it runs, once for each version of it, as Triton does with its launchers.

Knows compilers and where the results are kept; not what the code computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = Path("~/.cache/qwen2-vl-batch/compiled")
MAX_SECONDS = 300
"""For a compiler; two are usual."""


def compiler() -> list[str] | None:
    """The command of a C compiler: that of $CC, else the first that is installed; None without one."""
    commands = (_split(command) for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"))
    return next((command for command in commands if command and shutil.which(command[0])), None)


def _split(command: str) -> list[str]:
    """The words of a command; none where its quotes do not match."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def load_library(folder: Path, name: str, flags: Sequence[str]) -> ctypes.CDLL:
    """All C files of a folder as one library, compiled unless that was done before.

    Raises RuntimeError with what the compiler says, and OSError where the result can't be loaded.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("no C compiler is installed; install gcc or clang, or name one by the variable CC")
    # Without errno a square root is an instruction; with it the C library's function, which we do not link.
    command = [*found, "-O3", "-fno-math-errno", "-shared", "-fPIC", *flags]
    sources = sorted(folder.glob("*.[ch]"))
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    command += [str(source) for source in sources if source.suffix == ".c"]
    file_name = f"{name}-{digest.hexdigest()[:16]}.so"
    try:
        return _from_home(command, file_name)
    except (OSError, RuntimeError) as error:  # no home, or a full, a read-only or a damaged one
        log.debug("%s is compiled for this process alone: %s", name, error)
    with tempfile.TemporaryDirectory() as scratch:
        return ctypes.CDLL(str(_compile(command, Path(scratch) / file_name)))


def _from_home(command: Sequence[str], file_name: str) -> ctypes.CDLL:
    home = FOLDER.expanduser()
    home.mkdir(parents=True, exist_ok=True)
    library = home / file_name
    if not library.exists():
        # Engines that start at the same time may all compile it; each puts a whole file in place.
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            os.replace(_compile(command, Path(scratch) / file_name), library)
    return ctypes.CDLL(str(library))


def _compile(command: Sequence[str], library: Path) -> Path:
    finished = subprocess.run(
        [*command, "-o", str(library)], capture_output=True, text=True, errors="replace", timeout=MAX_SECONDS
    )
    if finished.returncode:
        said = finished.stderr.splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else "it says nothing")
        raise RuntimeError(f"{shlex.join(command)} fails with code {finished.returncode}: {reason}")
    return library
