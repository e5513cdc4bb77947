"""The general report: safe, self-contained, the same every time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import matplotlib
import pytest

from spallm_serve.report import (
    Card,
    Column,
    Figure,
    Legend,
    Note,
    Number,
    Report,
    Row,
    Section,
    Table,
    format_bytes,
    format_share,
    render,
    series_colour,
    series_dash,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOSTILE = '<script>alert("x")</script>'


def draw(axes: Axes) -> None:
    """Two lines with markers, each in a colour of its own."""
    for index in range(2):
        axes.plot([1, 2, 3], [index, 4, 2], color=series_colour(index), marker="o")


def page(text: str = "plain") -> str:
    """A report that shows ``text`` in every place there is."""
    table = Table(
        [Column(text), Column("number", numeric=True), Column("module", code=True)],
        [Row((text, 1234567, text)), Row((text, Number("1.5 %", 0.015), text), "warning")],
        sortable=True,
    )
    section = Section(
        text,
        text=[text],
        notes=[Note(text, "notice")],
        figures=[
            Figure(text, draw, caption=text, legend=[Legend(text, 0)]),
            Figure(text, draw, wide=True),
        ],
        tables=[table],
        settings={text: text},
        names=[text],
    )
    return render(Report(text, text, [Card(text, text, text)], [section]))


def test_the_same_report_gives_the_same_page() -> None:
    first = page()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other"}):
        assert page() == first


def test_rendering_leaves_the_settings_of_matplotlib_alone() -> None:
    with matplotlib.rc_context({"font.size": 30}):
        page()
        assert matplotlib.rcParams["font.size"] == 30


def test_all_text_is_escaped() -> None:
    html = page(HOSTILE)
    assert html.count("<script>") == 1, "only the page's own"
    assert "alert(&#34;x&#34;)" in html


def test_the_page_refers_to_nothing_outside() -> None:
    html = page()
    assert not re.search(r"https?:|//[a-z]|@import|<link|\bsrc=|url\((?!#)", html)


def test_plots_follow_the_theme() -> None:
    svgs = re.findall(r"<svg.*?</svg>", page(), flags=re.DOTALL)
    assert len(svgs) == 3, "one drawing of the half-wide figure, two of the wide one"
    for svg in svgs:
        assert "var(--series-0)" in svg and "var(--series-1)" in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg)


def test_cells_are_shown_and_sorted_as_they_should_be() -> None:
    html = page()
    assert '<td class="number" data-key="1234567">1,234,567</td>' in html
    assert '<td class="number" data-key="0.015">1.5 %</td>' in html


def test_dotted_names_may_wrap() -> None:
    assert "<code>model.<wbr>layers.<wbr>0</code>" in page("model.layers.0")


def test_series_that_share_a_colour_differ_in_dash() -> None:
    looks = {(series_colour(index), series_dash(index)) for index in range(24)}
    assert len(looks) == 24


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (269_030_016, "269.0 MB")],
)
def test_format_bytes(count: int, shown: str) -> None:
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (0.00412, "0.412 %"), (0.0123, "1.23 %"), (1, "100 %"), (3e-9, "3.00e-07 %")],
)
def test_format_share(share: float, shown: str) -> None:
    assert format_share(share) == shown
