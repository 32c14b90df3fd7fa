"""Small charts as SVG text: points with whiskers on lines, and bars. No dependency, and a file that diffs well."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 76, 64
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
_INK, _GRID = "#1f2937", "#e5e7eb"


@dataclass(frozen=True, slots=True)
class Point:
    """`low` and `high` are the ends of the whisker."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one group of bars; `points` has an entry per category, None where nothing was measured."""

    name: str
    points: Sequence[Point | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """Categories stand side by side at equal distances, whatever their numbers."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    categories: Sequence[str]
    series: Sequence[Series]
    limit: tuple[str, float] | None = None  # a horizontal line: what is asked for
    logarithmic: bool = False
    bars: bool = False

    def render(self) -> str:
        """The SVG document."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">',
            f"<title>{escape(self.title)}</title>",
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
            _text(_LEFT, 24, self.title, size=16, weight="600"),
            _text(_LEFT, 42, self.subtitle, colour="#6b7280"),
            *self._grid(),
            *self._categories(),
            *self._marks(),
            *self._limit(),
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    # -- scales

    def _span(self) -> tuple[float, float]:
        """The y axis from and to."""
        points = [point for series in self.series for point in series.points if point is not None]
        top = max([point.high for point in points] + ([self.limit[1]] if self.limit else []))
        if not self.logarithmic:
            return 0.0, _nice(top * 1.05)
        low = min(point.value for point in points)
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(top))

    def _y(self, value: float) -> float:
        low, high = self._span()
        if self.logarithmic:
            share = (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low))
        else:
            share = (value - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def _x(self, category: int) -> float:
        step = (_WIDTH - _LEFT - _RIGHT) / len(self.categories)
        return _LEFT + step * (category + 0.5)

    # -- parts

    def _grid(self) -> list[str]:
        low, high = self._span()
        if self.logarithmic:
            count = round(math.log10(high / low))
            values = [low * 10**power for power in range(count + 1)]
        else:
            values = [high * part / 5 for part in range(6)]
        parts = []
        for value in values:
            y = self._y(value)
            parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, _GRID))
            parts.append(_text(_LEFT - 8, y + 4, f"{value:g}", anchor="end"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(
            f'<text x="18" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 18 {middle:.0f})">'
            f"{escape(self.y_label)}</text>"
        )
        return parts

    def _categories(self) -> list[str]:
        base = _HEIGHT - _BOTTOM
        parts = [_line(_LEFT, base, _WIDTH - _RIGHT, base, _INK)]
        every = max(1, len(self.categories) // 16)
        for number, name in enumerate(self.categories):
            if number % every == 0:
                for line, words in enumerate(name.split(", ")):  # side by side there is room for short words only
                    parts.append(_text(self._x(number), base + 16 + 14 * line, words, anchor="middle", size=11))
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, self.x_label, anchor="middle"))
        return parts

    def _marks(self) -> list[str]:
        parts = []
        step = (_WIDTH - _LEFT - _RIGHT) / len(self.categories)
        for order, series in enumerate(self.series):
            colour = _COLOURS[order % len(_COLOURS)]
            width = step * 0.7 / len(self.series)
            shift = (order - (len(self.series) - 1) / 2) * (width if self.bars else min(10.0, width))
            seen = [(self._x(at) + shift, point) for at, point in enumerate(series.points) if point is not None]
            if not self.bars and len(seen) > 1:
                path = " ".join(f"{x:.1f},{self._y(point.value):.1f}" for x, point in seen)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            for x, point in seen:
                parts += self._mark(x, point, width, colour)
        return parts

    def _mark(self, x: float, point: Point, width: float, colour: str) -> list[str]:
        y, base = self._y(point.value), _HEIGHT - _BOTTOM
        whisker = _line(x, self._y(point.low), x, self._y(point.high), _INK if self.bars else colour)
        if self.bars:
            bar = (
                f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" height="{base - y:.1f}" '
                f'fill="{colour}" fill-opacity="0.85"/>'
            )
            label = _text(
                x,
                self._y(max(point.high, point.value)) - 5,
                f"{point.value:.0f}" if point.value >= 100 else f"{point.value:.3g}",
                anchor="middle",
                size=11,
            )
            return [bar, whisker, label]
        return [whisker, f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>']

    def _limit(self) -> list[str]:
        if self.limit is None:
            return []
        name, value = self.limit
        y = self._y(value)
        return [
            _line(_LEFT, y, _WIDTH - _RIGHT, y, "#dc2626", dashes="5 4"),
            _text(_WIDTH - _RIGHT, y - 5, name, anchor="end", colour="#dc2626", size=11),
        ]

    def _legend(self) -> list[str]:
        if len(self.series) < 2:
            return []
        parts, x = [], float(_LEFT)
        for order, series in enumerate(self.series):
            colour = _COLOURS[order % len(_COLOURS)]
            parts.append(f'<rect x="{x:.0f}" y="52" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(x + 15, 61, series.name))
            x += 30 + 6.8 * len(series.name)
        return parts


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, weight: str = "400", colour: str = _INK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(words)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten, so that fifths of it are round."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if step * power >= value)
