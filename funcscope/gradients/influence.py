"""Influence functions: how a test loss would move if a training sequence counted more, by the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from ..core.checks import check_choice, check_count, check_number
from ..core.estimate import wide
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..curvature import ekfac_factors, ggn, gradient_chunks, gradient_norms, gram, kfac_factors
from ..curvature.outputs import total_weight
from ..linalg import conjugate_gradient, hutchinson_trace

Method = Literal["cg", "ekfac", "kfac", "gram"]
METHODS = ("cg", "ekfac", "kfac", "gram")
RELATIVE = 0.1
"""Damping where none is given, in mean eigenvalues."""


class Influence(Result):
    """How every test loss moves with the weight of every training sequence; made by `influence`.

    Negative: the test loss falls when the sequence is weighted up.
    """

    values: Float[Tensor, "n m"] = quantity(
        "influence on the test loss", unit="loss", per=("sample", "other sample"), shown=False
    )
    residual: Float[Tensor, " m"] | None = quantity("relative residual of the solve", per="other sample")
    """Of conjugate gradients; other methods solve exactly for the matrix that they have."""
    damping: float = quantity("damping")
    total_weight: float = internal()
    method: str
    num_matvecs: int = 0
    num_unsolved: int = 0

    @derived(
        "rise of the test loss when the sequence is left out", unit="loss", per=("sample", "other sample"), shown=False
    )
    def left_out(self) -> Float[Tensor, "n m"]:
        """To first order in the sequence's share of the data: minus the influence over the weight W of all of them."""
        return -self.values / self.total_weight

    @derived("largest relative residual of a solve")
    def largest_residual(self) -> float | None:
        return None if self.residual is None else float(self.residual.nan_to_num(0.0).max())

    @property
    def head(self) -> str:
        num, other = self.values.shape
        tests = counted(other, "test loss", "test losses")
        return f"influence ({self.method}) of {counted(num, 'training sequence')} on {tests}"

    @property
    def notes(self) -> list[str]:
        bad = int((~self.values.isfinite().all(0)).sum())
        said = [f"{counted(bad, 'test sequence')} undefined: nothing of them is scored."] if bad else []
        if self.num_unsolved:
            said.append(
                f"{self.num_unsolved} of the solves did not come to the tolerance: their residuals say how far they are; "
                "take more damping or `max_steps`."
            )
        return said


def influence(
    train_loss: Loss,
    test_loss: Loss,
    theta: Theta,
    *,
    key: Key | None = None,
    method: Method = "cg",
    test: Literal["each", "mean"] = "each",
    damping: float | None = None,
    num: int = 4,
    tol: float = 1e-4,
    max_steps: int = 1000,
    chunk_size: int = 8,
) -> Influence:
    r"""How each test loss would move if each training sequence counted more: influence functions.

    $$I(z, z') = -\,\frac{g_{z'}^\top}{W_{z'}} (G + \lambda I)^{-1} g_z = \frac{d}{d\epsilon}\, \ell_{z'}\Big(\arg\min_\theta
      L + \epsilon\, s_z + \tfrac\lambda2 \lVert \theta - \theta_0 \rVert^2\Big),$$

    $s_z$ the sum of the token losses of z, $g_z$ its gradient, $\ell_{z'} = s_{z'} / W_{z'}$ the mean loss of a test
    sequence, and G the Gauss-Newton matrix of the mean training loss L in the place of its Hessian. Negative: the test loss
    falls when z is weighted up. The derivative is that at a minimum of the damped objective, with G its curvature: exact for
    a linear model with a loss that is quadratic, and else for the model made linear at theta.

    In L, z has $s_z / W$, W the weight of all training tokens. To leave z out is $\epsilon = -1/W$, and moves the loss by
    $-I/W$ (`left_out`) to first order in z's share; of N sequences of one length T, W = N T, and per mean loss of z, as many
    papers have it, the influence is I / T and leaving out is $\epsilon = -1/N$. For one squared error per sequence the whole
    move of theta is that divided by 1 - h, $h = x^\top (\sum x x^\top + W \lambda I)^{-1} x$: proofs/leave_one_out.py.

    method: `cg`: conjugate gradients on the exact G to the relative residual `tol`, one solve per test loss; `kfac`, `ekfac`:
    Kronecker factors of G, blocks of single weights; `gram`: $G \approx \sum_z g_z g_z^\top / W$, the empirical Fisher
    matrix, by $-K_{z'z} (K_{zz}/W + \lambda I)^{-1}$, n x n. The last needs no model of the labels, and says something else:
    it weighs sequences by their own errors. test: `each` test sequence has a column, or the `mean` test loss is one.
    damping: $\lambda$, in the units of G per token; by default 0.1 of the mean eigenvalue of the matrix that the method has,
    tr G / P (for `cg` by `num` random probes). It decides how far influence reaches along flat directions: with weight decay
    or an early stop in the training, that of the training is right. num: draws of the labels, or probes.

    Shapes: values (n, m). Errors: the residuals; draws of labels and probes are small beside what the linearisation leaves
    out, which retraining alone can say (`linear_datamodeling_score`). Gradients of the training sequences are never held:
    $g_z^\top u$ for all z is one forward-mode pass. Cost per test loss: a product with G per step (4.5 forwards), and 3.

    Raises ValueError for sequences that see each other and as `gram`; TypeError without a key where something is drawn.

    Koh, Liang (2017), arXiv:1703.04730; Bae et al. (2022), arXiv:2209.05364; Grosse et al. (2023), arXiv:2308.03296.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([[1.0], [3.0]]))], half_square)     # the mean: theta = 2
    >>> test = fs.objective(net, [(torch.ones(1, 1), torch.tensor([[0.0]]))], half_square)
    >>> influence(loss, test, torch.tensor([2.0]), damping=0.0).values.tolist()               # towards 1 it falls
    [[-2.0], [2.0]]
    """
    check_choice("method", method, METHODS)
    check_choice("test", test, ("each", "mean"))
    check_count("num", num)
    if damping is not None:
        check_number("damping", damping, 0.0)
    theta = Loss.vector(train_loss, theta)
    Loss.vector(test_loss, theta)
    weight = total_weight(train_loss, theta)
    if method == "gram":
        return _by_gram(train_loss, test_loss, theta, test, damping, weight)
    inverse = inverse_of(train_loss, theta, key, method, damping, num, tol, max_steps)
    gradient_norms(
        train_loss, theta, by="none", chunk_size=train_loss.batch_size
    )  # raises where sequences see each other
    rows = [_solved(train_loss, theta, g, inverse) for g in _test_gradients(test_loss, theta, test, chunk_size)]
    values = torch.stack([row.values for row in rows], 1)
    residual = torch.tensor([row.residual for row in rows], dtype=torch.float64) if method == "cg" else None
    num_matvecs, num_unsolved = (sum(column) for column in ([r.num_matvecs for r in rows], [r.is_short for r in rows]))
    return Influence(values, residual, inverse.damping, weight, method, num_matvecs, num_unsolved)


class Inverse(NamedTuple):
    """u -> (G + lambda I)^-1 u, with what the solve took: residual, products, and whether it fell short."""

    solve: Callable[[Tensor], tuple[Tensor, float, int, bool]]
    damping: float


def inverse_of(
    loss: Loss, theta: Tensor, key: Key | None, method: str, damping: float | None, num: int, tol: float, max_steps: int
) -> Inverse:
    """Of the training loss, by conjugate gradients or by Kronecker factors."""
    if method == "cg":
        matvec = ggn(loss, theta)
        if damping is None:
            check_key(key)
            trace = hutchinson_trace(matvec, theta, key=fold_in(key, "trace"), num=num)  # type: ignore[arg-type]
            damping = RELATIVE * float(trace.value) / len(theta)

        def solve(u: Tensor) -> tuple[Tensor, float, int, bool]:
            made = conjugate_gradient(matvec, u, damping=damping, tol=tol, max_steps=max_steps)
            return made.x, made.residual, made.num_matvecs, made.status != "converged"

        return Inverse(solve, damping)
    factors = (ekfac_factors if method == "ekfac" else kfac_factors)(loss, theta, key=key, num=num)
    shift = factors.absolute(RELATIVE) if damping is None else damping
    return Inverse(lambda u: (factors.solve(u, shift), 0.0, 0, False), shift)


class _Column(NamedTuple):
    values: Float[Tensor, " n"]
    residual: float
    num_matvecs: int
    is_short: bool


def _solved(loss: Loss, theta: Tensor, g: Float[Tensor, " p"], inverse: Inverse) -> _Column:
    """Of one test gradient; undefined where that is."""
    if not bool(g.isfinite().all()):
        num = len(loss.terms(theta)[1])
        return _Column(torch.full((num,), torch.nan, dtype=wide(g.device), device=g.device), torch.nan, 0, False)
    x, residual, num_matvecs, is_short = inverse.solve(g)
    moves: Any = jvp(lambda t: loss.terms(t)[0], (theta,), (x.to(theta),))[1]
    return _Column(-moves, residual, num_matvecs, is_short)


def _test_gradients(loss: Loss, theta: Tensor, test: str, chunk_size: int) -> Iterator[Tensor]:
    """Of the mean loss of every test sequence, or of all."""
    if test == "mean":
        yield grad(loss)(theta)
        return
    for chunk in gradient_chunks(loss, theta, reduction="mean", chunk_size=chunk_size):
        yield from chunk


def _by_gram(train: Loss, test_loss: Loss, theta: Tensor, test: str, damping: float | None, weight: float) -> Influence:
    """With the empirical Fisher matrix: everything happens between the samples."""
    own = gram(train, theta, by="none").total
    cross = gram(train, theta, other=test_loss, by="none").total
    if damping is None:
        damping = RELATIVE * float(own.trace()) / weight / len(theta)
    per_test = test_loss.terms(theta)[1].to(cross)
    columns = cross / per_test if test == "each" else cross.sum(1, keepdim=True) / per_test.sum()
    return Influence(-damped_solve(own / weight, damping, columns), None, damping, weight, "gram")


def damped_solve(matrix: Float[Tensor, "n n"], damping: float, columns: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """(M + lambda I)^-1 B; without damping, on the range of M. Symmetric M."""
    if damping == 0:
        return torch.linalg.pinv(matrix, hermitian=True) @ columns
    shifted = matrix + damping * torch.eye(len(matrix)).to(matrix)
    return torch.linalg.solve(shifted, columns)
