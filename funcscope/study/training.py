"""Trains a variant of a family into its folder of a run, or goes on, or reuses what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..core.store import load, save
from ..families.family import Family, Setup
from .runs import Variant, begin


def trained(family: Family, setup: Setup, out: Path, *, name: str = "", quiet: bool = False) -> Variant:
    """The variant's folder under `out`, with all its checkpoints and its curves. name: of the variant, as pages show it.

    An interrupted call loses at most the steps since the last checkpoint; the next one goes on from there with the same bits.
    Raises ValueError where the folder belongs to another configuration.
    """
    config = setup.config
    folder = getattr(config, "name", None) or f"{family.name}-{_digest(config)}"
    variant = begin(out / folder, family.name, name or folder, asdict(config))
    points = []
    with tqdm(total=max(setup.checkpoints), desc="training", unit="step", disable=quiet, dynamic_ncols=True) as bar:
        for point in family.train(config, variant.path, setup.checkpoints):
            points.append(point)
            bar.set_postfix_str(f"test accuracy {point.test_accuracy:.3f}", refresh=False)
            bar.update(point.step - bar.n)
    _keep_curves(variant, points)
    return variant


def _digest(config: Any) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:8]


def _keep_curves(variant: Variant, points: Sequence) -> None:
    columns = {name: np.array([getattr(point, name) for point in points]) for name in points[0]._fields}
    path = variant.path / "curves.npz"
    if not path.is_file() or len(load(path).arrays["step"]) != len(points):
        save(path, columns, {"settings": variant.head}, copy=False)
