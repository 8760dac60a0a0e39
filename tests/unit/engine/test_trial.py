"""The choice of a part: what raises or computes other numbers is replaced, once and with a reason; forced is forced."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pipeline.engine.trial import Candidate, Trial
from pipeline.errors import CheckpointError

VALUES = torch.tensor([1.0, -2.0, 3.0])


def raises(error: Exception) -> Any:
    def load() -> Any:
        raise error

    return load


def choose(candidates: Sequence[Candidate[torch.Tensor]], *, forced: bool = False, **calls: Any) -> tuple[Any, Trial]:
    trial = Trial([torch.device("cpu")])
    use: Callable[[torch.Tensor], None] = calls.get("use", lambda loaded: None)
    chosen = trial.choose("kernels", candidates, results=lambda loaded: [loaded], use=use, forced=forced)
    return chosen, trial


def eager() -> Candidate[torch.Tensor]:
    return Candidate("eager", lambda: VALUES)


def test_the_first_that_agrees_within_rounding_is_used() -> None:
    used: list[float] = []
    close = VALUES * (1 + 1e-6)
    chosen, trial = choose(
        [Candidate("fused", lambda: close), eager()], use=lambda loaded: used.append(float(loaded[0]))
    )
    assert chosen is close and used == [float(close[0])]
    assert trial.replaced == {}


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (raises(RuntimeError("no C compiler\nmore")), "RuntimeError: no C compiler"),
        (raises(ImportError("undefined symbol")), "ImportError: undefined symbol"),
        (lambda: VALUES * 1.01, "other numbers than eager: result 0 differs by 0.03, where the largest value is 3"),
        (lambda: VALUES * float("nan"), "result 0 differs by nan"),
        (lambda: VALUES[:2], r"result 0 is torch.float32 \(2,\), not torch.float32 \(3,\)"),
    ],
)
def test_one_that_fails_is_replaced_with_one_warning(load: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen, trial = choose([Candidate("fused", load), eager()])
    assert chosen is VALUES
    (warning,) = caplog.messages
    assert warning.startswith("kernels: fused does not work here, so eager is used: ")
    assert re.search(reason, warning) and re.search(reason, trial.replaced["kernels fused"])


def test_one_that_fails_in_a_whole_pass_is_replaced_by_the_next_in_order() -> None:
    def use(loaded: torch.Tensor) -> None:
        if loaded is not VALUES and loaded is not second:
            raise RuntimeError("too large a grid")

    second = VALUES.clone()
    chosen, trial = choose(
        [Candidate("first", lambda: VALUES.clone()), Candidate("second", lambda: second), eager()], use=use
    )
    assert chosen is second
    assert trial.replaced == {"kernels first": "RuntimeError: too large a grid"}


def test_a_forced_one_that_fails_is_an_error() -> None:
    with pytest.raises(
        CheckpointError, match=r"engine.kernels is 'fused', which does not work here: RuntimeError: boom"
    ):
        choose([Candidate("fused", raises(RuntimeError("boom"))), eager()], forced=True)


def test_bfloat16_is_compared_within_its_own_rounding() -> None:
    exact = torch.linspace(-1, 1, 50).bfloat16()
    rounded = (exact.float() * 1.01).bfloat16()
    trial = Trial([])
    candidates = [Candidate("fused", lambda: rounded), Candidate("eager", lambda: exact)]
    assert trial.choose("kernels", candidates, results=lambda x: [x], use=lambda x: None) is rounded


def test_a_trial_that_kills_the_device_ends_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(device: torch.device) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    trial = Trial([torch.device("cuda")])
    candidates = [Candidate("fused", raises(RuntimeError("illegal memory access"))), eager()]
    with pytest.raises(
        CheckpointError, match=r"left the GPU unusable for this process.*set engine.kernels so that eager"
    ):
        trial.choose("kernels", candidates, results=lambda loaded: [loaded], use=lambda loaded: None)


def test_a_lack_of_memory_is_no_candidate_s_fault() -> None:
    trial = Trial([torch.device("cpu")])
    candidates = [Candidate("fused", raises(MemoryError("full"))), eager()]
    with pytest.raises(MemoryError):
        trial.choose(
            "kernels",
            candidates,
            results=lambda loaded: [loaded],
            use=lambda loaded: None,
            not_its_fault=lambda error: isinstance(error, MemoryError),
        )
    assert trial.replaced == {}


def test_a_reference_that_fails_is_not_blamed_on_the_candidate() -> None:
    with pytest.raises(ImportError, match="no eager"):
        choose([Candidate("fused", lambda: VALUES), Candidate("eager", raises(ImportError("no eager")))])


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.03), (torch.float16, 0.005), (torch.float32, 1e-4)])
def test_what_counts_as_rounding_depends_on_the_dtype(dtype: torch.dtype, share: float) -> None:
    expected = torch.tensor([4.0, 256.0], dtype=dtype)
    for factor, is_used in ((0.5, True), (2.0, False)):
        other = (expected.float() + torch.tensor([256.0 * share * factor, 0.0])).to(dtype)
        chosen, _ = choose([Candidate("fused", lambda other=other: other), Candidate("eager", lambda: expected)])
        assert (chosen is other) is is_used
