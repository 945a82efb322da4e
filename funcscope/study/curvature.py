"""A user's own model, from its folder and a file of texts: the spectrum of its curvature, block by block, and sharpness."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from tqdm import tqdm

from ..core.checks import check_choice, check_count, check_positive
from ..core.keys import key
from ..core.progress import Kind, watched
from ..core.store import save, to_json
from ..curvature.summary import Matrix
from ..linalg.summary import SpectrumSummary
from .curvature_stages import STAGES, Settings, Work, check_vectors, expected
from .inputs import Data
from .opening import Opened, check_data, counts, free_stem, names_of, open_model
from .pace import Pace, pace_of
from .record import versions
from .spectrum import Part, summary_of
from .unfinished import files_of, remove, reusable, unfinished

LENGTH = 64
"""Tokens of a text that are kept unless another number is asked for: a product costs several passes over all of them."""


class Study(NamedTuple):
    """What `run` has made."""

    numbers: Path
    summary: SpectrumSummary
    meta: dict[str, Any]
    data: Data


def run(settings: Settings, model: str | Path, out: Path, *, quiet: bool = False) -> Study:
    """Look at the curvature of one model, and write the numbers to `out` as `.npz` and `.json`.

    An interrupted call keeps the stages that it has finished (`curvature_stages.STAGES`); the same command goes on from
    there.

    Raises ValueError or OSError in one line for whatever does not fit together, linalg.NonFinite for a product that is
    not finite.
    """
    _check(settings)
    started = time.perf_counter()
    folder = Path(model)
    opened = open_model(settings, folder, length=LENGTH)
    name = names_of([folder])[0]
    stem = free_stem(out, f"{name}-curvature", [folder])
    loss = opened.loss
    theta = loss.net.theta
    baseline, pace = _baseline(opened, theta), pace_of(loss, theta)
    with _Progress(settings, len(set(loss.layout.group_of(settings.by).values())), pace, quiet) as bar:
        work = Work(settings, loss, theta, key(settings.seed), bar.tick)
        check_vectors(work)
        wanted = to_json(
            {
                "settings": asdict(settings),
                "files": files_of(folder, Path(settings.data)),
                "versions": versions(),
                "baseline": baseline,
            }
        )
        parts, costs = _made(work, bar, lambda stage: unfinished(out, stem, stage), wanted)
    told = {stage: values for stage, (_, values) in parts.items()}
    arrays = {name: x for found, _ in parts.values() for name, x in found.items()}
    summary = summary_of(arrays, told, work.key)
    scalars = {name: value for name, value in summary.asdict().items() if isinstance(value, (bool, int, float))}
    described = {"name": name, **opened.described, "values": {"baseline_loss": baseline, **scalars}}
    meta = to_json(
        {
            "kind": "curvature",
            "settings": asdict(settings),
            "key": {"bits": f"{work.key.bits:032x}", "seed": settings.seed},
            "models": [described],
            "stages": told,
            "data": counts(settings, opened.data, opened.described["task"]),
            "cost": {"forward_seconds": pace.seconds, "stages": costs, "param_norm": float(theta.double().norm())},
            "seconds": time.perf_counter() - started,
            "versions": versions(),
        }
    )
    numbers = out / f"{stem}.npz"
    save(numbers, arrays, meta)
    for stage in STAGES:
        remove(unfinished(out, stem, stage))
    return Study(numbers, summary, meta, opened.data)


def _check(settings: Settings) -> None:
    """What can be said before a model is loaded; the rest is checked where it is used."""
    check_choice("matrix", settings.matrix, get_args(Matrix))
    check_choice("by", settings.by, ("layer", "module", "tensor"))
    least = {"num": 1, "probes": 1, "steps": 1, "trace_products": 2, "block_products": 1}
    for name, smallest in least.items():
        check_count(name, getattr(settings, name), smallest)
    for name in ("tol", "epsilon", "memory"):
        check_positive(name, getattr(settings, name))
    check_data(settings)
    if settings.attention == "keep":
        raise ValueError(
            "fused attention has no second derivative: the curvature needs `attention` 'eager' or 'math'; from Python, "
            "`fs.hessian_difference` makes single products from gradients, at two steps that must agree."
        )


def _made(
    work: Work, bar: _Progress, path: Callable[[str], Path], wanted: dict[str, Any]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """Every stage, from disk where an earlier call has finished it; and what each has cost."""
    parts: dict[str, Part] = {}
    costs: dict[str, Any] = {}
    tolerance = max(1e-6, work.loss.net.unit_roundoff)
    for stage in bar.expected:
        stored = reusable(path(stage), wanted, tolerance)
        bar.begin(stage)
        if stored is None:
            seconds, (arrays, told) = _timed(lambda stage=stage: STAGES[stage](work, parts))
            cost = {"seconds": seconds, "products": bar.ticks}
            parts[stage] = arrays, to_json(told)
            save(path(stage), arrays, {**wanted, "told": told, "cost": cost})
        else:
            parts[stage], cost = (stored.arrays, stored.meta["told"]), stored.meta["cost"]
        costs[stage] = cost
        bar.finish(stage)
    return parts, costs


class _Progress:
    """A bar of products: how many there will be is guessed where it depends on the spectrum, and corrected as it goes."""

    def __init__(self, settings: Settings, num_blocks: int, pace: Pace, quiet: bool):
        self.expected = expected(settings, num_blocks)
        self.ticks, self.passes, self.stage = 0, 0, ""
        num = sum(self.expected.values())
        self.bar = tqdm(total=num, unit="product", disable=quiet, dynamic_ncols=True)
        if not quiet:
            lines = [pace.estimate(num, "products", 6 if settings.keep else 10), pace.note]
            self.bar.write("\n".join(filter(None, lines)), file=sys.stderr)
        self.watch = ExitStack()

    def __enter__(self) -> _Progress:
        self.watch.enter_context(watched(self._passed))
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.close()
        self.bar.close()

    def _passed(self, kind: Kind) -> None:
        """Forward passes beside the products: what the last stage, which has no products, shows."""
        self.passes += kind == "forward"
        self.bar.set_postfix(forwards=self.passes, refresh=False)
        self.bar.update(0)

    def begin(self, stage: str) -> None:
        self.ticks, self.stage = 0, stage
        self.bar.set_description(stage.replace("_", " "))

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks > self.expected[self.stage]:
            self.expected[self.stage] = self.ticks
            self.bar.total = sum(self.expected.values())
        self.bar.update()

    def finish(self, stage: str) -> None:
        """The rest of what was expected is not to come."""
        self.expected[stage] = self.ticks
        self.bar.total = sum(self.expected.values())
        self.bar.refresh()


def _baseline(opened: Opened, theta: torch.Tensor) -> float:
    with torch.no_grad():
        found = float(opened.loss(theta))
    if not math.isfinite(found):
        raise ValueError(
            f"the loss at the weights is {found}: it has no curvature. Look at the weights and the texts, or compute in a "
            "wider dtype with `compute_dtype`."
        )
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found
