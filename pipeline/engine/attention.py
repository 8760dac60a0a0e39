"""Attention backends behind one interface, and the choice between them."""

from __future__ import annotations

import importlib.util


def flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None
