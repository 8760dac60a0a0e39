"""A benchmark's worker: its result, and what is reported when it fails."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from jobs.benchmark.measure import WorkerFailed, in_own_process


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert in_own_process(math.sqrt, 4.0) == 2.0


@pytest.mark.parametrize(
    ("function", "argument", "message", "shown"),
    [
        (json.loads, "{", "exit code 1; ", "JSONDecodeError: Expecting"),
        (exec, "import os; os.write(2, b'CUDA is lost'); os.kill(os.getpid(), 9)", "exit code -9; ", "CUDA is lost"),
    ],
)
def test_a_worker_that_fails_is_named_by_its_exit_code_and_its_stderr_is_shown(
    function: Any, argument: str, message: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailed, match=message):
        in_own_process(function, argument)
    assert shown in capfd.readouterr().err
