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
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

FRAME_HEIGHT = 760
"""Of a page in a notebook, in pixels."""
MANY_SECTIONS = 4
"""A page of more sections than this has a table of contents."""
_CONFIG = {"displayModeBar": False, "responsive": True, "scrollZoom": False}
_SIGNS = re.compile(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)")
_NUMBER = re.compile(r"[(≈<>]?[-−+]?[\d∞]|undefined|not resolved|failed|timeout|out of memory|skipped|$")


class Block:
    """A part of a page. As the last value of a notebook's cell it shows itself, in the style of the notebook."""

    def _repr_html_(self) -> str:
        return _template().render(bare=self)


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
        return framed(render("", "", [], [], [Section("", [self])]), self.caption)


@dataclass(frozen=True)
class Table(Block):
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Of as many cells as there are headers, the first a name."""
    caption: str = ""

    @property
    def words(self) -> list[bool]:
        """Whether a column holds words, which start at the left, and not numbers."""
        columns = [[row[i] for row in self.rows] for i in range(len(self.headers))]
        return [2 * sum(not _NUMBER.match(cell) for cell in column) > len(column) for column in columns]


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
        return framed(render("", "", [], [], [self]), self.title)


@dataclass(frozen=True)
class Page:
    """A page on disk, good for a path. As the last value of a notebook's cell it shows itself there, in a frame.

    The frame has the page inside, so that the notebook shows it on other machines too. It runs the page's own script
    and is cut off from the notebook.
    """

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".html":
            return framed(text, self.path.name)
        return f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'


def render(title: str, kicker: str, lede: Sequence[str], strip: Sequence[Fact], sections: Sequence[Section]) -> str:
    """The page as HTML. All text is plain text: the template escapes it.

    >>> "a &lt; b" in render("a < b", "", [], [], [])
    True
    """
    charts = any(isinstance(block, Chart) for section in sections for block in section.blocks)
    return _template().render(
        bare=None, title=title, kicker=kicker, lede=lede, strip=strip, sections=sections,
        contents=len(sections) > MANY_SECTIONS,
        style=Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8")),
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
    facts = "\n".join(f"- {_marked(f'{fact.label}: {fact.value} ({fact.detail})')}" for fact in strip)
    parts = [f"# {_marked(title)}", facts]
    for section in sections:
        parts += [f"## {_marked(section.title)}", *map(_in_markdown, section.blocks)]
    return "\n\n".join(filter(None, parts))


def framed(page: str, name: str) -> str:
    """A page inside another one, cut off from it."""
    return (
        f'<iframe title="{escape(name)}" sandbox="allow-scripts" loading="lazy" '
        f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 1px solid #dcdcdc" srcdoc="{escape(page)}"></iframe>'
    )


def _in_markdown(block: Block | str) -> str:
    match block:
        case Chart():
            return f"*Figure {_marked(block.name)}: {_marked(block.caption)}*"
        case Table():
            rule = f"|{'|'.join(':--' if words else '--:' for words in block.words)}|"
            head, *rows = (_row(cells) for cells in (block.headers, *block.rows))
            return "\n".join([head, rule, *rows, *([f"\n{_marked(block.caption)}"] if block.caption else [])])
        case Terms():
            return "\n".join(f"- **{_marked(term)}**: {_marked(' '.join(lines))}" for term, lines in block.items)
        case Quote():
            return f"> {_marked(block.text)} ({_marked(block.source)})"
        case Code():
            return "\n".join(f"    {line}" for line in block.text.splitlines())
    return _marked(str(block))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_marked(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _marked(text: str) -> str:
    r"""Text on one line that Markdown shows as it is; code between backticks stays code.

    >>> _marked("a_b *c* <i> `x*y` [z]")
    'a_b \\*c\\* &lt;i&gt; `x*y` \\[z\\]'
    """
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    for i in range(0, len(parts), 2):
        parts[i] = _SIGNS.sub(lambda sign: f"\\{sign[0]}", escape(parts[i], quote=False))
    return re.sub(r"^(?=[-+#=])|^(\d+)(?=[.)](?:\s|$))", r"\1\\", "".join(parts))


def _inline(text: str) -> Markup:
    """Escaped, with ±, × and % kept on the line of their neighbours, and code between backticks."""
    joined = re.sub(r"(?<=[\d)]) ([±×]) (?=\d)", "\u00a0\\1\u00a0", text)
    joined = re.sub(r"(?<=\d) %", "\u00a0%", joined)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(Markup.escape(joined))))


@cache
def _template() -> Template:
    where = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=where, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["inline"] = _inline
    return env.get_template("page.html")
