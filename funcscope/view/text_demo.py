"""The page of the demonstration of two tasks: what fine-tuning has changed, then everything that was measured."""

from __future__ import annotations

from pathlib import Path

from ..families import text
from ..study.cache import Outcome
from ..study.results import Results
from .page import Page
from .report import of_metric, with_short_names, write_report
from .section import said

TITLE = "Language models of prose and code"
MODELS = (
    "Three language models of bytes, trained here on the standard library of Python: `base` on its docstrings, which are "
    "prose, and on its source, which is code; `prose` and `code` go on from it, each on one of them. All are measured on "
    "both, on texts of modules that none of them has seen. A token is a byte, so that losses are nats per byte."
)


def write_page(results: Results, path: str | Path) -> Page:
    """Write the page, and return it: a notebook shows it."""
    return write_report(results, path, title=TITLE, lede=[MODELS, *changes(results)])


def changes(results: Results) -> list[str]:
    """For each model that was fine-tuned, how its loss differs from the base model's on both kinds of text.

    Paired over sequences: a difference is below 0 where the model is better.
    """
    compared = of_metric(with_short_names(results), "loss_comparison")
    pairs = {outcome.subject: outcome for outcome in compared if outcome.ok}
    sentences = []
    for name in text.KINDS:
        there = {kind: pairs.get(f"{text.BASE} on {kind} to {name} on {kind}") for kind in text.KINDS}
        parts = [f"{_change(pair)} on {kind}" for kind, pair in there.items() if pair is not None]
        if parts:
            sentences.append(f"Fine-tuned on {name}, the loss changes by {' and by '.join(parts)}.")
    return [" ".join(sentences)] if sentences else []


def _change(pair: Outcome) -> str:
    texts = said(pair, units=True)
    return f"{texts['difference']} (p = {texts['p_value']})"
