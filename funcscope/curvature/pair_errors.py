"""Standard errors of means over pairs of samples: of pairs within one sample, and of pairs of two samples."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def pair_stderr(sums: Float[Tensor, "*b g g"], counts: Float[Tensor, "g g"] | None = None) -> Float[Tensor, "*b"]:
    r"""Standard error of $U = \sum_{i \ne j} h_{ij} / \sum_{i \ne j} c_{ij}$ over g independent samples, h and c symmetric.

    With c = 1, U is a U-statistic of order two, whose variance has a part by samples and one by pairs (Hoeffding),
    $\mathrm{Var}\,U = \tfrac{4}{g} \zeta_1 + \tfrac{2}{g (g-1)} \zeta_2$. With e = h - U c, r_i its sums over $j \ne i$ and
    d its residuals beside a main effect of each sample,

    $$V_J = \frac{4 \sum_i r_i^2}{g (g-1) (g-2)^2}, \qquad V_2 = \frac{2 \sum_{i \ne j} d_{ij}^2}{g^2 (g-1) (g-3)}, \qquad
      V = V_J - \frac{g}{g-2} V_2.$$

    $V_J$ is the jackknife's variance, which counts the pairs' part $2 (g-1)/(g-2)$ times. $V_2$ has that part for its mean
    and V the variance of U, both exactly (proofs/pair_errors.py). The error is the root of V, or of $V_2 / 2$ where V is
    smaller, so that it is above 0. By that bound alone it is too large where samples have no part of their own: for squared
    lengths of means that are 0, by 10 % at 15 samples and 5 % at 40, 30 % at 5. Other c: to first order. Three samples:
    $V_J$; fewer: nan. Diagonals do not enter.

    Hoeffding (1948), doi:10.1214/aoms/1177730196; Efron, Stein (1981), doi:10.1214/aos/1176345462.

    >>> x = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    >>> round(float(pair_stderr((x[:, None] + x) / 2)), 10) == round(float(x.std() / 2), 10)         # a mean
    True
    """
    num = sums.shape[-1]
    if num < 3:
        return sums.new_full(sums.shape[:-2], math.nan)
    own = torch.eye(num, dtype=torch.bool, device=sums.device)
    counts = (torch.ones_like(sums) if counts is None else counts.to(sums)).masked_fill(own, 0)
    sums, total = sums.masked_fill(own, 0), counts.sum((-2, -1))
    rest = sums - (sums.sum((-2, -1)) / total)[..., None, None] * counts
    effects = rest.sum(-1) / (num - 2)
    jackknife = 4 * num * (num - 1) * effects.square().sum(-1) / total.square()
    if num == 3:
        return jackknife.sqrt()
    residuals = (rest - effects[..., :, None] - effects[..., None, :]).masked_fill(own, 0)
    of_pairs = 2 * (num - 1) * residuals.square().sum((-2, -1)) / ((num - 3) * total.square())
    return torch.maximum(jackknife - num / (num - 2) * of_pairs, of_pairs / 2).sqrt()


def crossed_stderr(
    values: Float[Tensor, "*b n m"], weights: tuple[Float[Tensor, " n"], Float[Tensor, " m"]] | None = None
) -> Float[Tensor, "*b"]:
    r"""Standard error of the mean of $h(x_i, y_j)$ over all pairs of two independent samples.

    $\mathrm{Var} = \zeta_{10} / n + \zeta_{01} / m + \zeta_{11} / (nm)$. The variances of the row means over n and of the
    column means over m, which are the jackknife, hold the last part once each; the mean square of what remains beside rows
    and columns, with $(n-1)(m-1)$ degrees of freedom, has $\zeta_{11}$ for its mean and takes it off once, exactly
    (proofs/pair_errors.py). Not below half of that part, as `pair_stderr`. nan for fewer than two samples of a side.

    weights: v, w of the samples, for the error of $\sum h / (\sum_i v_i \sum_j w_j)$, of $h - U v_i w_j$, to first order.

    >>> x, y = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 3.0])
    >>> torch.allclose(crossed_stderr(x[:, None] + y), (x.var() / 3 + y.var() / 2).sqrt())
    True
    """
    n, m = values.shape[-2:]
    if min(n, m) < 2:
        return values.new_full(values.shape[:-2], math.nan)
    if weights is not None:
        both = torch.outer(*(each.to(values) for each in weights))
        values = (values - (values.mean((-2, -1)) / both.mean())[..., None, None] * both) / both.mean()
    rows, columns = values.mean(-1), values.mean(-2)
    beside = values - rows[..., :, None] - columns[..., None, :] + values.mean((-2, -1))[..., None, None]
    of_pairs = beside.square().sum((-2, -1)) / ((n - 1) * (m - 1) * n * m)
    return torch.maximum(rows.var(-1) / n + columns.var(-1) / m - of_pairs, of_pairs / 2).sqrt()
