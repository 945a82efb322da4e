"""The page of the demonstration: reads the stored numbers, draws them, says what they show."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..core.store import load, write
from . import landscape_sections, methods, sections
from . import story as told
from .numbers import number
from .page import Fact, Files, Section, render
from .story import Story


def write_page(numbers: Path) -> Path:
    """Write the page of a stored demonstration next to its `.npz`, and return its path.

    Raises FileNotFoundError, and core.store.Damaged for a file that cannot be read.
    """
    story = Story(load(numbers))
    page = numbers.with_suffix(".html")
    body = [
        sections.training(story),
        sections.curvature(story),
        *([sections.sharpness(story)] if "sam_relative" in story.rows[0] else []),
        *landscape_sections.sections(story),
        sections.lines(story),
        sections.distribution(story),
        sections.roughness(story),
        sections.correlation(story),
        sections.table(story),
        Section("How these numbers were made", [methods.terms(story), Files([numbers.name, f"{numbers.stem}.json"])]),
    ]
    kicker = f"Modular addition, p = {story.config['p']}, seed {story.config['seed']}"
    write(page, render(told.title(story), kicker, told.lede(story), _strip(story), body).encode())
    return page


def _strip(story: Story) -> list[Fact]:
    best = float(np.nanmax(story.array("curve_test_accuracy")))
    never = Fact("Generalised", "never", f"{told.no_generalisation(story)}; best test accuracy {best:.3f}")
    reached = Fact("Generalised", f"step {story.generalised or 0:,}", f"test accuracy passed {told.GENERAL:g}")
    num = len(story.rows)
    return [
        _memorised(story),
        never if story.generalised is None else reached,
        _fallen(story),
        Fact(
            "Sampling",
            f"{story.settings['n_samples']} directions",
            f"at {num} checkpoints, span ±{story.settings['span']:g}",
        ),
    ]


def _memorised(story: Story) -> Fact:
    if story.memorised is None:
        best = float(np.nanmax(story.array("curve_train_accuracy")))
        return Fact(
            "Memorised", "never", f"train accuracy below 1 within {story.config['steps']:,} steps, best {best:.3f}"
        )
    return Fact("Memorised", f"step {story.memorised:,}", "train accuracy reached 1")


def _fallen(story: Story) -> Fact:
    ratio, stderr = told.curvature_ratio(story)
    if story.reference is None or math.isnan(ratio):
        detail = "at the end, in nats per relative step²"
        return Fact("Mean curvature", told.curvature_at(story, -1), detail)
    way = "lower" if ratio > 1 else "higher"
    size, error = (ratio, stderr) if ratio > 1 else (1 / ratio, stderr / ratio**2)
    step = story.rows[story.reference]["step"]
    return Fact("Mean curvature", f"{number(size)}× {way}", f"± {number(error, 2)}; from step {step:,} to the end")
