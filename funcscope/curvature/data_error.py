"""Errors over data of eigenvalues: how far they would move on other sequences; and of the differences of two models."""

from __future__ import annotations

import math

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_instance
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..linalg.eigen import Eigenpairs
from .hessian import Matrix
from .sequence_forms import SequenceForms, check_sum, crossed_forms, spacing


class EigenvalueErrors(Result):
    """Eigenvalues with what other data would change in them, to first order; made by `eigenvalue_errors`."""

    values: Float[Tensor, " k"] = quantity("eigenvalue", per="rank", name="eigenvalues", stderr="stderr")
    residuals: Float[Tensor, " k"] = quantity("residual", per="rank")
    """Of the iteration: an eigenvalue of the matrix of these data is within it."""
    forms: SequenceForms = internal()
    """What each sequence adds to each value."""
    bias: Float[Tensor, " k"] = quantity("bias", per="rank")
    """How much the values of n sequences lie, in the mean, beyond those of all data, to second order; see there."""

    @derived("standard error over sequences", per="rank", shown=False)
    def stderr(self) -> Float[Tensor, " k"]:
        """nan for one sequence."""
        return self.forms.stderr

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """Each value with its standard error over sequences, the bias not taken off."""
        return tuple(Estimate(*pair, len(self.forms.weights)) for pair in zip(self.values, self.stderr, strict=True))

    def intervals(self, level: float = 0.95) -> Float[Tensor, "k 2"]:
        """Between which ends the eigenvalues of all data lie: bias off, residuals on, Student's t of n - 1 degrees.

        Where `first_order` does not hold, with the bias off and on, whichever is farther; nan where the bias alone is more
        than the errors explain: the series says nothing there.
        """
        half = _quantile(level, len(self.forms.weights)) * self.stderr + self.residuals
        return _intervals(self.values, self.bias, half, self.first_order)

    @derived("bias below the standard error", per="rank", shown=False)
    def first_order(self) -> Tensor:
        """Per value, whether its bias is below its standard error, so that the first order says what happens."""
        return self.bias.abs() < self.stderr

    @derived("lower end of the 95 % interval", per="rank")
    def low(self) -> Float[Tensor, " k"]:
        return self.intervals()[:, 0]

    @derived("upper end of the 95 % interval", per="rank")
    def high(self) -> Float[Tensor, " k"]:
        return self.intervals()[:, 1]

    @property
    def head(self) -> str:
        return f"{counted(len(self.values), 'eigenvalue')}, errors over {counted(len(self.forms.weights), 'sequence')}"

    @property
    def notes(self) -> list[str]:
        if len(self.forms.weights) < 2:
            return ["one sequence has no error over sequences, score more"]
        return _not_for("beyond first order, score more sequences", self.first_order)

    @property
    def coords(self) -> dict[str, range]:
        return {"rank": range(1, len(self.values) + 1)}


class EigenvalueDifferences(Result):
    """Eigenvalues of one model minus those of another, in their order; made by `compare_eigenvalues`."""

    first: EigenvalueErrors = internal()
    second: EigenvalueErrors = internal()
    paired: bool
    """Whether the errors are taken in pairs: both score the same sequences with the same weights."""

    @derived("difference, second - first", per="rank", name="differences", stderr="stderr")
    def values(self) -> Float[Tensor, " k"]:
        return self.second.values - self.first.values

    @derived("bias", per="rank")
    def bias(self) -> Float[Tensor, " k"]:
        """The difference of the two biases."""
        return self.second.bias - self.first.bias

    @derived("standard error over sequences", per="rank", shown=False)
    def stderr(self) -> Float[Tensor, " k"]:
        """In pairs where `paired`."""
        if self.paired:
            return self.second.forms.minus(self.first.forms).stderr
        return torch.hypot(self.first.stderr, self.second.stderr)

    @derived("residual", per="rank")
    def residuals(self) -> Float[Tensor, " k"]:
        """What both iterations may be off by, together."""
        return self.first.residuals + self.second.residuals

    def intervals(self, level: float = 0.95) -> Float[Tensor, "k 2"]:
        """As those of `EigenvalueErrors`; degrees of freedom of the smaller side where not paired.

        nan where either has none.
        """
        num = min(len(self.first.forms.weights), len(self.second.forms.weights))
        half = _quantile(level, num) * self.stderr + self.residuals
        ends = _intervals(self.values, self.bias, half, self.first.first_order & self.second.first_order)
        return ends + 0 * (self.first.intervals() + self.second.intervals())  # nan stays nan

    @derived("resolved", per="rank", shown=False)
    def resolved(self) -> Tensor:
        """Per value, whether the 95 % interval leaves 0 out; not where there is none."""
        low, high = self.intervals().T
        return (low > 0) | (high < 0)

    low, high, coords = EigenvalueErrors.low, EigenvalueErrors.high, EigenvalueErrors.coords

    @property
    def head(self) -> str:
        return "second - first, " + ("paired over the same sequences" if self.paired else "not paired")

    @property
    def notes(self) -> list[str]:
        return _not_for("not resolved by these sequences", self.resolved)


def eigenvalue_errors(
    loss: Loss,
    theta: Theta,
    pairs: Eigenpairs,
    *,
    matrix: Matrix = "hessian",
    group: int | None = None,
    chunk_size: int | None = None,
) -> EigenvalueErrors:
    r"""What the choice of the sequences leaves open about eigenvalues: $d\lambda = v^\top (dH)\, v$, sequence by sequence.

    $$\mathrm{SE}(\lambda_j) = \mathrm{SE}\Big(\frac{\sum_i v_j^\top H_i v_j}{\sum_i w_i}\Big), \qquad
      \mathrm{bias}_j \approx \sum_{l \ne j} \frac{\mathrm{Var}(v_l^\top H v_j)}{\lambda_j - \lambda_l}$$

    with the vectors held where these data put them, the error by the jackknife over sequences, taken for a random sample of
    those that are spoken of. Eigenvectors turn towards the data: the largest eigenvalue of n sequences is larger than that
    of all in the mean, the smallest smaller, by an order 1/n that `bias` estimates, from the known pairs and, for all
    directions that are none of them, as if their eigenvalues were 0: right where the rest is small beside $\lambda_j$. Where
    it is not below the standard error, `first_order` is False and the interval an order of magnitude, or none: gaps of the
    size of the error, or fewer sequences than the eigenvectors have directions to turn to.

    pairs: `eigenpairs(hessian(loss, theta), ..., vectors=True)` of the same loss at the same theta, or of `ggn` with
    matrix="ggn". Cost, group and chunk_size: see `sequence_forms`; above 128 sequences the errors are those over groups.

    Raises ValueError for pairs without vectors, where the sequences do not add up to the value (pairs of another matrix;
    batch statistics), and as `sequence_forms` does.

    First order: Kato (1995), Perturbation theory for linear operators, II.2; bias: second order of the same.

    >>> import funcscope as fs
    >>> net, data = fs.functional(torch.nn.Linear(2, 1, bias=False)), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    >>> square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(data, torch.zeros(3, 1))], square)
    >>> top = fs.eigenpairs(fs.hessian(loss, net.theta), net.theta, key=fs.key(0), num=1, vectors=True)
    >>> print(eigenvalue_errors(loss, net.theta, top).estimates[0])                 # the mean of x^2: 1, 4, 9
    4.667 ± 2.3 (n = 3)
    """
    if pairs.vectors is None:
        raise ValueError("`pairs` has no vectors: ask for them, `eigenpairs(..., vectors=True)`.")
    values, residuals = (x.cpu().double() for x in (pairs.values, pairs.residuals))
    table, weights, size = crossed_forms(loss, theta, pairs.vectors, matrix=matrix, group=group, chunk_size=chunk_size)
    own = torch.stack([table[j, :, j] for j in range(len(values))])
    forms = SequenceForms(own, weights, size)
    check_sum(forms.values, values, residuals, spacing(loss, pairs.vectors))
    return EigenvalueErrors(values, residuals, forms, _bias(table, weights, values))


def compare_eigenvalues(first: EigenvalueErrors, second: EigenvalueErrors) -> EigenvalueDifferences:
    """How much larger the eigenvalues of the second model are, value by value, with errors over the sequences.

    Both by `eigenvalue_errors`, with as many values; of other weights, other architectures too. Where both losses give every
    sequence the same weight, which is taken to mean that they are the same tokens, what the sequences have in common cancels.

    Raises ValueError for other numbers of values.
    """
    for name, errors in (("first", first), ("second", second)):
        check_instance(
            name, errors, EigenvalueErrors, "`eigenvalue_errors(loss, theta, eigenpairs(..., vectors=True))`"
        )
    if len(first.values) != len(second.values):
        raise ValueError(
            f"`first` has {len(first.values)} values and `second` {len(second.values)}: ask for as many of both."
        )
    return EigenvalueDifferences(first, second, second.forms.paired_with(first.forms))


def _bias(table: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """The second order of every value's expectation, from v_l' H_i v_j and |H_i v_j|^2."""
    num, total = len(weights), weights.sum()
    if num < 2:
        return torch.full_like(values, math.nan)
    cross, squares = table[..., :-1], table[..., -1]
    mean = torch.diag(values)[:, None, :]  # v_l' H v_j
    spread = num / (num - 1) / total**2
    coupled = spread * (cross - weights[:, None] * mean).square().sum(1)
    own = cross.diagonal(dim1=0, dim2=2).T
    length = squares - 2 * weights * values[:, None] * own + (weights * values[:, None]).square()
    rest = (spread * length.sum(1) - coupled.sum(1)).clamp_min(0)
    gaps = (values[:, None] - values).fill_diagonal_(math.inf)
    return (coupled / gaps).sum(1) + rest / values


def _quantile(level: float, num: int) -> float:
    return float(scipy.stats.t.ppf((1 + level) / 2, num - 1)) if num > 1 else math.nan


def _intervals(values: Tensor, bias: Tensor, half: Tensor, first_order: Tensor) -> Tensor:
    """Around the values less their bias; around both where the bias is as uncertain as it is large."""
    off, on = values - bias, torch.where(first_order, values - bias, values)
    ends = torch.stack([torch.minimum(off, on) - half, torch.maximum(off, on) + half], 1)
    return torch.where((bias.abs() <= half)[:, None], ends, math.nan)


def _not_for(text: str, good: Tensor) -> list[str]:
    ranks = [str(i + 1) for i, each in enumerate(good.tolist()) if not each]
    return [f"{text}: rank {', '.join(ranks)}"] if ranks else []
