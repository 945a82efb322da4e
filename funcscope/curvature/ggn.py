"""The generalised Gauss-Newton matrix of the loss as a matvec."""

from __future__ import annotations

from ..core.checks import check_count
from ..core.objective import Loss, Theta
from ..linalg.matvec import Matvec
from .outputs import normalised, outputs_of
from .pullbacks import sandwich


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

    >>> import torch, funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)
    >>> ggn(loss, net.theta)(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    theta = Loss.vector(loss, theta)
    if head_chunk is not None:
        check_count("head_chunk", head_chunk)
    loss, scale = normalised(loss, theta)
    batches = outputs_of(loss, head_chunk=head_chunk, kept_at=loss.params(theta) if keep else None)
    return sandwich(loss, theta, [(batch, batch.gauss_newton) for batch in batches], scale, keep)
