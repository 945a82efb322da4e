"""What the losses on a path, or on the paths between many models, say about the barriers there."""

from __future__ import annotations

import math
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.estimate import Estimate
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import Means, means
from ..core.tables import counted
from .states import USED
from .terms import Measured, by_ending, estimate

PAIR = ("model", "other")


class LossPath(Measured, Result):
    r"""Losses at equally spaced points of a path; made by `linear_path` and `bezier_path`, which have the formulas.

    `sums` are float64 on the CPU: per point and sequence, the weighted sum of the token losses, non-finite ones
    included. Everything else is computed from them. A loss of infinity makes the barriers infinite, with an error of
    nan; nan is no loss that could be compared, and is left out of the maxima. An error is nan for a single sequence.
    The order of the barriers: proofs/barrier.py.
    """

    kind: Literal["line", "bezier"]
    sums: Float[Tensor, "n s"] = internal()
    weights: Float[Tensor, " s"] = internal()
    distance: float = quantity("distance of the ends")
    """||end - start||, also where the path is no straight line."""
    unit_roundoff: float = internal()
    chunk: int
    num_forwards: int
    """Passes over the batches; less than the number of points where the end points were known."""
    buffers: Literal["none", "interpolate", "reestimate", "fixed"] = "none"
    """Which running statistics the net has on the way; "none" where it tracks none."""
    start_reestimated: Float[Tensor, " s"] | None = internal(default=None)
    """The sums at an end with statistics re-estimated, where they are its own there and re-estimated beside it."""
    end_reestimated: Float[Tensor, " s"] | None = internal(default=None)
    metric_names: tuple[str, ...] = internal(default=())
    metric_sums: tuple[Float[Tensor, "n s"], ...] = internal(default=())
    """Of what was measured beside the loss, as `sums`."""

    coefficients = derived("position t on the path", per="t", shown=False)(lambda self: _positions(len(self.sums)))
    losses = derived("loss", unit="loss", per="t", stderr="stderr", shown=False)(attrgetter("_losses.value"))
    stderr = derived("standard error of the loss", unit="loss", per="t", shown=False)(attrgetter("_losses.stderr"))
    """Neighbours share their sequences, so that their differences are known far better."""
    excess = derived("loss over the chord", unit="loss", per="t", stderr="excess_stderr", shown=False)(
        attrgetter("_excess.value")
    )
    """Loss minus the chord (1 - t) L_0 + t L_1; exactly 0 at the ends."""
    excess_stderr = derived("standard error of the loss over the chord", unit="loss", per="t", shown=False)(
        attrgetter("_excess.stderr")
    )
    argmax = derived("index of the largest loss over the chord", shown=False)(lambda self: _argmax(self.excess))
    """Where `barrier_linear` is reached; the first of several."""
    argmax_loss = derived("index of the largest loss", shown=False)(lambda self: _argmax(self.losses))
    """Where `barrier_max` is reached; the first of several."""
    argmax_t = derived("position t of the largest loss over the chord")(
        lambda self: float(self.coefficients[self.argmax])
    )
    argmax_loss_t = derived("position t of the largest loss")(lambda self: float(self.coefficients[self.argmax_loss]))
    loss_start = derived("loss at the start", unit="loss")(lambda self: self.mean(self.sums[0]))
    loss_end = derived("loss at the end", unit="loss")(lambda self: self.mean(self.sums[-1]))
    loss_max = derived("largest loss", unit="loss")(lambda self: self.mean(self.sums[self.argmax_loss]))
    _metrics = derived("metric", per="t", name="*", stderr="_metric_errors", shown=False)(Measured.documented)
    _metric_errors = property(Measured.documented_errors)

    @derived("barrier over the higher end", unit="loss")
    def barrier_max(self) -> Estimate:
        """The highest loss over the higher end point; over the first one, where they are equal."""
        return self.mean(self.barrier_sums[0])

    @derived("barrier over the chord", unit="loss")
    def barrier_linear(self) -> Estimate:
        return self.mean(self.barrier_sums[1])

    @cached_property
    def barrier_sums(self) -> Float[Tensor, "2 s"]:
        """Per sequence, what `barrier_max` and `barrier_linear` are the means of."""
        higher = 0 if self.losses[0] >= self.losses[-1] else -1
        return torch.stack([self.sums[self.argmax_loss] - self.sums[higher], self.over_chord(self.sums)[self.argmax]])

    @property
    def metric_barrier_sums(self) -> tuple[Float[Tensor, "2 s"], ...]:
        """Of every metric, what its mean at `argmax` and its excess there are the means of."""
        return tuple(torch.stack([each[self.argmax], self.over_chord(each)[self.argmax]]) for each in self.metric_sums)

    @derived("curvature at the largest loss over the chord", unit="loss per t^2")
    def curvature(self) -> Estimate:
        """Second difference in t at `argmax` over the square of the spacing; nan where that is an end point."""
        at = self.argmax
        if at == 0:  # never the other end: its excess is 0, too, and the first counts
            return self.mean(torch.full_like(self.sums[0], torch.nan))
        second = self.sums[at - 1] - 2 * self.sums[at] + self.sums[at + 1]
        return self.mean(second * (len(self.sums) - 1) ** 2)

    @derived("curvature per square of the distance", unit="loss per distance^2")
    def curvature_per_distance(self) -> float:
        """nan for a curve, whose speed varies, and at distance 0."""
        straight = self.kind == "line" and self.distance > 0
        return float(self.curvature.value) / self.distance**2 if straight else math.nan

    @derived("total variation", unit="loss")
    def total_variation(self) -> float:
        """Sum of |dL| from point to point: noise and a finer grid make it larger."""
        return float(self.losses.diff().abs().sum())

    @derived("change at the start by re-estimated statistics", unit="loss")
    def start_reestimation(self) -> Estimate | None:
        """By how much the loss at the start changes where its running statistics are re-estimated from the data."""
        return None if self.start_reestimated is None else self.mean(self.start_reestimated - self.sums[0])

    @derived("change at the end by re-estimated statistics", unit="loss")
    def end_reestimation(self) -> Estimate | None:
        return None if self.end_reestimated is None else self.mean(self.end_reestimated - self.sums[-1])

    @derived("points whose loss is infinite or nan", unit="points")
    def n_nonfinite(self) -> int:
        return int((~self.losses.isfinite()).sum())

    @property
    def is_connected(self) -> bool | None:
        """`connected` at 2 standard errors."""
        return self.connected()

    def connected(self, tolerance: float = 2.0) -> bool | None:
        r"""Whether `barrier_linear` is at most `tolerance` of its standard errors, or of the size of rounding.

        $B \le 0$ is no test: the maximum is never below 0, and noise alone puts it above. True means that these
        sequences show no barrier at these points, not that there is none: few sequences see little. False is shown too
        often where the path is flat, as the largest of all points is tested. Rounding is taken as $4 u \max|L|$.
        None where it cannot be said: a loss of nan on a path that shows no barrier elsewhere, or a barrier of a single
        sequence, which has no error.
        """
        value, stderr = float(self.barrier_linear.value), float(self.barrier_linear.stderr)
        finite = self.losses[self.losses.isfinite()]
        rounding = 4 * self.unit_roundoff * float(finite.abs().max())
        small = value <= rounding or value <= tolerance * stderr
        if not small and math.isnan(stderr):
            return False if math.isinf(value) else None
        return None if small and bool(self.losses.isnan().any()) else small

    def mean(self, sums: Float[Tensor, " s"]) -> Estimate:
        """The mean over tokens of per-sequence sums, such as differences between points, with its paired error."""
        return estimate(sums, self.weights)

    @cached_property
    def _losses(self) -> Means:
        return means(self.sums, self.weights)

    @cached_property
    def _beside(self) -> dict[str, dict[str, Tensor]]:
        known = dict(zip(self.metric_names, self.metric_sums, strict=True))
        over = {name: means(self.over_chord(sums), self.weights) for name, sums in known.items()}
        return by_ending({name: means(sums, self.weights) for name, sums in known.items()}) | by_ending(over, "_excess")

    def over_chord(self, sums: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
        """Less the chord, from its nearer end: exact where the ends are equal, the same from either side."""
        t, first, last = self.coefficients[:, None], sums[0], sums[-1]
        from_start = t < t.flip(0)
        near, far = torch.where(from_start, first, last), torch.where(from_start, last, first)
        chord = near + torch.minimum(t, t.flip(0)) * (far - near)
        return sums - torch.where(t == t.flip(0), (first + last) / 2, chord)

    @cached_property
    def _excess(self) -> Means:
        return means(self.over_chord(self.sums), self.weights)

    def asdict(self) -> dict[str, Any]:
        """As of every result; `is_connected` is None where that cannot be said."""
        return super().asdict() | {"is_connected": self.is_connected}

    @property
    def head(self) -> str:
        verdict = {True: "no barrier seen", False: "a barrier over the chord", None: "undecided"}[self.is_connected]
        lost = f", {counted(self.n_nonfinite, 'loss', 'losses')} not finite" if self.n_nonfinite else ""
        return f"{self.kind}: {len(self.sums)} points, end points {self.distance:.4g} apart{lost}; {verdict}"

    @property
    def notes(self) -> list[str]:
        said = {
            "barrier_max": "The largest loss is at an end: there is no barrier over the higher end, and no error of one.",
            "barrier_linear": "No loss lies over the chord: there is no barrier over it, no error of one and no curvature.",
        }
        return [*USED[self.buffers], *(note for name, note in said.items() if name in self.texts)]

    @property
    def coords(self) -> dict[str, list[float]]:
        return {"t": self.coefficients.tolist()}

    @property
    def axis_titles(self) -> dict[str, str]:
        return {"t": "position on the path"}

    @property
    def texts(self) -> dict[str, str]:
        """Barriers of 0, which have no error: the largest loss is at an end, or none lies over the chord."""
        known = {"barrier_max": self.argmax_loss in (0, len(self.sums) - 1), "barrier_linear": self.argmax == 0}
        return {name: "0" for name, at_an_end in known.items() if at_an_end and float(getattr(self, name).value) == 0}


class BarrierMatrix(Measured, Result):
    """Barriers between every two of M models; made by `barrier_matrix`.

    Arrays of shape (M, M) are float64 on the CPU, symmetric, with a diagonal of 0. Infinite where a path has an infinite
    loss. `metrics` and `metrics_excess` have what was measured beside the loss, and that less its chord, by name, where
    `barrier_linear` is reached; on the diagonal, the models' own. The errors of the
    means hold for the points where the maxima were found, and for these models: over sequences, paired across all paths.
    """

    names: tuple[str, ...]
    barrier_max: Float[Tensor, "m m"] = quantity(
        "barrier over the higher end", unit="loss", per=PAIR, stderr="barrier_max_stderr", shown=False
    )
    barrier_max_stderr: Float[Tensor, "m m"] = quantity("its standard error", unit="loss", per=PAIR, shown=False)
    barrier_linear: Float[Tensor, "m m"] = quantity(
        "barrier over the chord", unit="loss", per=PAIR, stderr="barrier_linear_stderr"
    )
    barrier_linear_stderr: Float[Tensor, "m m"] = quantity("its standard error", unit="loss", per=PAIR, shown=False)
    distance: Float[Tensor, "m m"] = quantity("distance of the models", per=PAIR, shown=False)
    mean_barrier_max: Estimate = quantity("mean barrier over the higher end", unit="loss")
    mean_barrier_linear: Estimate = quantity("mean barrier over the chord", unit="loss")
    """Over the pairs of different models; the diagonal is no barrier."""
    num: int
    nonfinite: Int[Tensor, "m m"] = quantity("losses not finite", unit="points", per=PAIR, shown=False)
    """On each pair's path. Those of nan are left out of the maxima; a pair that shows no barrier
    beside them has barriers of nan, and then so have the means."""
    num_forwards: int
    measured: dict[str, dict[str, Tensor]] = internal()
    """By ending and name, as `_beside`."""
    buffers: Literal["none", "interpolate", "reestimate", "fixed"] = "none"
    """Which running statistics the net has on the paths; "none" where it tracks none."""

    _metrics = derived("metric", per=PAIR, name="*", stderr="_metric_errors", shown=False)(Measured.documented)
    _metric_errors = property(Measured.documented_errors)

    @cached_property
    def _beside(self) -> dict[str, dict[str, Tensor]]:
        return self.measured

    @derived("losses on all paths that are not finite", unit="points")
    def n_nonfinite(self) -> int:
        return int(self.nonfinite.triu().sum())

    @property
    def head(self) -> str:
        return f"barriers between {counted(len(self.names), 'model')}, {counted(self.num, 'point')} a path"

    @property
    def notes(self) -> list[str]:
        return USED[self.buffers]

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(PAIR, self.names)


def _positions(num: int) -> Float[Tensor, " n"]:
    return torch.arange(num, dtype=torch.float64) / (num - 1)


def _argmax(x: Tensor) -> int:
    return int(np.argmax(torch.where(x.isnan(), -torch.inf, x).numpy()))  # numpy's is the first of several
