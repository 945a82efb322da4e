"""The page of the demonstration: the story of a training run, then everything that was measured of it."""

from __future__ import annotations

from pathlib import Path

from ..core.store import write
from ..study.results import Results
from .numbers import typeset
from .page import Fact, Page, Section, render
from .report import of_metric, provenance, with_short_names
from .section import section, told
from .story import Story, checkpoints, sentence, title, training

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
    story = Story(results)
    there = dict.fromkeys(outcome.metric for outcome in results.outcomes)
    names = [name for name in FIRST if name in there] + [name for name in there if name not in FIRST]
    sections = [section(of_metric(results, name), sentence(story, name)) for name in names]
    sections += [Section("All checkpoints", [checkpoints(story)]), *provenance(results)]
    lede = [training(story), *([sentence(story, "directional_losses")] if "directional_losses" in there else [])]
    write(Path(path), render(title(story), story.run[0].group, lede, _strip(story), sections).encode())
    return Page(Path(path))


def _strip(story: Story) -> list[Fact]:
    _, before, last = story.phases
    when = {"Memorised": (story.memorised, "training"), "Generalised": (story.generalised, "test")}
    facts = [
        Fact(name, "not within the run" if step is None else f"step {step:,}", f"{data} accuracy above 0.99")
        for name, (step, data) in when.items()
    ]
    ends = [story.outcome("directional_losses", step) for step in (before, last)]
    if known := [(step, end) for step, end in zip((before, last), ends, strict=True) if end is not None]:
        values = [f"{told(end, 'curvature_mean')} at step {step:,}" for step, end in known]
        facts.append(Fact("Mean curvature", typeset(values[-1]), typeset("; ".join(values[:-1]))))
    return [*facts, Fact("Checkpoints", f"{len(story.steps):,}", f"steps {story.steps[0]:,} to {last:,}")]
