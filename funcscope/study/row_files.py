"""Files of rows: lines of UTF-8, JSON lines, cells between commas or tabs, each with the place that it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .quiet import first_line

_BOM = b"\xef\xbb\xbf"


def lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and content of each line, without its end. Read as bytes: a decoder's buffer would not know the line."""
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield number, line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as err:
                raise ValueError(f"{file}, line {number}: not UTF-8 ({err.reason}); save the file as UTF-8.") from err


def objects(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and content of each line of JSON, which must be an object; blank lines are skipped."""
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise ValueError(f"{file}, line {number}: not JSON ({first_line(err)}).") from err
        if not isinstance(value, dict):
            raise ValueError(f"{file}, line {number}: must be a JSON object, got {type(value).__name__}.")
        yield f"line {number}", value


def separated(file: Path, ending: str, label_field: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and cells of each row below the one of names; digits in the column `label_field` are numbers."""
    with file.open(encoding="utf-8-sig", newline="") as content:
        rows = csv.DictReader(content, delimiter="\t" if ending == ".tsv" else ",", strict=True)
        try:
            for row in rows:
                where = f"line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, {where}: as many cells as the first row has names, {len(row)}, are needed."
                    )
                label = row.get(label_field or "", "")
                yield where, {**row, label_field: int(label)} if label_field and label.isdecimal() else row
        except (csv.Error, UnicodeDecodeError) as err:
            raise ValueError(
                f"{file}, after line {rows.line_num}: no {ending[1:].upper()} ({first_line(err)})."
            ) from err
