"""What a symmetric matrix's spectrum is like, in one table: both ends, trace, shape of the density, each with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_positive
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .eigen import REMEDY, Eigenpairs, eigenpairs
from .matvec import Matvec
from .quadrature import spectral_density
from .quadrature_result import SpectralDensity
from .trace import TraceEstimate, xtrace


class SpectrumSummary(Result):
    """Eigenvalues from both ends, a trace, and a spectral density of one matrix; prints itself as a table."""

    ends: Eigenpairs = internal()
    """`num` eigenvalues from each end, in descending order."""
    trace: TraceEstimate = quantity("trace")
    density: SpectralDensity = internal()
    damping: float
    num_parameters: int
    key: Key

    @derived("large eigenvalue", per="rank", shown=False)
    def top_eigenvalues(self) -> Float[Tensor, " k"]:
        """The largest ones, in descending order."""
        return self.ends.values[: len(self.ends.values) // 2]

    @derived("small eigenvalue", per="rank from below", shown=False)
    def bottom_eigenvalues(self) -> Float[Tensor, " k"]:
        """The smallest ones, in descending order: the last is the smallest of all."""
        return self.ends.values[len(self.ends.values) // 2 :]

    @derived("largest eigenvalue")
    def max_eigenvalue(self) -> float:
        return float(self.ends.values[0])

    @derived("smallest eigenvalue")
    def min_eigenvalue(self) -> float:
        """The smallest Ritz value: no eigenvalue found lies below, and the true smallest is at most this."""
        return float(self.ends.values[-1])

    @derived("spectral norm")
    def spectral_norm(self) -> float:
        """The largest |eigenvalue|."""
        return float(self.ends.values.abs().max())

    @derived("spectral gap")
    def spectral_gap(self) -> float:
        """The largest eigenvalue minus the second; nan where one was asked for, or where either is not converged."""
        top = self.top_eigenvalues
        return float(top[0] - top[1]) if len(top) > 1 and bool(self.ends.converged[:2].all()) else math.nan

    @derived("condition number")
    def condition_number(self) -> float:
        r"""$(\lambda_{max} + \delta) / (\max(\lambda_{min}, 0) + \delta)$, with the stated `damping` $\delta$.

        That of the damped matrix where it is positive semidefinite. An indefinite or singular matrix has none of its own:
        the ratio is then that of an optimiser that leaves negative directions to the damping. nan where no eigenvalue is
        positive, where the largest is not converged, or where the smallest may be positive and is neither converged nor
        known to within the damping.
        """
        open_ = not bool(self.ends.converged[-1]) and self.min_eigenvalue > self.damping
        if self.max_eigenvalue <= 0 or not bool(self.ends.converged[0]) or open_:
            return math.nan
        return (self.max_eigenvalue + self.damping) / (max(self.min_eigenvalue, 0.0) + self.damping)

    @derived("whether an eigenvalue is negative")
    def has_negative_eigenvalues(self) -> bool | None:
        """The smallest Ritz value, which the smallest eigenvalue never exceeds, is below what rounding explains.

        None where it is not, and is not converged: a negative eigenvalue may then have been missed.
        """
        if self.min_eigenvalue < -self.density.rounding * self.spectral_norm:
            return True
        return False if bool(self.ends.converged[-1]) else None

    @derived("-smallest / largest eigenvalue")
    def negative_curvature_ratio(self) -> float:
        """-lambda_min / lambda_max; nan where no eigenvalue is positive, or one of the two is not converged."""
        known = self.max_eigenvalue > 0 and bool(self.ends.converged[[0, -1]].all())
        return -self.min_eigenvalue / self.max_eigenvalue if known else math.nan

    @derived("share of negative eigenvalues")
    def negative_fraction(self) -> Estimate:
        """The share of negative eigenvalues: those below -`density.rounding` times the largest node."""
        return self.density.negative_fraction()

    @derived("effective rank")
    def effective_rank(self) -> Estimate:
        """exp of the entropy of |lambda| / sum |lambda| (Roy and Vetterli)."""
        return self.density.effective_rank

    @derived("participation ratio")
    def participation_ratio(self) -> Estimate:
        """tr(A)^2 / tr(A^2); a rank for positive semidefinite matrices only."""
        return self.density.participation_ratio

    @derived("residual", per="place")
    def residuals(self) -> Float[Tensor, " k"]:
        """Of all eigenvalues, top and bottom."""
        return self.ends.residuals

    @derived("all eigenvalues converged", shown=False)
    def converged(self) -> bool:
        """Every eigenvalue of both ends is; `ends.converged` says it one by one."""
        return bool(self.ends.converged.all())

    @derived("products for the eigenvalues", shown=False)
    def lanczos_iterations(self) -> int:
        """Products that the eigenvalues took."""
        return self.ends.num_matvecs

    @derived("products", shown=False)
    def num_matvecs(self) -> int:
        """Products in all."""
        return self.ends.num_matvecs + self.trace.num_matvecs + self.density.num_matvecs

    @property
    def head(self) -> str:
        state = "all converged" if self.converged else "NOT all converged"
        return (
            f"spectrum of {self.num_parameters:,} eigenvalues, {counted(self.num_matvecs, 'product')}; the ends {state}"
        )

    @derived("eigenvalue", per="place")
    def eigenvalues(self) -> Float[Tensor, " k"]:
        return self.ends.values

    @derived("state", per="place")
    def states(self) -> list[str]:
        return self.ends.states

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        num, last = len(self.top_eigenvalues), self.num_parameters
        place = [f"{i + 1:,}" if i < num else f"{last - 2 * num + i + 1:,}" for i in range(2 * num)]
        return {"place": place, "rank": range(1, num + 1), "rank from below": range(num, 0, -1)}

    @derived("residual of the largest eigenvalue")
    def max_residual(self) -> float:
        return float(self.ends.residuals[0])

    @derived("residual of the smallest eigenvalue")
    def min_residual(self) -> float:
        return float(self.ends.residuals[-1])

    @property
    def unresolved(self) -> list[str]:
        ends = zip(("max_eigenvalue", "min_eigenvalue"), self.ends.converged[[0, -1]].tolist(), strict=True)
        return [*(name for name, converged in ends if not converged), *self.density.unresolved]

    @property
    def texts(self) -> dict[str, str]:
        ends = (name for name in ("max_eigenvalue", "min_eigenvalue") if name in self.unresolved)
        return {name: f"{getattr(self, name):.5g}, not converged" for name in ends} | self.density.texts

    @property
    def notes(self) -> list[str]:
        return [] if self.converged else [REMEDY]


def spectrum_summary(
    matvec: Matvec,
    like: Float[Tensor, " p"],
    *,
    key: Key,
    num: int = 5,
    tol: float = 1e-3,
    num_probes: int = 8,
    steps: int = 40,
    trace_matvecs: int = 64,
    damping: float | None = None,
    max_matvecs: int | None = None,
    check: bool = False,
    rounding: float | None = None,
) -> SpectrumSummary:
    r"""Both ends of the spectrum of a symmetric A, its trace, and its density.

    num: eigenvalues from each end, to a residual of `tol` times the largest |eigenvalue| at that end (`eigenpairs`), in at
    most `max_matvecs` products. num_probes, steps: of the quadrature (`spectral_density`), for the negative fraction and the
    ranks. trace_matvecs: products of `xtrace`. damping: of the condition number, an absolute number; default: `tol` times
    the largest |eigenvalue|, below which no eigenvalue is resolved here. rounding: see `spectral_density`.

    Raises as these three do; ValueError for 2 `num` above P.

    >>> import torch
    >>> from funcscope.core.keys import key
    >>> A = torch.linspace(-1, 9, 41)
    >>> summary = spectrum_summary(lambda v: A * v, torch.zeros(41), key=key(0), num=2)
    >>> [round(value, 3) for value in summary.top_eigenvalues.tolist()], summary.has_negative_eigenvalues
    ([9.0, 8.75], True)
    """
    check_key(key)
    ends = eigenpairs(
        matvec, like, key=fold_in(key, "ends"), num=num, which="both", tol=tol, max_matvecs=max_matvecs, check=check
    )
    if damping is None:
        damping = tol * float(ends.values.abs().max())
    else:
        check_positive("damping", damping)
    return SpectrumSummary(
        ends,
        xtrace(matvec, like, key=fold_in(key, "trace"), num=trace_matvecs),
        spectral_density(
            matvec, like, key=fold_in(key, "density"), num_probes=num_probes, steps=steps, rounding=rounding
        ),
        damping,
        len(like),
        key,
    )
