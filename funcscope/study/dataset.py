"""Texts of a Hugging Face data set by its name, where there is no such path; none of its code is run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from .quiet import one_line

ENDINGS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of files that are read without the package."""
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:\w[\w.-]*)?")
ROWS = 32
"""Rows that are looked at for each text that is asked for; some are blank, or too short to be scored."""


def is_dataset(data: str) -> bool:
    """Whether texts are those of a data set: a folder of its files, or `name`, `owner/name`, `name:configuration`.

    >>> is_dataset("wikitext:wikitext-2-raw-v1"), is_dataset("nowhere/texts.jsonl"), is_dataset("../imdb")
    (True, False, False)
    """
    path = Path(data)
    return path.is_dir() or not (path.exists() or path.suffix.lower() in ENDINGS or NAME.fullmatch(data) is None)


def rows(data: str, split: str, columns: Sequence[str | None], num: int) -> Iterator[Mapping[str, Any]]:
    """The first rows of a split, `ROWS` for each of the `num` texts that are asked for, with these columns alone.

    Raises, in one line: FileNotFoundError or IsADirectoryError where the package is not there, ValueError for a data set that
    cannot be loaded, and for a column that it does not have.
    """
    made = _loaded(str(Path(data).resolve()), split) if Path(data).is_dir() else _of_the_hub(data, split)
    names = [name for name in columns if name is not None]
    for name in names:
        if name not in made.column_names:
            there = ", ".join(map(repr, sorted(made.column_names)[:8]))
            raise ValueError(f"the data set {data!r} has no column {name!r}: it has {there}.")
    return islice(made.select_columns(names), ROWS * num)


def digest_of(data: str, split: str, columns: Sequence[str | None], num: int) -> str:
    """The sum of these rows, whatever the data set is called and wherever it is kept."""
    total = hashlib.sha256()
    for row in rows(data, split, columns, num):
        total.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return total.hexdigest()


def check_dataset(data: str) -> Any:
    """The package that reads it. Raises where it is not installed, or of a version that runs code of data sets."""
    try:
        import datasets  # type: ignore[import]

        version, _ = datasets.__version__, datasets.load_dataset
    except (ImportError, AttributeError) as err:  # a folder of that name is imported, too, and has neither
        kind: type[OSError] = IsADirectoryError
        what = "is a folder: pass one of its files"
        if not Path(data).is_dir():
            kind, what = FileNotFoundError, "is no file of texts, there is none of that name"
        raise kind(f"{data!r} {what}; data sets are read after `pip install 'funcscope[datasets]'`.") from err
    if int(version.partition(".")[0]) < 4:
        raise ValueError(f"datasets {version} runs code of data sets: install 4.0 or later, `funcscope[datasets]`.")
    return datasets


def _loaded(data: str, split: str) -> Any:
    package = check_dataset(data)
    name, _, configuration = (data, "", "") if Path(data).is_dir() else data.partition(":")
    with one_line(f"the data set {data!r} cannot be loaded, split {split!r}, and there is no such file"):
        return package.load_dataset(name, configuration or None, split=split)


_of_the_hub = cache(_loaded)
"""Asked once in a process: what is measured is what was summed."""
