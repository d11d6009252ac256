"""Panels of curves on one page: how they look."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's colours, which colour-blind eyes tell apart, without black and yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_STYLES = ("-", "--", ":")
_INK, _GRID = "#333333", "#e6e6e6"

MOST_LINES = len(_COLOURS) * len(_STYLES)
_STRETCHES = 600  # about the pixels of a panel's width
_FEW = 40  # measurements that are drawn with dots

_FORMATS = {
    "number": lambda value, _: f"{value:g}",
    "log": lambda value, _: f"{value:g}",
    "rate": lambda value, _: EngFormatter(sep="").format_eng(value),  # 20k
    "share": lambda value, _: f"{100 * value:g}%",
}


@dataclasses.dataclass
class Curve:
    """Measurements of one name: those that are finite, and the steps of the others.

    Attributes:
      steps: ascending.
      values: float64, as many.
      lost: steps whose value was not finite.
    """

    steps: np.ndarray
    values: np.ndarray
    lost: np.ndarray


@dataclasses.dataclass
class Line:
    """How a curve is drawn.

    Attributes:
      label: at its right end; "" for none.
      curve: the measurements.
      colour: an index of `_COLOURS` and `_STYLES`.
      mean: draw a running mean.
      raw: draw the measurements thin behind it.
      held_out: draw circles, for what is measured on data that is not trained on.
      crosses: mark the steps that were not finite.
    """

    label: str
    curve: Curve
    colour: int = 0
    mean: bool = False
    raw: bool = True
    held_out: bool = False
    crosses: bool = False


@dataclasses.dataclass
class Panel:
    """Curves with one pair of axes.

    Attributes:
      title: above them.
      lines: at least one.
      scale: of heights: "number", "log", "rate" or "share" (of 1, shown as percent).
      from_zero: heights begin at 0.
      top: what they reach at least.
    """

    title: str
    lines: list[Line]
    scale: str = "number"
    from_zero: bool = False
    top: float = 0.0


def draw_panels(figure: Figure, panels: list[Panel], first: int, last: int) -> None:
    """Fill a figure with panels over the steps from `first` to `last`."""
    room = max(0.5, 0.01 * (last - first))
    for axes, panel in _places(figure, panels):
        axes.set_xlim(first - room, last + room)
        _label(axes, _draw(axes, panel))


def _places(figure: Figure, panels: list[Panel]):
    """(axes, panel), up to two in one row, more in two, of which the lower takes the odd one."""
    upper = len(panels) // 2 if len(panels) > 2 else len(panels)
    rows = [row for row in (panels[:upper], panels[upper:]) if row]
    parts = figure.subfigures(len(rows), 1, squeeze=False, hspace=0.04)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        part.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        yield from zip(part.subplots(1, len(row), squeeze=False)[0], row, strict=True)


def _draw(axes, panel: Panel) -> list[tuple[float, str, str]]:
    """Draw one panel; returns (height, text, colour) of its labels."""
    axes.set_title(panel.title, loc="left", size=11, color=_INK)
    axes.set_xlabel("step", size=9, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(_FORMATS["rate"])
    if panel.scale == "log" and any((line.curve.values > 0).any() for line in panel.lines):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(_FORMATS[panel.scale])
    ends = []
    for line in panel.lines:
        colour = _COLOURS[line.colour % len(_COLOURS)]
        steps, values = line.curve.steps, line.curve.values
        if line.mean and len(steps) > _FEW:
            if line.raw:
                axes.plot(*_thinned(steps, values), color=colour, alpha=0.25, linewidth=0.7)
            steps, values = _running_mean(steps, values)
        axes.plot(
            *_thinned(steps, values),
            color=colour,
            linestyle=_STYLES[line.colour // len(_COLOURS) % len(_STYLES)],
            linewidth=1 if line.held_out else 1.8,
            marker="o" if line.held_out or len(steps) <= _FEW else None,
            markersize=5 if line.held_out else 3.5,
            markerfacecolor="white" if line.held_out else colour,
        )
        if line.crosses and len(line.curve.lost):
            bottom = np.full(len(line.curve.lost), 0.02)
            place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(line.curve.lost, bottom, "x", color=colour, **place)
        if line.label:
            ends.append((values[-1], line.label, colour))
    if panel.from_zero:
        top = max(panel.top, *(line.curve.values.max() for line in panel.lines)) or 1
        axes.set_ylim(-0.02 * top, 1.05 * top)  # room for dots
    return ends


def _label(axes, ends: list[tuple[float, str, str]]) -> None:
    """Write labels right of the axes, beside the ends of their lines, without overlap."""
    if not ends:
        return
    bottom, top = axes.get_ylim()
    if axes.get_yscale() == "log":
        ends = [(np.log(max(height, bottom)), *rest) for height, *rest in ends]
        bottom, top = np.log(bottom), np.log(top)
    ends = sorted(((height - bottom) / (top - bottom), *rest) for height, *rest in ends)
    gap = min(0.065, 1 / len(ends))
    places = np.array([height for height, *_ in ends])
    for i in range(1, len(places)):  # upwards, each clear of the one below
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):  # and back, down from the top
        places[i] = min(places[i], 1 - gap * (len(places) - 1 - i))
    for place, (_, text, colour) in zip(places, ends, strict=True):
        text = text if len(text) <= 20 else f"{text[:19]}…"
        axes.annotate(
            text,
            (1, place),
            xytext=(5, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            size=9,
            color=colour,
        )


def _running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means over a fiftieth of all to each side, one for every stretch."""
    size = -(-len(values) // _STRETCHES)
    begins = np.arange(0, len(values), size)
    counts = np.diff([*begins, len(values)])
    steps, values = (np.add.reduceat(x, begins) / counts for x in (steps, values))
    weights = np.hanning(2 * (len(values) // 50) + 3)[1:-1]
    weighed = [np.convolve(x, weights, "same") for x in (values * counts, counts)]
    return steps, weighed[0] / weighed[1]


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest value of every stretch, in order: what a line of all shows."""
    size = -(-len(values) // _STRETCHES)
    if size <= 2:
        return steps, values
    kept = {0, len(values) - 1}
    for begin in range(0, len(values), size):
        part = values[begin : begin + size]
        kept |= {begin + int(part.argmin()), begin + int(part.argmax())}
    kept = np.array(sorted(kept))
    return steps[kept], values[kept]
