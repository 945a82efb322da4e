"""What the losses on a path, or on the paths between many models, say about the barriers there."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from tabulate import tabulate
from torch import Tensor

from ..core.estimate import Estimate
from ..core.standard_errors import Means, means
from .states import USED


@dataclass(frozen=True, eq=False, repr=False)
class LossPath:
    r"""Losses at equally spaced points of a path; made by `linear_path` and `bezier_path`, which have the formulas.

    `sums` are float64 on the CPU: per point and sequence, the weighted sum of the token losses, non-finite ones
    included. Everything else is computed from them. A loss of infinity makes the barriers infinite, with an error of
    nan; nan is no loss that could be compared, and is left out of the maxima. An error is nan for a single sequence.
    The order of the barriers: proofs/barrier.py.
    """

    kind: Literal["line", "bezier"]
    sums: Float[Tensor, "n s"]
    weights: Float[Tensor, " s"]
    distance: float
    """||end - start||, also where the path is no straight line."""
    unit_roundoff: float
    chunk: int
    num_forwards: int
    """Passes over the batches; less than the number of points where the end points were known."""
    buffers: Literal["none", "interpolate", "reestimate", "fixed"] = "none"
    """Which running statistics the net has on the way; "none" where it tracks none."""
    start_reestimated: Float[Tensor, " s"] | None = None
    """The sums at an end with statistics re-estimated, where they are its own there and re-estimated beside it."""
    end_reestimated: Float[Tensor, " s"] | None = None

    @property
    def coefficients(self) -> Float[Tensor, " n"]:
        """t, from 0 to 1."""
        return torch.arange(len(self.sums), dtype=torch.float64) / (len(self.sums) - 1)

    @property
    def losses(self) -> Float[Tensor, " n"]:
        return self._losses.value

    @property
    def stderr(self) -> Float[Tensor, " n"]:
        """Of each loss; neighbours share their sequences, so that their differences are known far better."""
        return self._losses.stderr

    @property
    def excess(self) -> Float[Tensor, " n"]:
        """Loss minus the chord (1 - t) L_0 + t L_1; exactly 0 at the ends."""
        return self._excess.value

    @property
    def excess_stderr(self) -> Float[Tensor, " n"]:
        return self._excess.stderr

    @property
    def argmax(self) -> int:
        """The index of the point with the largest excess, where `barrier_linear` is reached; the first of several."""
        return _argmax(self.excess)

    @property
    def argmax_loss(self) -> int:
        """The index of the point with the largest loss, where `barrier_max` is reached; the first of several."""
        return _argmax(self.losses)

    @property
    def barrier_max(self) -> Estimate:
        """The highest loss over the higher end point; over the first one, where they are equal."""
        return self.mean(self.barrier_sums[0])

    @property
    def barrier_linear(self) -> Estimate:
        """The largest excess over the chord."""
        return self.mean(self.barrier_sums[1])

    @property
    def barrier_sums(self) -> Float[Tensor, "2 s"]:
        """Per sequence, what `barrier_max` and `barrier_linear` are the means of."""
        higher = 0 if self.losses[0] >= self.losses[-1] else -1
        return torch.stack([self.sums[self.argmax_loss] - self.sums[higher], self._excess_sums[self.argmax]])

    @property
    def curvature(self) -> Estimate:
        """Second difference in t at `argmax` over the square of the spacing; nan where that is an end point."""
        at = self.argmax
        if at == 0:  # never the other end: its excess is 0, too, and the first counts
            return self.mean(torch.full_like(self.sums[0], torch.nan))
        second = self.sums[at - 1] - 2 * self.sums[at] + self.sums[at + 1]
        return self.mean(second * (len(self.sums) - 1) ** 2)

    @property
    def curvature_per_distance(self) -> float:
        """Curvature per square of the distance travelled; nan for a curve, whose speed varies, and at distance 0."""
        straight = self.kind == "line" and self.distance > 0
        return float(self.curvature.value) / self.distance**2 if straight else math.nan

    @property
    def total_variation(self) -> float:
        """Sum of |dL| from point to point: noise and a finer grid make it larger."""
        return float(self.losses.diff().abs().sum())

    @property
    def start_reestimation(self) -> Estimate | None:
        """By how much the loss at the start changes where its running statistics are re-estimated from the data."""
        return None if self.start_reestimated is None else self.mean(self.start_reestimated - self.sums[0])

    @property
    def end_reestimation(self) -> Estimate | None:
        return None if self.end_reestimated is None else self.mean(self.end_reestimated - self.sums[-1])

    @property
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
        value, stderr = means(sums[None], self.weights)
        return Estimate(value[0], stderr[0], int((self.weights != 0).sum()))

    @cached_property
    def _losses(self) -> Means:
        return means(self.sums, self.weights)

    @cached_property
    def _excess_sums(self) -> Tensor:
        """Less the chord, from its nearer end: exact where the ends are equal, the same from either side."""
        t, first, last = self.coefficients[:, None], self.sums[0], self.sums[-1]
        left = t < t.flip(0)
        near, far = torch.where(left, first, last), torch.where(left, last, first)
        chord = near + torch.minimum(t, t.flip(0)) * (far - near)
        return self.sums - torch.where(t == t.flip(0), (first + last) / 2, chord)

    @cached_property
    def _excess(self) -> Means:
        return means(self._excess_sums, self.weights)

    def asdict(self) -> dict[str, Any]:
        """Plain numbers, a string and numpy arrays; `is_connected` is None where that cannot be said."""
        arrays = ("coefficients", "losses", "stderr", "excess", "excess_stderr")
        values: dict[str, Any] = {name: getattr(self, name).numpy() for name in arrays}
        for name in ("barrier_max", "barrier_linear", "curvature"):
            values |= {name: float(getattr(self, name).value), f"{name}_stderr": float(getattr(self, name).stderr)}
        plain = ("argmax", "argmax_loss", "curvature_per_distance", "total_variation", "distance", "n_nonfinite")
        for name in ("start_reestimation", "end_reestimation"):
            if (change := getattr(self, name)) is not None:
                values |= {name: float(change.value), f"{name}_stderr": float(change.stderr)}
        return values | {
            name: getattr(self, name) for name in (*plain, "is_connected", "chunk", "num_forwards", "kind", "buffers")
        }

    def __str__(self) -> str:
        return f"{self._head()}\n{tabulate(self._rows(), headers=('', 'value', 'stderr', 't'), disable_numparse=True)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        rows = tabulate(self._rows(), headers=("", "value", "stderr", "t"), tablefmt="html", disable_numparse=True)
        return f"<p>{html.escape(self._head())}</p>\n{rows}"

    def _head(self) -> str:
        said = {True: "no barrier seen", False: "a barrier", None: "undecided"}[self.is_connected]
        lost = f", {self.n_nonfinite} losses not finite" if self.n_nonfinite else ""
        head = f"{self.kind}: {len(self.sums)} points, end points {self.distance:.4g} apart{lost}"
        return f"{head}{USED[self.buffers]}; {said}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        last, t = len(self.sums) - 1, self.coefficients.tolist()
        points = {"loss at start": 0, "loss at end": last, "largest loss": self.argmax_loss}
        rows = [(name, self.mean(self.sums[at]), t[at]) for name, at in points.items()]
        for name, change, at in (("start", self.start_reestimation, 0), ("end", self.end_reestimation, last)):
            rows += [] if change is None else [(f"re-estimation at {name}", change, t[at])]
        rows += [("barrier_max", self.barrier_max, t[self.argmax_loss])]
        rows += [("barrier_linear", self.barrier_linear, t[self.argmax]), ("curvature", self.curvature, t[self.argmax])]
        return [(name, f"{float(e.value):.5g}", f"{float(e.stderr):.2g}", f"{at:.3g}") for name, e, at in rows]


@dataclass(frozen=True, eq=False, repr=False)
class BarrierMatrix:
    """Barriers between every two of M models; made by `barrier_matrix`.

    Arrays of shape (M, M) are float64 on the CPU, symmetric, with a diagonal of 0. Infinite where a path has an infinite
    loss. The errors of the means hold for the points where the maxima were found, and for these models: over sequences,
    paired across all paths.
    """

    names: tuple[str, ...]
    barrier_max: Float[Tensor, "m m"]
    barrier_max_stderr: Float[Tensor, "m m"]
    barrier_linear: Float[Tensor, "m m"]
    barrier_linear_stderr: Float[Tensor, "m m"]
    distance: Float[Tensor, "m m"]
    mean_barrier_max: Estimate
    mean_barrier_linear: Estimate
    """Over the pairs of different models; the diagonal is no barrier."""
    num: int
    nonfinite: Int[Tensor, "m m"]
    """Losses of each pair's path that are not finite. Those of nan are left out of the maxima; a pair that shows no barrier
    beside them has barriers of nan, and then so have the means."""
    num_forwards: int
    buffers: Literal["none", "interpolate", "reestimate", "fixed"] = "none"
    """Which running statistics the net has on the paths; "none" where it tracks none."""

    @property
    def n_nonfinite(self) -> int:
        """Losses on all paths that are not finite."""
        return int(self.nonfinite.triu().sum())

    def asdict(self) -> dict[str, Any]:
        """Plain numbers, the names, and numpy arrays."""
        values: dict[str, Any] = {"names": self.names}
        for name in ("barrier_max", "barrier_linear"):
            values |= {name: getattr(self, name).numpy(), f"{name}_stderr": getattr(self, f"{name}_stderr").numpy()}
            mean = getattr(self, f"mean_{name}")
            values |= {f"mean_{name}": float(mean.value), f"mean_{name}_stderr": float(mean.stderr)}
        values |= {"distance": self.distance.numpy(), "nonfinite": self.nonfinite.numpy()}
        return values | {name: getattr(self, name) for name in ("num", "n_nonfinite", "num_forwards", "buffers")}

    def __str__(self) -> str:
        return f"{self._head()}\n{tabulate(self._rows(), headers=('', *self.names), disable_numparse=True)}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        rows = tabulate(self._rows(), headers=("", *self.names), tablefmt="html", disable_numparse=True)
        return f"<p>{html.escape(self._head())}</p>\n{rows}"

    def _head(self) -> str:
        lost = f"; {self.n_nonfinite} losses not finite" if self.n_nonfinite else ""
        return (
            f"barrier_linear between {len(self.names)} models, {self.num} points a path: "
            f"mean {self.mean_barrier_linear}; barrier_max: mean {self.mean_barrier_max}{lost}{USED[self.buffers]}"
        )

    def _rows(self) -> list[list[str]]:
        pairs = zip(self.names, self.barrier_linear.tolist(), self.barrier_linear_stderr.tolist(), strict=True)
        return [[name, *(f"{b:.3g} ± {e:.2g}" for b, e in zip(bs, es, strict=True))] for name, bs, es in pairs]


def _argmax(x: Tensor) -> int:
    return int(np.argmax(torch.where(x.isnan(), -torch.inf, x).numpy()))  # numpy's is the first of several
