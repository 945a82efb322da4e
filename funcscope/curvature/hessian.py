"""The Hessian of the loss and its Gauss-Newton part as matvecs: exact, or by differences of gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ..core.checks import check_flat, check_positive
from ..core.objective import Loss, Theta
from ..core.vectors import norm
from ..linalg.matvec import Matvec
from .outputs import normalised, outputs_of, total_weight
from .pointwise import KeptActivations
from .product_check import checked_product
from .pullbacks import ONE_AT_A_TIME, kept_gradient, operator, rebuilt_gradient, sandwich, summed, unchanged

Matrix = Literal["hessian", "ggn"]
_AGREE, _RESOLVED, _PATIENCE = 3e-3, 0.05, 3


def hessian(
    loss: Loss, theta: Theta, *, keep: bool = True, head_chunk: int | None = None, check: bool = True
) -> Matvec:
    r"""v -> H v, with $H = \nabla^2 L(\theta)$ of the exact token-weighted mean over all batches.

    Exact up to rounding. For a piecewise linear network (ReLU) it is the Hessian of the pieces: kinks are not in it.

    keep: differentiate the gradient once and keep that graph, one per batch, for all products: about 6 forward passes
    per product, at the memory of the activations of a forward and a backward pass. Otherwise forward mode over reverse
    mode for every product: about 10 forward passes, and no memory between products.
    head_chunk: for causal language models with a large vocabulary (needs keep=True): the logits of so many tokens exist at
    a time, made again in every product.

    The graph holds theta and the batches: a product after one of them was changed in place raises RuntimeError. It costs
    less under `torch.no_grad()`, which every algorithm of `linalg` uses; without it, reverse mode can differentiate it in v.

    Raises ValueError, in the first product at the latest, where a kernel has no second derivative; and, unless check=False,
    where a product contradicts second differences of the loss beyond their error, as it does for an `autograd.Function`
    with a wrong derivative. One product and three forward passes where they agree; `audit` says more.

    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)      # (a^2 + b^2) / 2
    >>> hessian(loss, net.theta)(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    theta = Loss.vector(loss, theta)
    if head_chunk is not None and not keep:
        raise ValueError("`head_chunk` needs `keep=True`: the closed form of the head is one of reverse mode.")
    weighted, scale = normalised(loss, theta)

    def maps() -> list[Matvec]:
        if not keep:
            return [rebuilt_gradient(batch.sum, theta) for batch in outputs_of(weighted)]
        batches = outputs_of(weighted, head_chunk=head_chunk, kept_at=theta)
        with KeptActivations():
            return [kept_gradient(batch.scored, theta) for batch in batches]

    def made() -> Matvec:
        return operator(weighted, theta, maps, scale, "the Hessian needs second derivatives")

    return checked_product(loss, theta, made, f"keep={keep}") if check else made()


def ggn(loss: Loss, theta: Theta, *, keep: bool = True, head_chunk: int | None = None) -> Matvec:
    r"""v -> G v, the Hessian without the model's own second derivatives: the curvature that the loss brings.

    $$G = \frac{1}{W} \sum_t w_t\, J_t^\top M_t J_t, \qquad M_t = \nabla_z^2\, \ell_t(z), \quad W = \textstyle\sum_t w_t,$$

    over scored positions t with outputs $z_t$, Jacobians $J_t$ and weights $w_t$; $M = \mathrm{diag}\,p - pp^\top$ for
    cross-entropy, whatever the label. Positive semidefinite where $\ell$ is convex in z. For
    cross-entropy it is the Fisher information (proofs/gauss_newton_fisher.py); G = H where the model is linear.

    keep: both graphs, of J and of its transpose, are made once, one pair per batch: about 4.5 forward passes per product.
    Otherwise `jvp` and `vjp` for every product.
    head_chunk: for causal language models with a large vocabulary: the logits of so many tokens exist at a time.

    Raises ValueError where `head_chunk` is given and the model's head is not one linear map.

    Schraudolph (2002), doi:10.1162/08997660260028683; Martens (2020), arXiv:1412.1193.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)
    >>> ggn(loss, net.theta)(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    theta = Loss.vector(loss, theta)
    loss, scale = normalised(loss, theta)
    batches = outputs_of(loss, head_chunk=head_chunk, kept_at=theta if keep else None)
    return sandwich(loss, theta, [(batch, batch.gauss_newton) for batch in batches], scale, keep)


def hessian_difference(loss: Loss, theta: Theta, *, step: float | None = None) -> Matvec:
    r"""v -> H v by central differences of gradients, for models whose kernels have no second derivative.

    $$D_h = \frac{\nabla L(\theta + h \hat v) - \nabla L(\theta - h \hat v)}{2h}\,\|v\|, \qquad
      Hv \approx \frac{4 D_{h/2} - D_h}{3} \pm \|D_{h/2} - D_h\|,$$

    which has an error of order $h^4$ and of $u \|\nabla L\| / h$ by rounding; the discrepancy is more than the first and
    shows the second. Without a `step`, h begins at $u^{1/3} \max(\|\theta\|, 1)$, u the model's unit roundoff, and is
    halved until the discrepancy is below 0.3 % of the product, or rose three times: the pair that agrees best counts. Warns
    where more than 5 % remain.

    `matvec.error()` is the largest discrepancy so far, divided by $\|v\|$: an eigenvalue from these products is not known
    better. 0 before the first product.
    step: h, a length in parameter space, for every product; then nothing is halved.

    Symmetric up to that error only. Four gradients per product and two more per halving, no memory between products. Mapped
    over vectors by `vmap`, the first step is taken for all, and no error is known.

    Richardson (1911), doi:10.1098/rsta.1911.0009.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False).double()), fs.custom(lambda out, y: (out - y) ** 2)
    >>> x, y = torch.eye(2).double(), torch.zeros(2, 1).double()
    >>> loss = fs.objective(net, [(x, y)], square)
    >>> matvec = hessian_difference(loss, net.theta)
    >>> torch.allclose(matvec(x[0]), x[0]), matvec.error() < 1e-8
    (True, True)
    """
    theta = Loss.vector(loss, theta)
    halve = step is None
    if step is None:
        step = loss.net.unit_roundoff ** (1 / 3) * max(norm(theta), 1.0)
    check_positive("step", step)
    check_unchanged, scale, first = unchanged(loss, theta), 1 / total_weight(loss, theta), float(step)
    batches = outputs_of(loss)

    def slope(t: Tensor) -> Tensor:  # batch by batch: one graph at a time
        with ONE_AT_A_TIME:
            return summed([grad(batch.sum) for batch in batches], t, scale)

    worst = [0.0]

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        check_flat("v", v, len(theta))
        check_unchanged()
        v = v.to(theta.dtype)
        length = torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32))
        unit = torch.where(length > 0, v / length, v)  # the product with 0 is 0

        def central(h: float) -> Tensor:
            return (slope(theta + h * unit) - slope(theta - h * unit)) / (2 * h)

        if torch._C._functorch.is_functorch_wrapped_tensor(v):
            return ((4 * central(first / 2) - central(first)) / 3 * length).to(v.dtype)
        product, error = _extrapolated(central, first, halve)
        worst[0] = max(worst[0], error)
        return (product * length).to(v.dtype)

    matvec.error = lambda: worst[0]  # type: ignore[attr-defined]
    return matvec


MATRICES: dict[str, Callable[..., Matvec]] = {"hessian": hessian, "ggn": ggn}


def _extrapolated(central: Callable[[float], Tensor], step: float, halve: bool) -> tuple[Tensor, float]:
    """The extrapolation of the two steps that agree best, and how far they disagree."""
    coarse, fine = central(step), central(step / 2)
    product, error = (4 * fine - coarse) / 3, norm(fine - coarse)
    rises = 0
    while halve and error > _AGREE * norm(product) and rises < _PATIENCE:
        step, coarse, fine = step / 2, fine, central(step / 4)
        discrepancy = norm(fine - coarse)
        rises = 0 if discrepancy < error else rises + 1
        if discrepancy < error:
            product, error = (4 * fine - coarse) / 3, discrepancy
    if error > _RESOLVED * norm(product):
        warnings.warn(
            f"a Hessian product by differences is known to {error / norm(product):.0%} only: its steps disagree by rounding "
            "or kinks. Compute in a wider dtype (`dtype` of `functional`), or take `hessian`; `matvec.error()` says how far "
            "eigenvalues may be off.",
            stacklevel=3,
        )
    return product, error
