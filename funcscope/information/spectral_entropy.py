"""Over how many directions the variance of a representation is spread: entropies of the spectrum of its covariance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_positive
from ..core.estimate import wide
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.streams import Moments
from ..core.tables import counted
from .groups import Grouping, Groups, centred_columns, grouping, wide_rows


class SpectralEntropy(Result):
    """The entropy of a spectrum, and the number of equal eigenvalues that would have it."""

    entropy: Float[Tensor, ""] = quantity("spectral entropy", unit="nats", stderr="stderr")
    stderr: Float[Tensor, ""]
    num: int
    """Rows; 0 where only a covariance is known."""
    num_groups: int
    """Sequences."""
    dims: int
    order: float
    """alpha of Renyi's entropy; 1 is von Neumann's."""
    reason: str = internal(default="")
    """Why a number is nan."""

    @derived("spectral rank", unit="dimensions", stderr="spectral_rank_stderr")
    def spectral_rank(self) -> Float[Tensor, ""]:
        """exp of the entropy."""
        return self.entropy.exp()

    @property
    def spectral_rank_stderr(self) -> Float[Tensor, ""]:
        """To first order."""
        return self.spectral_rank * self.stderr

    @property
    def head(self) -> str:
        seen = f", {counted(self.num, 'row')} of {counted(self.num_groups, 'sequence')}" if self.num else ""
        return f"spectral entropy of order {self.order:g} in {counted(self.dims, 'dimension')}{seen}"

    @property
    def notes(self) -> list[str]:
        few = 0 < self.num < 10 * self.dims and not self.entropy.isnan()
        text = (
            f"{counted(self.num, 'row')} in {counted(self.dims, 'dimension')}: the spectrum of so few is wider than that of "
            "all, and its entropy too low."
        )
        return ([self.reason] if self.reason else []) + ([text] if few else [])


class _Spectrum(NamedTuple):
    shares: Float[Tensor, " r"]
    scores: Float[Tensor, "n r"]
    """Rows in the basis of the eigenvectors."""


def spectral_entropy(x: Float[Tensor, "n d"], *, groups: Groups | None = None, order: float = 1.0) -> SpectralEntropy:
    r"""Entropy of the eigenvalues of the centred covariance of activations, in nats, with its error over sequences.

    $$H = -\sum_j p_j \log p_j, \qquad p_j = \lambda_j \Big/ \sum_i \lambda_i, \qquad
      H_\alpha = \frac{1}{1 - \alpha} \log \sum_j p_j^\alpha \xrightarrow{\alpha \to 1} H:$$

    von Neumann's entropy of the covariance of unit trace, and of order $\alpha$ the matrix-based Renyi entropy of the
    centred linear Gram matrix, which has the same eigenvalues and is used where there are fewer rows than dimensions. Between
    0 (one direction) and log d (all alike); unchanged by rotations, shifts and scaling, not by a change of single units.
    `spectral_rank` is exp(H), as in `linalg.ranks`; Roy and Vetterli's effective rank takes singular values in place of
    eigenvalues and is larger. This says nothing of information about anything: a map that is invertible changes it.

    The error is linearised: eigenvalue j moves by the square of a row's j-th score, so that H is a ratio of sums over
    sequences. The estimate is too low by about d / 2n for equal eigenvalues: n should be ten times d.

    order: $\alpha$. Raises ValueError for values that are not finite, and for an order that is not above 0.

    Giraldo, Rao, Principe (2015), doi:10.1109/TIT.2014.2370058.

    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> float(spectral_entropy(x).spectral_rank)
    2.0
    """
    rows = wide_rows("x", x)
    check_positive("order", order)
    of = grouping(groups, len(rows), rows.device)
    spectrum = _spectrum(centred_columns(rows))
    value = _entropy(spectrum.shares, order)
    stderr, reason = value.new_tensor(math.nan), _reason(value, of)
    if not reason:
        stderr = _stderr(spectrum, of, order)
    return SpectralEntropy(value, stderr, len(rows), of.num, rows.shape[1], float(order), reason)


def covariance_entropy(covariance: Float[Tensor, "d d"] | Moments, *, order: float = 1.0) -> SpectralEntropy:
    r"""As `spectral_entropy`, from a covariance of any scale or the moments of a corpus, without an error.

    A covariance does not say how it would have differed on other sequences; rows of a sample do.

    Raises ValueError for a matrix that is not square, finite and symmetric, for one with an eigenvalue below 0, which is no
    covariance, and for moments of single units.

    >>> print(covariance_entropy(torch.eye(4)))
    spectral entropy of order 1 in 4 dimensions
    <BLANKLINE>
    -------------  ------
    entropy        1.3863
    spectral_rank  4
    -------------  ------
    a covariance alone has no standard error: rows and the sequences that they are of give one.
    """
    matrix, num, sequences = covariance, 0, 0
    if isinstance(covariance, Moments):
        matrix, num, sequences = covariance.scatter, covariance.num, covariance.num_sequences
    assert isinstance(matrix, Tensor)
    check_positive("order", order)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"`covariance` must be a matrix of shape (d, d), or such moments, got {tuple(matrix.shape)}.")
    if not bool(matrix.isfinite().all()):
        raise ValueError("`covariance` must be finite, and some of its values are not.")
    value = _entropy(_positive(_eigenvalues(matrix.detach()))[0], order)
    reason = "a covariance alone has no standard error: rows and the sequences that they are of give one."
    if bool(value.isnan()):
        reason = "nothing varies: there is no spectrum."
    return SpectralEntropy(value, value.new_tensor(math.nan), num, sequences, len(matrix), float(order), reason)


def _eigenvalues(matrix: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Of a covariance, within the rounding of its dtype."""
    rounding = 100 * len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
    if bool(((matrix - matrix.T).abs() > rounding).any()):
        raise ValueError(
            "`covariance` must be symmetric: `x.T @ x` of centred rows, or `(x + x.T) / 2` of what is nearly so."
        )
    values = torch.linalg.eigvalsh(matrix.to(wide(matrix.device)))
    if float(values[0]) < -rounding:
        raise ValueError(
            f"`covariance` must have no eigenvalue below 0, got {float(values[0]):.3g}: it is no covariance."
        )
    return values


def _spectrum(centred: Float[Tensor, "n d"]) -> _Spectrum:
    scale = centred.abs().max()
    centred = centred / scale if scale > 0 else centred
    if centred.shape[0] < centred.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        shares, places = _positive(values)
        return _Spectrum(shares, vectors[:, places] * values[places].sqrt())
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    shares, places = _positive(values)
    return _Spectrum(shares, centred @ vectors[:, places])


def _positive(values: Float[Tensor, " d"]) -> tuple[Tensor, Tensor]:
    """Shares of the eigenvalues that are more than rounding of the largest, and their places."""
    places = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return values[places] / values[places].sum(), places


def _entropy(shares: Float[Tensor, " r"], order: float) -> Float[Tensor, ""]:
    if not len(shares):
        return shares.new_tensor(math.nan)
    if order == 1:
        return torch.special.entr(shares).sum()
    if abs(order - 1) < 0.1:  # the sum of powers is 1 but for a little
        return (shares * ((order - 1) * shares.log()).expm1()).sum().log1p() / (1 - order)
    return (order * shares.log()).logsumexp(0) / (1 - order)


def _stderr(spectrum: _Spectrum, of: Grouping, order: float) -> Float[Tensor, ""]:
    """Of the ratio of what each sequence adds to the entropy's derivative and to the trace.

    A constant in all slopes changes nothing: it adds to the ratio what it is.
    """
    log_shares = spectrum.shares.log()
    if order == 1:
        slopes = -log_shares
    else:
        slopes = order / (1 - order) * ((order - 1) * log_shares - (order * log_shares).logsumexp(0)).expm1()
    squares = spectrum.scores.square()
    return ratio_stderr(of.sums(squares @ slopes)[None], of.sums(squares.sum(1)))[0]


def _reason(value: Tensor, of: Grouping) -> str:
    if bool(value.isnan()):
        return "nothing varies: there is no spectrum."
    return "" if of.num > 1 else "one sequence alone gives no standard error."
