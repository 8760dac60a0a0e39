"""Starting a Ray on a machine that is busy with other things."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Started = TypeVar("Started")
_TRIES = 3


def started(start: Callable[[], Started]) -> Started:
    """What `start` returns. Ray's first daemon gives up when its agents take more than 15 s to start, which no setting
    changes; jobs, too, try once more."""
    import ray

    for left in reversed(range(_TRIES)):
        try:
            return start()
        except Exception as error:  # Ray raises plain Exception
            if not left or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise AssertionError
