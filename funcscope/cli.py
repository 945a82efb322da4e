"""The commands: parse, call `study` or `view`, print."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from . import __version__
from .core.store import load
from .study import demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 for input that cannot be used, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError) as err:
        print(f"funcscope: {_one_line(err)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="funcscope", description="A microscope for trained networks, made of pure functions."
    )
    parser.add_argument("--version", action="version", version=f"funcscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    show = commands.add_parser(
        "demo",
        help="train a small transformer until it groks, and watch its loss landscape change",
        description="Trains a one-layer transformer on modular addition (or goes on, or reuses finished checkpoints), "
        "samples its loss along random directions at its checkpoints, prints a table, and writes a page and the numbers.",
    )
    show.add_argument("--quick", action="store_true", help="a smaller model: under 30 seconds instead of 3 minutes")
    show.add_argument(
        "--out", type=Path, default=Path("funcscope-demo"), metavar="DIR", help="default: ./funcscope-demo"
    )
    show.add_argument(
        "--samples", type=int, metavar="N", help="random directions per checkpoint (default 50, quick 20)"
    )
    show.add_argument("--span", type=float, metavar="H", help="relative step along each direction (default 0.1)")
    show.add_argument("--seed", type=int, metavar="S", help="another data split, initialisation and set of directions")
    show.set_defaults(run=_demo)
    return parser


def _demo(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("plotly") is None:
        raise ValueError("the page needs plotly, which is not installed: pip install 'funcscope[view]'")
    settings = demo.QUICK if args.quick else demo.FULL
    settings = demo.adjusted(settings, n_samples=args.samples, span=args.span, seed=args.seed)
    _check_writable(args.out)
    started = time.perf_counter()
    try:
        numbers = demo.run(settings, args.out)
        page = _page(numbers)
    except KeyboardInterrupt:
        kept = len(list(demo.checkpoints(settings, args.out)))
        print(
            f"\nfuncscope: interrupted; {kept} checkpoints are kept in {args.out}, the same command goes on from there."
        )
        return 130
    headers, rows = demo.table(load(numbers).meta)
    print(tabulate(rows, headers=headers, disable_numparse=True, stralign="right"))
    print(f"\n{time.perf_counter() - started:.0f} s. Errors are standard errors over {settings.n_samples} directions.")
    print(f"page     {page}\nnumbers  {numbers} and {numbers.with_suffix('.json').name}")
    return 0


def _page(numbers: Path) -> Path:
    from .view.demo import write_page  # plotly takes a second to import, and is an extra

    return write_page(numbers)


def _check_writable(folder: Path) -> None:
    """Before any work: can the folder be made and written?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise OSError(f"cannot write to {str(folder)!r} ({err.strerror}): choose another folder with --out.") from err


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())
