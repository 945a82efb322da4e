"""The dashboard of a study: a card for every metric it has, at one step of one run (extra `funcscope[view]`).

It only reads. Everything that the page needs comes from this server; nothing is fetched from elsewhere, and a content
security policy keeps it so. The study is read again when it has changed: one that still runs fills the page.
"""

from __future__ import annotations

import errno
import socket
import webbrowser
from collections.abc import Callable, Collection
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dash
from flask import Flask, Response, abort, request
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from ...study.results import MANIFEST, Results
from .callbacks import register
from .cards import shell

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine that only this machine can reach."""


def app(folder: str | PathLike[str], *, hosts: Collection[str] | None = LOCAL) -> dash.Dash:
    """The dashboard as a Dash application, for any WSGI server (`app(folder).server`).

    hosts: names that a request may call this server by; another name is answered with 403, so that a page on the web
    whose name was made to point here (DNS rebinding) cannot read the study. None: any name.
    Raises FileNotFoundError where the folder holds no study.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        Results.open(path)  # says what is not there
    flask: Any = Flask(__name__, static_folder=None)
    index, tables = (Path(__file__).parent / name for name in ("index.html", "../table.css"))
    made = dash.Dash(
        __name__,
        server=flask,
        assets_folder=str(Path(__file__).parent / "assets"),
        title=f"{path.resolve().name} · funcscope",
        update_title="",  # the title stays still while cards load
        index_string=index.read_text().replace("{{tables}}", tables.read_text()),
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
        serve_locally=True,
        suppress_callback_exceptions=True,  # cards come and go with the study
        enable_mcp=False,
        add_log_handler=False,
    )
    made.layout = shell(path.resolve().name)
    register(made, path)
    _guard(made, hosts)
    return made


def serve(
    folder: str | PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8050,
    open_browser: bool = False,
    started: Callable[[str], Any] = lambda _: None,
) -> None:
    """Serve the dashboard of a study until interrupted (Ctrl-C).

    host: the address to listen at; the default is reached from this machine only. port: 0 takes a free one.
    started: called with the address when the server listens.
    Raises what `app` raises, and OSError where the address is taken or not ours.
    """
    made = app(folder, hosts=LOCAL if host in LOCAL else None)
    with listen(made, host, port) as server:
        started(address(host, server.port))
        if open_browser:
            webbrowser.open(address(host, server.port))
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def address(host: str, port: int) -> str:
    """Where a browser on this machine finds the server.

    >>> address("127.0.0.1", 8050), address("::1", 8050), address("0.0.0.0", 80)
    ('http://127.0.0.1:8050/', 'http://[::1]:8050/', 'http://localhost:80/')
    """
    name = "localhost" if host in {"", "0.0.0.0", "::"} else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def listen(made: dash.Dash, host: str, port: int) -> BaseWSGIServer:
    """A threaded server of the application, bound and not yet serving."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, port), family=family)
    except OSError as err:
        hint = "choose another `--port`, or 0 for a free one" if err.errno == errno.EADDRINUSE else "choose another one"
        raise OSError(err.errno, f"cannot listen at {host}:{port} ({err.strerror}): {hint}.") from err
    with bound:  # the server keeps a duplicate
        return make_server(host, port, made.server, threaded=True, request_handler=_Quiet, fd=bound.fileno())


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing of requests that went well."""


def _guard(made: dash.Dash, hosts: Collection[str] | None) -> None:
    scripts = " ".join(made.csp_hashes())
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data: blob:; font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    more = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @made.server.before_request
    def known_host() -> None:
        try:
            name = urlsplit(f"//{request.host}").hostname
        except ValueError:
            name = None
        if hosts is not None and name not in hosts:
            abort(403, "This server answers to the names of this machine only.")

    @made.server.after_request
    def stay_here(response: Response) -> Response:
        response.headers.update(more)
        return response
