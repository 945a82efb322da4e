"""Commands: parse, call `study` or `view`, print."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

from .. import __version__
from .check import add_check
from .commands import COMMANDS
from .merging import add_fisher, add_merge
from .options import with_flags
from .runs import add_dashboard, add_demo, add_train
from .studies import add_analyze, add_cache, add_command, add_metrics, add_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 for input that cannot be used, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        with _warnings_in_a_line():
            return args.run(args)
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError, MemoryError, RuntimeError) as err:
        print(f"funcscope: {with_flags(_one_line(err), vars(args))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a command that keeps something says so itself
        print("\nfuncscope: interrupted; nothing half-made is left.", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Says which option is nearest to one that there is not, of the command that it was given to."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        known, rest = super().parse_known_args(args, namespace)
        if option := next((word.partition("=")[0] for word in rest if word.startswith("--")), None):
            there = [name for name in self._option_string_actions if name.startswith("--")]
            near = get_close_matches(option, there, 1)
            self.error(f"there is no option {option}{f': did you mean {near[0]}?' if near else ''}")
        return known, rest


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="funcscope", description="A microscope for trained networks, made of pure functions.")
    parser.add_argument("--version", action="version", version=f"funcscope {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_demo(commands)
    for one in COMMANDS:
        add_command(commands, one)
    for add in (
        add_check,
        add_merge,
        add_fisher,
        add_train,
        add_analyze,
        add_report,
        add_dashboard,
        add_metrics,
        add_cache,
    ):
        add(commands)
    return parser


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Our own warnings as a line on stderr, without the line of code that raised them."""
    before = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, UserWarning) and __name__.partition(".")[0] in filename:
            print(f"funcscope: {_one_line(message)}", file=sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _one_line(err: object) -> str:
    """The message, with the notes that were added to it on the way; the kind of error where it has none."""
    notes = getattr(err, "__notes__", [])
    return " ".join(" ".join([str(err) or type(err).__name__, *notes]).split())
