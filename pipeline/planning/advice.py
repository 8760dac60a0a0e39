"""Settings worth changing, from a plan's figures. Plain arithmetic and the names of the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import PromptTooLong, counted
from pipeline.planning.forecast import Engines, Times
from pipeline.planning.sample import Range, Rows, Sample

_MIN_BAD_SHARE = 0.001
_MANY_CORES = 8
_MANY_VISUAL_TOKENS = 600


@dataclass(frozen=True)
class Advice:
    """A setting worth changing, and why."""

    setting: str
    """As on the command line, `--section.key value`; empty where none helps, which a plan shows as a note."""
    why: str


def advise(
    sample: Sample,
    rows: Rows,
    times: Times | None,
    engines: Engines,
    fitted: Engines,
    *,
    max_length: int,
    rows_per_unit: int,
) -> Iterator[Advice]:
    """Settings to change.

    `fitted`: the engines with as many GPUs as the weights need; `max_length`: tokens of prompt and answer that fit;
    `rows_per_unit`: the fewest rows that a preprocessing actor takes at once.
    """
    if fitted.gpus_per_engine > engines.gpus_per_engine:
        gpus = counted(engines.gpus_per_engine, "GPU", form="g")
        setting = f"--resources.gpus_per_engine {fitted.gpus_per_engine:g}"
        yield Advice(setting, f"the weights and a cache don't fit into {gpus}")
    bad = {one.error_type: one for one in rows.bad}
    too_long = [row for row in sample.rows if isinstance(row.error, PromptTooLong)]
    if too_long:
        others = max(row.max_tokens + row.num_prompt_tokens - row.num_visual_tokens for row in too_long)
        longest = max(row.num_prompt_tokens for row in too_long)
        if max_length > others:
            why = f"rows of up to {longest:,} tokens don't fit; media shrink to fit"
            yield Advice(f"--media.max_visual_tokens {max_length - others}", why)
        else:
            yield Advice("", "some rows' text alone is too long for the context: shorten or split it")
    if "AccessDenied" in bad:
        why = f"rows name places that they may not read: {bad['AccessDenied'].example_message}"
        yield Advice("--input.allow [PLACE, ...]", why)
    if rows.num_bad.value > _MIN_BAD_SHARE * rows.num_rows:
        allowed = math.ceil(200 * rows.num_bad.high / rows.num_rows) / 100
        if allowed < 1:
            why = "stops the job early where far more rows fail than this plan expects"
            yield Advice(f"--run.max_error_fraction {allowed:g}", why)
        else:
            share = _percent(rows.num_bad, rows.num_rows)
            yield Advice("", f"{share} of the rows will fail: fix them before the run")
    if times is None:
        return
    if engines.gpus_per_engine:
        yield from _of_actors(rows, times, engines, rows_per_unit)
    video_s = sum(row.video_core_s for row in sample.answered)
    all_s = sum(row.core_s for row in sample.answered)
    if video_s > all_s / 2 and times.cores_per_engine.value > _MANY_CORES:
        why = f"decoding videos takes {video_s / all_s:.0%} of preprocessing; keyframes need far less, and differ"
        yield Advice("--media.video_frames keyframes", why)
    vision, visual_tokens = times.shares.get("vision", 0.0), rows.visual_tokens.mean.value
    if vision > 0.4 and visual_tokens > _MANY_VISUAL_TOKENS:
        why = (
            f"{visual_tokens:,.0f} visual tokens a row; {vision:.0%} of the engine's work is the vision tower's: half "
            "the pixels save about half of it"
        )
        yield Advice("--media.max_pixels N", why)


def _of_actors(rows: Rows, times: Times, engines: Engines, rows_per_unit: int) -> Iterator[Advice]:
    """How many preprocessing actors keep the engines busy, and have rows to work on."""
    cores = times.cores_per_engine * engines.num_engines
    most = max(1, math.ceil(rows.num_rows / rows_per_unit))
    enough, plenty = (min(most, max(1, math.ceil(count))) for count in (cores.value, cores.high))
    if engines.num_cpus is None or enough > engines.num_cpus:
        why = ", so that no GPU waits" if enough < most else "; more would find no rows to work on"
        yield Advice(f"--resources.preprocess_actors {enough}", f"one core each{why}")
    elif 2 * plenty < engines.num_cpus:
        yield Advice(f"--resources.preprocess_actors {plenty}", "one core each; more would wait for the engines")


def _percent(count: Range, num_rows: int) -> str:
    low, value, high = (f"{number / num_rows:.0%}" for number in (count.low, count.value, count.high))
    return value if low == high else f"{value} ({low} to {high})"
