"""Charts of a report: parts of a `Report` in, SVG text or PNG bytes out.

Drawn with matplotlib's objects (`Figure`), never with pyplot: nothing is registered, shown or left
open. The same report gives the same bytes: ids are salted with a constant and no date is written.
Before and after are vermilion and blue, after Okabe and Ito's palette, which colour-blind readers tell
apart, and differ in marker too; all colours, the grey of axes and letters included, are of a middle
tone that is legible on white and on black.

matplotlib keeps its settings per process; each public function sets its own for as long as it draws,
so draw from one thread.
"""

import io
import math
import re
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from recoup.schemas import Alignment, AlignmentState, Checkpoint, TrainingReport, Trajectory

INK: Final = "#6e7681"
BEFORE: Final = "#d55e00"
AFTER: Final = "#1f86c1"

_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recoup",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
}


@mpl.rc_context(_STYLE)
def loss_curve(training: TrainingReport) -> str:
    """Training loss by step, KL on validation at each checkpoint, and which checkpoint was chosen.

    Where a skill is taught, the loss on validation demonstrations stands beside the KL, which is the drift.
    """
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    _draw_loss(figure.subplots(), training)
    return _svg(figure, "loss")


@mpl.rc_context(_STYLE)
def trajectory_curves(trajectory: Trajectory) -> str:
    """KL on validation and, above it, alignment at the same steps of a training."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    _draw_trajectory(figure, trajectory)
    return _svg(figure, "trajectory")


@mpl.rc_context(_STYLE)
def alignment_diagonal(alignment: Alignment) -> str:
    """CKA of corresponding layers with its interval, between its floor and its ceiling."""
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    _draw_diagonal(figure, alignment)
    return _svg(figure, "diagonal")


@mpl.rc_context(_STYLE)
def alignment_heatmap(alignment: Alignment) -> str:
    """CKA of every student layer with every teacher layer, before beside after, on one scale."""
    figure = Figure(figsize=_heatmap_size(alignment), layout="constrained")
    _draw_heatmaps(figure, alignment)
    return _svg(figure, "heatmap")


@mpl.rc_context(_STYLE)
def alignment_svg(alignment: Alignment) -> str:
    """Heat maps and diagonal in one picture, on white."""
    return _svg(_alignment_figure(alignment), "alignment")


@mpl.rc_context(_STYLE)
def alignment_png(alignment: Alignment) -> bytes:
    """The picture of `alignment_svg` in pixels, 150 to the inch."""
    buffer = io.BytesIO()
    _alignment_figure(alignment).savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _alignment_figure(alignment: Alignment) -> Figure:
    width, height = _heatmap_size(alignment)
    figure = Figure(figsize=(max(width, 7.0), height + 3.9), layout="constrained", facecolor="white")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 3.9])
    _draw_heatmaps(upper, alignment)
    _draw_diagonal(lower, alignment)
    return figure


def _draw_loss(axes: Axes, training: TrainingReport) -> None:
    points = [point for point in training.curve if math.isfinite(point.loss)]
    axes.plot(
        [point.step for point in points],
        [point.loss for point in points],
        color=INK,
        linewidth=1.4,
        label="training loss of the batch",
    )
    scored = [checkpoint for checkpoint in training.checkpoints if checkpoint.validation_kl is not None]
    values = [checkpoint.validation_kl for checkpoint in scored]
    axes.plot(
        [checkpoint.step for checkpoint in scored],
        values,
        color=AFTER,
        linewidth=1.0,
        linestyle=(0, (4, 3)),
        marker="D",
        markersize=6,
        label="KL on validation",
    )
    taught = [(point.step, point.skill_loss) for point in scored if point.skill_loss is not None]
    if taught:
        axes.plot(*zip(*taught, strict=True), color=BEFORE, linewidth=1.0, marker="s", markersize=5)
        axes.lines[-1].set_label("loss on held-out demonstrations")
    for checkpoint in scored:
        if checkpoint.chosen:
            _mark_chosen(axes, checkpoint)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = [point.loss for point in points] + [value for value in values if value is not None]
    _set_nats(shown + [loss for _, loss in taught], axes)
    axes.grid(axis="y")
    axes.legend(loc="upper right", labelspacing=0.7)


def _mark_chosen(axes: Axes, checkpoint: Checkpoint) -> None:
    axes.plot(
        checkpoint.step,
        checkpoint.validation_kl,
        linestyle="none",
        marker="o",
        markersize=14,
        markerfacecolor="none",
        markeredgecolor=AFTER,
        markeredgewidth=1.8,
        label=f"chosen: step {checkpoint.step}, KL {checkpoint.validation_kl:.3f}",
    )


def _draw_trajectory(figure: Figure, trajectory: Trajectory) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [point.step for point in trajectory.points]
    for name, marker, label in (("mean", "o", "mean over layers"), ("last", "s", "last layer")):
        values = _floats([getattr(point, name) for point in trajectory.points])
        above.plot(steps, values, color=BEFORE, linewidth=1.4, marker=marker, markersize=4.5, label=label)
    above.lines[-1].set_linestyle((0, (4, 3)))
    above.set_ylabel("CKA with the teacher")
    above.legend(loc="lower right")
    nats = [point.validation_kl for point in trajectory.points]
    below.plot(steps, _floats(nats), color=AFTER, linewidth=1.4, marker="D", markersize=4.5)
    _set_nats([value for value in nats if value is not None], below)
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(axis="y")


def _set_nats(values: list[float], axes: Axes) -> None:
    """From zero where the values are of one size, logarithmic where they are not."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 50 * min(positive):
        axes.set_yscale("log")
        axes.set_ylabel("nats a token (logarithmic)")
        return
    axes.set_ylim(0, 1.08 * max(positive, default=1.0))
    axes.set_ylabel("nats a token")


def _draw_diagonal(figure: Figure | SubFigure, alignment: Alignment) -> None:
    """The floor lies far below: it gets a strip of its own, so that the layers fill the height."""
    main, strip = figure.subplots(2, 1, sharex=True, height_ratios=[7, 1])
    _draw_state(main, alignment.before, color=BEFORE, marker="o", label=_first_name(alignment))
    if alignment.after is not None:
        _draw_state(main, alignment.after, color=AFTER, marker="s", label="after")
    main.plot(
        _floats(alignment.ceiling),
        color=INK,
        linestyle=(0, (5, 3)),
        linewidth=1.2,
        label="ceiling (teacher in bfloat16)",
    )
    strip.plot(
        _floats(alignment.floor),
        color=INK,
        linestyle=(0, (1, 1.5)),
        linewidth=1.6,
        label="floor (shuffled positions)",
    )
    _break_axis(main, strip)
    main.set_ylabel("CKA with the teacher")
    main.grid(axis="y")
    strip.set_xlabel("student layer")
    strip.set_xticks(*_ticks([alignment.student_layers[row] for row, _ in alignment.layer_map], 12))
    figure.legend(loc="outside upper center", ncols=4, handlelength=2.4, columnspacing=1.4)


def _draw_state(axes: Axes, state: AlignmentState, color: str, marker: str, label: str) -> None:
    lows = _floats([layer.low if layer else None for layer in state.diagonal])
    highs = _floats([layer.high if layer else None for layer in state.diagonal])
    values = _floats([layer.value if layer else None for layer in state.diagonal])
    axes.fill_between(range(len(values)), lows, highs, color=color, alpha=0.22, linewidth=0)
    axes.plot(values, color=color, linewidth=1.6, marker=marker, markersize=3.6, label=label)


def _first_name(alignment: Alignment) -> str:
    return "student" if alignment.after is None else "before"


def _break_axis(main: Axes, strip: Axes) -> None:
    """Cut the vertical axis between the two, with the usual slanted marks; it starts on a twentieth."""
    low = min(main.dataLim.y0, 0.95) if math.isfinite(main.dataLim.y0) else 0.0
    main.set_ylim(math.floor(low * 20) / 20, 1.005)
    if math.isfinite(strip.dataLim.y0):
        strip.set_ylim(min(strip.dataLim.y0 - 0.01, -0.04), max(strip.dataLim.y1 + 0.01, 0.04))
    strip.set_yticks([0])
    main.spines.bottom.set_visible(False)
    main.tick_params(axis="x", bottom=False)
    slanted = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": 9, "color": INK, "clip_on": False}
    main.plot([0], [0], transform=main.transAxes, linestyle="none", **slanted)
    strip.plot([0], [1], transform=strip.transAxes, linestyle="none", **slanted)


def _heatmap_size(alignment: Alignment) -> tuple[float, float]:
    return (5.6, 4.5) if alignment.after is None else (10.0, 4.9)


def _draw_heatmaps(figure: Figure | SubFigure, alignment: Alignment) -> None:
    states = {_first_name(alignment): alignment.before}
    if alignment.after is not None:
        states["after"] = alignment.after
    matrices = {name: np.array([_floats(row) for row in state.matrix]) for name, state in states.items()}
    values = np.concatenate([matrix.ravel() for matrix in matrices.values()])
    start = _colour_start(values)
    panels = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=True):
        image = _draw_matrix(axes, matrix, start, alignment)
        axes.set_title(name)
    panels[0].set_ylabel("student layer")
    below = "min" if np.nanmin(values, initial=1.0) < start else "neither"
    bar = figure.colorbar(image, ax=list(panels), extend=below, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    undefined = "\nhatched: undefined" if np.isnan(values).any() else ""
    bar.set_label(f"CKA (colours start at {start:.1f}){undefined}")


def _colour_start(values: NDArray[np.float64]) -> float:
    """The tenth at or below 95 % of all values: CKA crowds near one, and colours from 0 would hide it."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0
    return float(np.clip(math.floor(10 * np.quantile(finite, 0.05)) / 10, 0.0, 0.9))


def _draw_matrix(axes: Axes, matrix: NDArray[np.float64], start: float, alignment: Alignment) -> Any:
    """A cell without a value lets the hatching behind it through."""
    rows, columns = matrix.shape
    axes.axhspan(-0.5, rows - 0.5, facecolor="none", edgecolor=INK, hatch="////", linewidth=0, zorder=-1)
    image = axes.imshow(
        np.ma.masked_invalid(matrix),
        cmap="viridis",
        vmin=start,
        vmax=1.0,
        origin="lower",
        interpolation="none",
        aspect="equal",
    )
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_xlabel("teacher layer")
    axes.set_xticks(*_ticks(alignment.teacher_layers, 8))
    axes.set_yticks(*_ticks(alignment.student_layers, 8))
    axes.spines[:].set_visible(False)
    return image


def _ticks(layers: list[str], most: int) -> tuple[list[int], list[str]]:
    """About so many layers: the first by three letters, then those whose number is a multiple of a step."""
    step = max(1, round(len(layers) / most))
    numbers = [re.search(r"\d+$", layer) for layer in layers]
    shown = {0: layers[0][:3]}
    for index, number in enumerate(numbers[1:], start=1):
        if number and int(number[0]) % step == 0 and index > step / 2:
            shown[index] = number[0]
    return list(shown), list(shown.values())


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    """Null becomes not-a-number, which matplotlib leaves out."""
    return np.array(values, dtype=np.float64)


def _svg(figure: Figure, name: str) -> str:
    """SVG text whose ids carry `name`, so that several charts fit in one page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", buffer.getvalue())
