"""What an engine is doing before its first row, as short texts for whoever waits.

Knows transformers' progress bars; not who shows the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Report: TypeAlias = Callable[[str], None]


def ignore(state: str) -> None:
    """A `Report` for whoever does not want to know."""


@contextmanager
def weights_reported(report: Report) -> Iterator[None]:
    """Report how many tensors have been read, in place of transformers' bars, which fill logs with their lines."""
    from transformers.utils import logging

    def silent(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        items = args[0] if args else kwargs.get("iterable")
        if items is None:
            return factory(*args, **{**kwargs, "disable": True})
        return _SilentBar(items, report)

    if not hasattr(logging, "set_tqdm_hook"):  # younger than the oldest transformers that we run with
        yield
        return
    before = logging.set_tqdm_hook(silent)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


class _SilentBar:
    """Iterates like a progress bar, and takes its other calls."""

    def __init__(self, items: Any, report: Report) -> None:
        self._items, self._report = items, report

    def __iter__(self) -> Iterator[Any]:
        total = len(self._items) if hasattr(self._items, "__len__") else None
        for number, item in enumerate(self._items, 1):
            self._report(f"reading weights, tensor {number:,}" + (f" of {total:,}" if total else ""))
            yield item

    def __enter__(self) -> _SilentBar:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
