"""The page of the demonstration of two tasks: what fine-tuning has changed, then everything that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.tables import counted
from ..families import text
from ..gradients.influential_texts import MostInfluential
from ..study.cache import Outcome
from ..study.results import Results
from .numbers import number
from .page import Block, Page, Table
from .report import of_metric, with_short_names, write_report
from .section import said

TITLE = "Language models of prose and code"
MODELS = (
    "Three language models of bytes, trained here on the standard library of Python: `base` on its docstrings, which are "
    "prose, and on its source, which is code; `prose` and `code` go on from it, each on one of them. All are measured on "
    "both, on texts of modules that none of them has seen; influence alone is that of texts that they were trained on. A "
    "token is a byte, so that losses are nats per byte."
)


def write_page(results: Results, path: str | Path) -> Page:
    """Write the page, and return it: a notebook shows it."""
    lede = [MODELS, *changes(results), *shared(results)]
    return write_report(results, path, title=TITLE, lede=lede, more={"most_influential": influential(results)})


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


def shared(results: Results) -> list[str]:
    """What prose and code have in common in the base model: parameters that they need, and where gradients point."""
    short = with_short_names(results)
    subject, ok = f"{text.BASE} on {' and '.join(text.KINDS)}", dict[str, Any]()
    for name in ("fisher_overlap", "cross_task_conflicts"):
        ok |= {o.metric: o.result for o in of_metric(short, name) if o.ok and o.subject == subject}
    parts = []
    if (overlap := ok.get("fisher_overlap")) is not None:
        both, prose, code = (number(float(x), 2) for x in overlap.total_halves)
        parts.append(
            f"The {100 * overlap.density:.3g} % of the base model's parameters with the largest Fisher information for "
            f"prose and those for code overlap by {number(overlap.total_kappa, 2)}, where 0 is chance and 1 are the same; "
            f"with half of the texts by {both}, while two halves of prose overlap by {prose}, of code by {code}."
        )
    if (conflicts := ok.get("cross_task_conflicts")) is not None:
        apart, against = (int((q <= 0.05).sum()) for q in (conflicts.q_differ, conflicts.q_conflict))
        num = len(conflicts.blocks)
        parts.append(
            f"Gradients of prose and code differ in {apart} of {counted(num, 'block')} and point against each other in "
            f"{against} (q ≤ 0.05)."
        )
    return [" ".join(parts)] if parts else []


def influential(results: Results) -> list[Block | str]:
    """Of every model, the training texts that help held-out ones most and those that harm them most, whole."""
    made = [o for o in of_metric(with_short_names(results), "most_influential") if o.result is not None]
    found = {o.subject: result for o in made if isinstance(result := o.result, MostInfluential)}
    if not found:
        return []
    nums = " or ".join(f"{num:,}" for num in sorted({each.num_sequences for each in found.values()}))
    rows = [
        [subject, "helps" if rise > 0 else "harms", "‹" + passage.replace("\n", " ↵ ") + "›", number(rise, 3)]
        for subject, each in found.items()
        for passage, rise in zip(each.passages, each.rise.tolist(), strict=True)
    ]
    return [
        f"The training texts are {nums} windows that the model was trained on, as it saw them, drawn at random: of `base` "
        "from prose and code, of the others from their fine-tuning; ↵ is the end of a line. The test loss is the mean over "
        "held-out texts. What leaving one out does is as if these windows were all training data: with all of them, one "
        "counts in proportion less.",
        Table(["model on data", "", "training text", "rise of the test loss without it (nats per byte)"], rows),
    ]


def _change(pair: Outcome) -> str:
    texts = said(pair, units=True)
    return f"{texts['difference']} (p = {texts['p_value']})"
