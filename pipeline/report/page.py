"""The report: everything gathered once, then shown as one HTML page or as a few lines of Markdown.

    RunReader -> collect -> Report -> render_html | markdown.render_markdown

The page is one file without scripts: it fetches nothing, and a content security policy forbids it to. Everything from
data or model passes Jinja's escaping. Knows what a reader wants to see first; not how anything was computed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import storage
from pipeline.report import plots
from pipeline.report.baseline import OtherRun, read_other_run
from pipeline.report.collect import Collected, CountHistogram, collect
from pipeline.report.facts import Speed, headline, rates, settings_lines, shown_source, speed
from pipeline.report.gallery import Card, CardMaker
from pipeline.report.thumbnails import ThumbnailMaker
from pipeline.results.reader import Position, RunReader, place_key

_TEMPLATE_FOLDER = Path(__file__).parent
_TEMPLATE = "page.html.j2"
_MAX_HTML_BYTES = 5_000_000
_MAX_ERROR_EXAMPLES = 12

_SECTIONS = (
    ("lost", "Lost against the baseline", "Rows whose score fell most."),
    ("won", "Won against the baseline", "Rows whose score rose most."),
    ("worst", "Worst", "Lowest scores; of equal ones a random few."),
    ("best", "Best", "Highest scores; of equal ones a random few."),
    ("random", "Random", "Answered rows drawn at random."),
    ("errors", "Errors", "One row of each kind of error."),
    ("truncated", "Truncated", "Answers that ended at max_tokens."),
    ("repeating", "Repeating", "Answers that say the same again and again."),
    ("longest", "Longest", "Most output tokens."),
    ("slowest", "Slowest", "Longest in the engine, waiting for a place included."),
)


@dataclass(frozen=True)
class ReportOptions:
    """What goes onto the page."""

    thumbnails: bool = True
    cards: int = 6
    """Rows in each section of the gallery."""
    price_per_gpu_hour: float | None = None
    currency: str = "$"
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """Everything a page shows."""

    reader: RunReader
    collected: Collected
    speed: Speed
    metrics: Mapping[str, Any] | None
    comparison: Mapping[str, Any] | None
    other: OtherRun | None
    sections: tuple[tuple[str, str, str, tuple[Card, ...]], ...]
    """Key, title, what it shows, cards."""
    errors: tuple[tuple[str, str, int, Card | None], ...]
    """Type, stage, rows, an example."""
    progress: tuple[Mapping[str, Any], ...]
    options: ReportOptions

    @property
    def run(self) -> Mapping[str, Any]:
        return self.reader.run

    @property
    def state(self) -> str:
        """finished, running, interrupted, failed: as the folder says."""
        if self.reader.is_finished:
            return "finished"
        state = self.run.get("state")
        return state if isinstance(state, str) and state != "finished" else "unfinished"

    @property
    def num_expected(self) -> int | None:
        """Rows that the finished run will have."""
        counts = self.run.get("counts")
        found = counts.get("rows") if isinstance(counts, Mapping) else None
        manifest = self.run.get("manifest")
        if found is None and isinstance(manifest, Mapping):
            found = manifest.get("num_rows")
        return found if isinstance(found, int) else None


def gather(
    path: str,
    *,
    comparison: Mapping[str, Any] | None = None,
    baseline: str | None = None,
    options: ReportOptions | None = None,
    storage_options: storage.StorageOptions = None,
) -> Report:
    """Reads the run folder once. `comparison` is that of the two runs' scores, where both have any.

    Raises OutputError when either folder is no run.
    """
    options = options or ReportOptions()
    reader = RunReader(path, storage_options)
    metrics = reader.metrics
    comparison = comparison or (metrics or {}).get("baseline")
    other_path = baseline or (comparison or {}).get("run")
    places = {name: [place_key(*place) for place in (comparison or {}).get(name, ())] for name in ("won", "lost")}
    wanted = {key for keys in places.values() for key in keys}
    found = collect(reader, size=options.cards, places=wanted, seed=options.seed)
    other = None
    if other_path and (baseline or storage.exists(str(other_path), storage_options)):
        other_reader = RunReader(str(other_path), storage_options)
        other = read_other_run(reader, other_reader, wanted, price_per_gpu_hour=options.price_per_gpu_hour)
    for name, keys in places.items():
        found.sections[name] = [found.by_place[key] for key in keys if key in found.by_place][: options.cards]
    kinds = sorted(found.errors.values(), key=lambda kind: -kind.count)
    found.sections["errors"] = [kind.example for kind in kinds[: options.cards]]
    cards, examples = _cards(reader, found, other, metrics, options, kinds)
    return Report(
        reader=reader,
        collected=found,
        speed=speed(reader.run, price_per_gpu_hour=options.price_per_gpu_hour),
        metrics=metrics,
        comparison=comparison,
        other=other,
        sections=tuple((key, title, what, tuple(cards[key])) for key, title, what in _SECTIONS if cards.get(key)),
        errors=tuple((kind.kind, kind.stage, kind.count, examples.get(kind.example)) for kind in kinds),
        progress=tuple(reader.progress()),
        options=options,
    )


def _cards(
    reader: RunReader,
    found: Collected,
    other: OtherRun | None,
    metrics: Mapping[str, Any] | None,
    options: ReportOptions,
    kinds: Sequence[Any],
) -> tuple[dict[str, list[Card]], dict[Position, Card]]:
    """The cards of each section, and the examples of errors."""
    examples = [kind.example for kind in kinds[:_MAX_ERROR_EXAMPLES]]
    wanted = {position for positions in found.sections.values() for position in positions} | set(examples)
    rows = reader.fetch(wanted)
    columns = (metrics or {}).get("columns") or {}
    with ThumbnailMaker(reader.run) as maker:
        make = CardMaker(
            reader.run,
            reader.columns,
            references=columns.get("references"),
            thumbnails=maker if options.thumbnails else None,
        )

        def card(position: Position, *, compared: bool = False) -> Card:
            row = rows[position]
            key = place_key(row["manifest_file"], row["manifest_row"])
            before = other.texts.get(key) if other is not None and compared else None
            return make.card(row, found.scores.get(position), before)

        cards = {
            name: [card(position, compared=name in ("won", "lost")) for position in found.sections.get(name, ())]
            for name, _, _ in _SECTIONS
        }
        return cards, {position: card(position) for position in examples}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text


def shown_number(value: float | None, digits: int = 1) -> str:
    """A quantity with thousands separators, a dash where there is none."""
    if value is None or value != value:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def shown_duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shown_score(value: float | None, maximum: float = 1.0) -> str:
    """A share as a percentage; a metric with another scale (CIDEr) as it is."""
    if value is None or value != value:
        return "–"
    return f"{100 * value:.1f} %" if maximum == 1.0 else f"{value:.2f}"


def shown_interval(low: float | None, high: float | None, maximum: float = 1.0) -> str:
    """A 95 % interval."""
    if low is None or high is None:
        return "no interval"
    if maximum == 1.0:
        return f"{100 * low:.1f} to {100 * high:.1f} %"
    return f"{low:.2f} to {high:.2f}"


def shown_p(value: float) -> str:
    """A p value; tiny ones by their bound."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def metric_facts(report: Report, name: str) -> tuple[str, str, float]:
    """Title, explanation and scale of a metric."""
    known = ((report.metrics or {}).get("definitions") or {}).get(name) or {}
    return known.get("title") or name, known.get("what") or "", float(known.get("maximum") or 1.0)


def shown_difference(comparison: Mapping[str, Any], maximum: float) -> str:
    """A difference with its interval, in points for percentages."""
    scale, unit = (100, " points") if maximum == 1.0 else (1, "")
    digits = 1 if maximum == 1.0 else 2
    difference, low, high = (comparison.get(key) for key in ("difference", "low", "high"))
    if difference is None:
        return "–"
    text = f"{scale * difference:+.{digits}f}{unit}"
    if low is None or high is None:
        return text
    return f"{text} ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"


def verdict(report: Report) -> tuple[str, str] | None:
    """How the run stands against its baseline: a word for the colour, and a sentence."""
    if report.comparison and report.comparison.get("metrics"):
        name, first = next(iter(report.comparison["metrics"].items()))
        title, _, maximum = metric_facts(report, name)
        how = first.get("verdict", "no difference found")
        if how == "identical":
            return "same", f"Identical scores on all {first['num_rows']:,} rows that both runs have ({title})."
        words = {"better": "Better", "worse": "Worse"}.get(how, "No difference found")
        kind = {"better": "good", "worse": "bad"}.get(how, "same")
        return kind, (
            f"{words} than the baseline: {title} {shown_difference(first, maximum)}, "
            f"{shown_p(first['p_permutation'])}; {first['won']:,} rows won, {first['lost']:,} lost, "
            f"{first['tied']:,} tied."
        )
    if report.other is not None and report.other.agreement.num_shared:
        shared, same = report.other.agreement.num_shared, report.other.agreement.num_same
        return "same", f"{same:,} of {shared:,} answers ({same / shared:.1%}) are the same text as the baseline's."
    return None


# ---------------------------------------------------------------------------------------------------------------------
# HTML


def render_html(report: Report) -> str:
    """The page. Thumbnails are dropped should it ever come out larger than 5 MB."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE_FOLDER),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=shown_number, duration=shown_duration, score=shown_score, source=shown_source, p=shown_p
    )
    html = environment.get_template(_TEMPLATE).render(_context(report))
    if len(html.encode("utf-8", "replace")) > _MAX_HTML_BYTES and report.options.thumbnails:
        smaller = ReportOptions(**{**vars(report.options), "thumbnails": False})
        return render_html(
            gather(
                report.reader.path,
                comparison=report.comparison,
                baseline=report.other.path if report.other else None,
                options=smaller,
                storage_options=report.reader.storage_options,
            )
        )
    # Lone surrogates from a model's broken output can't be written as UTF-8.
    return html.encode("utf-8", "replace").decode("utf-8").translate(_VISIBLE)


# Control characters become their pictures, and marks that reverse text a replacement sign: a file name must not be
# able to look like another one.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | dict.fromkeys(
    (0x7F, *range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def _context(report: Report) -> dict[str, Any]:
    found = report.collected
    return {
        "report": report,
        "name": report.reader.name,
        "state": report.state,
        "found": found,
        "speed": report.speed,
        "headline": headline(report.run),
        "verdict": verdict(report),
        "scores": _scores(report),
        "slices": _slices(report),
        "compared": _compared(report),
        "canaries": (report.metrics or {}).get("canaries"),
        "distributions": _distributions(found),
        "finish_reasons": _finish_reasons(found),
        "errors": [
            {"kind": kind, "stage": stage, "count": count, "card": card, "bar": _error_bar(kind, count, found)}
            for kind, stage, count, card in report.errors
        ],
        "speed_plots": _speed_plots(report),
        "timings": [
            (title, histogram.num_rows, [histogram.quantile(share) for share in (0.5, 0.95, 0.99)])
            for title, histogram in (("Preprocessing", found.preprocess_s), ("In the engine", found.generate_s))
            if histogram.num_rows
        ],
        "settings": list(settings_lines(report.run)),
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _scores(report: Report) -> list[dict[str, Any]]:
    scores = []
    for name, estimate in ((report.metrics or {}).get("overall") or {}).items():
        title, what, maximum = metric_facts(report, name)
        value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
        interval = shown_interval(low, high, maximum)
        scores.append(
            {
                "title": title,
                "what": what,
                "value": shown_score(value, maximum),
                "interval": interval,
                "rows": estimate.get("num_rows", 0),
                "bar": _score_bar(value, low, high, maximum, f"{title} {shown_score(value, maximum)}, {interval}"),
            }
        )
    return scores


def _score_bar(value: Any, low: Any, high: Any, maximum: float, label: str) -> Markup:
    if value is None or value != value:
        return Markup()
    scaled = [None if number is None else number / maximum for number in (low, high)]
    return plots.interval_bar(value / maximum, scaled[0], scaled[1], label)


def _slices(report: Report) -> list[dict[str, Any]]:
    tables = []
    for name, values in ((report.metrics or {}).get("slices") or {}).items():
        rows: list[dict[str, Any]] = []
        for entry in values:
            for metric, estimate in (entry.get("metrics") or {}).items():
                title, _, maximum = metric_facts(report, metric)
                value, low, high = (estimate.get(key) for key in ("value", "low", "high"))
                interval = shown_interval(low, high, maximum)
                shown = shown_score(value, maximum)
                rows.append(
                    {
                        "value": shown_source(str(entry.get("value"))),
                        "first": not rows or rows[-1]["value"] != shown_source(str(entry.get("value"))),
                        "metric": title,
                        "score": shown,
                        "interval": interval,
                        "rows": estimate.get("num_rows", 0),
                        "bar": _score_bar(
                            value, low, high, maximum, f"{entry.get('value')}: {title} {shown}, {interval}"
                        ),
                    }
                )
        if rows:
            tables.append({"name": name, "rows": rows})
    return tables


def _compared(report: Report) -> dict[str, Any] | None:
    if report.comparison is None and report.other is None:
        return None
    rows = []
    comparison = report.comparison or {}
    entries = [(metric_facts(report, name)[0], name, one) for name, one in (comparison.get("metrics") or {}).items()]
    entries += [(f"task {task}", "", one) for task, one in (comparison.get("tasks") or {}).items()]
    scale = max(
        [
            abs(one.get(key) or 0.0) / metric_facts(report, name)[2]
            for _, name, one in entries
            for key in ("low", "high", "difference")
        ],
        default=1.0,
    )
    for title, name, one in entries:
        maximum = metric_facts(report, name)[2]
        low, high = (None if one.get(key) is None else one[key] / maximum for key in ("low", "high"))
        text = shown_difference(one, maximum)
        rows.append(
            {
                "title": title,
                "value": shown_score(one.get("value"), maximum),
                "baseline": shown_score(one.get("baseline"), maximum),
                "difference": text,
                "p": shown_p(one["p_permutation"]),
                "p_sign": shown_p(one["p_sign"]),
                "won": one["won"],
                "lost": one["lost"],
                "tied": one["tied"],
                "verdict": one.get("verdict", ""),
                "bar": plots.difference_bar(
                    (one.get("difference") or 0.0) / maximum, low, high, scale or 1.0, f"{title}: {text}"
                ),
            }
        )
    return {"rows": rows, "other": report.other, "only": comparison}


def _distributions(found: Collected) -> list[dict[str, Any]]:
    named: tuple[tuple[str, CountHistogram], ...] = (
        ("Output tokens", found.output_tokens),
        ("Prompt tokens", found.prompt_tokens),
        ("Visual tokens", found.visual_tokens),
        ("Characters of the answer", found.characters),
    )
    shown = []
    for title, histogram in named:
        bins = histogram.bins()
        if not bins or histogram.largest == 0:
            continue
        half, most = histogram.quantile(0.5), histogram.quantile(0.95)
        label = f"{title}: half of the rows have up to {half:,}, 95 % up to {most:,}, the largest {histogram.largest:,}"
        shown.append(
            {
                "title": title,
                "plot": plots.histogram(bins, label),
                "first": f"{bins[0][0]:,}",
                "last": f"{bins[-1][1]:,}",
                "mean": histogram.mean,
                "median": half,
                "p95": most,
                "largest": histogram.largest,
                "total": histogram.total,
            }
        )
    return shown


def _finish_reasons(found: Collected) -> list[dict[str, Any]]:
    meaning = {
        "stop": "ended by itself",
        "length": "cut off at max_tokens",
        "repetition": "stopped for repeating itself",
        "error": "failed in the engine",
    }
    return [
        {
            "reason": reason,
            "what": meaning.get(reason, ""),
            "count": count,
            "share": count / max(found.num_rows, 1),
            "bar": plots.share_bar(
                count / max(found.num_rows, 1), f"{reason}: {count:,} rows", "bar" if reason == "stop" else "warn"
            ),
        }
        for reason, count in found.finish_reasons.most_common()
    ]


def _error_bar(kind: str, count: int, found: Collected) -> Markup:
    return plots.share_bar(count / max(found.num_rows, 1), f"{kind}: {count:,} of {found.num_rows:,} rows", "loss")


def _speed_plots(report: Report) -> list[dict[str, Any]]:
    shown = []
    for name, title in (
        ("rows", "Rows per second"),
        ("output_tokens", "Output tokens per second"),
        ("errors", "Errors per second"),
    ):
        points = rates(report.progress, name)
        if len(points) < 2 or (name == "errors" and not any(rate for _, rate in points)):
            continue
        most = max(rate for _, rate in points)
        label = f"{title} over {shown_duration(points[-1][0])}, at most {shown_number(most)}"
        shown.append(
            {
                "title": title,
                "plot": plots.line_chart(points, label),
                "most": most,
                "end": shown_duration(points[-1][0] - points[0][0]),
            }
        )
    return shown
