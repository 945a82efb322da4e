"""How similar two representations of the same samples are, beside what pairs of unrelated samples would give."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flag, check_number
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .calibration import above_null, above_null_stderr, calibrate, calibration_notes, null_p_value, null_point
from .measures import LinearKernels, Measure, Neighbours, Projections, Rotations
from .sequences import check_rows


class Similarity(Result):
    r"""A similarity S of two representations, and what it would be if the samples of one belonged to other ones of the other.

    With the null $S^*_1 \ldots S^*_R$ of R permutations of the pairing of sequences and its 95 % point q, the value of rank
    $\lceil .95 (R + 1) \rceil$:

    $$p = \frac{1 + \#\{S^* \ge S\}}{1 + R}, \qquad S_{\mathrm{cal}} = \max\Big(0, \frac{S - q}{1 - q}\Big).$$

    The errors are a jackknife over sequences (32 blocks of them where there are more); that of the calibrated value takes q
    as it is, and is nan where that value is cut off at 0. arXiv:2602.14486.
    """

    similarity: Estimate = quantity("similarity")
    null: Float[Tensor, " r"] = quantity("similarity of permuted pairs", per="permutation", shown=False)
    measure: str
    per_sequence: int
    """Rows of each sequence."""
    num_left_out: int = internal()
    key: Key

    @derived("mean of the null")
    def null_mean(self) -> float:
        return float(self.null.mean()) if len(self.null) else math.nan

    @derived("95 % point of the null")
    def null_quantile(self) -> float:
        return float(null_point(self.null))

    @derived("p value")
    def p_value(self) -> float:
        return float(null_p_value(self.null, self.similarity.value))

    @derived("similarity above the null")
    def calibrated(self) -> Estimate:
        point = null_point(self.null)
        value, stderr = self.similarity.value, self.similarity.stderr
        return Estimate(above_null(value, point), above_null_stderr(value, stderr, point), self.similarity.num)

    @derived("angular distance", unit="radians")
    def angle(self) -> Estimate | None:
        """arccos S of the Procrustes similarity; its error to first order, nan where S is 1 to rounding."""
        if self.measure != "procrustes":
            return None
        cosine = self.similarity.value.clamp(-1, 1)
        sine = (1 - cosine.square()).sqrt()
        return Estimate(
            cosine.arccos(), self.similarity.stderr / sine.where(sine > 1e-6, torch.nan), self.similarity.num
        )

    @property
    def head(self) -> str:
        return f"{self.measure} of two representations, over {counted(self.similarity.num, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        undefined = not bool(self.similarity.value.isfinite())
        return calibration_notes(self.similarity.num, self.per_sequence, self.num_left_out, undefined)


def cka(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], groups: Tensor | None = None, *, key: Key, debiased: bool = True,
    num: int = 199, per_sequence: int | None = None,
) -> Similarity:  # fmt: skip
    r"""Centred kernel alignment (CKA) of two representations, with linear kernels: which pairs of samples are alike.

    $$\mathrm{CKA} = \frac{h(K, L)}{\sqrt{h(K, K)\, h(L, L)}}, \qquad K = X X^\top, \quad L = Y Y^\top,$$

    with $h(K, L) = \|X_c^\top Y_c\|_F^2$ of centred columns, or debiased, with kernels whose diagonals are 0,

    $$h = \frac{1}{n (n - 3)} \Big(\mathrm{tr}\, \tilde K \tilde L +
      \frac{1^\top \tilde K 1\; 1^\top \tilde L 1}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^\top \tilde K \tilde L 1\Big),$$

    whose mean is $\|\mathrm{Cov}(x, y)\|_F^2$ (proofs/debiased_hsic.py). 1 where one is a rotated and scaled copy of the
    other, unchanged by such maps of either (proofs/cka_invariances.py). The biased one approaches 1 for unrelated
    representations of more dimensions than samples; the debiased one is near 0 there, and may be negative. The ratio of
    unbiased numbers keeps a bias of order 1/n.

    x, y: values of the same samples, row by row. groups: the sequence that each row is of; without, every row is one.
    num: permutations. per_sequence: rows that are drawn of each sequence, by `key`; without, all where sequences have as
    many, else one. A permutation moves whole sequences, so that all have as many rows. Debiased is exact for one row of
    each: rows of one sequence are not independent, and what they share counts as alike.

    The 95 % interval S ± t SE (t of one degree of freedom less than are left out in turn) of the debiased value held the
    truth for 95 % of 200 keys, with 64 samples of 8 and 5 dimensions; that of the biased one its own mean, which few samples
    raise, for 93 %.

    Raises ValueError where rows, groups and numbers are not as said.

    Kornblith et al. (2019), arXiv:1905.00414; Song et al. (2012), JMLR 13:1393; Nguyen et al. (2021), arXiv:2010.15327.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(32, 4))
    >>> found = cka(x, 3 * x.flip(1), key=fs.key(1))
    >>> round(float(found.similarity.value), 6), found.p_value
    (1.0, 0.005)
    """
    check_flag("debiased", debiased)
    name = "debiased CKA" if debiased else "biased CKA"
    return _similarity(name, LinearKernels(debiased), x, y, groups, key=key, num=num, per_sequence=per_sequence)


def canonical_correlation(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], groups: Tensor | None = None, *, key: Key, variance: float = 0.99,
    num: int = 199, per_sequence: int | None = None,
) -> Similarity:  # fmt: skip
    r"""Mean squared canonical correlation of the leading principal components of two representations.

    $$\bar\rho^2 = \frac{1}{\min(p, q)} \sum_i \rho_i^2 = \frac{\|U_x^\top U_y\|_F^2}{\min(p, q)},$$

    with $U_x$ the left singular vectors of the p components that hold `variance` of the variance of centred x (q of y): that
    is the truncation, and there is no ridge. Unchanged by every invertible linear map with variance = 1, and by rotations and
    scaling else. The null is large where p and q are no small share of n: for independent representations its mean is
    max(p, q) / (n - 1). nan where a representation has n - 1 components: every pairing is as similar there.

    Arguments as of `cka`. The error lets the components change with the sequences that are left out; the interval held the
    mean at this number of samples, which is not its limit, for 97 % of 200 keys.

    Raises ValueError as `cka`, and where `variance` is not above 0 and at most 1.

    Raghu et al. (2017), arXiv:1706.05806 (SVCCA); Kornblith et al. (2019), arXiv:1905.00414, R^2_CCA.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(32, 2))
    >>> found = canonical_correlation(x, x @ torch.tensor([[1.0, 2.0], [0.0, 1.0]]), key=fs.key(1), variance=1.0)
    >>> round(float(found.similarity.value), 6)
    1.0
    """
    check_share("variance", variance)
    return _similarity("CCA", Projections(variance), x, y, groups, key=key, num=num, per_sequence=per_sequence)


def procrustes(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], groups: Tensor | None = None, *, key: Key, num: int = 199,
    per_sequence: int | None = None,
) -> Similarity:  # fmt: skip
    r"""Procrustes similarity: the cosine between two representations as shapes, after the best rotation of one.

    $$S = \max_{Q^\top Q = I} \frac{\langle X_c Q, Y_c \rangle}{\|X_c\|_F \|Y_c\|_F} =
      \frac{\|X_c^\top Y_c\|_*}{\|X_c\|_F \|Y_c\|_F}, \qquad \theta = \arccos S,$$

    with columns centred; the one of fewer dimensions is padded by zeros. The angle is a metric. Large for unrelated
    representations of many dimensions and few samples: read it beside its null.

    Arguments as of `cka`. A singular value decomposition of d x e for every permutation: of wide layers, take fewer. The
    interval held the mean at this number of samples, which is not its limit, for 97 % of 200 keys.

    Raises ValueError as `cka`.

    Williams et al. (2021), arXiv:2110.14739.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(32, 2, dtype=torch.float64))
    >>> round(float(procrustes(x, 2 * x.flip(1) + 1, key=fs.key(1), num=19).similarity.value), 6)
    1.0
    """
    return _similarity("procrustes", Rotations(), x, y, groups, key=key, num=num, per_sequence=per_sequence)


def mutual_neighbours(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], groups: Tensor | None = None, *, key: Key, k: int = 10,
    num: int = 199, per_sequence: int | None = None,
) -> Similarity:  # fmt: skip
    r"""Mutual k-nearest-neighbour agreement: the share of each sample's nearest samples that two representations agree on.

    $$S = \frac1n \sum_i \frac{|N_k^x(i) \cap N_k^y(i)|}{k},$$

    by Euclidean distance, among rows of other sequences: those of its own are near in every representation. Which of equally
    near ones are taken is by their order: equal rows say little. Of unrelated
    representations k over the number of candidates, on average. It sees the close neighbourhood only, whatever the rest does.

    Arguments as of `cka`. The interval held the mean at this number of samples for 98 % of 200 keys; with more, neighbours
    are nearer, and the mean is another.

    Raises ValueError as `cka`. nan where a sample has fewer than k rows of other sequences, and for rows that are all equal.

    Huh et al. (2024), arXiv:2405.07987.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(32, 4))
    >>> float(mutual_neighbours(x, 3 * x, key=fs.key(1), k=3).similarity.value)
    1.0
    """
    check_count("k", k)
    return _similarity("neighbours", Neighbours(k), x, y, groups, key=key, num=num, per_sequence=per_sequence)


def check_share(name: str, value: float) -> None:
    """A number above 0 and at most 1."""
    check_number(name, value, 0.0, 1.0)
    if value == 0:
        raise ValueError(f"`{name}` must be above 0 and at most 1, got {value!r}.")


def _similarity(
    name: str, measure: Measure, x: Tensor, y: Tensor, groups: Tensor | None, *, key: Key, num: int,
    per_sequence: int | None,
) -> Similarity:  # fmt: skip
    first = check_rows("x", x)
    second = check_rows("y", y, len(x)).to(first)
    made = calibrate(measure, [first], [second], groups, key=key, num=num, per_sequence=per_sequence)
    estimate = Estimate(made.values[0, 0].cpu(), made.stderr[0, 0].cpu(), made.num_sequences)
    rows = made.num_rows // made.num_sequences
    return Similarity(estimate, made.null[:, 0, 0].cpu(), name, rows, made.num_left_out, key)
