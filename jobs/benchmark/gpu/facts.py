"""What this machine has: GPU, driver, compilers, packages, and how long the first imports take.

Prints a line a fact; what is missing is said, not raised.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "tokenizers", "safetensors", "accelerate", "flash-attn", "fa3-fwd"),
    *("flash-attn-4", "vllm", "ray", "av", "pydantic", "pyarrow", "pillow", "pytest", "pytest-timeout", "hypothesis"),
)
GPU_FIELDS = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"


def main() -> int:
    """Print the facts; returns the exit code."""
    print(f"Python {sys.version.split()[0]} at {sys.executable}, {platform.platform()}")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    print(f"Python headers {'at' if headers.exists() else 'MISSING at'} {headers.parent}; Triton needs them")
    for tool in ("gcc", "nvcc"):
        print(f"{tool} {shutil.which(tool) or 'is missing'}")
    _show("nvidia-smi", f"--query-gpu={GPU_FIELDS}", "--format=csv")
    _show("nproc")
    _show("free", "-g")
    _show("df", "-h", "/tmp", "/dev/shm")
    print("package", ", ".join(f"{package} {_version(package)}" for package in PACKAGES))
    for module in ("torch", "transformers", "triton", "fa3_fwd_interface", "flash_attn"):
        started = time.perf_counter()
        try:
            importlib.import_module(module)
        except Exception as error:  # a package may fail to import in any way
            print(f"import {module} fails: {type(error).__name__}: {str(error)[:120]}")
        else:
            print(f"import {module} takes {time.perf_counter() - started:.1f} s")
    _device()
    return 0


def _device() -> None:
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    if not torch.cuda.is_available():
        print("GPU none")
        return
    started = time.perf_counter()
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    print(
        f"GPU {torch.cuda.get_device_name()}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, "
        f"first touch {time.perf_counter() - started:.1f} s"
    )
    print(torch.cuda.get_device_properties(0))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _show(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}")
        return
    print((done.stdout or done.stderr).strip())


if __name__ == "__main__":
    sys.exit(main())
