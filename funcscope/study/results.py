"""What a study has made: outcomes by model and metric, as frames, trajectories and plain dictionaries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from ..core.result import Result
from ..core.statistics import q_values
from ..core.store import to_json, write
from .cache import Cache, Cell, Outcome, plain
from .digest import of_json
from .files import claimed
from .metric import CATALOGUE, nearest

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST = "study.json"


class Values(dict[str, Any]):
    """An outcome as documented: the names and numbers of its result, or `error`, `error_type`, `status` and `traceback`.

    The result itself, with its tables and frames, is `.result`; the whole outcome `.outcome`.
    """

    def __init__(self, outcome: Outcome):
        failed = ("error", "error_type", "status", "traceback")
        result = outcome.result
        super().__init__({name: getattr(outcome, name) for name in failed} if result is None else result.asdict())
        self.outcome = outcome

    @property
    def result(self) -> Result:
        """Raises ValueError for an outcome that has none."""
        if self.outcome.result is None:
            raise ValueError(f"{self.outcome.metric} of {self.outcome.subject} has no result: {self.outcome.error}")
        return self.outcome.result


class Metrics(Mapping[str, Values]):
    """The outcomes of one model by metric; dictionaries are made when they are looked at."""

    def __init__(self, outcomes: Iterable[Outcome]):
        self.outcomes = {outcome.metric: outcome for outcome in outcomes}
        self._values: dict[str, Values] = {}

    def __getitem__(self, name: str) -> Values:
        if name not in self.outcomes:
            raise KeyError(f"{name!r}{nearest(name, self.outcomes)}")
        if name not in self._values:
            self._values[name] = Values(self.outcomes[name])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)


@dataclass(frozen=True, eq=False)
class ModelResults:
    """One model."""

    name: str
    step: int | None
    group: str
    metrics: Metrics


@dataclass(frozen=True, eq=False)
class Results:
    """All outcomes of a study, in the order of its models and metrics; prints itself as a table of statuses."""

    outcomes: tuple[Outcome, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the study: `config` (its fields), `models` (as given), `command` (as typed, or empty); and in `before`
    the same of earlier ones in its folder, of which there are outcomes among these."""

    @property
    def studies(self) -> list[Mapping[str, Any]]:
        """What is known of every study that these outcomes are of, the last at the end."""
        return [*self.about.get("before", {}).values(), self.about]

    @cached_property
    def models(self) -> dict[str, ModelResults]:
        """By name."""
        by_name: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            by_name.setdefault(outcome.subject, []).append(outcome)
        return {
            name: ModelResults(name, each[0].step, each[0].group or name, Metrics(each))
            for name, each in by_name.items()
        }

    @cached_property
    def groups(self) -> dict[str, list[ModelResults]]:
        """The models by the training run that they are checkpoints of, in the order of their steps; one of none alone.

        Pairs and series of them are in `models` only.
        """
        groups: dict[str, list[ModelResults]] = {}
        for name, model in self.models.items():
            if name not in self._together:
                groups.setdefault(model.group, []).append(model)
        return {name: sorted(each, key=lambda one: one.step or 0) for name, each in groups.items()}

    @cached_property
    def _together(self) -> set[str]:
        """Names of pairs and series."""
        return {o.subject for o in self.outcomes if o.metric in CATALOGUE and CATALOGUE[o.metric].on != "model"}

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those without a result."""
        return tuple(outcome for outcome in self.outcomes if not outcome.ok)

    def to_frame(self, metrics: Sequence[str] | None = None) -> DataFrame:
        """Tidy, over everything: a row per number, with `model`, `step`, `metric`, quantity, unit, axes, value and errors.

        What failed is a row with its `status`, and no number. An axis of a result that is named as one of these columns is
        that column where the outcome has none, as the steps of a series have; else it has `_of` at its end.
        """
        import pandas as pd

        tables = []
        for outcome in self.outcomes:
            if metrics is None or outcome.metric in metrics:
                rows = pd.DataFrame({"quantity": [None]}) if outcome.result is None else outcome.result.frame()
                where = {
                    "model": outcome.subject,
                    "step": outcome.step,
                    "metric": outcome.metric,
                    "status": outcome.status,
                }
                rows = rows.rename(columns={name: f"{name}_of" for name, own in where.items() if own is not None})
                rows = rows.assign(**{name: own for name, own in where.items() if name not in rows})
                tables.append(rows[[*where, *rows.columns.difference(list(where), sort=False)]])
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["model", "step", "metric"])

    def trajectory(self, metric: str, quantity: str) -> DataFrame:
        """One number at every step: `step`, `model`, `value`, `stderr`, `resolved`; absent where it failed.

        Raises ValueError for a metric or a quantity that no outcome has, and for one that is more than one number.
        """
        frame = self.to_frame([metric])
        if frame.empty:
            raise ValueError(f"no metric {metric!r}{nearest(metric, {o.metric: o for o in self.outcomes})}")
        rows = frame[frame["quantity"] == quantity]
        if rows.empty:
            names = frame["quantity"].dropna().unique().tolist()
            raise ValueError(f"{metric} has no quantity {quantity!r}{nearest(quantity, names)}")
        if rows[["model", "step"]].duplicated().any():
            raise ValueError(f"{quantity!r} of {metric} is several numbers at every step: take them from `to_frame()`.")
        known = rows["resolved"].fillna(True).astype(bool) if "resolved" in rows else True
        rows = rows.assign(resolved=known).reindex(columns=["step", "model", "value", "stderr", "resolved"])
        return rows.sort_values("step", kind="stable").reset_index(drop=True)

    def tests(self) -> DataFrame:
        """Every p value of the comparisons of two models, with its q value: the false discovery rate over all of them.

        A row per test: `models`, `metric`, `statistic` where there are several, `p`, `q`. Benjamini and Hochberg (1995), for
        tests that are independent or positively dependent.
        """
        frame = self.to_frame()
        rows = frame[frame["quantity"] == "p_value"] if len(frame) else frame.assign(value=[], quantity=[])
        axes = [name for name in ("statistic",) if name in rows]
        rows = rows.rename(columns={"model": "models", "value": "p"})[["models", "metric", *axes, "p"]]
        return rows.assign(q=q_values(rows["p"].tolist())).reset_index(drop=True)

    def save(self, folder: Path, about: Mapping[str, Any] | None = None) -> Path:
        """Write the list of the outcomes to `folder`: with the cache in it, all that `open` needs.

        about: what is to be known of the study; None: what this one knows.
        What an earlier study has measured there beside them stays in the list, as long as the model has the same weights.
        """
        rows = [
            {"metric": o.metric, "subject": o.subject, "step": o.step, "group": o.group, "content": o.content}
            if o.content
            else {"lost": plain(o)}
            for o in self.outcomes  # without content: the model could not be opened, and there is no cell
        ]
        path = folder / MANIFEST
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(path, wait=True):
            kept, before = _earlier(path, rows)
            now = {name: value for name, value in (self.about if about is None else about).items() if name != "before"}
            stored = {**now, **({"before": before} if before else {}), "cells": [*kept, *rows]}
            write(path, json.dumps(to_json(stored), indent=1).encode())
        return path

    @classmethod
    def open(cls, folder: str | Path) -> Results:
        """The results of a study that was saved there, without its models.

        What is no longer in its cache, or of a class that is not imported or has other fields, is an outcome that says so.
        Raises FileNotFoundError where there is no study.
        """
        from . import catalogue as catalogue  # whose metrics are those of pairs and series

        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no study (a {MANIFEST}): `funcscope analyze --out` makes one.")
        stored = json.loads(path.read_text(encoding="utf-8"))
        cache, outcomes = Cache(Path(folder) / "cache"), []
        for row in stored["cells"]:
            if "lost" in row:
                outcomes.append(Outcome(**row["lost"]))
                continue
            cell = Cell(row["metric"], row["subject"], row["content"])
            known = cache.get(cell)  # as another study has it, where two have the cell: step and run are of this one
            own = {name: row[name] for name in ("step", "group") if name in row}
            outcomes.append(replace(known, **own) if known else _unread(row, cache))
        return cls(tuple(outcomes), {name: value for name, value in stored.items() if name != "cells"})

    def __str__(self) -> str:
        rows = [
            [o.subject, o.metric, o.status, "reused" if o.reused else f"{o.cost.get('seconds', 0):.1f} s", o.error]
            for o in self.outcomes
        ]
        return tabulate(rows, headers=("model", "metric", "status", "time", ""), disable_numparse=True)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [[o.subject, o.metric, o.status, o.error] for o in self.outcomes]
        return tabulate(rows, headers=("model", "metric", "status", ""), tablefmt="html", disable_numparse=True)


def _unread(row: Mapping[str, Any], cache: Cache) -> Outcome:
    return Outcome(
        row["metric"], row["subject"], row.get("step"), row["content"].get("task", ""), "failed", group=row.get("group", ""),
        content=row["content"], error_type="Unread",
        error=f"its stored result cannot be read from {cache.root}: run the same study again, or import the module that "
        "defines its class, where that is one of your own.",
    )  # fmt: skip


def _earlier(path: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the list has of before, and `rows` do not make anew or contradict; and by what studies it was made."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        cells = stored["cells"]
    except (FileNotFoundError, ValueError, KeyError):
        return [], {}
    named = [row for row in rows if "lost" not in row]
    anew = {(row["metric"], row["subject"]) for row in named} | {
        (row["lost"]["metric"], row["lost"]["subject"]) for row in rows if "lost" in row
    }
    weights = {row["subject"]: row["content"]["weights"] for row in named}
    about = {name: value for name, value in stored.items() if name not in ("cells", "before")}
    studies = {**stored.get("before", {}), (last := of_json(about)): about}
    kept = [
        {"by": last, **row}
        for row in cells
        if "lost" not in row
        and (row["metric"], row["subject"]) not in anew
        and weights.get(row["subject"], row["content"]["weights"]) == row["content"]["weights"]
    ]
    made_by = {row["by"] for row in kept}
    return kept, {name: each for name, each in studies.items() if name in made_by}
