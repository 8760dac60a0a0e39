"""How a process that ran integration tests ends: with their exit status, whatever happens while Python is taken down.

After some hundred tests it holds threads of Ray, gRPC, servers and FFmpeg. One of them, running on while the
interpreter was dismantled, has ended a run with a segmentation fault after its last test had passed.
"""

from __future__ import annotations

import atexit
import os
import sys

import pytest

_ended: list[pytest.Session] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # workers report to their own caller
        _ended.append(session)


@atexit.register  # before what tests import registers, so it runs after that
def _leave() -> None:
    if _ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_ended[0].exitstatus))
