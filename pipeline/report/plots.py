"""Inline SVG without a library: bars with intervals, histograms, lines over time.

Pictures stretch to their column by percentages and hold no text of their own: labels are HTML beside them, so they
stay readable on a phone and to a screen reader. Colours are the page's CSS variables. Every string is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def interval_bar(value: float, low: float | None, high: float | None, label: str) -> Markup:
    """A bar of a share of the width, with a whisker for its interval."""
    parts = [
        Markup('<rect class="track" width="100%" height="100%" rx="3"/>'),
        Markup('<rect class="bar" width="{}" height="100%" rx="3"/>').format(_percent(value)),
    ]
    if low is not None and high is not None:
        left, right = _percent(low), _percent(high)
        parts.append(Markup('<line class="whisker" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(left, right))
        for edge in (left, right):
            parts.append(Markup('<line class="whisker" x1="{0}" x2="{0}" y1="22%" y2="78%"/>').format(edge))
    return _svg("plot-bar", label, parts)


def share_bar(share: float, label: str, kind: str = "bar") -> Markup:
    """A plain bar; `kind` is a CSS class that colours it."""
    parts = [
        Markup('<rect class="track" width="100%" height="100%" rx="3"/>'),
        Markup('<rect class="{}" width="{}" height="100%" rx="3"/>').format(kind, _percent(share)),
    ]
    return _svg("plot-bar", label, parts)


def difference_bar(difference: float, low: float | None, high: float | None, scale: float, label: str) -> Markup:
    """A bar to the right of the middle for a gain, to the left for a loss; `scale` reaches the edge."""
    place = [0.5 + 0.5 * (value or 0.0) / (scale or 1.0) for value in (difference, low, high)]
    start, width = min(0.5, place[0]), abs(place[0] - 0.5)
    parts = [
        Markup('<rect class="track" width="100%" height="100%" rx="3"/>'),
        Markup('<rect class="{}" x="{}" width="{}" height="100%"/>').format(
            "gain" if difference >= 0 else "loss", _percent(start), _percent(width)
        ),
        Markup('<line class="zero" x1="50%" x2="50%" y1="0" y2="100%"/>'),
    ]
    if low is not None and high is not None:
        parts.append(
            Markup('<line class="whisker" x1="{}" x2="{}" y1="50%" y2="50%"/>').format(
                _percent(place[1]), _percent(place[2])
            )
        )
    return _svg("plot-bar", label, parts)


def histogram(bins: Sequence[tuple[int, int, int]], label: str) -> Markup:
    """Columns of (first, last, rows), each with its numbers as a tooltip."""
    most = max((rows for _, _, rows in bins), default=0) or 1
    step = 100 / max(len(bins), 1)
    parts = []
    for index, (first, last, rows) in enumerate(bins):
        height = rows / most
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        parts.append(
            Markup(
                '<rect class="bar" x="{}%" y="{}" width="{}%" height="{}"><title>{}: {:,} rows</title></rect>'
            ).format(f"{index * step:.2f}", _percent(1 - height), f"{step * 0.9:.2f}", _percent(height), span, rows)
        )
    return _svg("plot-area", label, parts)


def line_chart(points: Sequence[tuple[float, float]], label: str) -> Markup:
    """A line over (seconds, value), from zero to the largest value."""
    if len(points) < 2:
        return Markup()
    start, end = points[0][0], points[-1][0]
    most = max(value for _, value in points) or 1.0
    places = [(100 * (t - start) / ((end - start) or 1.0), 40 - 38 * value / most) for t, value in points]
    line = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
    parts = [
        Markup('<polygon class="area" points="0,40 {} 100,40"/>').format(line),
        Markup('<polyline class="line" points="{}" vector-effect="non-scaling-stroke"/>').format(line),
    ]
    return _svg("plot-area", label, parts, 'viewBox="0 0 100 40" preserveAspectRatio="none"')


def _svg(kind: str, label: str, parts: Sequence[Markup], more: str = "") -> Markup:
    return Markup('<svg class="{}" role="img" aria-label="{}" {}>{}</svg>').format(
        kind, escape(label), Markup(more), Markup("").join(parts)
    )
