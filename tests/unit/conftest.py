"""Unit tests need no GPU: Triton's kernels run in its interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
