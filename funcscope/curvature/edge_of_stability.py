"""Whether a learning rate stands at the edge of stability: the sharpness of the loss against what a training can bear."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core.checks import check_choice, check_number, check_positive
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..linalg.eigen import eigenpairs
from ..linalg.matvec import Matvec
from .critical import CriticalSharpness, critical_sharpness
from .hessian import hessian
from .leafwise import gradient_at
from .sequence_forms import sequence_forms

Momentum = Literal["heavy ball", "nesterov", "average"]
COARSE = 2**0.5 - 1


class EdgeOfStability(Result):
    r"""The largest eigenvalue of the (preconditioned) Hessian times the learning rate, against a threshold.

    Made by `edge_of_stability`.
    """

    sharpness: float = quantity("largest eigenvalue", stderr="sharpness_stderr")
    sharpness_stderr: float
    """Over sequences, to first order; nan for one."""
    residual: float = quantity("residual of the largest eigenvalue")
    threshold: float = quantity("threshold")
    learning_rate: float
    is_converged: bool
    preconditioned: bool
    critical: CriticalSharpness = internal()
    num_matvecs: int
    key: Key

    @derived("learning rate times sharpness", stderr="product_stderr")
    def product(self) -> float:
        return self.learning_rate * self.sharpness

    @property
    def product_stderr(self) -> float:
        return self.learning_rate * self.sharpness_stderr

    @derived("share of the threshold", stderr="share_stderr")
    def share(self) -> float:
        """Near 1 a training is at the edge; above, a step along the eigenvector makes the quadratic part of the loss grow."""
        return self.product / self.threshold

    @property
    def share_stderr(self) -> float:
        return self.product_stderr / self.threshold

    @derived("critical sharpness", stderr="critical_stderr")
    def critical_sharpness(self) -> float:
        return self.critical.value

    @property
    def critical_stderr(self) -> float:
        return self.critical.stderr

    @derived("learning rate over the critical one")
    def critical_share(self) -> float:
        """Above 1 the next step along the update, without momentum, raises the loss of these data."""
        return self.learning_rate / self.critical.learning_rate

    @derived("forward passes of the critical sharpness")
    def num_forwards(self) -> int:
        return self.critical.num_forwards

    @property
    def head(self) -> str:
        matrix = "preconditioned Hessian" if self.preconditioned else "Hessian"
        return f"edge of stability of the {matrix} at a learning rate of {self.learning_rate:g}, " + counted(
            self.num_matvecs, "product"
        )

    @property
    def notes(self) -> list[str]:
        notes = []
        if not self.is_converged:
            notes.append("The largest eigenvalue is not converged, and a bound from below: take more `max_matvecs`.")
        if self.critical.status != "found":
            notes.append(f"The search for a critical learning rate ended with: {self.critical.status}.")
        if math.isnan(self.sharpness_stderr):
            notes.append("There is one sequence, and no error over sequences.")
        return notes


def edge_of_stability(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    learning_rate: float = 1e-3,
    preconditioner: Theta | None = None,
    threshold: float = 2.0,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    keep: bool = True,
    head_chunk: int | None = None,
) -> EdgeOfStability:
    r"""The largest eigenvalue of the Hessian times the learning rate, against the threshold at which steps become unstable.

    $$\eta\, \lambda_{\max}(D^{-1/2} H D^{-1/2}) \quad \text{against} \quad 2,$$

    with D = 1 for gradient descent. On a quadratic loss the steps $\theta \leftarrow \theta - \eta D^{-1} g$ shrink along
    every eigenvector while this is below 2 and grow along the first above it. Gradient descent on the whole training set
    raises the sharpness until the product is about 2, and stays there (Cohen et al. 2021); Adam does so with
    the preconditioned Hessian (2022). Of data that are a sample, and of steps by batches, neither is so: products stay below.

    preconditioner: D, a flat vector or a dict of positive numbers, which the gradient is divided by: for Adam
    $\sqrt{\hat v} + \epsilon$ of the optimiser's state. threshold: 2, or `stability_threshold` of an optimiser with momentum.
    tol, max_matvecs: of `eigenpairs`; keep, head_chunk: of `hessian`.

    `residual` is of the iteration: an eigenvalue lies within it of `sharpness`, which is a bound from below up to it.
    `sharpness_stderr` is over sequences, to first order, with the eigenvector held; the largest eigenvalue of few sequences
    is above that of many in the mean, which no error here has (`eigenvalue_errors`). `critical_sharpness` is that along the
    update $D^{-1} g$ by the coarse search, within a factor of 1.41, from $2 / \lambda_{\max}$ on: 2 over the learning rate at
    which one step raises the loss; on a quadratic at most `sharpness`, and that of a step with D where there is one.

    Cost: 10 to 60 products of about six forward passes, one product on each sequence, one gradient and `num_forwards`.

    Raises ValueError for numbers that are not above 0, in the preconditioner too, and as `hessian` and `critical_sharpness`
    do.

    Cohen, Kaur, Li, Kolter, Talwalkar (2021), arXiv:2103.00065; Cohen et al. (2022), arXiv:2207.14484; Kalra et al. (2026),
    arXiv:2601.16979.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2)
    >>> data = torch.diag(torch.tensor([3.0, 1.0])), torch.zeros(2, 1)                                # H = (9, 1)
    >>> loss = fs.objective(net, [data], square)
    >>> edge = edge_of_stability(loss, torch.ones(2), key=fs.key(0), learning_rate=0.2)
    >>> round(edge.product, 4), round(edge.share, 4)
    (1.8, 0.9)
    """
    check_key(key)
    for name, value in (("learning_rate", learning_rate), ("threshold", threshold)):
        check_positive(name, value)
    theta = Loss.vector(loss, theta)
    matvec, root = hessian(loss, theta, keep=keep, head_chunk=head_chunk), None
    if preconditioner is not None:
        root = _root(loss.vector(preconditioner, "preconditioner")).to(theta)
        matvec = preconditioned(matvec, root)
    pairs = eigenpairs(matvec, theta, key=key, num=1, which="largest", tol=tol, max_matvecs=max_matvecs, vectors=True)
    assert pairs.vectors is not None
    vector = pairs.vectors if root is None else pairs.vectors / root
    sharpness = float(pairs.values)
    start = 2 / sharpness if sharpness > 0 else learning_rate
    return EdgeOfStability(
        sharpness=sharpness,
        sharpness_stderr=float(sequence_forms(loss, theta, vector.to(theta)).stderr),
        residual=float(pairs.residuals),
        threshold=threshold,
        learning_rate=learning_rate,
        is_converged=bool(pairs.converged.all()),
        preconditioned=root is not None,
        critical=critical_sharpness(
            loss, theta, _update(loss, theta, root), start=start, tolerance=COARSE, search="double"
        ),
        num_matvecs=pairs.num_matvecs,
        key=key,
    )


def stability_threshold(momentum: float, kind: Momentum = "heavy ball") -> float:
    r"""What learning rate times curvature a step with momentum $\beta$ bears on a quadratic: 2 without momentum.

    $$\text{heavy ball: } 2 + 2\beta, \qquad \text{nesterov: } \frac{2 + 2\beta}{1 + 2\beta}, \qquad
      \text{average: } \frac{2 + 2\beta}{1 - \beta}.$$

    heavy ball: $v \leftarrow \beta v + g$, as torch's SGD. nesterov: the same with the gradient at the point that the
    momentum goes to. average: $m \leftarrow \beta m + (1 - \beta) g$, as Adam with $\beta_1$ (38 for 0.9), once its bias
    correction has faded and for a preconditioner that hardly moves.

    Raises ValueError for a momentum that is not from 0 to below 1, and another kind.

    Cohen et al. (2021), arXiv:2103.00065; (2022), arXiv:2207.14484.

    >>> stability_threshold(0.5, "average")
    6.0
    """
    check_number("momentum", momentum, least=0.0, most=math.nextafter(1.0, 0.0))
    check_choice("kind", kind, get_args(Momentum))
    below = {"heavy ball": 1.0, "nesterov": 1 + 2 * momentum, "average": 1 - momentum}
    return (2 + 2 * momentum) / below[kind]


def preconditioned(matvec: Matvec, root: Tensor) -> Matvec:
    r"""$v \mapsto D^{-1/2} A D^{-1/2} v$, root the root of D's diagonal; with the eigenvalues of $D^{-1} A$."""

    def product(v: Tensor) -> Tensor:
        return matvec(v / root) / root

    return product


def _root(diagonal: Tensor) -> Tensor:
    if not bool((diagonal > 0).all()) or not bool(diagonal.isfinite().all()):
        raise ValueError(
            f"`preconditioner` must hold finite numbers above 0, got {float(diagonal.min())}: for Adam `v.sqrt() + eps`."
        )
    return diagonal.sqrt()


def _update(loss: Loss, theta: Tensor, root: Tensor | None) -> Tensor | None:
    """None for the gradient itself."""
    if root is None:
        return None
    gradient = gradient_at(loss, loss.wide_leaves(theta))[0]
    return torch.cat([gradient[name].flatten() for name in loss.layout.names]).to(theta) / root.square()
