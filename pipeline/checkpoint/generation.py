"""How a checkpoint's makers choose its tokens: what `generation_config.json` and the family's card say.

A job does not follow it by itself: it is greedy, so that it gives the same answers again. But it says so where the
makers do otherwise, and how to do as they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pipeline.checkpoint.families.family import Family, Sampling
from pipeline.checkpoint.locate import read_json

_AS_GOOD_AS_GREEDY = 0.01
"""Temperatures up to this one are the makers' way to write 0."""


def published_sampling(model_path: str, family: Family, *, thinks: bool, revision: str | None = None) -> Sampling:
    """The checkpoint's own, and where its file says nothing (as of penalties for presence), that of the family."""
    stated = read_json(model_path, "generation_config.json", revision) or {}
    if stated.get("do_sample") is False:
        stated["temperature"] = 0.0
    of_family = asdict(family.thinking_sampling if thinks else family.sampling)
    own = {name: stated[name] for name in of_family if isinstance(stated.get(name), int | float)}
    found = Sampling(**{**of_family, **own})
    if found.top_k == 1 or found.temperature <= _AS_GOOD_AS_GREEDY:
        return replace(found, temperature=0.0, top_k=0, top_p=1.0)
    return found


def greedy_note(published: Mapping[str, float], sampling: Mapping[str, Any]) -> str | None:
    """A sentence on a job that chooses tokens by default (`sampling` is its section of that name) where the makers of
    the checkpoint choose otherwise; None where there is nothing to say."""
    default = asdict(Sampling())
    others = {name: value for name, value in published.items() if value != default[name]}
    if not others or any(sampling[name] != value for name, value in default.items()):
        return None
    if published["temperature"] and sampling["seed"] is None:
        others["seed"] = 0  # or answers differ from run to run
    flags = " ".join(f"--sampling.{name} {value:g}" for name, value in others.items())
    return f"tokens are chosen greedily and without penalties, the default; the checkpoint's makers choose by {flags}"
