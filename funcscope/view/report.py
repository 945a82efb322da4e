"""A page of any study: a title and its metrics, what failed and why, and the call that makes it again."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..core.store import to_json, write
from ..families.family import SPLITS
from ..study.cache import Outcome
from ..study.catalogue import CATALOGUE
from ..study.config import UnifiedConfig
from ..study.record import duration, file_stem
from ..study.results import Results
from .export import ENDINGS, export
from .numbers import typeset
from .page import Block, Code, Fact, Page, Section, Table, Terms, markdown, render
from .section import MOST_COLUMNS, entries, label, methods, on, panel, passes, section, shown, table, total, tried

__all__ = ["methods", "panel", "save_plots", "section", "table", "write_report"]


def write_report(
    results: Results,
    path: str | Path,
    *,
    title: str = "",
    metrics: Sequence[str] | None = None,
    lede: Sequence[str] = (),
    more: Mapping[str, Sequence[Block | str]] = MappingProxyType({}),
) -> Page:
    """One page of a study's results, with what failed and why; returns it, a notebook shows it.

    path: `.html` for a page that is whole in itself, `.md` for Markdown with tables, whose figures `save_plots` makes.
    metrics: the ones that it has, in this order; None: all. lede: paragraphs below the title, of a page that is HTML.
    more: by metric, what its section says below its first line.

    Raises ValueError for another ending, for a metric that the study does not have, and for a study of nothing.
    """
    path, results = Path(path), with_short_names(results)
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"a report is a page (`.html`) or Markdown (`.md`), got {path.name!r}.")
    chosen = _chosen(results, metrics)
    results = replace(results, outcomes=tuple(outcome for outcome in results.outcomes if outcome.metric in chosen))
    first = tried(lambda: _overview(results, chosen), "the overview")
    body = [Section("Overview", first)] if first else []
    body += [*(_with(section(of_metric(results, name)), more.get(name, ())) for name in chosen), *provenance(results)]
    models = [*dict.fromkeys(o.subject for o in results.outcomes if on(o) == "model")] or [results.outcomes[0].subject]
    title = title or (f"What {len(models)} models are like" if len(models) > 1 else f"What {models[0]} is like")
    strip = _strip(results)
    is_page = path.suffix == ".html"
    text = render(title, "funcscope", lede, strip, body) if is_page else markdown(title, strip, body)
    write(path, text.encode())
    return Page(path)


def save_plots(
    results: Results, folder: str | Path, metrics: Sequence[str] | None = None, ending: str = "html"
) -> list[Path]:
    """Every figure of the report as a file in `folder`, `METRIC-NUMBER.ending`; returns their paths.

    ending: html, svg, png or pdf; images need what `export` says. Raises ValueError as `write_report` and `export` do.
    """
    if f".{ending}" not in ENDINGS:
        raise ValueError(f"figures are files of the kinds {', '.join(ENDINGS)}, got {ending!r}.")
    results, paths = with_short_names(results), []
    for name in _chosen(results, metrics):
        ok = [outcome for outcome in of_metric(results, name) if outcome.result is not None]
        for chart in panel(ok) if ok else ():
            path = Path(folder) / f"{file_stem(chart.name)}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            paths.append(export(chart.figure, path))
    return paths


def of_metric(results: Results, name: str) -> list[Outcome]:
    return [outcome for outcome in results.outcomes if outcome.metric == name]


def _with(made: Section, more: Sequence[Block | str]) -> Section:
    return replace(made, blocks=[*made.blocks[:1], *more, *made.blocks[1:]])


def _overview(results: Results, metrics: Sequence[str]) -> Iterator[Table]:
    """The main number of every metric, where there are several models to be looked at together."""
    models = {outcome.subject: outcome for outcome in results.outcomes if on(outcome) == "model"}
    names = [outcome.subject for outcome in shown(list(models.values()))]
    for few in (names[i : i + MOST_COLUMNS] for i in range(0, len(names), MOST_COLUMNS)):
        each = table(Results(tuple(o for o in results.outcomes if o.subject in few)), metrics)
        if len(names) > 1 and len(each.rows) > 1:
            yield each


def provenance(results: Results) -> Iterator[Section]:
    """What has no result and why, what is not resolved and why, and how all of it is made again."""
    failed = [(o, o.status, o.reason) for o in results.failed]
    unresolved = [each for outcome in results.outcomes for each in _unresolved(outcome)]
    for title, rows, what in (("What has no result", failed, "status"), ("What is not resolved", unresolved, "number")):
        if rows:
            yield Section(title, [Table(["metric", what, "of", "reason"], _merged(rows))])
    named = [data for each in results.studies if (data := each.get("config", {}).get("dataset_name"))]
    files = dict.fromkeys(file for data in named for file in (data.values() if isinstance(data, Mapping) else [data]))
    packages = {f"{k} {v}": None for o in results.outcomes for k, v in o.content.get("packages", {}).items()}
    if all(outcome.task in SPLITS for outcome in results.outcomes):
        files = {}  # runs have data of their own
    terms = [("Data", [", ".join(files)]), ("Versions", [", ".join(packages)])]
    calls = dict.fromkeys(each.get("command") or _call(results, each) for each in results.studies)
    made: list[Block | str] = ["The same numbers come from:", *map(Code, calls)]
    yield Section("How this was made", [*made, Terms([term for term in terms if any(term[1])])])


def with_short_names(results: Results) -> Results:
    """The same results; models are called by what tells them apart.

    Steps of one run by these, paths without what they share, runs without the digest of their settings.
    """
    models = {o.subject: o for o in results.outcomes if on(o) == "model"}
    runs = {o.group for o in results.outcomes if o.step is not None and o.group}
    names = {name: re.sub(r"-[0-9a-f]{8}$", "", name) for name in runs}
    if len({o.group for o in models.values()}) == 1 < len(models) and all(o.step is not None for o in models.values()):
        names |= {name: f"step {outcome.step}" for name, outcome in models.items()}
    else:
        paths = [name.rstrip("/") for name in models if "/" in name.rstrip("/")]
        is_one_kind = len({path.startswith("/") for path in paths}) == 1
        shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if is_one_kind else ""
        names |= {f"{shared}/": ""} if shared.strip("/") else {}
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"\Z")
    each = {name for o in results.outcomes for name in (o.subject, o.group)}
    cut = {name: pattern.sub(lambda hit: names.get(hit[0], ""), name) for name in each}
    if len(set(cut.values())) < len(cut):  # two would have one name
        return results
    short = (replace(o, subject=cut[o.subject], group=cut[o.group]) for o in results.outcomes)
    return replace(results, outcomes=tuple(short))


def _chosen(results: Results, metrics: Sequence[str] | None) -> list[str]:
    there = list(dict.fromkeys(outcome.metric for outcome in results.outcomes))
    for name in [name for name in metrics or () if name not in there]:
        raise ValueError(f"this study has no metric {name!r}: it has {', '.join(there)}.")
    if not there:
        raise ValueError("this study has no outcomes: there is nothing to report.")
    return list(metrics or there)


def _unresolved(outcome: Outcome) -> Iterator[tuple[Outcome, str, str]]:
    if outcome.result is not None and outcome.result.unresolved:
        texts, why = outcome.result.texts, " ".join(outcome.result.notes)
        labels = {name: label(entry) for name, entry in entries(outcome).items()}
        for name in outcome.result.unresolved:
            yield outcome, labels.get(name, name), typeset(texts.get(name, why))


def _merged(rows: Sequence[tuple[Outcome, str, str]]) -> list[list[str]]:
    """A row for all models of which the same is said but for the numbers in it: those of the last one stand."""
    alike: dict[tuple[str, ...], tuple[list[str], str]] = {}
    for outcome, what, why in rows:
        names, _ = alike.get(key := (outcome.metric, what, re.sub(r"[\d⁰¹²³⁴-⁹⁻.,]+", "#", why)), ([], ""))
        alike[key] = [*names, outcome.subject], why
    return [[metric, what, ", ".join(names), why] for (metric, what, _), (names, why) in alike.items()]


def _call(results: Results, about: Mapping[str, Any]) -> str:
    """`analyze_models` as it was called; of results without a configuration, `run` with the settings that they have."""
    config, models = about.get("config"), about.get("models")
    if config and models:
        usual = to_json(asdict(UnifiedConfig()))
        changes = [f"{name}={value!r}" for name, value in to_json(config).items() if usual.get(name) != value]
        listed = "".join(f"\n        {each}," for each in changes)
        return f"analyze_models(\n    {models!r},\n    UnifiedConfig({listed}\n    ),\n)"
    listed = "".join(f"\n        {each}," for each in dict.fromkeys(map(_configured, results.outcomes)))
    given = {_options(o.content) for o in results.outcomes if o.content.get("seed") is not None}
    options = f", options={given.pop()}" if len(given) == 1 else ""
    tasks = tuple(dict.fromkeys(outcome.task for outcome in results.outcomes))
    return f"run(\n    [{listed}\n    ],\n    sources, tasks={tasks!r}{options}\n)  # `sources` are the models"


def _options(content: Mapping[str, Any]) -> str:
    stream = f", stream={content['stream']!r}" if "stream" in content else ""
    return f"Options(seed={content['seed']}{stream})"


def _configured(outcome: Outcome) -> str:
    usual = to_json(CATALOGUE[outcome.metric].settings) if outcome.metric in CATALOGUE else {}
    changes = [f"{name}={value!r}" for name, value in outcome.settings.items() if usual.get(name) != value]
    return f"metric({outcome.metric!r})" + (f".configured({', '.join(changes)})" if changes else "")


def _data(tasks: set[str]) -> str:
    """Splits by name; parts of the same texts have none."""
    named = sorted(tasks - {"data", "fisher", "landscape"})
    return f"on {', '.join(named)} data" if named else "on the same data"


def _strip(results: Results) -> list[Fact]:
    models = {outcome.subject: outcome for outcome in results.outcomes if on(outcome) == "model"}
    steps = [outcome.step for outcome in models.values() if outcome.step is not None]
    few = ", ".join([*dict.fromkeys(outcome.group or outcome.subject for outcome in models.values())][:2])
    span = f", steps {min(steps):,} to {max(steps):,}" if len(steps) > 1 else ""
    num, lost = len(results.outcomes), len(results.failed)
    metrics, tasks = ({getattr(o, each) for o in results.outcomes} for each in ("metric", "task"))
    return [
        Fact("Models", f"{len(models):,}", few + span),
        Fact("Metrics", f"{len(metrics)}", _data(tasks)),
        Fact("Results", f"{num - lost} of {num}", "the others say why not" if lost else "nothing failed"),
        Fact("Computing", duration(total(results.outcomes, "seconds")), passes(results.outcomes)),
    ]
