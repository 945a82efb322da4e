"""What the quadratures of a spectrum say, each number with its error: traces, ranks, negative eigenvalues, the density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_positive
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Result, derived, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.tables import counted
from .gauss import Resolution, christoffel, corner, rule
from .spectral_mass import SpectralMass, bracket, ends

Scale = Literal["linear", "symlog"]
Rank = Literal["effective_rank", "participation_ratio"]
RANKS: tuple[Rank, ...] = get_args(Rank)


class SpectralDensity(Result):
    r"""Quadrature nodes and weights of every probe, and what they say about the spectrum.

    Every number is an `Estimate`: a mean over probes with its standard error, which holds what is left to chance in
    the probes, not the error of few `steps`. Polynomials up to degree 2 `steps` - 1 have none (`spectral_density`);
    steps and logarithms are slow in `steps`: `negative_resolution`, `resolution` and the bracket of `mass_between` say
    whether these are enough.
    """

    nodes: Float[Tensor, "n m"] = quantity("Ritz value", per=("probe", "node"))
    """Ritz values of each probe, ascending, in float64; where a Krylov space ends early, its first one again."""
    weights: Float[Tensor, "n m"] = quantity("weight of a Ritz value", per=("probe", "node"))
    """Squared first components; rows sum to 1, and a node that only fills a row has weight 0."""
    num_parameters: int
    num_matvecs: int
    steps: int
    rounding: float
    """The square root of the epsilon of the products' dtype: what is smaller, relative to the largest node, may be noise."""
    key: Key

    @property
    def num_probes(self) -> int:
        return len(self.nodes)

    @property
    def head(self) -> str:
        low, high = self.range
        probes = f"{counted(self.num_probes, 'probe')} of {counted(self.steps, 'step')}"
        nodes = f"{probes}, nodes from {low:.4g} to {high:.4g}"
        return f"density of {self.num_parameters:,} eigenvalues: {nodes} ({counted(self.num_matvecs, 'product')})"

    @property
    def unresolved(self) -> list[str]:
        open_: list[str] = [name for name in RANKS if not self.resolution(name).resolved]
        return open_ if self.negative_resolution().resolved else [*open_, "negative_fraction"]

    @property
    def texts(self) -> dict[str, str]:
        low, high = self.trace_squared_interval()
        square = f"{float(self.trace_squared.value):.4g}, 95 % in {low:.4g} to {high:.4g}"
        ranks: dict[str, str] = {name: self.said(name) for name in RANKS}
        return {"trace_squared": square, "negative_fraction": self.said_negative(), **ranks}

    def said(self, name: Rank) -> str:
        """A rank with its standard error, and, where the steps leave it open, that they do."""
        open_ = self.resolution(name)
        value = getattr(self, name)
        return str(value) if open_.resolved else f"{float(value.value):.4g}, {open_}"

    def said_negative(self) -> str:
        """The negative fraction with its threshold and the share within it; where the steps leave it open, its bounds."""
        edge = self.edge()
        value, open_ = self.negative_fraction(), self.negative_resolution()
        least, most = (min(1.0, max(0.0, float(value.value) + sign * open_.bound)) for sign in (-1, 1))
        said = str(value) if open_.resolved else f"{least:.2g} to {most:.2g}, {open_}"
        return f"{said}; below {-edge:.2g}, {self._said_within(edge)} within ±{edge:.2g}"

    def _said_within(self, edge: float) -> str:
        """The share of what may be noise; where the steps leave it open, its bounds."""
        if not edge:
            return "1"
        within = self.mass_between(-edge, edge)
        return f"{float(within.value):.2g}" if within.resolved else f"{within.low:.2g} to {within.high:.2g}"

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest node; both lie inside the spectrum."""
        return float(self.nodes.min()), float(self.nodes.max())

    @derived("trace")
    def trace(self) -> Estimate:
        """tr A, unbiased whatever the steps."""
        return self.function(lambda x: x)

    @derived("trace of the square")
    def trace_squared(self) -> Estimate:
        """tr A^2 = ||A||_F^2, unbiased from 2 steps on; nan for one."""
        return self.function(torch.square if self.steps > 1 else lambda x: x * math.nan)

    def trace_squared_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Where tr A^2 lies at this level: wide to the right where a few eigenvalues, which probes may miss, have most.

        A normal probe's v'A^2v is a sum of lambda^2 times squared normal numbers: in its first two moments
        $\mathrm{tr} A^2\,\chi^2_k / k$ with $k = (P + 2) (\mathrm{tr} A^2)^2 / (P\,\mathrm{tr} A^4 - (\mathrm{tr} A^2)^2)$
        (Satterthwaite 1946), of which both traces are known from the same probes. Random signs scatter less.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` must be between 0 and 1, got {level!r}: 0.95, for instance.")
        squares, fourth = self._means(torch.square), self._means(lambda x: x**4)
        if not bool(squares.any()):
            return 0.0, 0.0
        if self.steps < 2 < self.num_parameters:
            return math.nan, math.nan
        num, share = self.num_parameters, float(squares.mean() ** 2 / fourth.mean())
        if share >= 1 - 1e-12:
            return (float(self.trace_squared.value),) * 2
        freedom, value = self.num_probes * max(1.0, share * (num + 2) / (1 - share)), float(self.trace_squared.value)
        low, high = (freedom / float(scipy.stats.chi2.ppf((1 + sign * level) / 2, freedom)) for sign in (1, -1))
        return value * low, value * high

    def function(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A), the sum of f over the eigenvalues; f maps a tensor entry by entry, and is called at nodes only."""
        return Estimate.of(self.num_parameters * self._means(f))

    def log_determinant(self, damping: float) -> Estimate:
        """log det(A + damping I); nan where a node is at or below -damping: no logarithm of that matrix exists."""
        return self.function(lambda x: (x + damping).clamp_min(0).log() if self.range[0] > -damping else x * math.nan)

    @derived("share of negative eigenvalues", name="negative_fraction")
    def _negative_fraction(self) -> Estimate:
        return self.negative_fraction()

    def negative_fraction(self, tol: float | None = None) -> Estimate:
        """The share of eigenvalues below -`tol` max|node|; `tol` is `rounding` unless given (3.5e-4 in float32).

        Rounding of the products gives half of a singular matrix's zeros a negative sign: a smaller `tol` counts them.
        """
        return self._share(-math.inf, -self.edge(tol))

    def edge(self, tol: float | None = None) -> float:
        """`tol` (`rounding` unless given) times the largest |node|: what is within it of 0 counts as neither sign."""
        return (self.rounding if tol is None else tol) * float(self.nodes.abs().max())

    def negative_resolution(self, tol: float | None = None) -> Resolution:
        r"""Whether the steps determine `negative_fraction`.

        A quadrature and the probe's spectrum agree on 2 `steps` moments, and two such distributions differ at x by at most
        $1 / \sum_{k < m} p_k(x)^2$, p the orthonormal polynomials of the probe: the inequalities of Chebyshev, Markov and
        Stieltjes (Krein and Nudelman 1977, The Markov Moment Problem). `bound` is the mean of that over probes.
        """
        edge = self.edge(tol)
        value, half = self.negative_fraction(tol), self.halved._share(-math.inf, -edge)
        rules = zip(self.nodes, self.weights, self._ends()[2].tolist(), strict=True)
        bounds = [0.0 if exact else christoffel(x, w, -edge, self.rounding) for x, w, exact in rules]
        return self._resolution(value, half, sum(bounds) / len(bounds), 1.0)

    def resolution(self, name: Rank) -> Resolution:
        """Whether the steps determine `effective_rank`, or `participation_ratio` (which two steps do)."""
        value: Estimate = getattr(self, name)
        return self._resolution(value, getattr(self.halved, name), math.nan, abs(float(value.value)))

    @property
    def halved(self) -> SpectralDensity:
        """The same probes with half the steps, at no products: corners of the Lanczos matrices."""
        steps = max(1, self.steps // 2)
        rules = [rule(corner(*each, steps), steps) for each in zip(self.nodes, self.weights, strict=True)]
        nodes, weights = (torch.stack(rows) for rows in zip(*rules, strict=True))
        return replace(self, nodes=nodes, weights=weights, steps=steps)

    def _resolution(self, value: Estimate, half: Estimate, bound: float, scale: float) -> Resolution:
        moved = abs(float(value.value - half.value))
        if self.steps == 1 < self.num_parameters and math.isnan(bound):  # a step has no half
            return Resolution(math.nan, bound, False, 2)
        return Resolution(moved, bound, *self._enough(value, moved if math.isnan(bound) else bound, scale))

    def _enough(self, value: Estimate, error: float, scale: float) -> tuple[bool, int]:
        """Whether an error of the steps is small beside that of the probes, and the steps that it would take."""
        allowed = max(2 * float(value.stderr.nan_to_num(0.0)), 0.01 * scale)
        if error <= allowed or math.isnan(error):
            return True, self.steps
        return False, min(math.ceil(self.steps * error / allowed), max(self.num_parameters, self.steps))

    def mass_between(self, low: float, high: float) -> SpectralMass:
        """The share of eigenvalues in low <= lambda < high, with what the steps leave open (`SpectralMass`).

        A node stands for a stretch of the spectrum: near `low` and `high` its weight may be on either side. The bracket holds
        for the probes' own spectra, also without reorthogonalisation, but an eigenvalue within half of `edge()` of a border
        may count as on either side. It narrows as 1 / `steps` in a dense spectrum, and is one point where Krylov spaces end.
        """
        if not low < high:
            raise ValueError(f"`low` must be below `high`, got {low!r} and {high!r}.")
        share, near = self._share(low, high), self.edge() / 2
        nodes, weights, exact = self._ends()
        ((least, most), (below, up_to)) = (bracket(nodes, weights, at, near, exact) for at in (low, high))
        inside, at_most = float((below - most).clamp_min(0.0).mean()), float((up_to - least).clamp_max(1.0).mean())
        bound = max(float(share.value) - inside, at_most - float(share.value))
        return SpectralMass(share.value, share.stderr, share.num, inside, at_most, *self._enough(share, bound, 1.0))

    def _share(self, low: float, high: float) -> Estimate:
        return Estimate.of(self._means(lambda x: ((x >= low) & (x < high)).double()))

    def _ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `ends`."""
        return ends(self.nodes, self.weights, self.edge(), self.num_matvecs, self.steps, self.num_parameters)

    @derived("effective rank", unit="eigenvalues")
    def effective_rank(self) -> Estimate:
        r"""$e^H$, H the entropy of |lambda| / sum |lambda|: 1 for one eigenvalue, r for r equal ones; nan for A = 0.

        A smooth function of two means, its error by the jackknife. Roy and Vetterli (2007).
        """
        size = self._means(torch.abs)
        logs = self._means(lambda x: torch.special.xlogy(x.abs(), x.abs()))

        def rank(rows: Tensor) -> Tensor:
            mean = rows @ size / rows.sum(-1)
            return self.num_parameters * mean * torch.exp(-(rows @ logs / rows.sum(-1)) / mean)

        return self._of_means(rank)

    @derived("participation ratio", unit="eigenvalues")
    def participation_ratio(self) -> Estimate:
        """tr(A)^2 / tr(A^2): r for r equal eigenvalues; a rank for A >= 0 only, as signs cancel in the trace.

        tr^2 from pairs of different probes, which has no bias; may be negative where the trace is lost in its error.
        nan for A = 0 and one probe; the jackknife's error needs three.
        """
        traces, squares = (self.num_parameters * self._means(f) for f in (lambda x: x, torch.square))

        def ratio(rows: Tensor) -> Tensor:
            num = rows.sum(-1)
            pairs = ((rows @ traces).square() - rows @ traces.square()) / (num * (num - 1))
            return pairs / (rows @ squares / num)

        return self._of_means(ratio)

    def density(
        self, grid: Float[Tensor, " g"], width: float | None = None
    ) -> tuple[Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Mean and standard error over probes of the density, each node a Gaussian of standard deviation `width`.

        In units of 1 / eigenvalue; it integrates to 1. `width`: `self.width` unless given.
        """
        width = self.width if width is None else width
        check_positive("width", width)
        scaled = (grid.double().cpu()[:, None, None] - self.nodes) / width  # (g, n, m)
        bumps = torch.exp(-scaled.square() / 2) / (width * math.sqrt(2 * math.pi))
        rows = (bumps * self.weights).sum(-1)
        nan = rows.new_full(rows.shape[:1], math.nan)
        return rows.mean(1), rows.std(1) / self.num_probes**0.5 if self.num_probes > 1 else nan

    @property
    def width(self) -> float:
        """A hundredth of the range of the nodes; where they are all one, of its size, or 0.01 at 0."""
        low, high = self.range
        spread = high - low
        return 0.01 * (spread if spread > self.rounding * abs(high) else abs(high) or 1.0)

    def grid(self, num: int = 1000, width: float | None = None, scale: Scale = "linear") -> Float[Tensor, " g"]:
        """Points for `density`: even ones, 5 widths beyond the nodes; "symlog" (for plots): even in sinh-like steps."""
        check_choice("scale", scale, get_args(Scale))
        width = self.width if width is None else width
        ends = torch.tensor(self.range, dtype=torch.float64) + torch.tensor([-5.0, 5.0], dtype=torch.float64) * width
        if scale == "symlog":
            ends = ends.sign() * torch.log1p(ends.abs() / width)
        points = torch.linspace(float(ends[0]), float(ends[1]), num, dtype=torch.float64)
        return points if scale == "linear" else points.sign() * torch.expm1(points.abs()) * width

    def _means(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """One quadrature per probe."""
        return (self.weights * f(self.nodes)).sum(1)

    def _of_means(self, statistic: Callable[[Tensor], Tensor]) -> Estimate:
        """A statistic of all probes, chosen by rows of 0 and 1, less its jackknife bias, with its jackknife error."""
        num, every = self.num_probes, self.weights.new_ones(1, self.num_probes)
        rest = statistic(every - torch.eye(num, dtype=every.dtype))
        value, bias = statistic(every)[0], (num - 1) * (rest.mean() - statistic(every)[0])
        return Estimate(value - bias if bool(bias.isfinite()) else value, jackknife_stderr(rest), num)
