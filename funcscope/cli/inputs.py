"""Models and texts that a command is given: what can be said of them before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..study.config import UnifiedConfig
from ..study.dataset import check_dataset, is_dataset
from ..study.folder import local_folder
from ..study.images import is_image_folder
from ..study.recordings import is_speech
from ..study.runs import is_run


def named_files(files: list[str]) -> str | dict[str, str]:
    """One file of texts, or several by name."""
    if len(files) == 1 and ("=" not in files[0] or Path(files[0]).exists()):
        return files[0]
    named = dict(file.partition("=")[::2] for file in files)
    if not all(name and file for name, file in named.items()) or len(named) < len(files):
        raise ValueError(f"several files of texts have a name each, `--data code=a.jsonl prose=b.jsonl`, got {files}.")
    return named


def check_inputs(models: list[Any], data: str | Mapping[str, str] | None) -> None:
    """What can be said before any work."""
    folders = [path for path in models if isinstance(path, (str, Path)) and not is_run(path)]
    for path in folders:
        local_folder(path)
    if len({str(Path(path).resolve()) for path in folders}) < len(folders):
        raise ValueError("one of the models is given twice: a model does not differ from itself.")
    if folders and data is None:
        raise ValueError("models in folders need texts: `--data FILE`.")
    for file in [data] if isinstance(data, str) else (data or {}).values():
        if is_image_folder(file) or is_speech(file):
            continue
        if folders and is_dataset(file):
            check_dataset(file)
        elif folders and not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file!r}: `--data` takes a file of texts.")


def check_texts(config: UnifiedConfig) -> None:
    """The first text of every file is read before a model is."""
    from ..study.inputs.text import read_texts  # beside what imports transformers

    given = config.dataset_name
    how: Any = {name: getattr(config, name) for name in ("field", "label_field", "second_field", "unit")}
    for file in [given] if isinstance(given, str) else (given or {}).values():
        if Path(file).is_file():
            next(read_texts(file, **how))
