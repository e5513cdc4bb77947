"""Self-contained HTML reports: headline figures, plots, tables and settings in one file.

A page refers to nothing outside itself, and the same contents always give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mark = Literal["", "notice", "warning"]

# What drawing functions may paint with. The page turns each into a CSS variable, so that a plot
# follows the reader's light or dark mode.
INK, MUTED, RULE, PAPER = "#3b3f45", "#6c7178", "#d9dbdf", "#ffffff"
SERIES = ("#2a78d6", "#d9601f", "#159a6b", "#c98a00", "#c9568a", "#4a3aa7", "#7a7f87", "#8a5a2b")
_SERIES_DARK = (
    "#5aa0f2",
    "#f08a4b",
    "#3cc191",
    "#e3b341",
    "#e98bb4",
    "#a598f5",
    "#a3a8b0",
    "#c99a6b",
)
_THEMED = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "card"} | {
    colour: f"series-{index}" for index, colour in enumerate(SERIES)
}

# Widths in CSS pixels. A plot across the page is drawn twice, so that its text keeps its size on a
# narrow screen; half the page is about as wide as a phone, one drawing serves both.
_NARROW, _WIDE = 450, 1060
_PIXELS_PER_INCH = 96


@dataclass(frozen=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        numeric: right-aligned.
        code: set in a monospaced face and allowed to wrap at dots: names of modules, digests.
    """

    title: str
    numeric: bool = False
    code: bool = False


@dataclass(frozen=True)
class Number:
    """A number as it is shown and, for sorting, as it is."""

    text: str
    value: float


@dataclass(frozen=True)
class Row:
    """A row of a table, possibly marked for attention."""

    cells: Sequence[str | int | Number]
    mark: Mark = ""


@dataclass(frozen=True)
class Note:
    """A paragraph that stands out, painted as rows with the same mark are."""

    text: str
    mark: Mark


@dataclass(frozen=True)
class Table:
    """A table; where it is ``sortable``, a click on a heading sorts it."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    sortable: bool = False


@dataclass(frozen=True)
class Legend:
    """An entry of a figure's legend; ``index`` as for :func:`series_colour`."""

    label: str
    index: int

    @property
    def variable(self) -> str:
        """The CSS variable with its colour."""
        return f"series-{self.index % len(SERIES)}"

    @property
    def style(self) -> str:
        """How a line with this index is drawn."""
        return series_dash(self.index)


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        title: in words.
        draw: paints it, with the colours of this module only; may be called more than once.
        caption: what the reader should know.
        legend: shown above the plot.
        height: in CSS pixels.
        wide: across the page; otherwise two figures share a line.
    """

    title: str
    draw: Callable[[Axes], None]
    caption: str = ""
    legend: Sequence[Legend] = ()
    height: int = 260
    wide: bool = False

    @property
    def drawings(self) -> list[tuple[str, Markup]]:
        """(screen it is for, SVG) pairs."""
        narrow = _svg(self, _NARROW)
        if not self.wide:
            return [("any", narrow)]
        return [("large", _svg(self, _WIDE)), ("small", narrow)]


@dataclass(frozen=True)
class Section:
    """A part of a report; what is given is shown in the order of these attributes.

    Attributes:
        title: its heading.
        text: paragraphs.
        notes: paragraphs the reader must not miss.
        figures: plots.
        tables: tables.
        settings: names and values.
        names: a list of modules, files and the like.
    """

    title: str
    text: Sequence[str] = ()
    notes: Sequence[Note] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """A page."""

    title: str
    subtitle: str
    cards: Sequence[Card]
    sections: Sequence[Section]


def render(report: Report) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=PackageLoader("spallm_serve"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["shown"] = _shown
    environment.filters["sort_key"] = _sort_key
    template = environment.get_template("report.html.jinja")
    return template.render(report=report, light=SERIES, dark=_SERIES_DARK) + "\n"


def series_colour(index: int) -> str:
    """Colour of the series number ``index``; they repeat after the last."""
    return SERIES[index % len(SERIES)]


def series_dash(index: int) -> Literal["solid", "dashed", "dotted"]:
    """Line style of the series number ``index``: tells apart those that share a colour."""
    styles: tuple[Literal["solid", "dashed", "dotted"], ...] = ("solid", "dashed", "dotted")
    return styles[index // len(SERIES) % len(styles)]


def format_bytes(count: int) -> str:
    """A size in decimal units: 138.2 MB."""
    if count < 1000:
        return f"{count} B"
    units = ("kB", "MB", "GB", "TB")
    power = next((at for at in (1, 2, 3) if count < 999.95 * 1000**at), 4)
    return f"{count / 1000**power:,.1f} {units[power - 1]}"


def format_share(share: float) -> str:
    """A share as a percentage with three significant digits: 0.00412 is "0.412 %"."""
    if not math.isfinite(share):
        return str(share)
    percent = 100 * share
    if percent == 0:
        return "0 %"
    if abs(percent) < 1e-4:
        return f"{percent:.2e} %"
    decimals = max(0, 2 - math.floor(math.log10(abs(percent))))
    return f"{percent:,.{decimals}f} %"


def _breakable(text: str) -> Markup:
    """Lets a dotted name wrap after its dots, slashes and underscores."""
    return Markup("").join(
        Markup("{}<wbr>").format(part) if part in "._/" else escape(part)
        for part in re.split(r"([._/])", text)
        if part
    )


def _shown(cell: str | int | Number) -> str:
    if isinstance(cell, Number):
        return cell.text
    return f"{cell:,}" if isinstance(cell, int) else cell


def _sort_key(cell: str | int | Number) -> str:
    value = cell.value if isinstance(cell, Number) else cell
    return str(value)


def _svg(figure: Figure, width: int) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    # Any: newer matplotlib names every setting in a type of its own.
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"{figure.title}/{width}",
        "font.size": 9,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.8,
        "text.color": INK,
    }
    with matplotlib.rc_context():
        # A reader's own matplotlibrc must not change the page.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        size = (width / _PIXELS_PER_INCH, figure.height / _PIXELS_PER_INCH)
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        figure.draw(canvas.add_subplot())
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), figure.title)


def _inline(svg: str, label: str) -> Markup:
    """An SVG file as an element of the page: no namespaces, no metadata, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", svg)
    # Several plots share the page: their groups would have the same ids, which nothing refers to.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _THEMED.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
