"""Which attention backends may be tried here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from pipeline.engine.attention.choose import flash_attn_installed


def test_a_folder_that_flash_attn_4_leaves_is_not_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    importlib.invalidate_caches()
    assert not flash_attn_installed()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert flash_attn_installed()
