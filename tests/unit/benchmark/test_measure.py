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
    ("function", "argument", "message"),
    [
        (json.loads, "{", r"exit code 1; the end of its stderr:\n(.*\n)*json.decoder.JSONDecodeError: Expecting"),
        (
            exec,
            "import os; os.write(2, b'1\\n' * 50 + b'CUDA is lost\\n'); os._exit(3)",
            r"exit code 3; .*\n1\n(1\n)*CUDA",
        ),
        (exec, "import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_a_worker_that_fails_shows_its_exit_code_and_the_end_of_its_stderr(
    function: Any, argument: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailed, match=message) as caught:
        in_own_process(function, argument)
    shown = str(caught.value).splitlines()[1:]
    assert len(shown) <= 20
    assert all(line in capfd.readouterr().err for line in shown[-1:])
