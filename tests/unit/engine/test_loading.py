"""What is reported while an engine loads."""

from __future__ import annotations

from pipeline.demo import CHECKPOINT
from pipeline.engine import EngineOptions
from pipeline.engine.load import load_engine


def test_loading_reports_tensors_and_warm_up_and_draws_no_bar(capfd: object) -> None:
    states: list[str] = []
    load_engine(EngineOptions(str(CHECKPOINT)), report=states.append)
    assert states[0] == "reading weights" and states[-1] == "warming up"
    tensors = [state for state in states if "tensor" in state]
    last = tensors[-1].removeprefix("reading weights, tensor ").split(" of ")
    assert last[0] == last[1] and len(tensors) == int(last[1])
    assert "Loading weights" not in capfd.readouterr().err  # type: ignore[attr-defined]
