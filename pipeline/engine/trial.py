"""Which implementation of a part runs here: the first that runs without an error and agrees with the simplest one.

A part (attention, kernels, CUDA graphs) has several candidates, the fastest first. The last one is plain torch: it runs
anywhere, and the results of the others are compared with its own. Knows neither parts nor passes; the caller says how a
candidate is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pipeline.engine.device import is_alive
from pipeline.errors import CheckpointError, JobError, first_line

log = logging.getLogger(__name__)
T = TypeVar("T")

TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}
"""Largest difference between two results that rounding explains, as a share of the largest value."""


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """One implementation of a part."""

    name: str
    load: Callable[[], T]
    """Import and build it. It may raise anything; that is then the reason why it is not used."""


class Trial:
    """Chooses the parts of one engine, and remembers which candidates failed."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        self.replaced: dict[str, str] = {}
        """`PART CANDIDATE` of each one that was tried and failed, with the reason."""

    def choose(
        self,
        part: str,
        candidates: Sequence[Candidate[T]],
        *,
        results: Callable[[T], Sequence[torch.Tensor]],
        use: Callable[[T], None],
        forced: bool = False,
        not_its_fault: Callable[[Exception], bool] = lambda error: False,
        tolerance: float = 1.0,
    ) -> T:
        """The first candidate that works, already in use.

        `results` runs a candidate on small inputs, for the comparison; `use` puts it into the engine and runs whole
        passes. If one that is `forced` fails either, that is a CheckpointError; otherwise the next is tried, with one
        warning. The last candidate is not compared with anything, and what it raises is not caught. `tolerance` is a
        factor on TOLERANCE, for results of many operations. Errors that are `not_its_fault` are raised: another
        candidate would not help.
        """
        *faster, simplest = candidates
        expected: Sequence[torch.Tensor] | None = None
        for candidate, following in zip(faster, candidates[1:], strict=True):
            if expected is None:
                expected = results(simplest.load())
            try:
                loaded = candidate.load()
                found = results(loaded)
                if (difference := _difference(found, expected, tolerance)) is not None:
                    raise ArithmeticError(f"it computes other numbers than {simplest.name}: {difference}")
                use(loaded)
            except Exception as error:
                if isinstance(error, JobError) or not_its_fault(error):
                    raise
                reason = f"{type(error).__name__}: {first_line(error)}"
            else:
                return loaded
            self._check_devices(part, candidate.name, following.name, reason)
            if forced:
                raise CheckpointError(
                    f"engine.{part} is {candidate.name!r}, which does not work here: {reason}; use auto"
                )
            log.warning("%s: %s does not work here, so %s is used: %s", part, candidate.name, following.name, reason)
            self.replaced[f"{part} {candidate.name}"] = reason
        loaded = simplest.load()
        use(loaded)
        return loaded

    def _check_devices(self, part: str, name: str, following: str, reason: str) -> None:
        """A process whose device is dead can try nothing more."""
        if not all(is_alive(device) for device in self._devices):
            raise CheckpointError(
                f"the trial of {part} {name} has left the GPU unusable for this process: {reason}; "
                f"set engine.{part} so that {following} is used"
            )


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> str | None:
    """Where two lists of results differ by more than rounding; None if they agree."""
    for number, (mine, other) in enumerate(zip(found, expected, strict=True)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            return f"result {number} is {mine.dtype} {tuple(mine.shape)}, not {other.dtype} {tuple(other.shape)}"
        largest = float(other.float().abs().max())
        error = float((mine.float() - other.float()).abs().max())
        if not error <= tolerance * TOLERANCE[other.dtype] * largest:  # also where the error is NaN
            return f"result {number} differs by {error:.3g}, where the largest value is {largest:.3g}"
    return None
