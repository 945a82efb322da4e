"""Commands for studies of any metrics: `metrics`, `analyze MODELS --data`, `report` and `cache`."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..study.cache import Cache
from ..study.catalogue import CATALOGUE
from ..study.config import UnifiedConfig, analyze_models
from ..study.listing import Listing, terminal_width
from ..study.metric import nearest
from ..study.results import Results
from .shared import check_plotly, check_writable

OUT = Path("analysis_results")


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


def add_models(show: argparse.ArgumentParser) -> None:
    """The options of `analyze` for models in folders."""
    models = show.add_argument_group("models in Hugging Face folders")
    models.add_argument("--data", metavar="FILE", help="the texts that they are measured on: .txt, .jsonl or .parquet")
    models.add_argument("--metrics", nargs="+", metavar="NAME", help="of `funcscope metrics` (default: all)")
    models.add_argument("--config", type=Path, metavar="FILE", help="a .json or .toml file of `UnifiedConfig`")
    models.add_argument("--out", type=Path, metavar="DIR", help=f"default: ./{OUT}")
    models.add_argument("--workers", type=int, default=1, metavar="N", help="models at a time, each in its own process")


def is_study(args: argparse.Namespace) -> bool:
    """Whether `analyze` was given models and data, and no run folder."""
    return args.data is not None or args.config is not None


def analyze(args: argparse.Namespace) -> int:
    """`analyze` for models in folders."""
    check_plotly()
    config = configured(args)
    out = Path(config.output_dir)
    check_writable(out)
    models = [str(path) for path in args.folder]
    try:
        if args.workers > 1:
            with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as workers:
                results = analyze_models(models, config, executor=workers)
        else:
            results = analyze_models(models, config)
    except KeyboardInterrupt:
        print(f"\nfuncscope: interrupted; what was finished is kept in {out}, the same command goes on from there.")
        return 130
    return _shown(results, out)


def configured(args: argparse.Namespace) -> UnifiedConfig:
    """The file's fields, then those of the command line."""
    few: dict[str, Any] = {"num_samples": 64, "max_seq_length": 128}
    values = few if args.config is None else asdict(UnifiedConfig.load(args.config))
    values |= {"dataset_name": args.data} if args.data is not None else {}
    values |= {"metrics": tuple(args.metrics)} if args.metrics else {}
    values |= {"output_dir": str(args.out)} if args.out is not None else {}
    values["verbose"] = not args.quiet
    for text in args.changes:
        name, equals, value = text.partition("=")
        metric, dot, setting = name.partition(".")
        if not equals:
            raise ValueError(f"`--set` takes name=value or metric.setting=value, got {text!r}.")
        if dot:
            if metric not in CATALOGUE:
                raise ValueError(f"no metric {metric!r}{nearest(metric, CATALOGUE)}")
            known = dict(values.get("settings") or {})
            values["settings"] = {**known, metric: {**known.get(metric, {}), setting: _plain(value)}}
        else:
            values[name] = _plain(value)
    config = UnifiedConfig.of(values)
    flags = (each.name for each in fields(config) if each.name.startswith("compute_") and each.default is False)
    asked = config.metrics or any(getattr(config, name) for name in flags)
    return config if asked else UnifiedConfig.of({**values, "compute_all": True})


def _shown(results: Results, out: Path) -> int:
    from ..view.report import write_report  # plotly takes a second to import, and is an extra

    width = terminal_width()
    took = ("reused" if o.reused else f"{o.cost.get('seconds', 0):.1f} s" for o in results.outcomes)
    rows = [(o.subject, o.metric, o.status, time, o.error) for o, time in zip(results.outcomes, took, strict=True)]
    print(Listing(("model", "metric", "status", "time", "why"), tuple(rows)).trimmed().text(width))
    print(f"\npage     {write_report(results, out / 'report.html')}\nstudy    {out}")
    return 1 if results.failed else 0


def _metrics(_: argparse.Namespace) -> int:
    rows = []
    for one in sorted(CATALOGUE.values(), key=lambda one: (one.category, one.name)):
        settings = ", ".join(f"{name}={value}" for name, value in one.settings.items() if value is not None)
        rows.append((one.name, one.category, f"{one.cost(one.settings):,.0f}", one.summary, settings))
    headers = ("metric", "category", "forward passes", "what", "settings")
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
        before = cache.get_stats()["num_entries"]
        cache.clear_model_cache(args.clear) if args.clear else cache.clear_all()
        print(f"{before - cache.get_stats()['num_entries']} results removed")
    else:
        stats = cache.get_stats()
        print(f"{stats['num_entries']} results, {stats['total_size_mb']:.2f} MB")
    return 0


def _plain(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
