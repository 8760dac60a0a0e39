"""A plan as a page on the terminal. Knows how figures are shown; not where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import counted
from pipeline.planning.plan import Plan
from pipeline.planning.sample import Range, Spread

_BAR_LENGTH = 40
_MAX_MESSAGE = 100


def print_plan(console: Console, plan: Plan, *, currency: str = "$") -> None:
    rows = plan.rows
    looked = "every row looked at" if rows.is_exact else f"{rows.num_sampled:,} rows looked at; ranges are 95 %"
    console.print(
        f"plan for {plan.input} on {plan.model}: {counted(rows.num_rows, 'row')}; {looked} "
        f"({_seconds(plan.looked_s)}, {_bytes(plan.bytes_read)} of media read)",
        markup=False,
    )
    _print_rows(console, plan)
    if rows.num_rows and rows.prompt_tokens.largest:
        _print_tokens(console, plan)
        _print_bytes(console, plan)
    _print_times(console, plan, currency)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if plan.advice:
        _print_table(console, "suggested settings", [], [(one.setting, one.why) for one in plan.advice])


def _print_rows(console: Console, plan: Plan) -> None:
    rows = plan.rows
    kinds = [(kind, _shown(count), f"{count.value / max(rows.num_rows, 1):.1%}") for kind, count in rows.kinds.items()]
    _print_table(console, "rows", ["kind", ">rows", ">share"], kinds)
    if not rows.bad:
        unseen = "" if rows.is_exact else f" (at most {rows.num_bad.high:,.0f})"
        console.print(f"\nno row is expected to fail{unseen}; damage inside a file does not show in its header")
        return
    lines = []
    for bad in rows.bad:
        file, row = bad.example_row_key
        name = "" if bad.example_id == f"{file}:{row}" else f"{bad.example_id}, "
        message = bad.example_message
        message = message if len(message) <= _MAX_MESSAGE else message[: _MAX_MESSAGE - 3] + "..."
        lines.append((bad.error_type, _shown(bad.rows), f"{name}file {file} row {row}: {message}"))
    _print_table(console, "rows that will fail", ["error", ">rows", "for example"], lines)


def _print_tokens(console: Console, plan: Plan) -> None:
    rows = plan.rows
    lines = [
        (name, _shown(of.mean), *(f"{value:,.0f}" for value in (of.median, of.p95, of.largest)), _shown(of.total))
        for name, of in (("prompt", rows.prompt_tokens), ("visual among them", rows.visual_tokens))
    ]
    _print_table(console, "tokens per row", ["", ">mean", ">median", ">95th percentile", ">largest", "total"], lines)
    console.print(f"\nat most {plan.too_long_limit:,} tokens of prompt and answer fit ({plan.too_long_why})")
    print_histogram(console, "visual tokens", rows.visual_tokens)
    if plan.inexact_videos:
        videos = counted(plan.inexact_videos, "sampled video")
        console.print(f"{videos} without an index: frames follow from the stated duration")


def print_histogram(console: Console, title: str, spread: Spread) -> None:
    most = max((count for _, _, count in spread.histogram), default=1)
    lines = []
    for low, high, count in spread.histogram:
        bar = "█" * round(_BAR_LENGTH * count / most) or ("▏" if count else "")
        lines.append((f"{low:,}", f"{high:,}", f"{count:,}", bar))
    _print_table(console, title, [">from", ">to", ">sampled rows", ""], lines)


def _print_bytes(console: Console, plan: Plan) -> None:
    rows, store = plan.rows, plan.store
    patches = (
        f"{_bytes(rows.patch_bytes.mean.value)} a row, 95th percentile {_bytes(rows.patch_bytes.p95)}; "
        f"{_shown(rows.patch_bytes.total, _bytes)} in all, in blocks of {_bytes(store.block_bytes)}"
    )
    in_flight = (
        f"up to {store.blocks_per_engine} blocks, {_bytes(store.bytes_per_engine)} (Ray's store is 30 % of a node's "
        "memory, and its rows may fill half of that)"
    )
    lines = [
        ("media to fetch", f"{_shown(rows.media_bytes, _bytes)} in all"),
        ("patches in the object store", patches),
        ("in flight for each engine", in_flight),
    ]
    _print_table(console, "bytes", [], lines)


def _print_times(console: Console, plan: Plan, currency: str) -> None:
    if not plan.times:
        return
    columns = ["hardware", "rows/s", "cores per engine", "time", "GPU hours", "cost"]
    lines = [
        (
            one.hardware,
            _shown(one.engine_rows_per_s, _short),
            _shown(one.cores_per_engine, _short),
            _shown(one.seconds, _seconds),
            _shown(one.gpu_hours, _short) if one.gpu_hours is not None else "",
            currency + _shown(one.cost, "{:,.2f}".format) if one.cost is not None else "",
        )
        for one in plan.times
    ]
    has_cost = any(one.cost is not None for one in plan.times)
    _print_table(console, "time", columns if has_cost else columns[:-1], lines)
    for basis in dict.fromkeys(one.basis for one in plan.times):
        console.print(basis, markup=False, soft_wrap=True)
        for one in plan.times:
            if one.basis == basis:
                peaks = f" ({one.data_sheet})" if one.data_sheet else ""
                console.print(f"  bottleneck, {one.hardware}{peaks}: {one.bottleneck}", markup=False, soft_wrap=True)
    shares = plan.times[-1].shares
    if shares:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"the engine's arithmetic: {parts}", markup=False)


def _print_table(console: Console, title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """A table; `>` before a column's name aligns it to the right. Without columns, two without a header."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = bool(columns)
    for number, name in enumerate(columns or ("", "")):
        right = name.startswith(">")
        keep_whole = number == 0 and bool(columns)
        table.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=keep_whole)
    for line in lines:
        table.add_row(*map(Text, line[: len(table.columns)]))
    console.print(table)


def _count(value: float) -> str:
    return _scaled(value, ((1e12, " T"), (1e9, " G"), (1e6, " M")), "")


def _bytes(value: float) -> str:
    return _scaled(value, ((1e15, " PB"), (1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " bytes")


def _scaled(value: float, units: Iterable[tuple[float, str]], unit: str) -> str:
    """Three digits and the largest unit that fits."""
    return next((f"{value / size:.3g}{name}" for size, name in units if value >= size), f"{value:,.0f}{unit}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _shown(of: Range, number: Callable[[float], str] = _count) -> str:
    """A figure, and its range where it has one."""
    if of.low == of.high:
        return number(of.value)
    return f"{number(of.value)} ({number(of.low)} to {number(of.high)})"
