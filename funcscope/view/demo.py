"""The page of the demonstration: the story of a training run, then everything that was measured of it."""

from __future__ import annotations

import math
from pathlib import Path

from ..core.store import write
from ..study.results import Results
from .page import Chart, Fact, Page, Section, render
from .report import of_metric, provenance, with_short_names
from .section import entries, said, section
from .story import MEMORISED, Story, checkpoints, sentence, title, training
from .theme import MUTED

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
    if "training_curves" in there:
        _mark_phases(body[names.index("training_curves")], story)
    body += [Section("All checkpoints", [checkpoints(story)]), *provenance(results)]
    lede = [training(story), *(sentence(story, name) for name in there if name == "directional_losses")]
    write(Path(path), render(title(story), story.run[0].group, lede, _strip(story), body).encode())
    return Page(Path(path))


def _mark_phases(curves: Section, story: Story) -> None:
    """Vertical lines in the curves where the training data are known by heart, and where the test data are."""
    steps = {name: story.passed(split) for name, split in PHASES.items()} if story.curves else {}
    for chart in (block for block in curves.blocks if isinstance(block, Chart)):
        for i, (name, step) in enumerate(steps.items()):
            if step is not None:  # the axis is that of square roots
                x, font = math.sqrt(step), {"size": 12, "color": MUTED}
                chart.figure.add_vline(x=x, line={"color": MUTED, "width": 1, "dash": "dot"}, layer="below", name=name)
                at = {"x": x, "y": 0.05 * i, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
                chart.figure.add_annotation(text=name, showarrow=False, font=font, **at)


PHASES = {"memorised": "train", "generalised": "test"}
"""By phase, the data that are known from it on."""


def _strip(story: Story) -> list[Fact]:
    facts = []
    for name, split in PHASES.items() if story.curves else ():
        step, text = story.passed(split), f"{split} accuracy above {MEMORISED:g}"
        facts.append(Fact(name.capitalize(), "never" if step is None else f"step {step:,}", text))
    last = story.outcome("directional_losses", story.steps[-1])
    if last is not None and (entry := entries(last).get("curvature_mean")) is not None:
        unit = last.in_unit(entry.quantity.unit)
        facts.append(Fact("Mean curvature", said(last)[entry.name], f"{unit}, at the end"))
    return [*facts, Fact("Checkpoints", f"{len(story.steps):,}", f"steps {story.steps[0]:,} to {story.steps[-1]:,}")]
