"""A plan as a page on the terminal. Knows how figures are shown; not where they come from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.planning.forecast import Range, Spread, Times
from pipeline.planning.plan import Plan

_BAR = 40
_MESSAGE = 100


def print_plan(console: Console, plan: Plan, *, currency: str = "$") -> None:
    """The whole page."""
    rows = plan.rows
    looked = "every row looked at" if rows.is_exact else f"{rows.num_sampled:,} rows looked at; ranges are 95 %"
    console.print(
        f"plan for {plan.input} on {plan.model}: {rows.num_rows:,} rows; {looked} "
        f"({_seconds(plan.looked_s)}, {_bytes(plan.bytes_read)} of media read)",
        markup=False,
    )
    _print_rows(console, plan)
    if rows.num_rows and rows.prompt_tokens.largest:
        _print_tokens(console, plan)
        _print_room(console, plan)
    _print_times(console, plan, currency)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if plan.advice:
        table = _table("suggested settings", "", "", header=False)
        for one in plan.advice:
            table.add_row(Text(one.setting), Text(one.why))
        console.print(table)


def _print_rows(console: Console, plan: Plan) -> None:
    rows = plan.rows
    table = _table("rows", "kind", "rows", "share")
    for kind, count in rows.kinds.items():
        table.add_row(kind, shown(count), f"{count.value / max(rows.num_rows, 1):.1%}")
    console.print(table)
    if not rows.bad:
        unseen = "" if rows.is_exact else f" (at most {rows.num_bad.high:,.0f})"
        console.print(f"\nno row is expected to fail{unseen}; damage inside a file does not show in its header")
        return
    table = _table("rows that will fail", "error", "rows", "for example")
    for bad in rows.bad:
        file, row = bad.example_place
        name = "" if bad.example_id == f"{file}:{row}" else f"{bad.example_id}, "
        message = bad.example_message
        message = message if len(message) <= _MESSAGE else message[: _MESSAGE - 3] + "..."
        table.add_row(bad.error_type, shown(bad.rows), Text(f"{name}file {file} row {row}: {message}"))
    console.print(table)


def _print_tokens(console: Console, plan: Plan) -> None:
    rows = plan.rows
    table = _table("tokens a row", "", "mean", "median", "95 %", "largest", "in all")
    for name, spread in (("prompt", rows.prompt_tokens), ("visual among them", rows.visual_tokens)):
        table.add_row(
            name,
            shown(spread.mean),
            *(f"{value:,.0f}" for value in (spread.median, spread.p95, spread.largest)),
            shown(spread.total),
        )
    console.print(table)
    console.print(f"\nat most {plan.too_long_limit:,} tokens of prompt and answer fit ({plan.too_long_why})")
    console.print(histogram_table("visual tokens", rows.visual_tokens))
    if plan.inexact_videos:
        console.print(f"{plan.inexact_videos:,} sampled videos state no index: their frames are what they say they are")


def histogram_table(title: str, spread: Spread) -> Table:
    """Bars by powers of two."""
    table = _table(title, "from", "to", "sampled rows", "")
    most = max((count for _, _, count in spread.histogram), default=1)
    for low, high, count in spread.histogram:
        length = round(_BAR * count / most)
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", "█" * length or ("▏" if count else ""))
    return table


def _print_room(console: Console, plan: Plan) -> None:
    rows, store = plan.rows, plan.store
    table = _table("bytes", "", "", header=False)
    table.add_row("media to fetch", f"{_range_of_bytes(rows.media_bytes)} in all")
    table.add_row(
        "patches in the object store",
        f"{_bytes(rows.patch_bytes.mean.value)} a row, 95 % below {_bytes(rows.patch_bytes.p95)}; "
        f"{_range_of_bytes(rows.patch_bytes.total)} in all, in blocks of {_bytes(store.block_bytes)}",
    )
    table.add_row(
        "in flight for each engine",
        f"up to {store.blocks_per_engine} blocks, {_bytes(store.bytes_per_engine)} (Ray's store is 30 % of a node's "
        "memory, and its rows may fill half of that)",
    )
    console.print(table)


def _print_times(console: Console, plan: Plan, currency: str) -> None:
    if not plan.times:
        return
    names = ["hardware", "rows/s", "cores an engine", "time", "GPU hours"]
    if any(one.cost is not None for one in plan.times):
        names.append("cost")
    table = _table("time", *names)
    for one in plan.times:
        cells = [one.hardware, _spread_of(one.engine_rows_per_s), _spread_of(one.cores_per_engine)]
        cells.append(f"{_seconds(one.seconds.value)} ({_seconds(one.seconds.low)} to {_seconds(one.seconds.high)})")
        cells.append(_spread_of(one.gpu_hours) if one.gpu_hours else "")
        if one.cost is not None:
            cells.append(f"{currency}{one.cost.value:,.2f} ({one.cost.low:,.2f} to {one.cost.high:,.2f})")
        table.add_row(*cells)
    console.print(table)
    for basis, of_basis in _by_basis(plan.times):
        console.print(f"{basis}", markup=False, soft_wrap=True)
        for one in of_basis:
            console.print(f"  bottleneck, {one.hardware}: {one.bottleneck}", markup=False, soft_wrap=True)
    shares = plan.times[-1].shares
    if shares:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        console.print(f"the engine's arithmetic: {parts}", markup=False)


def _by_basis(times: tuple[Times, ...]) -> list[tuple[str, list[Times]]]:
    """Times with the same kind of basis together; figures of single GPUs are left out of a shared one."""
    groups: dict[str, list[Times]] = {}
    for one in times:
        kind = one.basis.partition(":")[0]
        groups.setdefault(kind, []).append(one)
    return [(group[0].basis if len(group) == 1 else _shared(group[0].basis), group) for group in groups.values()]


def _shared(basis: str) -> str:
    head, _, tail = basis.partition("data sheet's")
    return f"{head}data sheet's bound;{tail.partition(';')[2]}"


def _table(title: str, *columns: str, header: bool = True) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.show_header = header
    for number, name in enumerate(columns):
        right = name in ("rows", "share", "mean", "median", "95 %", "largest", "from", "to", "sampled rows")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=number == 0 and header)
    return table


def shown(of: Range) -> str:
    """A figure, and its range where it has one."""
    if of.low == of.high:
        return _count(of.value)
    return f"{_count(of.value)} ({_count(of.low)} to {_count(of.high)})"


def _count(value: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def _spread_of(of: Range) -> str:
    return f"{_short(of.value)} ({_short(of.low)} to {_short(of.high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} bytes"


def _range_of_bytes(of: Range) -> str:
    if of.low == of.high:
        return _bytes(of.value)
    return f"{_bytes(of.value)} ({_bytes(of.low)} to {_bytes(of.high)})"


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"
