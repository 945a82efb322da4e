"""Numbers with their errors as text, tables and tidy frames, from what they say they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tabulate import tabulate
from torch import Tensor
from uncertainties import ufloat

if TYPE_CHECKING:
    from pandas import DataFrame

Coordinates = Mapping[str, Sequence[Any]]
"""Names or numbers along axes."""
ERRORS = ("stderr", "stderr_data", "stderr_total")
HEADERS = ("", "value", "over draws", "over data", "in all")
LONGEST = 40
"""Rows of a table; what is per more things than this is drawn, not printed."""


@dataclass(frozen=True)
class Quantity:
    """What a field or property of a result is."""

    label: str
    unit: str
    per: tuple[str, ...]
    """The axes of its array, in order."""
    name: str
    """As documented, where that is not the name of the attribute; "*" for a mapping whose keys are names themselves."""
    stderr: str
    """The attribute that has its standard errors, of the same shape."""
    shown: bool
    """Whether tables have it."""


class Entry(NamedTuple):
    """One quantity of one result."""

    name: str
    quantity: Quantity
    value: Any
    stderr: Any


def said(value: float, stderr: float = math.nan) -> str:
    """A number with its standard error as text, rounded by the error: two digits of that.

    >>> said(0.032912, 0.000213), said(3.14159), said(float("nan"))
    ('0.03291 ± 0.00021', '3.1416', 'undefined')
    """
    if math.isnan(value):
        return "undefined"
    if math.isnan(stderr) or math.isinf(value):
        return f"{value:.5g}"
    if stderr <= 1e-9 * abs(value):  # 0, or rounding: its digits would be those of the binary number
        return f"{value:.5g} ± {stderr:.1g}"
    return f"{ufloat(value, stderr):.2uP}".replace("±", " ± ")


def counted(num: int, what: str, several: str = "") -> str:
    """A count and its noun, which takes an s where there is not one, unless another plural is given.

    >>> counted(1, "gradient"), counted(1024, "gradient"), counted(2, "batch", "batches")
    ('1 gradient', '1,024 gradients', '2 batches')
    """
    return f"{num:,} {what if num == 1 else several or what + 's'}"


def frame(entries: Iterable[Entry], coordinates: Coordinates, unresolved: Collection[str]) -> DataFrame:
    """A row per number: quantity, unit, axes, value, errors."""
    try:
        import pandas as pd
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("`frame()` needs pandas: pip install 'funcscope[frame]'.") from err
    parts = [part for entry in entries if (part := _columns(entry, coordinates)) is not None]
    if not parts:
        return pd.DataFrame(columns=["quantity", "unit", "value"])
    whole = pd.concat(map(pd.DataFrame, parts), ignore_index=True)
    axes = [name for name in whole.columns if name not in ("quantity", "unit", "value", *ERRORS)]
    errors = [name for name in ERRORS if name in whole.columns]
    if unresolved:
        whole["resolved"] = ~whole["quantity"].isin(list(unresolved))
        errors.append("resolved")
    return whole[["quantity", "unit", *axes, "value", *errors]]


def table(entries: Iterable[Entry], coordinates: Coordinates, texts: Mapping[str, str], tablefmt: str) -> str:
    """Scalars in one table, and one more for everything that is per the same axes, where these have names."""
    shown = [entry for entry in entries if entry.quantity.shown]
    parts = []
    if single := [entry for entry in shown if not entry.quantity.per]:
        parts += [_scalars(single, texts, tablefmt)]
    for axes in dict.fromkeys(entry.quantity.per for entry in shown if entry.quantity.per):
        names = [list(map(str, coordinates.get(axis, ()))) for axis in axes]
        same = [entry for entry in shown if entry.quantity.per == axes]
        if all(0 < len(each) <= LONGEST for each in names):
            parts += [_list(axes[0], names[0], same, tablefmt)] if len(axes) == 1 else _matrices(names, same, tablefmt)
    return "\n\n".join(parts)


def is_estimate(value: Any) -> bool:
    """A value with its standard errors (`estimate.Estimate`)."""
    return hasattr(value, "named") and hasattr(value, "stderr")


def _scalars(entries: list[Entry], texts: Mapping[str, str], tablefmt: str) -> str:
    """A row each; errors in columns where some are over draws and over data, else beside their values."""
    crossed = any(is_estimate(entry.value) and len(_errors(entry.value)) > 2 for entry in entries)
    rows = []
    for entry in entries:
        if entry.name in texts:
            rows.append([entry.name, texts[entry.name]])
        elif crossed and is_estimate(entry.value):
            value, *errors = _errors(entry.value).values()
            rows.append([entry.name, said(value), *map(_error, errors)])
        elif crossed and entry.stderr is not None:  # of what no draw goes into
            rows.append([entry.name, said(float(entry.value)), "", _error(float(entry.stderr)), ""])
        else:
            rows.append([entry.name, _cell(entry)])
    return _tabulated(rows, HEADERS if crossed else (), tablefmt)


def _list(axis: str, names: list[str], entries: list[Entry], tablefmt: str) -> str:
    cells = [_cells(entry) for entry in entries]
    rows = [[name, *row] for name, row in zip(names, zip(*cells, strict=True), strict=True)]
    return _tabulated(rows, [axis, *(entry.name for entry in entries)], tablefmt)


def _matrices(names: list[list[str]], entries: list[Entry], tablefmt: str) -> list[str]:
    if len(names) > 2:
        return []
    width = len(names[1])
    parts = []
    for entry in entries:
        cells = _cells(entry)
        rows = [[name, *cells[i * width : (i + 1) * width]] for i, name in enumerate(names[0])]
        parts.append(_tabulated(rows, [entry.name, *names[1]], tablefmt))
    return parts


def _tabulated(rows: Sequence[Sequence[str]], headers: Sequence[str], tablefmt: str) -> str:
    return str(tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True))


def _columns(entry: Entry, coordinates: Coordinates) -> dict[str, Any] | None:
    """The rows of one quantity for a frame; None where it is no number."""
    values = numbers(entry)
    if values is None:
        return None
    sizes = zip(entry.quantity.per, values["value"].shape, strict=True)
    places = [np.asarray(coordinates.get(axis, range(size))) for axis, size in sizes]
    grids = np.meshgrid(*places, indexing="ij") if places else []
    columns: dict[str, Any] = {"quantity": entry.name, "unit": entry.quantity.unit}
    columns |= {axis: grid.ravel() for axis, grid in zip(entry.quantity.per, grids, strict=True)}
    return columns | {name: np.ravel(value) for name, value in values.items()}


def numbers(entry: Entry) -> dict[str, np.ndarray] | None:
    """Value and errors as float arrays of one shape; None for what is no number."""
    value = list(entry.value.values()) if isinstance(entry.value, Mapping) else entry.value
    if isinstance(value, (list, tuple)) and value and is_estimate(value[0]):
        each = [_errors(estimate) for estimate in value]
        return {name: np.array([one.get(name, math.nan) for one in each]) for name in each[0]}
    if is_estimate(value):
        return {name: np.array(number) for name, number in _errors(value).items()}
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and any(isinstance(each, str) for each in value)):
        return None
    alone = {"value": _array(value)}
    return alone if entry.stderr is None else alone | {"stderr": _array(entry.stderr)}


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)


def _errors(estimate: Any) -> dict[str, float]:
    names = [name for name in ERRORS if hasattr(estimate, name)]
    return {"value": float(estimate.value)} | {name: float(getattr(estimate, name)) for name in names}


def _error(stderr: float) -> str:
    return "" if math.isnan(stderr) else f"{stderr:.2g}"


def _cells(entry: Entry) -> list[str]:
    """One text per number, each with its standard error where there is one."""
    values = numbers(entry)
    if values is None:
        return list(entry.value)
    errors = values.get("stderr_total", values.get("stderr"))
    flat = np.ravel(values["value"]).tolist()
    known = [math.nan] * len(flat) if errors is None else np.ravel(errors).tolist()
    return [said(value, error) for value, error in zip(flat, known, strict=True)]


def _cell(entry: Entry) -> str:
    """A single number, word or range, with its standard error."""
    value = entry.value
    if isinstance(value, (bool, str)):
        return str(value)
    return " to ".join(_cells(entry))
