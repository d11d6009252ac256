"""RUN/curves.png: what a run measured, drawn."""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.panels import MOST_LINES, Curve, Line, Panel, draw_panels

FILE_NAME = "curves.png"


def draw_curves(folder: str | os.PathLike) -> Path:
    """Draw `metrics.jsonl` of a run: losses, gradient norms, learning rate, speed, accuracy.

    Only what was measured gets a panel, and at most 18 names of a kind, those measured most often.
    Values that were not finite are left out; steps whose loss was not are marked with crosses. Of
    many steps, every stretch keeps its extremes.

    Args:
      folder: of the run.

    Returns:
      The picture, `FOLDER/curves.png`, 1600 x 900 pixels.

    Raises:
      ValueError: if there are no metrics, or they cannot be read.
    """
    folder = Path(folder)
    records = read_metrics(folder)
    panels = _panels(_curves(records))
    if not panels:
        raise ValueError(f"{folder}: no metrics to draw; train at least one step")
    figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    first, last = records[0]["step"], records[-1]["step"]
    title = f"{folder.absolute().name}, step {last:,}"
    figure.suptitle(title, x=0.01, ha="left", size=14)
    draw_panels(figure, panels, first, last)
    target = folder / FILE_NAME
    unfinished = folder / f"{FILE_NAME}.new"
    figure.savefig(unfinished, format="png")
    os.replace(unfinished, target)
    return target


def _curves(records: list[dict]) -> dict[str, Curve]:
    """Every name of a number, in order of appearance."""
    found: dict[str, tuple[list, list]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and not isinstance(value, str):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(np.nan if value is None else value)
    curves = {}
    for name, (steps, values) in found.items():
        steps, values = np.asarray(steps), np.asarray(values, np.float64)
        good = np.isfinite(values)
        curves[name] = Curve(steps[good], values[good], steps[~good])
    return curves


def _panels(curves: dict[str, Curve]) -> list[Panel]:
    """The panels that have something to show."""

    def below(prefix):
        names = {n.removeprefix(prefix): c for n, c in curves.items() if n.startswith(prefix)}
        often = sorted(names, key=lambda name: -len(names[name].steps))[:MOST_LINES]
        return {name: c for name, c in names.items() if name in often}

    def one(name, label="", **options):
        return [Line(label, curves[name], **options)] if name in curves else []

    def each(prefix, **options):
        return [
            Line(name, curve, i, **options) for i, (name, curve) in enumerate(below(prefix).items())
        ]

    validation = one("validation/loss", "validation", colour=1, held_out=True)
    loss = one("loss", "training" if validation else "", mean=True, crosses=True)
    lost = len(loss[0].curve.lost) if loss else 0
    datasets = each("loss/", mean=True, raw=False)
    colours = {line.label: line.colour for line in datasets}
    held_out = [
        Line("", curve, colours[name], held_out=True)
        for name, curve in below("validation/loss/").items()
        if name in colours
    ]
    if len(datasets) < 2:  # one alone is the loss itself
        datasets = held_out = []
    norms = each("grad_norm/", mean=True) or one("grad_norm", mean=True)
    rates = one("learning_rate")
    panels = [
        Panel(f"loss{' (x not finite)' * bool(lost)}", loss + validation),
        Panel(f"loss per dataset{' (o validation)' * bool(held_out)}", datasets + held_out),
        Panel("gradient norm", norms, "log"),
        Panel("learning rate", rates, from_zero=True),
        Panel("tokens per second", one("tokens_per_second", mean=True), "rate", True),
        Panel("model FLOP/s utilisation", one("utilisation", mean=True), "share", True),
        Panel("accuracy", each("accuracy/", held_out=True), "share", True, 1),
    ]
    for panel in panels:
        panel.lines = [line for line in panel.lines if len(line.curve.steps)]
    return [panel for panel in panels if panel.lines]
