"""One self-contained HTML page: text, figures and tables in a column; plotly.js inside, nothing loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..study.listing import Listing
from .numbers import typeset

FRAME_HEIGHT = 760
"""Of a page in a notebook, in pixels."""
_CONFIG = {"displayModeBar": False, "responsive": True, "scrollZoom": False}
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>$style</style>
<script>$script</script>
</head>
<body>
<main>
<header>
<p class="kicker">$kicker</p>
<h1>$title</h1>
$lede
</header>
$strip
$sections
</main>
</body>
</html>
""")


class Fact(NamedTuple):
    """A cell of the strip below the title: what, its value, and a line that says more."""

    label: str
    value: str
    detail: str


class Chart(NamedTuple):
    figure: go.Figure
    caption: str
    """How to read it."""


class Table(NamedTuple):
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    style: str = ""
    """"named" where rows start with words, "listed" where they end with words, too, and fit the column of text."""


class Note(NamedTuple):
    """A paragraph in small letters below a table."""

    text: str


class Terms(NamedTuple):
    """Terms and what is to be said of each, a paragraph per line."""

    items: Sequence[tuple[str, Sequence[str]]]


class Quote(NamedTuple):
    text: str
    source: str


class Files(NamedTuple):
    """Names of files that lie beside the page."""

    names: Sequence[str]


Block = str | Chart | Table | Note | Terms | Quote | Files


class Section(NamedTuple):
    title: str
    blocks: Sequence[Block]


def listed(listing: Listing, style: str = "named") -> list[Block]:
    """A listing of a study with its notes: the cells of the terminal, in the characters of print."""
    rows = [[row[0], *map(typeset, row[1:])] for row in listing.rows]
    style += " noted" if listing.headers[-1] == "note" else ""
    notes = [Note(typeset(" ".join(listing.notes)))] if listing.notes else []
    return [*([Table(listing.headers, rows, style)] if rows else []), *notes]


@dataclass(frozen=True)
class Page:
    """A page on disk, good for a path. As the last value of a notebook's cell it shows itself there, in a frame.

    The frame has the page inside, so that the notebook shows it on other machines too. It runs the page's own script
    and is cut off from the notebook: links to the files beside the page work only in the page itself.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{escape(self.path.name)}" sandbox="allow-scripts" loading="lazy" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 1px solid #dcdcdc" '
            f'srcdoc="{escape(self.path.read_text(encoding="utf-8"))}"></iframe>'
        )


def render(title: str, kicker: str, lede: Sequence[str], strip: Sequence[Fact], sections: Sequence[Section]) -> str:
    """The page as HTML. All text is plain text: it is escaped here, once.

    >>> "a &lt; b" in render("a < b", "", [], [], [])
    True
    """
    body = [
        f"<section>\n<h2>{_text(section.title)}</h2>\n"
        + "\n".join(_html(block, f"figure-{i}-{j}") for j, block in enumerate(section.blocks))
        + "\n</section>"
        for i, section in enumerate(sections, start=1)
    ]
    return _PAGE.substitute(
        title=_text(title),
        kicker=_text(kicker),
        lede="\n".join(f'<p class="lede">{_text(text)}</p>' for text in lede),
        strip=_strip(strip),
        sections="\n".join(body),
        style=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
        script=get_plotlyjs(),
    )


def _html(block: Block, name: str) -> str:
    match block:
        case Chart():
            return _chart(block, name)
        case Table():
            return _table(block)
        case Note():
            return f'<p class="note">{_text(block.text)}</p>'
        case Terms():
            return _terms(block)
        case Quote():
            return f"<blockquote><p>{_text(block.text)}</p><footer>{_text(block.source)}</footer></blockquote>"
        case Files():
            links = (f'<a href="{escape(quote(f"./{file}"))}">{_text(file)}</a>' for file in block.names)
            return f'<p class="files">Beside this page: {", ".join(links)}</p>'
    return f"<p>{_text(block)}</p>"


def _strip(facts: Sequence[Fact]) -> str:
    cells = (
        f"<div><dt>{_text(fact.label)}</dt><dd>{_text(fact.value)}</dd><dd>{_text(fact.detail)}</dd></div>"
        for fact in facts
    )
    return f'<dl class="strip">{"".join(cells)}</dl>'


def _chart(chart: Chart, name: str) -> str:
    drawn = chart.figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config=_CONFIG,
        div_id=name,
        default_height=f"{chart.figure.layout.height}px",
    )
    caption = _text(chart.caption)
    return f"<figure>\n{drawn}\n<figcaption>{caption}</figcaption>\n</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in table.headers)
    rows = (
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in cells)}</tr>'
        for first, *cells in table.rows
    )
    return (
        f'<div class="{f"scroll {table.style}".strip()}" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def _terms(terms: Terms) -> str:
    items = ((term, "".join(f"<p>{_text(line)}</p>" for line in lines)) for term, lines in terms.items)
    return "<dl>" + "".join(f"<dt>{_text(term)}</dt><dd>{lines}</dd>" for term, lines in items) + "</dl>"


def _text(text: str) -> str:
    """Escaped, with ±, × and % kept on the line of their neighbours, and code between backticks."""
    kept = re.sub(r"(?<=[\d)]) ([±×]) (?=\d)", r"&nbsp;\1&nbsp;", escape(text))
    return re.sub(r"(?<=\d) %", "&nbsp;%", re.sub(r"`([^`]+)`", r"<code>\1</code>", kept))
