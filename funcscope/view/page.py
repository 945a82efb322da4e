"""One self-contained page, HTML or Markdown: text, figures and tables in a column; plotly.js inside, nothing loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

FRAME_HEIGHT = 760
"""Of a page in a notebook, in pixels."""
MANY_SECTIONS = 4
"""A page of more sections than this has a table of contents."""
FOLDER = Path(__file__).parent
_CONFIG = {"displayModeBar": False, "responsive": True, "scrollZoom": False}
_SIGNS = re.compile(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)")
_NUMBER = re.compile(r"[(≈<>]?[-−+]?[\d∞]")
_NEITHER = ("", "undefined", "not resolved", "failed", "timeout", "out of memory", "skipped")
MOST_DIGITS = 60
"""Letters of a cell that is a number or an interval."""


class Block:
    """A part of a page. As the last value of a notebook's cell it shows itself, in the style of the notebook."""

    def _repr_html_(self) -> str:
        return _templates().get_template("page.html").render(bare=self)


class Fact(NamedTuple):
    """A cell of the strip below the title: what, its value, and a line that says more."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Chart(Block):
    figure: go.Figure
    caption: str
    """How to read it."""
    name: str = ""
    """Of its file, where it is written to one."""

    def html(self, place: str) -> str:
        """plotly's own, which escapes what it draws; `place` tells the figures of a page apart."""
        height = f"{self.figure.layout.height or 450}px"
        options = {"full_html": False, "include_plotlyjs": False, "config": _CONFIG}
        return Markup(self.figure.to_html(div_id=place, default_height=height, **options))

    def _repr_html_(self) -> str:
        return framed(render("", sections=[Section("", [self])]), self.caption)


@dataclass(frozen=True)
class Table(Block):
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Of as many cells as there are headers, the first a name."""
    caption: str = ""

    @property
    def words(self) -> list[bool]:
        """Whether a column holds words, which start at the left, and not numbers."""
        columns = [[row[i] for row in self.rows if row[i] not in _NEITHER] for i in range(len(self.headers))]
        return [2 * sum(bool(_NUMBER.match(x)) and len(x) < MOST_DIGITS for x in each) <= len(each) for each in columns]

    @property
    def width(self) -> str:
        """How it is laid out: the wider it is, the sooner a row becomes a block of lines."""
        return "narrow" if len(self.headers) < 4 else "medium" if len(self.headers) < 7 else "wide"


@dataclass(frozen=True)
class Terms(Block):
    """Terms and what is to be said of each, a paragraph per line."""

    items: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Quote(Block):
    text: str
    source: str


@dataclass(frozen=True)
class Code(Block):
    """Lines as they are typed."""

    text: str


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block | str]

    def _repr_html_(self) -> str:
        return framed(render("", sections=[self]), self.title)


@dataclass(frozen=True)
class Page:
    """A page on disk, good for a path. As the last value of a notebook's cell it shows itself there, in a frame.

    The frame has the page inside, so that the notebook shows it on other machines too. It runs the page's own script
    and is cut off from the notebook.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def _repr_html_(self) -> str:
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".html":
            return framed(text, self.path.name)
        return f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'


def render(
    title: str, kicker: str = "", lede: Sequence[str] = (), strip: Sequence[Fact] = (), sections: Sequence[Section] = ()
) -> str:
    """The page as HTML. All text is plain text: the template escapes it.

    >>> "a &lt; b" in render("a < b")
    True
    """
    charts = any(isinstance(block, Chart) for section in sections for block in section.blocks)
    styles = [(FOLDER / name).read_text(encoding="utf-8") for name in ("table.css", "page.css")]
    return _templates().get_template("page.html").render(
        bare=None, title=title, kicker=kicker, lede=lede, strip=strip, sections=sections,
        contents=len(sections) > MANY_SECTIONS, style=Markup("".join(styles)),
        script=Markup(get_plotlyjs()) if charts else "",
    ).lstrip()  # fmt: skip


def markdown(title: str, strip: Sequence[Fact], sections: Sequence[Section]) -> str:
    """The page as Markdown, with a figure's caption in its place.

    >>> print(markdown("a *b*", [], [Section("c", ["1 < 2"])]))
    # a \\*b\\*
    <BLANKLINE>
    ## c
    <BLANKLINE>
    1 &lt; 2
    """
    text = _templates().get_template("page.md").render(title=title, strip=strip, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip()


def framed(page: str, name: str) -> str:
    """A page inside another one, cut off from it."""
    return (
        f'<iframe title="{escape(name)}" sandbox="allow-scripts" loading="lazy" '
        f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 1px solid #dcdcdc" srcdoc="{escape(page)}"></iframe>'
    )


def _marked(text: str) -> str:
    r"""Text on one line that Markdown shows as it is; code between backticks stays code.

    >>> _marked("a_b *c* <i> `x*y` [z]")
    'a_b \\*c\\* &lt;i&gt; `x*y` \\[z\\]'
    """
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):
        parts[i] = _SIGNS.sub(lambda sign: f"\\{sign[0]}", escape(parts[i], quote=False))
    return re.sub(r"^(?=[-+#=])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", "".join(parts))


def joined(text: str) -> str:
    """With signs and units on the line of their numbers."""
    text = re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", text)
    text = re.sub(r"(?<=[\d)]) × (?=\d)", " ×\u00a0", text)  # where there is no room for both, the power stands alone
    return re.sub(r"(?<=\d) %|(?<=\bstep) (?=\d)", lambda gap: gap[0].replace(" ", "\u00a0"), text)


def _inline(text: str) -> Markup:
    """Escaped and joined, with long names in pieces, and code between backticks."""
    pieces = re.sub(r"([_/])(?=\w)|(\w{24})(?=\w)", "\\g<0>\u200b", joined(text))
    escaped = str(Markup.escape(pieces)).replace("\u200b", "<wbr>")
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))


@cache
def _templates() -> Environment:
    env = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=lambda name: name == "page.html",
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {"inline": _inline, "marked": _marked}
    return env
