"""Recordings of speech with what is said in them: which there are, before any is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .digest import Sums, of_json
from .row_files import lines, objects, separated

ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
FILE = "file_name"
"""The column that names the files."""


class Recording(NamedTuple):
    """A file of sound, its transcript, and where that was found, for messages."""

    file: Path
    text: str
    where: str


def is_speech(data: str | Path) -> bool:
    """Whether it is a folder with recordings, of its own or of its splits, or a table whose first row names one.

    >>> is_speech("."), is_speech("texts.jsonl")
    (False, False)
    """
    path = Path(data)
    if not path.is_dir():
        return path.is_file() and _names_sound(path)
    return _holds(path) or any(_holds(each) for each in path.iterdir() if each.is_dir() and each.name[0] != ".")


def recordings(data: str | Path, num: int, *, field: str = "text", split: str = "train") -> Iterator[Recording]:
    """The first `num` recordings with their transcripts: by the rows of a table, or of a folder.

    A table (`.csv`, `.tsv`, `.jsonl`) names a file in each row, in `file_name`, beside itself or below, and its transcript in
    `field`; where that is `text` and there is none, in `transcription`. A folder has such a table, `metadata.csv` or
    `metadata.jsonl`, or NAME.txt beside NAME.wav, in the order of names. Where a folder has neither, those of its sub-folder
    `split` are taken. Raises ValueError, by file and line, for a row without a transcript or of a file that is not there.
    """
    path = Path(data)
    if path.is_dir() and not _holds(path):
        path = path / split
    if not path.exists():
        return iter(())
    table = _table(path) if path.is_dir() else path
    return islice(_beside(path) if table is None else _listed(table, field), num)


def digest_of_recordings(data: str | Path, num: int, field: str, split: str, sums: Sums) -> str:
    """The sum of these recordings and their transcripts, whatever the files are called."""
    return of_json([[text, sums.of(file)] for file, text, _ in recordings(data, num, field=field, split=split)])


def _holds(folder: Path) -> bool:
    return _table(folder) is not None or any(True for _ in _sounds(folder))


def _table(folder: Path) -> Path | None:
    """The table of a folder that names sounds; ValueError where there are two."""
    here = [file for ending in TABLES if (file := folder / f"metadata{ending}").is_file() and _names_sound(file)]
    if len(here) > 1:
        raise ValueError(f"{folder} has both {here[0].name} and {here[1].name}: leave one of them there.")
    return here[0] if here else None


def _names_sound(file: Path) -> bool:
    """Whether the first row names a file of sound; of a table that cannot be read, its reader will tell."""
    if file.suffix.lower() not in TABLES:
        return False
    try:
        _, row = next(_rows(file), ("", {}))
    except ValueError:
        return False
    return isinstance(row.get(FILE), str) and row[FILE].lower().endswith(ENDINGS)


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    ending = file.suffix.lower()
    return separated(file, ending) if ending in (".csv", ".tsv") else objects(file)


def _listed(table: Path, field: str) -> Iterator[Recording]:
    for where, row in _rows(table):
        at = f"{table}, {where}"
        name = row.get(FILE)
        if not isinstance(name, str) or not name:
            raise ValueError(f"{at}: no file; every row names one of sound in the column {FILE!r}.")
        if not (table.parent / name).is_file():
            raise ValueError(f"{at}: there is no file {name!r} beside {table.name}, nor below it.")
        yield Recording(table.parent / name, _transcript(at, row, field), at)


def _transcript(at: str, row: Mapping[str, Any], field: str) -> str:
    name = "transcription" if field == "text" and "text" not in row else field
    text = row.get(name)
    if isinstance(text, str) and text.strip():
        return text
    there = ", ".join(map(repr, sorted(row)[:8]))
    raise ValueError(
        f"{at}: no transcript in {name!r}; name the column of what is said (`field`), of {there}, or take the row out."
    )


def _beside(folder: Path) -> Iterator[Recording]:
    for file in _sounds(folder):
        words = file.with_suffix(".txt")
        text = " ".join(line for _, line in lines(words)).strip() if words.is_file() else ""
        if not text:
            raise ValueError(
                f"{file} has no transcript: write what is said into {words.name} beside it, or list the files in a "
                f"metadata.csv with the columns {FILE} and transcription."
            )
        yield Recording(file, text, str(file))


def _sounds(folder: Path) -> Iterator[Path]:
    yield from (
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in ENDINGS and file.is_file() and file.name[0] != "."
    )
