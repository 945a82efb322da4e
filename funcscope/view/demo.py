"""The page of the demonstration: the story of a training run, then everything that was measured of it."""

from __future__ import annotations

from pathlib import Path

from ..core.store import write
from ..study.results import Results
from .page import Fact, Page, Section, render
from .report import of_metric, provenance, with_short_names
from .section import entries, said, section
from .story import MEMORISED, Story, checkpoints, sentence, title, training

FIRST = (
    "training_curves", "mean_loss", "directional_losses", "hessian_eigenvalues", "sam_sharpness", "landscape_flatness",
    "flatness_profile", "loss_landscape_2d", "loss_lines", "trajectory_plane", "linear_path", "effective_dimensionality",
)  # fmt: skip
"""In this order, and the others after them."""


def write_page(results: Results, path: str | Path) -> Page:
    """Write the page of a family's training run, and return it: a notebook shows it.

    Raises ValueError where the study has no checkpoints with steps.
    """
    results = with_short_names(results)
    story, there = Story(results), dict.fromkeys(outcome.metric for outcome in results.outcomes)
    names = sorted(there, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    body = [section(of_metric(results, name), sentence(story, name)) for name in names]
    body += [Section("All checkpoints", [checkpoints(story)]), *provenance(results)]
    lede = [training(story), *(sentence(story, name) for name in there if name == "directional_losses")]
    write(Path(path), render(title(story), story.run[0].group, lede, _strip(story), body).encode())
    return Page(Path(path))


def _strip(story: Story) -> list[Fact]:
    facts = []
    for name, split in (("Memorised", "train"), ("Generalised", "test")) if story.curves else ():
        step = story.passed(split)
        facts.append(Fact(name, "never" if step is None else f"step {step:,}", f"{split} accuracy above {MEMORISED:g}"))
    last = story.outcome("directional_losses", story.steps[-1])
    if last is not None and (entry := entries(last).get("curvature_mean")) is not None:
        unit = last.in_unit(entry.quantity.unit)
        facts.append(Fact("Mean curvature", said(last, entry), f"{unit}, at the end"))
    return [*facts, Fact("Checkpoints", f"{len(story.steps):,}", f"steps {story.steps[0]:,} to {story.steps[-1]:,}")]
