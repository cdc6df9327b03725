"""The plots of a part: bars of time, memory and limits, and curves on logarithmic axes with their fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from . import fits
from .fits import Fit, Series
from .sections import largest_text
from .svg import INK, colour, drawn, figure_html
from .tables import reason
from .targets import MIB, Json, allocated, median

WIDTH = 4.8  # inches: on a narrow phone the text is still of about ten pixels
BAR, MARGIN = 0.42, 0.65  # inches: the height of a bar with its name, and of the axis below
AXES, ENTRY = 3.4, 0.2  # inches: the height of a curve's axes, and of a line of its legend
#: Characters of a name and what stands beside it; the table has all of a reason.
MOST = 56
MARKERS = "osD^vP*X<>"
#: Colours that a role's providers take in turns.
OF_ROLE = {"floor": (0,), "materialised": (1,), "logitless": (2, 3), "peer": (4, 5, 6, 7)}


class Bar(NamedTuple):
    """A provider's number; None where it has none, and the text says why."""

    name: str
    role: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None


def plots_of(name: str, part: Json, label: str = "") -> list[str]:
    """Figures of a part in HTML; `label` says which file it is of, if there are several."""
    title = f"{label}, {name}" if label else name
    return list(PLOTS[part["kind"]](title, part))


def _steps(title: str, part: Json) -> Iterator[str]:
    yield from _bars(title, "time of a step, seconds (line: shortest to longest round)", _times(part["rows"]))
    yield from _bars(title, "extra memory, MiB", _memories(part["rows"]))


def _models(title: str, part: Json) -> Iterator[str]:
    yield from _bars(title, "time of a whole step, seconds (line: shortest to longest round)", _times(part["rows"]))
    yield from _bars(title, "peak memory beyond the weights, MiB", _memories(part["rows"]))


def _limits(title: str, part: Json) -> Iterator[str]:
    bars = [_bar(row, row["largest"], largest_text(row)) for row in part["rows"]]
    yield from _bars(title, f"the most {part['unit']} within {part['memory_bytes'] / MIB:.0f} MiB", bars)


def _curves(title: str, part: Json) -> Iterator[str]:
    yield from _curve(title, part, "time of a step, seconds", fits.times, 1)
    yield from _curve(title, part, "extra memory, MiB", fits.memories, MIB)


PLOTS: dict[str, Callable[[str, Json], Iterator[str]]] = {
    "step": _steps,
    "curve": _curves,
    "limit": _limits,
    "model": _models,
}


def _bar(row: Json, value: float | None, text: str, low: float | None = None, high: float | None = None) -> Bar:
    if row["failure"]:
        return Bar(row["provider"], row["role"], None, reason(row["failure"]))
    return Bar(row["provider"], row["role"], value, text or "not reached", low, high)


def _short(text: str) -> str:
    return text if len(text) <= MOST else text[: MOST - 1] + "…"


def _times(rows: Sequence[Json]) -> list[Bar]:
    found = []
    for row in rows:
        seconds, middle = row["seconds"], median(row["seconds"])
        ends = (min(seconds), max(seconds)) if seconds else (None, None)
        found.append(_bar(row, middle, "" if middle is None else f"{middle:.3g}", *ends))
    return found


def _memories(rows: Sequence[Json]) -> list[Bar]:
    """Bars of the rows whose memory is known; those of time have the others, and why they fail."""
    sizes = [(row, size) for row in rows if not row["failure"] and (size := allocated(row)) is not None]
    return [_bar(row, size / MIB, f"{size / MIB:.1f}") for row, size in sizes]


def _bars(title: str, what: str, bars: Sequence[Bar]) -> Iterator[str]:
    """Nothing where no bar has a number."""
    if any(bar.value is not None for bar in bars):
        words = f"{title}: {what}. " + "; ".join(f"{bar.name}: {bar.text}" for bar in bars)
        plot = drawn(lambda _, axes: _draw_bars(axes, bars), WIDTH, MARGIN + BAR * len(bars), f"{title} {what}", words)
        yield figure_html(plot, f"{title}: {what}")


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    """Each name above its bar, so that long ones take nothing from the bars."""
    colours = colours_of([(bar.name, bar.role) for bar in bars])
    for place, bar in enumerate(bars):
        if bar.value is not None:
            axes.barh(place, bar.value, height=0.36, color=colours[bar.name])
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place, place], color=INK, linewidth=1.5)
        text = axes.text(0, place - 0.26, _short(f"{bar.name}: {bar.text}"), va="bottom")
        text.set_in_layout(False)  # else a long one narrows the axes
    axes.set(xlim=(0, None), ylim=(len(bars) - 0.6, -0.8), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.locator_params(axis="x", nbins=5)


def colours_of(providers: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A colour for each name, by its role; where a role has more names than colours they are used again."""
    used: dict[str, int] = {}
    found = {}
    for name, role in providers:
        found[name] = colour(OF_ROLE[role][used.get(role, 0) % len(OF_ROLE[role])])
        used[role] = used.get(role, 0) + 1
    return found


class _Curve(NamedTuple):
    name: str
    points: Series
    fit: Fit | None

    @property
    def legend(self) -> str:
        return f"{self.name}, exponent {self.fit}" if self.fit else self.name


def _curve(title: str, part: Json, what: str, series: Callable[[Json, str], Series], unit: float) -> Iterator[str]:
    roles = fits.providers(part)
    found = {name: [(x, y / unit) for x, y in series(part, name) if y > 0] for name in roles}
    curves = [_Curve(name, points, fits.fit(points)) for name, points in found.items() if points]
    if not curves:
        return
    colours = colours_of(list(roles.items()))
    axis = part["axis"]
    words = f"{title}: {what} by {axis}. " + "; ".join(
        f"{curve.legend}: " + ", ".join(f"{x}: {y:.3g}" for x, y in curve.points) for curve in curves
    )

    def draw(figure: Any, axes: Any) -> None:
        _draw_curves(axes, curves, [colours[curve.name] for curve in curves], axis)
        figure.legend(loc="outside lower left", fontsize=9, frameon=False)

    height = AXES + ENTRY * len(curves)
    yield figure_html(
        drawn(draw, WIDTH, height, f"{title} {what}", words), f"{title}: {what}; lines: fitted power laws"
    )


def _draw_curves(axes: Any, curves: Sequence[_Curve], colours: Sequence[str], axis: str) -> None:
    """Points and the fitted power law, or a thin line where there is none."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    for place, (curve, own) in enumerate(zip(curves, colours, strict=True)):
        x = [value for value, _ in curve.points]
        marker = dict(color=own, marker=MARKERS[place % len(MARKERS)], label=curve.legend)
        axes.plot(x, [y for _, y in curve.points], linestyle="none" if curve.fit else ":", linewidth=1, **marker)
        if curve.fit:
            axes.plot(x, [curve.fit.at(value) for value in x], color=own, linewidth=1.2)
    values = sorted({value for curve in curves for value, _ in curve.points})
    axes.set(xscale="log", yscale="log", xlabel=axis)
    axes.set_xticks(values, [str(value) for value in values], rotation=30 if len(values) > 4 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=colour(0), linewidth=0.3)
