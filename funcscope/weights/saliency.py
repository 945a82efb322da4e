"""Scores of parameters: what each is said to be worth to the loss, as one vector over theta."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import wide
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from ..curvature.fisher import fisher_diagonal_mc
from ..curvature.leafwise import gradient_at, terms_at
from ..curvature.pruning_masks import obd_saliency
from ..curvature.rows import gradient_chunks
from .linear_inputs import input_norms

Score = Literal["magnitude", "gradient", "taylor", "taylor_squared", "fisher", "obd", "wanda"]
SCORES = ("magnitude", "gradient", "taylor", "taylor_squared", "fisher", "obd", "wanda")
DRAWN = ("fisher", "obd")
"""Scores that need a key: labels are drawn."""
BY_ROW = ("wanda",)
"""Scores that are compared inside each output row: those of two rows are in other units."""


def saliency(
    loss: Loss, theta: Theta, score: Score = "magnitude", *, key: Key | None = None, num: int = 8, chunk_size: int = 8
) -> Float[Tensor, " p"]:
    r"""A score for every parameter, by name; the larger, the longer it is kept.

    `magnitude` $|\theta_k|$; `gradient` $|\partial L / \partial \theta_k|$; `taylor` and `taylor_squared`: see
    `taylor_saliency`; `fisher` the diagonal $F_k$ of the Fisher information, from `num` draws of all labels; `obd`
    $F_k \theta_k^2 / 2$ (`obd_saliency`); `wanda`: see `wanda_saliency`, nan for what is no matrix and no filter.

    key: decides the labels that are drawn, for `fisher` and `obd`. chunk_size: of `gradient_chunks`.

    Raises ValueError for another name and for what the functions behind them refuse; TypeError without a key that is needed.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], fs.mse)
    >>> saliency(loss, torch.tensor([3.0, -4.0]), "gradient").tolist()        # L = mean of (3, -4) squared
    [3.0, 4.0]
    """
    check_choice("score", score, SCORES)
    theta = Loss.vector(loss, theta)
    if score == "magnitude":
        return theta.abs()
    if score == "gradient":
        return loss.layout.ravel(gradient_at(loss, loss.wide_leaves(theta))[0], theta.dtype).abs()
    if score == "wanda":
        return wanda_saliency(loss, theta)
    if score in DRAWN:
        check_key(key)
        assert key is not None
        fisher = fisher_diagonal_mc(loss, theta, key=key, num=num).value
        return obd_saliency(fisher, theta) if score == "obd" else fisher
    return taylor_saliency(loss, theta, power=1 if score == "taylor" else 2, chunk_size=chunk_size)


def taylor_saliency(loss: Loss, theta: Theta, *, power: Literal[1, 2] = 1, chunk_size: int = 8) -> Float[Tensor, " p"]:
    r"""To first order, by how much the loss of single sequences moves when a parameter is set to 0: no signs cancel.

    $$T^{(1)}_k = \frac1W \sum_i |g_{ik} \theta_k|, \qquad
      T^{(2)}_k = \frac1n \sum_i \Big(\frac{n}{W} g_{ik} \theta_k\Big)^2,$$

    with $g_i$ the gradient of the weighted sum of the losses of sequence i, W the sum of all weights, n the sequences that
    have any. $T^{(1)}$ is in the units of the loss, $T^{(2)}$ in their square. Signs across sequences would cancel:
    $|\theta_k \sum_i g_{ik}| / W$, as a document has it, is 0 for every parameter at a stationary point, and what is left of
    it near one is noise. $T^{(1)}$ is never below that.

    power: 1 or 2. chunk_size: sequences whose gradients are computed at once.

    Raises ValueError as `gradient_chunks` does.

    Molchanov et al. (2017), arXiv:1611.06440; (2019), arXiv:1906.10771.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]))], fs.mse)
    >>> float(taylor_saliency(loss, torch.tensor([2.0])))           # gradients 2 and -2, whose sum is 0
    4.0
    """
    if power not in (1, 2):
        raise ValueError(f"`power` must be 1 or 2, got {power!r}.")
    theta = Loss.vector(loss, theta)
    weights = terms_at(loss, theta).weights
    total, num = float(weights.sum()), int((weights != 0).sum())
    made = torch.zeros_like(theta, dtype=wide(theta.device))
    for rows in gradient_chunks(loss, theta, chunk_size=chunk_size):
        moved = (rows * theta).to(made.dtype)
        made += (moved.abs() if power == 1 else moved.square()).sum(0)
    return (made / total if power == 1 else made * (num / total**2)).to(theta.dtype)


def wanda_saliency(loss: Loss, theta: Theta) -> Float[Tensor, " p"]:
    r"""$|W_{ij}| \, \|X_j\|_2$: a weight by the norm of its input over the data; one forward pass, no gradient.

    Compared inside each output row i, as its authors do (`sparse_mask(scope="row")`): a row's outputs have one scale,
    those of two rows need not. Stored (in, out), as a Hugging Face Conv1D, j is the first dimension. nan for parameters
    that are no matrix of a linear map and no filters of a convolution. Norms: `input_norms`.

    Sun et al. (2024), A simple and effective pruning approach for large language models, arXiv:2306.11695.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1))
    >>> loss = fs.objective(net, [(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.zeros(2, 1))], fs.mse)
    >>> wanda_saliency(loss, torch.tensor([-1.0, 2.0, 7.0])).tolist()
    [5.0, 2.0, nan]
    """
    theta = Loss.vector(loss, theta)
    made = torch.full_like(theta, math.nan)
    for name, norms in input_norms(loss, theta).items():
        leaf = loss.layout.by_name.get(name)
        if leaf is not None:
            weight = theta[leaf.slice].view(leaf.shape).abs()
            made[leaf.slice] = (weight * norms.beside(weight)).flatten()
    return made
