"""Stochastic Lanczos quadrature: the spectral density of a symmetric matrix and every trace of a function of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count, check_positive
from ..core.keys import Distribution, Key, check_key, fold_in
from .gauss import rule
from .krylov import Krylov
from .matvec import Matvec, Products, check_symmetric
from .quadrature_result import SpectralDensity
from .space import Like, Space, space_of


def spectral_density(
    matvec: Matvec,
    like: Like,
    *,
    key: Key,
    num_probes: int = 8,
    steps: int = 40,
    distribution: Distribution = "normal",
    reorthogonalize: bool = False,
    check: bool = False,
    rounding: float | None = None,
) -> SpectralDensity:
    r"""The distribution of the eigenvalues of a symmetric A, from `num_probes` times `steps` products.

    For a random v, $v^\top f(A)\,v / v^\top v = \sum_k f(\lambda_k)\,\langle v, u_k\rangle^2 / v^\top v$ is an integral over
    the spectrum with mean $\mathrm{tr} f(A) / P$. `steps` products give its Gauss quadrature: nodes are the eigenvalues
    of the tridiagonal Lanczos matrix, weights the squared first components of its eigenvectors,
    $\mathrm{tr} f(A) \approx P\,\mathrm{mean}_v \sum_i w_i f(\theta_i)$.

    like: a vector of shape (P,), float32 or float64, for dtype and device; or `net.shares` of a model on several
    ranks. Starts are independent over all coordinates.
    Exact in f of degree up to 2 `steps` - 1 for each probe; a probe whose Krylov space ends before
    is exact for every f, and takes fewer products. Memory: three vectors, and hardly any time beside the products: copies
    of converged nodes appear by rounding, which share their weight, so that sums over the spectrum stay accurate (Greenbaum
    1989), but nodes must not be counted as eigenvalues. reorthogonalize: keep `steps` vectors and make each new one
    orthogonal to all of them: nodes are Ritz values then, at up to as much time again as the products.

    rounding: what is smaller, relative to the largest node, may be noise; default: the square root of the epsilon of
    `like`'s dtype. Larger where the products are made in a coarser one.

    Raises ValueError for no probes or steps and, with `check=True` (two more products), for a matvec that is not
    symmetric; NonFinite for a product that is not finite.

    Golub and Welsch (1969), doi:10.1090/S0025-5718-69-99647-1; Ubaru, Chen and Saad (2017), doi:10.1137/16M1104974;
    Greenbaum (1989), doi:10.1016/0024-3795(89)90285-1. Degree 2 `steps` - 1: proofs/lanczos_quadrature.py.

    >>> from funcscope.core.keys import key
    >>> halves = torch.tensor([1.0, 3.0]).repeat(500)             # 500 ones, 500 threes
    >>> density = spectral_density(lambda v: halves * v, halves, key=key(0), steps=2)
    >>> [round(node, 4) for node in density.nodes[0].tolist()]
    [1.0, 3.0]
    >>> abs(float(density.trace.value) - 2000) < 3 * float(density.trace.stderr)
    True
    """
    check_key(key)
    space = space_of(like)
    check_count("num_probes", num_probes)
    check_count("steps", steps)
    check_choice("distribution", distribution, get_args(Distribution))
    products = Products(matvec, space)
    if check:
        check_symmetric(products, like, key=fold_in(key, "check"))
    starts = (space.draw(fold_in(key, i), distribution) for i in range(num_probes))
    run = _orthogonal(products, like, key) if reorthogonalize else _three_term(products, space)
    nodes, weights = (torch.stack(rows) for rows in zip(*(rule(run(v, steps), steps) for v in starts), strict=True))
    if rounding is None:
        rounding = torch.finfo(space.like.dtype).eps ** 0.5
    check_positive("rounding", rounding)
    return SpectralDensity(nodes, weights, space.num, products.num, steps, rounding, key)


def _orthogonal(products: Products, like: Like, key: Key) -> Callable[[Tensor, int], Tensor]:
    """start, steps -> the Lanczos matrix, with full orthogonalisation; one basis for all probes."""
    space = Krylov(products, like, key=fold_in(key, "basis"))

    def run(start: Tensor, steps: int) -> Tensor:
        space.begin(start)
        space.expand()
        while space.residual and space.size < min(steps, space.num):
            space.expand()
        return space.T

    return run


def _three_term(products: Products, space: Space) -> Callable[[Tensor, int], Tensor]:
    """The same by Paige's three-term recurrence, on three vectors."""

    def run(start: Tensor, steps: int) -> Tensor:
        old, new, beta, scale = torch.zeros_like(start), start / math.sqrt(space.dot(start, start)), 0.0, 0.0
        diagonal, beside = [], []
        while True:
            w = old.mul_(-beta).add_(products(new))
            diagonal.append(space.dot(w, new))
            old, new = new, w.sub_(new, alpha=diagonal[-1])
            beta = math.sqrt(space.dot(new, new))
            scale = max(scale, abs(diagonal[-1]) + beta)
            if len(diagonal) == min(steps, space.num) or beta <= 4 * torch.finfo(start.dtype).eps * scale:
                break
            beside.append(beta)
            new.div_(beta)
        side = torch.tensor(beside, dtype=torch.float64)
        return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(side, 1) + torch.diag(side, -1)

    return run
