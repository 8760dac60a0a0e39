"""What differs between model families in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.engine.models.mrope import PositionRule
from pipeline.engine.models.vision import VisionModel


@dataclass(frozen=True)
class Architecture:
    """A model family. `config` is transformers' config of a checkpoint."""

    model_class: str
    """transformers' class that reads the weights."""
    patch_size: int
    """Pixels of a patch's side."""
    vision: type[VisionModel]
    output_width: str
    """The field of vision_config that is the text model's width."""
    mrope_section: tuple[int, int, int]
    """Frequencies of the text model's rotation that follow time, height and width, where a config does not say."""
    interleaved: bool
    """Whether these take turns, or stand in three blocks."""
    positions: Callable[[Any], PositionRule]
    problems: Callable[[Any], Iterator[str]]
    """What of a config this family's forward pass does not compute."""
