"""Commands for models that are trained here: `demo`, `train`, `analyze` and `dashboard`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..core.store import load
from ..families import family
from ..study import demo
from ..study.analysis import Unanalysed, analyse
from ..study.analyzer import Analyzer
from ..study.analyzers import ANALYZERS, analyzer
from ..study.listing import Listing, terminal_width
from ..study.runs import Runs, Variant, summarised
from ..study.training import trained
from .shared import check_plotly, check_writable, print_files
from .studies import add_models, analyze, is_study


def add_demo(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="train a small transformer until it groks, and watch its loss landscape change",
        description="Trains a one-layer transformer on modular addition (or goes on, or reuses finished checkpoints), "
        "samples its loss along random directions at its checkpoints, prints a table, and writes a page and the numbers.",
    )
    show.add_argument("--quick", action="store_true", help="a smaller model: under a minute instead of two or three")
    show.add_argument(
        "--out", type=Path, default=Path("funcscope-demo"), metavar="DIR", help="default: ./funcscope-demo"
    )
    show.add_argument(
        "--samples", type=int, metavar="N", help="random directions per checkpoint (default 50, quick 20)"
    )
    show.add_argument("--span", type=float, metavar="H", help="relative step along each direction (default 0.1)")
    show.add_argument("--seed", type=int, metavar="S", help="another data split, initialisation and set of directions")
    show.set_defaults(run=_demo)


def add_train(commands: Any) -> None:
    show = commands.add_parser(
        "train",
        help="train a variant of a family of small models, keeping checkpoints to analyse",
        description="Trains one variant (modular_addition has p37, p53 and p113, the published size), or goes on where an "
        "interrupted call stopped. Then: `funcscope analyze DIR`, `funcscope dashboard DIR`.",
    )
    show.add_argument("family", metavar="FAMILY", help="modular_addition, or one of your own with --import")
    show.add_argument("variant", metavar="VARIANT", help="a variant of that family")
    show.add_argument("--out", type=Path, default=Path("funcscope-run"), metavar="DIR", help="default: ./funcscope-run")
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_import(show)
    show.set_defaults(run=_train)


def add_analyze(commands: Any) -> None:
    show = commands.add_parser(
        "analyze",
        help="measure models on texts (--data), or run analyzers over the checkpoints of a run",
        description="With --data: every metric on every model folder, and a page. Without: goes through the checkpoints of "
        "every variant in a run folder. What is stored with the same settings is kept; interrupted calls go on where they "
        "were, and several may work on one folder at a time.",
    )
    show.add_argument(
        "folder", type=Path, nargs="+", metavar="PATH", help="model folders, or a run as `funcscope train` makes it"
    )
    add_models(show)
    show.add_argument("--variant", metavar="NAME", help="only this one")
    show.add_argument(
        "--analyzer", action="append", metavar="NAME", help=f"one or more of {', '.join(ANALYZERS)} (default: all)"
    )
    show.add_argument("--steps", type=int, nargs="+", metavar="N", help="only these checkpoints")
    show.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="a setting of the chosen analyzer, for example --set epsilon=0.05",
    )  # fmt: skip
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_import(show)
    show.set_defaults(run=_analyze)


def add_dashboard(commands: Any) -> None:
    show = commands.add_parser(
        "dashboard",
        help="look at a run in the browser: trajectories, planes and distributions, step by step",
        description="Serves the results in a run folder to this machine's browsers until Ctrl-C. Nothing is computed.",
    )
    show.add_argument("folder", type=Path, metavar="RUN_DIR", help="as `funcscope demo`, `train` and `analyze` make it")
    show.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other than the default, others can read (default: %(default)s)",
    )
    show.add_argument("--port", type=int, default=8050, help="default: %(default)s")
    show.add_argument("--open", action="store_true", dest="open_browser", help="open a browser")
    show.set_defaults(run=_dashboard)


def _add_import(show: argparse.ArgumentParser) -> None:
    show.add_argument(
        "--import", action="append", default=[], metavar="MODULE", dest="modules",
        help="import a module first: one that registers a family or an analyzer",
    )  # fmt: skip


def _demo(args: argparse.Namespace) -> int:
    check_plotly()
    settings = demo.QUICK if args.quick else demo.FULL
    settings = demo.adjusted(settings, n_samples=args.samples, span=args.span, seed=args.seed)
    check_writable(args.out)
    started = time.perf_counter()
    try:
        numbers = demo.run(settings, args.out)
        from ..view.demo import write_page  # plotly takes a second to import, and is an extra

        page = write_page(numbers)
    except KeyboardInterrupt:
        kept = len(list(demo.checkpoints(settings, args.out)))
        print(
            f"\nfuncscope: interrupted; {kept} checkpoints are kept in {args.out}, the same command goes on from there."
        )
        return 130
    headers, rows = demo.table(load(numbers).meta)
    width = terminal_width()
    note = f"± is one standard error over {settings.n_samples} directions, on these training pairs."
    print(Listing(tuple(headers), tuple(map(tuple, rows)), (note,)).text(width))
    print(f"\n{time.perf_counter() - started:.0f} s")
    print_files(page, numbers)
    return 0


def _train(args: argparse.Namespace) -> int:
    _import(args.modules)
    known = family(args.family)
    setup = known.setup(args.variant)
    check_writable(args.out)
    try:
        variant = trained(known, setup, args.out, name=args.variant, quiet=args.quiet)
    except KeyboardInterrupt:
        print(f"\nfuncscope: interrupted; checkpoints are kept in {args.out}, the same command goes on from there.")
        return 130
    print(f"{len(variant.checkpoints())} checkpoints  {variant.path}\nnext  funcscope analyze {args.out}")
    return 0


def _analyze(args: argparse.Namespace) -> int:
    _import(args.modules)
    if is_study(args):
        return analyze(args)
    if len(args.folder) > 1:
        raise ValueError("several paths are models, which need texts: `--data FILE`. A run folder stands alone.")
    chosen = [analyzer(name) for name in args.analyzer or ANALYZERS]
    if args.changes:
        if len(chosen) != 1:
            raise ValueError("`--set` is for one analyzer: name it with `--analyzer`.")
        chosen = [chosen[0].configured(**_changes(chosen[0], args.changes))]
    runs = Runs(args.folder[0])
    variants = [runs.variant(args.variant)] if args.variant else [runs.variant(name) for name in runs.variants()]
    failures = []
    try:
        for variant in variants:
            try:
                analyse(variant, chosen, steps=args.steps, quiet=args.quiet)
            except Unanalysed as err:
                failures.append(f"{variant.head['variant']}: {err}")
    except KeyboardInterrupt:
        print("\nfuncscope: interrupted; what was finished is kept, the same command goes on from there.")
        return 130
    rows = [tuple(row) for variant in variants for row in _times(variant, chosen)]
    headers = ("analyzer", "variant", "steps", "forwards each", "seconds each", "expected")
    print(Listing(headers, tuple(rows)).text(terminal_width()))
    print(f"\nnext  funcscope dashboard {args.folder[0]}")
    if failures:
        raise Unanalysed(" ".join(failures))
    return 0


def _dashboard(args: argparse.Namespace) -> int:
    check_plotly("dashboard", "dash")
    runs = Runs(args.folder)
    from ..view.dashboard import serve  # dash takes a second to import, and is an extra

    def tell(address: str) -> None:
        print(f"{', '.join(runs.variants())}\n{address}  (Ctrl-C stops)", flush=True)

    serve(args.folder, host=args.host, port=args.port, open_browser=args.open_browser, started=tell)
    return 0


def _times(variant: Variant, chosen: list[Analyzer]) -> list[list[str]]:
    """What each analyzer took for a checkpoint, and what its number of forward passes promised."""
    rows = []
    for one in chosen:
        times, summary = variant.times(one.name), variant.summary(one.name)
        stored = variant.steps(one.name) if summary is None else summarised(summary)
        cost = one.forwards(one.settings)
        alike = [entry for entry in times if entry.get("forwards") == cost]  # of as much work as these settings ask for
        seconds = sorted({entry.get("step"): entry["seconds"] for entry in alike}.values())
        forward = next((e["forward_seconds"] for e in reversed(times) if e.get("forward_seconds")), None)
        rows.append(
            [
                one.name,
                variant.head["variant"],
                "all together" if one.across else f"{len(stored)} of {len(variant.checkpoints())}",
                f"{cost:g}",
                f"{seconds[len(seconds) // 2]:.2g}" if seconds else "",
                f"{cost * forward:.2g}" if forward else "",
            ]
        )
    return rows


def _changes(one: Analyzer, given: list[str]) -> dict[str, Any]:
    """`name=value` as the analyzer's own types: those of its defaults."""
    changes = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"`--set` takes name=value, got {text!r}.")
        known = one.configured(**{name: one.settings.get(name)})  # refuses a name that it does not have
        changes[name] = _value(name, value, known.settings[name])
    return changes


def _value(name: str, text: str, default: Any) -> Any:
    """The text as what the default is."""
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if isinstance(default, (tuple, list)):
            kind = type(default[0]) if default else float
            return type(default)(kind(part) for part in text.split(",") if part)
        return _plain(text) if default is None else type(default)(text)
    except (ValueError, KeyError) as err:
        wanted = "true or false" if isinstance(default, bool) else f"of the kind of {default!r}"
        raise ValueError(f"`{name}` must be {wanted}, got {text!r}.") from err


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _import(modules: list[str]) -> None:
    """Modules by name; those of the current folder, too."""
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in modules:
        importlib.import_module(name)
