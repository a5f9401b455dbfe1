"""One look for all figures: colours safe for the colour-blind, told apart in grey by lightness, line and marker."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiment.files import replace_atomically

# Okabe and Ito (2008), ordered so that neighbours also differ in lightness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "pdf.fonttype": 42,
}
matplotlib.rcParams.update(STYLE)


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 3.5, **options: Any
) -> tuple[Figure, Any]:
    """A figure (inches) with a (rows, columns) array of axes. It needs no pyplot and keeps no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend for the figure, outside the data, from the labels of `axes`: in at most so many columns, in fewer
    where they would be wider than the figure."""
    handles, labels = axes.get_legend_handles_labels()
    renderer = FigureCanvasAgg(figure).get_renderer()
    for fewer in range(columns, 0, -1):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=fewer)
        if legend.get_window_extent(renderer).width <= figure.bbox.width or fewer == 1:
            return
        legend.remove()


def no_figures(folder: Path, names: Iterable[str]) -> list[str]:
    """Removes these figures, of a run before it was added to; gives the names of those that are there then."""
    for name in names:
        for ending in ("png", "pdf"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    return []


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Writes name.png (150 dots an inch) and name.pdf, without dates, so that equal data give equal bytes."""
    for ending, options in (
        ("png", {"dpi": 150, "metadata": {"Software": None}}),
        ("pdf", {"metadata": {"CreationDate": None}}),
    ):
        with replace_atomically(folder / f"{name}.{ending}") as temporary:
            figure.savefig(temporary, **options)  # type: ignore[arg-type]
        figure.set_layout_engine("none")  # found once: it takes longer than drawing
