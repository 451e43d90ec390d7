"""Figures in one style, as PNG. Only this file imports matplotlib, which is optional."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

BLUE, ORANGE, GREEN, PURPLE, RED = "#2b6ca3", "#d97b29", "#3b8a4f", "#9d3c8a", "#be123c"
GREY, INK, PALE, TEAL, BROWN = "#6b7280", "#374151", "#e5e7eb", "#0f766e", "#b45309"
SERIES = (GREY, BROWN, BLUE, ORANGE, PURPLE, GREEN, TEAL, RED)
"""Colours of things that are compared, in their order."""
MISSING = "Figures are left out: they need matplotlib (`pip install 'sae[figures]'`)."
"""The text in Markdown in place of figures."""

Arguments = ParamSpec("Arguments")
Drawn = TypeVar("Drawn")


def drawing(draw: Callable[Arguments, Drawn]) -> Callable[Arguments, Drawn | None]:
    """Make a drawing function return None if matplotlib is not installed."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Drawn | None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return None
        return draw(*args, **kwargs)

    return wrapper


class Canvas:
    """A grid of axes, drawn without pyplot and its global state.

    Args:
        rows, columns: numbers of axes.
        size: of the figure, in inches.
    """

    def __init__(self, rows: int, columns: int, size: tuple[float, float]) -> None:
        from matplotlib.figure import Figure as MatplotlibFigure

        self.figure = MatplotlibFigure(figsize=size, dpi=160, layout="constrained", facecolor="white")
        self.axes: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False).flat)
        for axes in self.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GREY)
            axes.tick_params(labelsize=8, color=GREY, labelcolor=INK, which="both")
            axes.xaxis.label.set(size=9, color=INK)
            axes.yaxis.label.set(size=9, color=INK)
            axes.grid(axis="y", color=PALE, linewidth=0.7)
            axes.set_axisbelow(True)

    def legend(self, place: str, handles: Iterable[Artist] | None = None, *, columns: int, size: int = 8) -> None:
        """A legend outside the axes.

        Args:
            place: `upper` or `lower`, centred.
            handles: from `line` and `patch`; None: everything with a label.
            columns: number of columns.
            size: of the font.
        """
        options: dict[str, Any] = {} if handles is None else {"handles": list(handles)}
        options["loc"] = f"outside {place} center"
        self.figure.legend(frameon=False, fontsize=size, labelcolor=INK, ncols=columns, **options)

    def png(self) -> bytes:
        """Draw the figure; the same figure gives the same bytes."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(content, metadata={"Software": None})
        return content.getvalue()


def title(axes: Axes, text: str) -> None:
    """A small title at the left."""
    axes.set_title(text, fontsize=9, loc="left", color=INK)


def bare(axes: Axes) -> None:
    """Remove spines, ticks and grid."""
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def circle(axes: Axes, radius: float) -> None:
    """A pale circle around the origin."""
    from matplotlib.patches import Circle

    axes.add_patch(Circle((0, 0), radius, fill=False, color=PALE, linewidth=1))


def cells(axes: Axes, x: ArrayLike, y: ArrayLike, kinds: ArrayLike, colours: Sequence[str]) -> None:
    """Draw a grid of cells, each in the colour of its kind.

    Args:
        axes: to draw on.
        x, y: centres of the cells.
        kinds: of the cells, `[y][x]`, as indices into `colours`.
        colours: one for each kind.
    """
    from matplotlib.colors import ListedColormap

    axes.pcolormesh(
        x, y, kinds, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, shading="nearest",
        edgecolors="white", linewidth=0.3,
    )  # fmt: skip
    axes.grid(False)


def line(label: str, **style: Any) -> Artist:
    """A line or marker for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def patch(label: str, colour: str) -> Artist:
    """A patch of colour for a legend."""
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def logarithmic(axes: Axes, which: str, limits: tuple[float, float]) -> None:
    """Set a log scale with plain numbers as ticks, also between the powers of ten if the range is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    decades = math.log10(limits[1] / limits[0])
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(thousands())
    axis.set_minor_formatter(NullFormatter())


def whole_numbers() -> Any:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])


def engineering() -> Any:
    """Ticks such as 20k and 3M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def percent() -> Any:
    """Ticks such as 20%, for shares."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def thousands() -> Any:
    """Ticks such as 20,000."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.10g}")
