"""How many points or sequences a metric has in memory at a time, so that they fit.

One forward pass and one graph, each of the largest batch, say what the model takes; what a metric takes are multiples of
these, measured of GPT-2 and Llama models. No number depends on the choice beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.batches import num_rows
from ..core.held import peak_bytes
from ..core.objective import Loss
from ..curvature.blocks import block_views
from ..landscape.directional import plan_of
from ..landscape.evaluator import points_at_once
from .memory_plan import GIB, graph_bytes, largest
from .metric import Metric

_KNOWN: WeakKeyDictionary[Loss, int] = WeakKeyDictionary()
CHUNKS = ("chunk", "chunk_size")
LITTLE = 0.1
"""Of what is beside a chunk."""


class Need(NamedTuple):
    """Memory as multiples of vectors as long as theta, of the peak of a forward pass, of a graph, and of larger things."""

    thetas: float = 0
    forwards: float = 0
    graphs: float = 0
    every: float = 0
    """Of the graphs of all batches."""
    pairs: float = 0
    """Of matrices with a number for every two sequences and every block of parameters, in float64."""


class Chunked(NamedTuple):
    """What a metric takes for each of a chunk, and beside them."""

    each: Need
    beside: Need
    points: Callable[[Loss], int] | None = None
    """How many points it has at a time by itself; None where sequences are what it has at a time."""
    num: str = ""
    """The setting that says how many points there are, where it may be fewer."""


def _flat(loss: Loss) -> int:
    return 1 if plan_of(loss, None, None).lazy else points_at_once(loss)


def _directions(loss: Loss) -> int:
    return plan_of(loss, None, None).chunk


VALUES = Chunked(Need(2, 2), Need(3, 2), points_at_once)
NORMS = Chunked(Need(graphs=1.8), Need(3))
GRAMS = Chunked(Need(graphs=2.8), Need(3))
NOISE = GRAMS._replace(beside=Need(3, pairs=9))
CHUNKED = {
    **dict.fromkeys(("loss_landscape_2d", "loss_lines", "trajectory_plane", "linear_path"), VALUES),
    "gradient_norms": NORMS,
    "landscape_flatness": VALUES._replace(points=_flat, num="n_directions"),
    "bezier_connection": Chunked(Need(2, graphs=7), Need(10), points_at_once),
    "directional_losses": Chunked(Need(2, 8), Need(every=3), _directions, "n_samples"),
    "gradient_noise": NOISE,
    **dict.fromkeys(
        (
            "gradient_alignment",
            "gradient_aggregation",
            "cross_task_conflicts",
            "task_interference",
            "modularity_score",
            "separability",
        ),
        GRAMS,
    ),
}
"""By metric. Of the others, chunks stay as they are until memory runs out."""


class ChunkPlan(NamedTuple):
    """How many at a time, and why."""

    name: str
    chunk: int
    gib: float
    """That they are expected to take."""
    why: str


def chunk_plan(one: Metric, losses: Sequence[Loss], theta: Tensor, gib: float | int) -> ChunkPlan | None:
    """The largest chunk that fits into so much memory, up to the metric's own; None where that one does, or is asked for.

    Where what is beside them is too much by itself: one that adds little to it, as the smallest may take long.
    """
    name = next((each for each in CHUNKS if each in one.plan and each not in one.asked), None)
    if name is None or one.name not in CHUNKED or not losses:
        return None
    usual = _usual(one, one.plan[name], losses)
    each, beside = _each_and_beside(one, losses, theta)
    if usual == 1 or beside + usual * each <= gib:
        return None
    chunk = max(1, min(usual, int(max(gib - beside, LITTLE * beside if beside > gib else 0.0) / each)))
    need = beside + chunk * each
    verdict = "too much, but the least that is tried" if need > gib else "this fits"
    said = f"{usual} at a time would take {beside + usual * each:.2g} GiB. " if chunk < usual else ""
    return ChunkPlan(
        name, chunk, need, f"{said}{chunk} at a time {'takes' if chunk == 1 else 'take'} {need:.2g} GiB: {verdict}."
    )


def expected_gib(one: Metric, losses: Sequence[Loss], theta: Tensor, chunk: int) -> float:
    """What a metric is expected to take with so many at a time."""
    each, beside = _each_and_beside(one, losses, theta)
    return beside + min(chunk, _usual(one, chunk, losses)) * each


def forward_bytes(loss: Loss, theta: Tensor) -> int:
    """What a forward pass over the largest batch holds at its peak, without derivatives."""
    if loss not in _KNOWN:
        with torch.no_grad():
            _KNOWN[loss] = peak_bytes(lambda: largest(loss)(theta))
    return _KNOWN[loss]


def _usual(one: Metric, given: int | None, losses: Sequence[Loss]) -> int:
    """As many as the metric has at a time by itself."""
    chunked = CHUNKED[one.name]
    if chunked.points is not None:
        chunk = given or max(map(chunked.points, losses))
        return min(chunk, one.settings[chunked.num]) if chunked.num else chunk
    return min(given or 1, max(sum(map(num_rows, loss.batches)) for loss in losses))


def _each_and_beside(one: Metric, losses: Sequence[Loss], theta: Tensor) -> tuple[float, float]:
    """GiB for each of a chunk, and beside them."""
    each, beside = (max(_bytes(need, one, loss, theta) for loss in losses) / GIB for need in CHUNKED[one.name][:2])
    return each, beside


def _bytes(need: Need, one: Metric, loss: Loss, theta: Tensor) -> float:
    graph = graph_bytes(loss, theta) if need.graphs or need.every else 0
    forward = forward_bytes(loss, theta) if need.forwards else 0
    share = 1 if CHUNKED[one.name].points is not None else num_rows(largest(loss).batches[0])
    total = need.thetas * theta.nbytes + need.forwards * forward + need.graphs * graph / share
    total += need.every * graph * len(loss.batches)
    if need.pairs:
        blocks = len(block_views(loss.layout, one.settings["by"])) + 1  # and all of them together
        total += need.pairs * blocks * 8 * sum(map(num_rows, loss.batches)) ** 2
    return float(total)
