"""Commands for models that are trained here, `demo` and `train`, and the dashboard of any study."""

from __future__ import annotations

import argparse
import math
import re
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.result import Result
from ..core.tables import counted, numbers, said
from ..families import family
from ..study import demo, induction_demo, text_demo
from ..study.listing import Listing, terminal_width
from ..study.modules import import_modules
from ..study.results import Results
from ..study.training import trained
from .shared import check_plotly, check_writable
from .studies import add_import


def add_demo(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="train small models, and measure them: one that groks, language models of two tasks, or induction heads",
        description="modular: trains a one-layer transformer on modular addition (or goes on, or reuses what is there), and "
        "samples its loss along random directions at its checkpoints. text: trains a language model of prose and code, "
        "fine-tunes it on each, and measures all three on both. induction: trains transformers of one and two layers on "
        "repeated random tokens, and measures how induction heads grow. Prints a table, and writes a page and the numbers.",
    )
    show.add_argument(
        "--family", choices=tuple(_DEMOS), default="modular", help="which models are trained (default: %(default)s)"
    )
    show.add_argument("--quick", action="store_true", help="smaller models, and fewer measurements")
    show.add_argument(
        "--out", type=Path, metavar="DIR", help="default: ./funcscope-demo, of another family ./funcscope-demo-FAMILY"
    )
    show.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="random directions per model (default 50, quick 20; of text 10, quick 5; of induction 20, quick 5)",
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
    add_import(show)
    show.set_defaults(run=_train)


def add_dashboard(commands: Any) -> None:
    show = commands.add_parser(
        "dashboard",
        help="look at a study in the browser: trajectories, planes and distributions, step by step",
        description="Serves the results of a study to this machine's browsers until Ctrl-C. Nothing is computed.",
    )
    show.add_argument(
        "folder", type=Path, metavar="STUDY_DIR", help="as `funcscope demo`, `analyze` and the others make it"
    )
    show.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other than the default, others can read (default: %(default)s)",
    )
    show.add_argument("--port", type=int, default=8050, help="default: %(default)s")
    show.add_argument("--open", action="store_true", dest="open_browser", help="open a browser")
    show.set_defaults(run=_dashboard)


def _demo(args: argparse.Namespace) -> int:
    check_plotly()
    kind, out = _DEMOS[args.family]
    settings = kind.QUICK if args.quick else kind.FULL
    settings = kind.adjusted(settings, n_samples=args.samples, span=args.span, seed=args.seed)
    out = args.out or out
    check_writable(out)
    started = time.perf_counter()
    try:
        results = kind.run(settings, out)
        written = import_module(
            f"funcscope.view.{kind.__name__.rpartition('.')[2]}"
        )  # plotly takes a second, and is an extra
        page = written.write_page(results, out / f"{settings.name}.html")
    except KeyboardInterrupt:
        print(f"\nfuncscope: interrupted; what was made is kept in {out}, the same command goes on from there.")
        return 130
    tables = {"modular": _table, "text": _texts_table, "induction": _induction_table}
    print(tables[args.family](results).text(terminal_width()))
    print(f"\n{time.perf_counter() - started:.0f} s\npage     {page}\nstudy    {out}")
    return 1 if results.failed else 0


_DEMOS: dict[str, tuple[Any, Path]] = {
    "modular": (demo, Path("funcscope-demo")),
    "text": (text_demo, Path("funcscope-demo-text")),
    "induction": (induction_demo, Path("funcscope-demo-induction")),
}
"""By the family that is trained: what runs it, and where it is kept unless something else is said."""


COLUMNS = {
    "directional_losses": ("landscape_roughness", "curvature_mean", "dir_grad_delta_corr"),
    "landscape_flatness": ("mean_delta_loss",),
    "hessian_trace": ("value",),
}
"""Of the table that is printed, after the losses: quantities by metric."""


def _table(results: Results) -> Listing:
    """The curves and the main numbers at every checkpoint; ± is over the draws and the data, as in the results."""
    (curves,) = (o.result for o in results.outcomes if o.metric == "training_curves")
    losses = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    places = {step: i for i, step in enumerate(curves.steps)}  # type: ignore[union-attr]
    rows = []
    for model in next(iter(results.groups.values())):
        row = [str(model.step), *(f"{float(getattr(curves, name)[places[model.step or 0]]):.3g}" for name in losses)]
        for metric, names in COLUMNS.items():
            outcome = model.metrics.outcomes.get(metric)
            result = None if outcome is None else outcome.result
            row += ["" if result is None else _number(result, name) for name in names]
        rows.append(tuple(row))
    titles = (
        "train loss",
        "test loss",
        "train acc",
        "test acc",
        "roughness",
        "curvature",
        "grad-delta corr",
        "flatness",
        "trace",
    )
    return Listing(("step", *titles), tuple(rows))


TEXT_COLUMNS = (
    ("mean_loss", "loss", "nats per byte"),
    ("directional_losses", "curvature_mean", "curvature"),
    ("fisher_spectrum", "global_trace", "trace of the gradients' second moment"),
    ("fisher_spectrum", "global_largest_eigenvalue", "its largest eigenvalue"),
)
"""Of the table of the models of texts: metric, quantity, title."""


def _texts_table(results: Results) -> Listing:
    """The main numbers of every model on every kind of text."""
    rows = []
    for name, model in results.models.items():
        there = {metric: outcome.result for metric, outcome in model.metrics.outcomes.items() if outcome.result}
        if "mean_loss" in model.metrics:
            cells = (_number(there[metric], each) if metric in there else "" for metric, each, _ in TEXT_COLUMNS)
            rows.append((Path(name).name, *cells))
    return Listing(("model", *(title for _, _, title in TEXT_COLUMNS)), tuple(rows))


INDUCTION_COLUMNS = {
    "second_loss": "loss on the second copy",
    "gain": "gain",
    "induction": "induction score",
    "previous": "previous-token score",
}
"""Of the table of models that grow induction heads: titles by quantity."""


def _induction_table(results: Results) -> Listing:
    """Losses and scores of every model at its checkpoints."""
    rows = []
    for result, name in ((o.result, o.group) for o in results.outcomes if o.metric == "induction_curves"):
        places = {step: i for i, step in enumerate(result.coords["step"])} if result is not None else {}
        for step in (model.step for model in results.groups[name] if model.step in places):
            pairs = (
                (getattr(result, f"{each}{end}")[places[step]] for end in ("", "_stderr")) for each in INDUCTION_COLUMNS
            )
            rows.append((re.sub(r"-[0-9a-f]{8}$", "", name), f"{step}", *(said(*map(float, pair)) for pair in pairs)))
    return Listing(("model", "step", *INDUCTION_COLUMNS.values()), tuple(rows))


def _number(result: Result, name: str) -> str:
    """A single number with its error, or that it is not resolved."""
    if name in result.unresolved:
        return "not resolved"
    entry = next(each for each in result.entries(name) if each.name == name)
    values = numbers(entry) or {}
    stderr = values.get("stderr_total", values.get("stderr", math.nan))
    return said(float(values["value"]), float(stderr))


def _train(args: argparse.Namespace) -> int:
    import_modules(args.modules)
    known = family(args.family)
    setup = known.setup(args.variant)
    check_writable(args.out)
    try:
        variant = trained(known, setup, args.out, name=args.variant, quiet=args.quiet)
    except KeyboardInterrupt:
        print(f"\nfuncscope: interrupted; checkpoints are kept in {args.out}, the same command goes on from there.")
        return 130
    print(f"{counted(len(variant.checkpoints()), 'checkpoint')}  {variant.path}\nnext  funcscope analyze {args.out}")
    return 0


def _dashboard(args: argparse.Namespace) -> int:
    check_plotly("dashboard", "dash")
    results = Results.open(args.folder)
    from ..view.dashboard import serve  # dash takes a second to import, and is an extra

    def announce(address: str) -> None:
        print(f"{', '.join(results.groups)}\n{address}  (Ctrl-C stops)", flush=True)

    serve(args.folder, host=args.host, port=args.port, open_browser=args.open_browser, started=announce)
    return 0
