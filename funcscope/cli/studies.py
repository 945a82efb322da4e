"""How the commands that measure run: options, a study, what is printed, a page; and what is said of studies."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.tables import counted
from ..study import presets
from ..study.analyze import analyze_models, checkpoints_of
from ..study.cache import Cache
from ..study.catalogue import CATALOGUE
from ..study.config import UnifiedConfig
from ..study.flags import FLAGS
from ..study.listing import Listing, terminal_width
from ..study.modules import import_modules
from ..study.presets import Preset
from ..study.results import Results
from ..study.runs import is_run
from ..study.texts import Usual
from .commands import Command
from .inputs import check_inputs, check_texts, named_files
from .options import COMPUTING, STREAM, TEXTS, Flag, add_fields, add_flags, add_settings, changed, with_flags
from .shared import check_plotly, check_writable

OUT = Path("analysis_results")
FEW = {"num_samples": 64, "max_seq_length": Usual(128), "batch_size": 8}
"""Fields that the commands have otherwise than `UnifiedConfig`: what ends within minutes on a laptop."""


def add_command(commands: Any, one: Command) -> None:
    """A command of the table."""
    show = commands.add_parser(one.name, help=one.help, description=f"{one.description} {_KEPT}")
    names = {"A B": ["a", "b"]}.get(one.models)
    for name in names or ["models"]:
        nargs = "+" if one.models == "MODEL..." else 1
        show.add_argument(name, nargs=nargs, metavar=name.upper() if names else "MODEL", help=_FOLDER)
    if one.name == "directional":
        show.add_argument("--compare", metavar="MODEL2", help="as `funcscope compare MODEL MODEL2`")
    _add_study(show, one, Path(f"funcscope-{one.name}"))
    show.set_defaults(run=lambda args: _measured(args, one))


def add_analyze(commands: Any) -> None:
    show = commands.add_parser(
        "analyze",
        help="measure any metrics on any models, or on the checkpoints of a run",
        description=f"Every metric on every model folder (with --data), or on the checkpoints of a run. {_KEPT}",
    )
    show.add_argument("models", nargs="+", metavar="PATH", help="model folders, or a run as `funcscope train` makes it")
    show.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="of `funcscope metrics`; default: all, of a run a choice"
    )
    show.add_argument("--config", type=Path, metavar="FILE", help="a .json or .toml file of `UnifiedConfig`")
    show.add_argument("--variant", metavar="NAME", help="of a run, only this one")
    show.add_argument("--at-steps", type=int, nargs="+", metavar="N", help="of a run, only these checkpoints")
    show.add_argument("--split", metavar="NAME", help="of a run, the data: train, test or probe (default: train)")
    _add_study(show, Command("analyze", "", "", "MODEL...", {}), None)
    add_import(show)
    show.set_defaults(run=_analyze)


_FOLDER = "a local folder as `save_pretrained` writes it"
_KEPT = (
    "Prints what came of every metric, writes a page with the numbers and keeps each result: what is there with the same "
    "settings is not computed again, and an interrupted call goes on where it was."
)


def _add_study(show: argparse.ArgumentParser, one: Command, out: Path | None) -> None:
    texts = "texts: .txt, .jsonl, .csv, .tsv, .parquet, or a Hugging Face data set; several as NAME=FILE"
    show.add_argument("--data", dest="dataset_name", nargs="+", metavar="FILE", help=texts)
    show.add_argument(
        "--out", type=Path, default=out, metavar="DIR", help=f"default: {out or 'the run, or ./' + str(OUT)}"
    )
    show.add_argument("--workers", type=int, metavar="N", help="models at a time, each in its own process")
    show.add_argument(
        "--executor",
        metavar="NAME",
        help="`dask:ADDRESS` for the workers of a Dask scheduler, `dask` for --workers of this machine",
    )
    show.add_argument("--quiet", action="store_true", help="no progress bar")
    show.add_argument("--save-plots", action="store_true", default=None, help="every figure as a file, too")
    add_settings(show)
    defaults = {**FEW, **one.fields}
    add_flags(show.add_argument_group("what is measured"), one.flags, one.preset)
    add_fields(show.add_argument_group("texts"), TEXTS, defaults)
    add_fields(show.add_argument_group("computing"), COMPUTING | STREAM, defaults)


def _measured(args: argparse.Namespace, one: Command) -> int:
    models = [str(path) for path in getattr(args, "models", None) or [*args.a, *args.b]]
    preset = one.preset
    if compared := getattr(args, "compare", None):
        models, preset = [*models, compared], presets.COMPARISON
    base = models[0] if one.name == "compare" or compared else None
    values = {**FEW, **one.fields, "base_model": base}
    return _study(args, models, values, preset, one.flags, shown=True)


def _analyze(args: argparse.Namespace) -> int:
    import_modules(args.modules)
    runs = [path for path in args.models if is_run(path)]
    if runs and len(runs) < len(args.models):
        raise ValueError("model folders and runs have different data: analyse them in two calls.")
    models: list[Any] = list(args.models)
    if runs:
        models = [one for path in runs for one in checkpoints_of(path, variant=args.variant, steps=args.at_steps)]
        args.out = args.out or Path(runs[0])
    values = dict[str, Any](FEW) if args.config is None else asdict(UnifiedConfig.load(args.config))
    names = args.metrics or values.get("metrics") or ()
    preset: Preset = {name: presets.RUN.get(name, {}) if runs else {} for name in names}
    if not names and not any(values.get(flag) for flag in (*FLAGS, "compute_all")):
        preset, values["compute_all"] = (presets.RUN, False) if runs else ({}, True)
    return _study(args, models, values, preset, {}, shown=False)


def _study(
    args: argparse.Namespace,
    models: list[Any],
    values: dict[str, Any],
    preset: Preset,
    flags: Mapping[str, Flag],
    *,
    shown: bool,
) -> int:
    """Measure, print, and write the page."""
    check_plotly()
    if args.dataset_name is not None:
        args.dataset_name = named_files(args.dataset_name)
    check_inputs(models, args.dataset_name or values.get("dataset_name"))
    given, settings = changed(args, flags)
    for name in (*preset, *(values.get("settings") or {})):
        own = {**preset.get(name, {}), **(values.get("settings") or {}).get(name, {})}
        settings[name] = {**own, **settings.get(name, {})}
    settings = {name: each for name, each in settings.items() if each}
    out = args.out or Path(values.get("output_dir", OUT))
    config = UnifiedConfig.load(
        **{
            **values,
            "metrics": tuple(preset),
            **given,
            "settings": settings,
            "output_dir": str(out),
            "verbose": not args.quiet,
        }
    )
    check_texts(config)
    check_writable(out)
    started = time.perf_counter()
    try:
        results = analyze_models(models, config)
    except KeyboardInterrupt:
        print(f"\nfuncscope: interrupted; what was finished is kept in {out}, the same command goes on from there.")
        return 130
    seconds = time.perf_counter() - started
    return show(results, out, shown=shown, seconds=seconds, options=vars(args), flags=flags)


def show(
    results: Results, out: Path, *, shown: bool, seconds: float, options: Collection[str], flags: Mapping[str, Flag]
) -> int:  # fmt: skip
    """Print the results themselves, or what came of each; then write the page."""
    from ..view.report import write_report  # plotly takes a second to import, and is an extra

    width = terminal_width()
    if shown:
        for outcome in results.outcomes:
            if outcome.result is not None:
                said = with_flags(str(outcome.result), options, flags, outcome.metric)
                print(f"\n{outcome.metric} of {outcome.subject}\n{said}")
    rows = [o for o in results.outcomes if not shown or not o.ok or "peak" in o.plan]
    reasons = [with_flags(o.error, options, flags, o.metric) or o.plan.get("peak", "") for o in rows]
    bare = [why.removeprefix(f"{o.metric} ") for o, why in zip(rows, reasons, strict=True)]
    took = ("reused" if o.reused else f"{o.cost.get('seconds', 0):.1f} s" for o in rows)
    table = [
        (o.subject, o.metric, o.status, time, "the same" if why and one == before else why)
        for o, time, why, one, before in zip(rows, took, reasons, bare, ["", *bare], strict=False)
    ]
    if table:
        print(f"\n{Listing(('model', 'metric', 'status', 'time', 'why'), tuple(table)).trimmed().text(width)}")
    print(f"\n{seconds:.0f} s\npage     {write_report(results, out / 'report.html')}\nstudy    {out}")
    return 1 if results.failed else 0


def add_metrics(commands: Any) -> None:
    show = commands.add_parser(
        "metrics",
        help="what can be measured: every metric with its settings and its cost",
        description="The catalogue. Names are those of `funcscope analyze --metrics` and `UnifiedConfig(metrics=...)`.",
    )
    show.set_defaults(run=_metrics)


def add_report(commands: Any) -> None:
    show = commands.add_parser(
        "report",
        help="a page of a study that `funcscope analyze MODELS --data FILE` has made",
        description="One self-contained HTML page from stored results; no model is opened.",
    )
    show.add_argument("folder", type=Path, nargs="?", default=OUT, metavar="STUDY_DIR", help=f"default: ./{OUT}")
    show.add_argument("--metrics", nargs="+", metavar="NAME", help="only these, in this order")
    show.add_argument("--title", default="", help="of the page")
    show.set_defaults(run=_report)


def add_cache(commands: Any) -> None:
    show = commands.add_parser(
        "cache",
        help="how large the stored results of a study are, and how to be rid of them",
        description="Counts the stored results of a study, or removes them.",
    )
    show.add_argument("folder", type=Path, nargs="?", default=OUT, metavar="STUDY_DIR", help=f"default: ./{OUT}")
    show.add_argument("--clear", nargs="?", const="", metavar="MODEL", help="remove those of one model, or all")
    show.set_defaults(run=_cache)


def _metrics(_: argparse.Namespace) -> int:
    rows = []
    for one in sorted(CATALOGUE.values(), key=lambda one: (one.category, one.name)):
        settings = ", ".join(f"{name}={value}" for name, value in one.settings.items() if value is not None)
        rows.append((one.name, one.category, one.on, f"{one.cost(one.settings):,.0f}", one.summary, settings))
    headers = ("metric", "category", "of a", "forward passes", "what", "settings")
    print(Listing(headers, tuple(rows)).text(terminal_width()))
    return 0


def _report(args: argparse.Namespace) -> int:
    check_plotly()
    results = Results.open(args.folder)
    from ..view.report import write_report

    print(f"page     {write_report(results, args.folder / 'report.html', title=args.title, metrics=args.metrics)}")
    return 0


def _cache(args: argparse.Namespace) -> int:
    cache = Cache(args.folder / "cache")
    if not cache.entries():
        raise ValueError(f"{args.folder} has no stored results: `funcscope analyze MODELS --data FILE` makes them.")
    if args.clear is not None:
        before = len(cache.entries())
        cache.clear_model_cache(args.clear) if args.clear else cache.clear_all()
        print(f"{counted(before - len(cache.entries()), 'result')} removed")
    else:
        stats = cache.get_stats()
        print(f"{counted(int(stats['num_entries']), 'result')}, {stats['total_size_mb']:.2f} MB")
    return 0


def add_import(show: argparse.ArgumentParser) -> None:
    show.add_argument(
        "--import", action="append", default=[], metavar="MODULE", dest="modules",
        help="import a module first: one that registers a family or a metric",
    )  # fmt: skip
