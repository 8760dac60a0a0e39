"""torchvision beside a torch for CPUs: two operators, without which its wheel for CUDA does not load."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

_libraries: list[torch.library.Library] = []
"""The definitions last as long as these objects."""


def define_missing_operators() -> None:
    """Define torchvision's operators, where it was built for CUDA and does not load beside a torch for CPUs.

    Importing torchvision, as vLLM and transformers do, fails where they are not defined. Nothing here calls them: their
    schemas are enough.
    """
    try:
        built_for = version("torchvision")
    except PackageNotFoundError:
        return
    if torch.__version__.endswith("+cpu") and not built_for.endswith("+cpu") and not _libraries:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        _libraries.append(library)
