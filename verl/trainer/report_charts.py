"""Line charts as SVG text, drawn by hand: no plotting library, no script, colours from the page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
SMOOTH_FROM = 40
"""Points from which on a running mean is drawn over the raw line."""
MAX_SERIES = 6

Point = tuple[float, float]


@dataclass(frozen=True)
class ChartSpec:
    """What one chart shows."""

    title: str
    unit: str
    """Label of the vertical axis."""
    metrics: Mapping[str, str]
    """Metric name, as a regular expression -> label, in which `\\1` is the first group."""
    log: bool = False
    percent: bool = False
    """Shares are shown as percentages."""


CHARTS = (
    ChartSpec(
        "Reward", "mean over samples", {"reward/overall": "total", "reward/format": "format"}
    ),
    ChartSpec(
        "Accuracy",
        "correct, %",
        {"reward/accuracy": "training samples", r"val/([^/]+)/accuracy": r"validation: \1"},
        percent=True,
    ),
    ChartSpec("Reward by kind of question", "mean over samples", {r"reward/by_type/(.+)": r"\1"}),
    ChartSpec(
        "Response length",
        "tokens",
        {
            "response_length/mean": "mean",
            "response_length/max": "longest",
            "response_length/min": "shortest",
        },
    ),
    ChartSpec("KL to the reference", "nats a token", {"kl/ref": "KL"}),
    ChartSpec(
        "Rollout versus trainer log-probs",
        "|difference|, nats",
        {"mismatch/mean_abs": "mean", "mismatch/max_abs": "largest"},
        log=True,
    ),
    ChartSpec("Entropy of the policy", "nats a token", {"actor/entropy": "entropy"}),
    ChartSpec(
        "Clipped tokens",
        "share of tokens, %",
        {r"actor/clip_fraction_(low|high|dual)": r"\1"},
        percent=True,
    ),
    ChartSpec("Gradient norm, RL", "before clipping", {"actor/grad_norm": "norm"}),
    ChartSpec(
        "Seconds a step",
        "s",
        {
            "perf/step_s": "step, without validation and checkpoint",
            "timing_s/generation": "generation alone",
        },
    ),
    ChartSpec(
        "SFT loss",
        "nats a target token",
        {"train/loss": "training", r"val/([^/]+)/loss": r"validation: \1"},
    ),
    ChartSpec("Gradient norm, SFT", "before clipping", {"train/grad_norm": "norm"}),
)


@dataclass(frozen=True)
class Chart:
    """A drawn chart, with its legend."""

    title: str
    svg: Markup
    legend: list[str]
    smoothed: bool


def read_metrics(path: Path) -> dict[str, list[Point]]:
    """(step, value) by metric name; values that are not finite are left out."""
    series: dict[str, list[Point]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row["metrics"].items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                series.setdefault(name, []).append((float(row["step"]), float(value)))
    return series


def draw_charts(
    sources: Mapping[str, Mapping[str, Sequence[Point]]], specs: Sequence[ChartSpec] = CHARTS
) -> tuple[list[Chart], list[str]]:
    """Charts of all sources (label -> metrics), and the titles of those with nothing to show."""
    charts, empty = [], []
    for spec in specs:
        found = list(_matching(spec, sources))[:MAX_SERIES]
        if found:
            smoothed = any(len(points) >= SMOOTH_FROM for _, points in found)
            svg = Markup(_svg(spec, found))  # every text in it is escaped
            charts.append(Chart(spec.title, svg, [label for label, _ in found], smoothed))
        else:
            empty.append(spec.title)
    return charts, empty


def _matching(
    spec: ChartSpec, sources: Mapping[str, Mapping[str, Sequence[Point]]]
) -> Iterator[tuple[str, list[Point]]]:
    """Series of a chart; their source is named where several have the same one."""
    found: list[tuple[str, str, list[Point]]] = []
    scale = 100.0 if spec.percent else 1.0
    for source, metrics in sources.items():
        for pattern, label in spec.metrics.items():
            for name in sorted(metrics):
                match = re.fullmatch(pattern, name)
                points = [(x, y * scale) for x, y in metrics[name]] if match else []
                if match and spec.log:
                    points = [(x, y) for x, y in points if y > 0]
                if match and points:
                    found.append((source, match.expand(label), points))
    labels = [label for _, label, _ in found]
    for source, label, points in found:
        yield (f"{source}: {label}" if labels.count(label) > 1 else label), points


def running_mean(points: Sequence[Point], width: int) -> list[Point]:
    """Mean over up to `width` points around each point."""
    half = width // 2
    means = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Axes:
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def place(self, point: Point) -> tuple[float, float]:
        value = math.log10(point[1]) if self.log else point[1]
        x = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        y = (value - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[tuple[float, str]]:
        """(value, text) of the horizontal grid lines."""
        if not self.log:
            return [(t, f"{t:g}") for t in nice_ticks(*self.y)]
        first, last = math.ceil(self.y[0]), math.floor(self.y[1])
        every = max(1, math.ceil((last - first) / 5))
        return [(10.0**e, f"1e{e}") for e in range(first, last + 1, every)]


def _axes(spec: ChartSpec, series: Sequence[tuple[str, Sequence[Point]]]) -> _Axes:
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    if spec.log:
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        return _Axes(_range(min(xs), max(xs)), (low, max(high, low + 1)), True)
    low, high = min(ys), max(ys)
    if low > 0 and low < 0.6 * high:
        low = 0.0
    pad = 0.06 * (high - low)
    top = 100.0 if spec.percent and high <= 100 < high + pad else high + pad
    bottom = low - pad if low else 0.0
    return _Axes(_range(min(xs), max(xs)), _range(bottom, top), False)


def _range(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    if low == 0:
        return 0.0, 1.0
    return low - 0.1 * abs(low), high + 0.1 * abs(low)


def _svg(spec: ChartSpec, series: Sequence[tuple[str, Sequence[Point]]]) -> str:
    axes = _axes(spec, series)
    label = escape(f"{spec.title}: {spec.unit}, by step")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">']
    parts += _grid(spec, axes)
    for number, (_, points) in enumerate(series, start=1):
        smooth = len(points) >= SMOOTH_FROM
        parts.append(_line(axes, points, f"s{number}{' raw' if smooth else ''}"))
        if smooth:
            width = max(5, len(points) // 12)
            parts.append(_line(axes, running_mean(points, width), f"s{number}"))
        elif len(points) <= 12:
            dots = (axes.place(point) for point in points)
            parts += [
                f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots
            ]
    return "".join(parts) + "</svg>"


def _grid(spec: ChartSpec, axes: _Axes) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value, text in axes.y_ticks():
        _, y = axes.place((axes.x[0], value))
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{escape(text)}</text>'
    for value in nice_ticks(*axes.x, count=5):
        if value == int(value):
            x, _ = axes.place((value, 10.0 ** axes.y[0] if axes.log else axes.y[0]))
            yield f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    middle = (LEFT + right) / 2
    yield f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>'
    y = (TOP + bottom) / 2
    yield (
        f'<text class="name" transform="translate(11 {y:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(spec.unit)}</text>'
    )


def _line(axes: _Axes, points: Sequence[Point], css: str) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*axes.place(point)) for point in points)
    return f'<polyline class="{css}" points="{path}"/>'
