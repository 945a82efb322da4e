"""The README of a merged model: what it was made of, and how, so that it can be made again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from .digest import Sums, of_files
from .merge_leaves import Merger
from .stored_model import StoredModel

_USED = {
    "linear": ("weights",), "slerp": ("weights",), "task_arithmetic": ("weights", "scale"),
    "ties": ("weights", "scale", "density", "scope"), "dare": ("weights", "scale", "drop", "seed"),
    "fisher": ("weights",), "regmean": ("weights", "shrink"),
}  # fmt: skip
PAPERS = {
    "linear": "Wortsman et al. (2022), arXiv:2203.05482",
    "slerp": "Shoemake (1985), doi:10.1145/325165.325242",
    "task_arithmetic": "Ilharco et al. (2023), arXiv:2212.04089",
    "ties": "Yadav et al. (2023), arXiv:2306.01708",
    "dare": "Yu et al. (2024), arXiv:2311.03099",
    "fisher": "Matena, Raffel (2022), arXiv:2111.09832",
    "regmean": "Jin et al. (2023), arXiv:2212.09849",
}


def card(merger: Merger, every: Sequence[StoredModel]) -> str:
    """Markdown. Folders are named as they were given, those given by a place on this machine by their last name."""
    weights = merger.settings["weights"] or [1.0] * len(merger.models)
    rows = [f"| {_plain(each.label)} | base | | `{each.digest()}` |" for each in every if each is merger.base]
    for model, weight in zip(merger.models, weights, strict=True):
        rows.append(f"| {_plain(model.label)} | model | {weight:g} | `{model.digest()}` |")
    for file, model in zip(merger.files, merger.models, strict=bool(merger.files)):
        what = "Fisher diagonal" if merger.method == "fisher" else "Grams"
        rows.append(
            f"| {_plain(file.path.name)} | {what} of {_plain(model.label)} | | `{of_files([file.path], Sums(None))}` |"
        )
    settings = [f"- {name}: {merger.settings[name]}" for name in _USED[merger.method] if name != "weights"]
    settings.append(f"- dtype: {', '.join(sorted({str(merger.shape(n).dtype)[6:] for n in merger.names()}))}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors"))
    return "\n".join(
        [
            "---", "library_name: transformers", "tags:", "- merge", "- funcscope", "---", "",
            f"# A merge by {merger.method}", "",
            f"Made by `funcscope merge`: {PAPERS[merger.method]}.", "",
            "| what | role | weight | SHA-256 over files' names and contents |", "|---|---|---|---|", *rows, "",
            *settings, "",
            f"Settings and tokenizer are those of {_plain(every[0].label)}. funcscope {__version__}, {packages}.", "",
        ]
    )  # fmt: skip


def _plain(text: str | Path) -> str:
    """In a cell of a table, as code."""
    return "`" + re.sub(r"[|`\s]+", " ", str(text)).strip() + "`"
