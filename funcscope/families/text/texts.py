"""Texts that every machine has: what the standard library says of itself, as prose, and its source, as code."""

from __future__ import annotations

import ast
import json
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from ...core.keys import Key, fold_in, key, uniform
from ...core.store import write
from .variants import KINDS, Config

T = TypeVar("T")
SPLITS = ("train", "heldout")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SHORTEST = 64
"""Bytes of a text: shorter ones say little, and their first bytes have nothing to be predicted from."""
_PIECE = 1024
"""Bytes of a text of code, cut at the end of a line."""


class Texts(NamedTuple):
    """The texts of one module of the standard library."""

    prose: list[str]
    code: list[str]


def data(config: Config, folder: Path) -> dict[str, dict[str, Path]]:
    """The files of texts by split and kind, `train/prose.jsonl` and so on in `folder`, made where they are missing.

    A share of the modules, drawn from the seed, is held out: no text of theirs is trained on. A file that is there stays as
    it is, whatever Python made it: models are of the files that they were trained on. Raises ValueError where this Python
    has too little source to train on.
    """
    files = {split: {kind: folder / split / f"{kind}.jsonl" for kind in KINDS} for split in SPLITS}
    missing = [(split, kind) for split in SPLITS for kind in KINDS if not files[split][kind].is_file()]
    if missing:
        made = selected(config, dict(modules(Path(sysconfig.get_paths()["stdlib"]))))
        for split, kind in missing:
            lines = (json.dumps({"text": text, "module": module}) for module, text in made[split][kind])
            write(files[split][kind], "".join(f"{line}\n" for line in lines).encode())
    return files


def read(path: Path) -> list[str]:
    """The texts of a file that `data` made."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def selected(config: Config, found: Mapping[str, Texts]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """By split and kind, (module, text) in a random order, up to as many bytes as the configuration says."""
    root, names = fold_in(key(config.seed), "texts"), sorted(found)
    cut = round(config.heldout_fraction * len(names))
    order = _shuffled(root, names)
    made: dict[str, dict[str, list[tuple[str, str]]]] = {split: {} for split in SPLITS}
    for split, chosen, most in (
        ("heldout", sorted(order[:cut]), config.heldout_bytes),
        ("train", sorted(order[cut:]), config.train_bytes),
    ):
        for kind in KINDS:
            texts = [(name, text) for name in chosen for text in getattr(found[name], kind)]
            made[split][kind] = _capped(_shuffled(fold_in(fold_in(root, split), kind), texts), most)
            _check_enough(made[split][kind], split, kind, config)
    return made


def modules(stdlib: Path) -> Iterator[tuple[str, Texts]]:
    """Name and texts of the modules of a standard library that are files, sorted; without those of packages, and without
    `_sysconfigdata`, which says how this one Python was built."""
    for path in sorted(path for path in stdlib.glob("*.py") if not path.name.startswith("_sysconfigdata")):
        with tokenize.open(path) as file:  # in the encoding that the file says
            yield path.stem, texts_of(file.read())


def texts_of(source: str) -> Texts:
    """Docstrings without examples, and the source without docstrings and lines of comments, in pieces of whole lines.

    >>> said = "Twice the number, whatever it may be: of an array, twice every number in it."
    >>> texts_of(f"def f(x):\\n    '{said}'\\n    return 2 * x").prose == [said]
    True
    """
    lines: list[str | None] = [*source.split("\n")]
    prose = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and (said := ast.get_docstring(node)) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [None] * ((first.end_lineno or 0) - first.lineno + 1)
            prose += [said] if ">>>" not in said and len(said.encode()) >= _SHORTEST else []
    return Texts(
        prose, list(_pieces([line for line in lines if line is not None and not line.lstrip().startswith("#")]))
    )


def _pieces(lines: list[str]) -> Iterator[str]:
    piece = ""
    for line in lines:
        if piece and len((piece + line).encode()) > _PIECE:
            yield from [piece] if len(piece.encode()) >= _SHORTEST else []
            piece = ""
        piece += f"{line.rstrip()}\n" if line.strip() or piece else ""
    if len(piece.encode()) >= _SHORTEST:
        yield piece


def _shuffled(root: Key, things: list[T]) -> list[T]:
    order = uniform(root, torch.empty(len(things))).argsort(stable=True).tolist() if things else []
    return [things[i] for i in order]


def _check_enough(texts: list[tuple[str, str]], split: str, kind: str, config: Config) -> None:
    if (total := sum(len(text.encode()) for _, text in texts)) < 8 * config.length:
        raise ValueError(
            f"there are {total} bytes of {kind} for the {split} data, and at least {8 * config.length} are needed: take a "
            f"Python that has the sources of its standard library in {sysconfig.get_paths()['stdlib']}, or a larger "
            "`train_bytes` and `heldout_bytes`."
        )


def _capped(texts: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """The first texts, as many as have room."""
    total, kept = 0, []
    for module, text in texts:
        total += len(text.encode())
        if total > most:
            break
        kept.append((module, text))
    return kept
