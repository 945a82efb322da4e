"""The page of the demonstration of induction heads: what grew and when, then everything that was measured."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..core.tables import said as with_error
from ..families import induction
from ..study.cache import Outcome
from ..study.results import Results
from .page import Page
from .report import of_metric, with_short_names, write_report

TITLE = "Induction heads, and when they grow"
MODELS = (
    "Small transformers, trained here on sequences of random tokens that repeat themselves: those of one and of two layers "
    "have attention only, `mlp` in a name says that there are MLPs, too. What comes next can be known in the second copy "
    "alone: by looking for an earlier occurrence of the current token, and at the one behind it. A head that does so is an "
    "induction head; it reads what a head of the layer before, which looks at the previous token, has written."
)
FIRST = ("induction_curves", "induction_heads", "attention_on_text", "attention_patterns", "training_curves")
"""Of the metrics, in this order, and the others after them."""


def write_page(results: Results, path: str | Path) -> Page:
    """Write the page, and return it: a notebook shows it."""
    there = dict.fromkeys(outcome.metric for outcome in results.outcomes)
    names = sorted(there, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    return write_report(results, path, title=TITLE, metrics=names, lede=[MODELS, *grown(results), baseline()])


def grown(results: Results) -> list[str]:
    """For each model: its gain and the scores of its heads at the end, and the step at which half of the gain was there."""
    curves = of_metric(with_short_names(results), "induction_curves")
    return [_sentence(outcome) for outcome in curves if outcome.ok]


def baseline() -> str:
    """What those numbers would be without order."""
    config = induction.Config()
    worth = math.log(config.vocab_size / config.longest)
    return (
        f"A head that attends to all positions alike has an induction score of about {math.log(2) / config.longest:.2g}. "
        f"To know which tokens are in the block, without their order, is worth ln({config.vocab_size} / {config.longest}) = "
        f"{worth:.3g} nats, and a little more where distances say which of them are likelier."
    )


def _sentence(outcome: Outcome) -> str:
    result = outcome.result
    assert result is not None
    values = {name: np.asarray(getattr(result, name)) for name in ("gain", "induction", "previous")}
    errors = {name: np.asarray(getattr(result, f"{name}_stderr")) for name in values}
    last = {name: with_error(float(x[-1]), float(errors[name][-1])) for name, x in values.items()}
    steps = result.coords["step"]
    half = {name: steps[int(np.argmax(values[name] >= values[name][-1] / 2))] for name in ("gain", "induction")}
    return (
        f"{outcome.group or outcome.subject}: at the end the second copy costs {last['gain']} nats per token less than the "
        f"first, of which half is there from step {half['gain']:,} on; the largest induction score is {last['induction']}, "
        f"half of it from step {half['induction']:,} on, and the largest previous-token score of the first layer "
        f"{last['previous']}."
    )
