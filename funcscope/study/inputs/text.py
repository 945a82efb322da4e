"""Texts from files, one at a time: plain text, JSON lines, CSV and parquet, each with the place that it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ...core.checks import check_choice
from ..dataset import ENDINGS, is_dataset
from ..dataset import rows as dataset_rows
from ..images import is_image_folder
from ..quiet import first_line
from ..recordings import is_speech
from ..row_files import lines, objects, separated
from ..texts import Unit

_PARQUET_ERRORS = (OSError, ValueError, RuntimeError)  # pyarrow's own are kinds of these
_ROWS = 64
"""Rows of a parquet file that are held at once."""


class Example(NamedTuple):
    """A text, its label where there is one (a class index or name), where it was found, for messages, and a second text:
    the other one of a pair, or what an encoder-decoder is to say."""

    text: str
    label: int | str | None = None
    where: str = ""
    second: str | None = None


def read_texts(
    path: str | Path,
    *,
    field: str = "text",
    label_field: str | None = None,
    second_field: str | None = None,
    unit: Unit = "paragraph",
    split: str = "train",
    num_samples: int = 64,
) -> Iterator[Example]:
    """The texts of a file or of a Hugging Face data set, in their order, read as they are asked for.

    `.txt`: UTF-8, cut by `unit`: its lines, its paragraphs (between blank lines) or the whole document; no text is blank.
    `.jsonl`, `.ndjson`: one JSON object per line, the text in `field`, the label in `label_field`, a second text in
    `second_field`; blank lines are skipped.
    `.csv`, `.tsv`: a row per text below a row of names, cells between commas or tabs, quoted where they hold one or a line's
    end; labels of digits are class indices.
    `.parquet`: one text per row, with the columns `field` and `label_field`; needs pyarrow.
    Where there is no such file, `name`, `owner/name` or `name:configuration` is a data set of the Hugging Face hub, and a
    folder is one on the disk: of its `split`, 32 rows are looked at for each of the `num_samples`; needs datasets.

    Raises, in one line: FileNotFoundError, IsADirectoryError, ValueError for another ending and for `label_field` with a
    `.txt`, ImportError for a missing pyarrow, at once; ValueError, with file and line or row, for whatever in the file is
    not as described above, when it is reached; and ValueError at the end of a file without any text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.jsonl"
    ...     _ = path.write_text('{"text": "one", "y": 1}')
    ...     list(read_texts(path, label_field="y"))
    [Example(text='one', label=1, where='line 1', second=None)]
    """
    check_choice("unit", unit, get_args(Unit))
    file = Path(path)
    if file.is_dir() and is_speech(file):
        raise ValueError(
            f"{path} is a folder of recordings, which models of speech take (Whisper): a model of text reads their "
            "transcripts from a table, its metadata.csv."
        )
    if file.is_dir() and is_image_folder(file):
        raise ValueError(
            f"{str(path)!r} is a folder of images, which classifiers of images take (ViT), and this is a model of text: "
            f"pass a file of texts ({', '.join(ENDINGS)})."
        )
    if is_dataset(str(path)):
        each = dataset_rows(str(path), split, (field, label_field, second_field), num_samples)
        named = ((f"row {i}", row) for i, row in enumerate(each, start=1))
        return _some(file, (_example(file, row, where, field, label_field, second_field) for where, row in named))
    if not file.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}: texts are read from a file of {', '.join(ENDINGS)}.")
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{file.name!r} is no file of texts that is read: its name must end in {', '.join(ENDINGS)}.")
    if ending == ".txt":
        for name, given in (("label_field", label_field), ("second_field", second_field)):
            if given is not None:
                raise ValueError(f"`{name}` is {given!r}, and {file} is plain text without fields: use `.jsonl`.")
        return _some(file, _units(file, unit))
    if ending == ".parquet":
        rows = _parquet(file, field, label_field, second_field)
    else:
        rows = separated(file, ending, label_field) if ending in (".csv", ".tsv") else objects(file)
    return _some(file, (_example(file, row, where, field, label_field, second_field) for where, row in rows))


def _some(file: Path, examples: Iterable[Example]) -> Iterator[Example]:
    found = False
    for example in examples:
        found = True
        yield example
    if not found:
        raise ValueError(f"{file} is empty: there is no text in it.")


def _units(file: Path, unit: Unit) -> Iterator[Example]:
    if unit == "line":
        yield from (Example(line, None, f"line {number}") for number, line in lines(file) if line.strip())
    elif unit == "paragraph":
        for blank, group in groupby(lines(file), key=lambda numbered: not numbered[1].strip()):
            if not blank:
                numbers, parts = zip(*group, strict=True)
                yield Example("\n".join(parts), None, f"line {numbers[0]}")
    else:
        text = "\n".join(line for _, line in lines(file))
        if text.strip():
            yield Example(text, None, "the document")


def _parquet(file: Path, *fields: str | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The named columns, row by row. The file is opened at once, its rows are read as they are asked for."""
    try:
        import pyarrow.parquet as pq  # type: ignore[import]
    except ImportError as err:
        raise ImportError(f"{file} needs pyarrow: install it with `pip install 'funcscope[parquet]'`.") from err
    columns = [name for name in fields if name is not None]
    try:
        content = pq.ParquetFile(file, pre_buffer=False)
    except _PARQUET_ERRORS as err:
        raise ValueError(f"{file} is damaged or no parquet file ({first_line(err)}).") from err
    for name in columns:
        if name not in content.schema_arrow.names:
            raise ValueError(_lacking(file, "its columns", name, content.schema_arrow.names))
    return _rows(file, content, columns)


def _rows(file: Path, content: Any, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    with content:
        try:
            for batch in content.iter_batches(_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except _PARQUET_ERRORS as err:
            raise ValueError(f"{file} is damaged after row {number} ({first_line(err)}).") from err


def _example(
    file: Path, row: Mapping[str, Any], where: str, field: str, label_field: str | None, second_field: str | None
) -> Example:
    for name in (field, label_field, second_field):
        if name is not None and name not in row:
            raise ValueError(_lacking(file, where, name, row))
    label = row[label_field] if label_field is not None else None
    text, second = (None if name is None else _text(file, where, name, row[name]) for name in (field, second_field))
    if label_field is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise ValueError(
            f"{file}, {where}: the label `{label_field}` must be a class index or name, got {type(label).__name__}."
        )
    return Example(text or "", label, where, second)


def _text(file: Path, where: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{file}, {where}: `{field}` must be a string, got {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        raise ValueError(f"{file}, {where}: `{field}` holds half of a surrogate pair, which is no character.") from err
    return value


def _lacking(file: Path, where: str, name: str, present: Iterable[str]) -> str:
    return f"{file}, {where}: no field {name!r}; it has {', '.join(map(repr, sorted(present)[:8])) or 'none'}."
