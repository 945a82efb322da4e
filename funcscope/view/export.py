"""Figures as files: HTML that loads nothing, and images through kaleido where it and a browser are found."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

import plotly.graph_objects as go

from ..core.store import write

ENDINGS = (".html", ".svg", ".png", ".pdf")
WIDTH, HEIGHT = 800, 450
TIMEOUT = 60.0
"""Seconds for an image, the start of the browser included."""
_REMEDY = (
    "Install one with `pip install 'funcscope[image]'` and a Chromium or Chrome, or write .html, which needs neither."
)


def export(
    fig: go.Figure,
    path: str | PathLike[str],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
) -> Path:
    """Write a figure to `path`, in one step; the ending says how: .html, .svg, .png or .pdf.

    HTML has plotly.js inside and loads nothing. Images are drawn by kaleido in a headless browser: the one that
    BROWSER_PATH names, or a Chromium, Chrome or Edge of the system; it starts for the image and ends after it.
    width, height: pixels; of images, those of the figure or 800 x 450 unless given. scale: pixels of a PNG per pixel of
    the figure. A transparent background becomes white; the figure itself stays as it is.

    Raises ValueError for another ending, and where kaleido or the browser is missing or fails; OSError where the file
    cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(go.Figure(), Path(folder) / "empty.html").name
    'empty.html'
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"`path` must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}, got {path.name!r}.")
    drawn = go.Figure(fig)
    if drawn.layout.paper_bgcolor in (None, "rgba(0,0,0,0)"):
        drawn.layout.paper_bgcolor = "white"
    if ending == ".html":
        write(path, _page(drawn.update_layout(width=width, height=height or fig.layout.height)))
    else:
        size = {"width": width or fig.layout.width or WIDTH, "height": height or fig.layout.height or HEIGHT}
        write(path, _image(drawn, {"format": ending[1:], "scale": scale, **size}))
    return path


def _page(fig: go.Figure) -> bytes:
    """The same figure gives the same bytes."""
    config = {"displayModeBar": False, "responsive": True}
    return str(fig.to_html(include_plotlyjs=True, full_html=True, config=config, div_id="figure")).encode()


def _image(fig: go.Figure, options: dict[str, str | float]) -> bytes:
    """The bytes of an image. A thread of its own has its own event loop, whatever loop a notebook or a server runs."""
    if find_spec("kaleido") is None:
        raise ValueError(f"a {options['format']} needs kaleido, which is not installed. {_REMEDY}")
    kaleido, errors = import_module("kaleido"), import_module("choreographer.errors")
    failures = (
        errors.ChromeNotFoundError, errors.BrowserClosedError, errors.BrowserFailedError, errors.BrowserDepsError,
        TimeoutError,
    )  # fmt: skip

    async def draw() -> bytes:
        # without MathJax, which would be loaded from the network
        settings = {"mathjax": False, "timeout": TIMEOUT}
        return bytes(await kaleido.calc_fig(fig, opts=options, kopts=settings))

    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: asyncio.run(draw())).result()
    except failures as err:
        raise ValueError(f"a {options['format']} needs a browser, and none could draw it ({err}). {_REMEDY}") from err
