"""Second derivatives along given directions by products with kept graphs, and the step that a difference should take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_positive
from ..core.directions import Direction, dot
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.restrict import restrict
from ..core.result import Result, derived, quantity
from ..linalg.matvec import Products
from .hessian import ggn, hessian

STENCIL = {
    2: (1 / 90, -3 / 20, 3 / 2, -49 / 18, 3 / 2, -3 / 20, 1 / 90),
    4: (-1 / 6, 2.0, -13 / 2, 28 / 3, -13 / 2, 2.0, -1 / 6),
}
"""Weights of f(-3h) ... f(3h) in h^2 f'' (error h^6 f''''''''/560) and in h^4 f'''' (error 7 h^4 f''''''''/240)."""
PROBES = (1 / 16, 1 / 4, 1.0)
"""Reaches of the stencil that are tried, as shares of the largest one."""


class DirectionalCurvatures(Result):
    """d'Hd and d'Gd of every direction, per unit of its coefficient, in float64; made by `directional_curvatures`."""

    hessian: Float[Tensor, " n"] = quantity("curvature", per="direction")
    gauss_newton: Float[Tensor, " n"] | None = quantity("curvature of the Gauss-Newton matrix", per="direction")
    """The loss's own part; the rest, H - G, is what the model's second derivatives bring."""
    norms: Float[Tensor, " n"] = quantity("norm of the direction", per="direction")
    num_matvecs: int

    @derived("curvature per distance", per="direction")
    def rayleigh_quotients(self) -> Float[Tensor, " n"]:
        """d'Hd / ||d||^2: curvature per unit of distance."""
        return self.hessian / self.norms.square()

    @derived("mean curvature")
    def mean(self) -> Estimate:
        """Of d'Hd; for random directions of norm 1, tr(H) / P."""
        return Estimate.of(self.hessian)


def directional_curvatures(
    loss: Loss, theta: Theta, dirs: Sequence[Direction], *, gauss_newton: bool = True, keep: bool = True
) -> DirectionalCurvatures:
    r"""Exact second derivatives of the loss along directions: $d^\top H d$, and $d^\top G d$ of the Gauss-Newton part.

    One product and one dot per direction and matrix: with kept graphs some 6 and 4.5 forward passes, where `jvp` of `jvp`
    takes 10 and up. A direction is dense while it is used.

    dirs: as `directions` makes them. keep: keep the graphs of all batches; see `hessian`.

    Raises as `hessian` does.

    >>> from funcscope.core import criterion, directions, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)      # H = 1
    >>> dirs = directions.directions(net, key=keys.key(0), num=2, normalize="global")
    >>> [round(c, 4) for c in directional_curvatures(loss, net.theta, dirs).hessian.tolist()]
    [1.0, 1.0]
    """
    check_count("the number of directions", len(dirs))
    theta = Loss.vector(loss, theta)
    makers = [hessian, ggn] if gauss_newton else [hessian]
    products = [Products(make(loss, theta, keep=keep)) for make in makers]
    rows = []
    for direction in dirs:
        d = direction.dense().to(theta)
        rows.append([math.sqrt(dot(d, d)), *(dot(d, product(d)) for product in products)])
    columns = torch.tensor(rows, dtype=torch.float64).T
    num = sum(product.num for product in products)
    return DirectionalCurvatures(columns[1], columns[2] if gauss_newton else None, columns[0], num)


class DifferenceStep(Result):
    """The step h at which the second difference (L(h) + L(-h) - 2 L(0)) / h^2 has the smallest error bound."""

    step: float = quantity("step")
    error: float = quantity("error of the second difference")
    """At that step: h^2 |L''''| / 12 + 4 u |L| / h^2."""
    curvature: float = quantity("second derivative")
    """L'' by the 7-point stencil itself."""
    fourth_derivative: float = quantity("fourth derivative")
    fourth_noise: float = quantity("what rounding may do to the fourth derivative")
    reach: float = quantity("largest coefficient of the stencil")
    """The coefficient that the stencil went out to, on both sides."""
    num_forwards: int
    status: Literal["resolved", "flat", "non-finite"] = quantity("status")
    """`flat`: no fourth derivative above rounding as far as losses are finite; the step is the largest that was tried.
    `non-finite`: no stencil had finite losses."""


def difference_step(loss: Loss, theta: Theta, direction: Direction, *, largest: float = 0.5) -> DifferenceStep:
    r"""The finite-difference step to take along a direction, from a 7-point stencil in its coefficient.

    The error of the second difference is at most $h^2 |L''''| / 12 + 4 u |L| / h^2$, with the model's unit roundoff u, and
    smallest at $h = (48\, u\, |L| / |L''''|)^{1/4}$ (proofs/central_difference.py). $L''''$ comes from the smallest of three
    stencils in which it is ten times its own rounding error, $\|c\|_2\, u\, |L| / h^4$.

    largest: the largest coefficient that is tried. 19 forward passes at most; nothing is differentiated, so that it works for
    every kernel. Kinks (ReLU) have no fourth derivative: the step is then one of the scale that was looked at.

    >>> from funcscope.core import criterion, directions, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False).double())
    >>> fourth = criterion.custom(lambda out, y: 1 + (out - y) ** 4 / 24)
    >>> one = torch.ones(1, 1).double()
    >>> loss = objective.objective(net, [(one, 0 * one)], fourth)                  # L'''' = |d|^4
    >>> d, = directions.directions(net, key=keys.key(0), num=1, normalize="global")
    >>> found = difference_step(loss, torch.zeros(1).double(), d)
    >>> round(found.fourth_derivative, 3), round(found.step / (48 * 2.0**-53) ** 0.25, 3)
    (1.0, 1.0)
    """
    check_positive("largest", largest)
    phi, found, num = restrict(loss, theta, direction), None, 1
    with torch.no_grad():
        middle = float(phi(0.0))
        for share in PROBES:
            h = share * largest / 3
            sides = [float(phi(k * h)) for k in (-3, -2, -1, 1, 2, 3)]
            num += 6
            last, found = found, _read([*sides[:3], middle, *sides[3:]], h, largest, loss.net.unit_roundoff, num)
            if found.status == "non-finite" and last is not None:
                return replace(last, step=last.reach, num_forwards=num)  # as far as losses are finite
            if found.status != "flat":
                return found
    assert found is not None
    return found


def _read(values: list[float], h: float, largest: float, roundoff: float, num: int) -> DifferenceStep:
    """What one stencil says."""
    level = max(map(abs, values))
    second, fourth = (sum(c * x for c, x in zip(STENCIL[n], values, strict=True)) / h**n for n in (2, 4))
    noise = math.hypot(*STENCIL[4]) * roundoff * level / h**4
    if not math.isfinite(fourth):
        return DifferenceStep(math.nan, math.nan, second, fourth, noise, 3 * h, num, "non-finite")
    resolved = abs(fourth) > 10 * noise
    best = (48 * roundoff * level / abs(fourth)) ** 0.25 if resolved else largest
    step = min(best, largest)
    error = step**2 * (abs(fourth) if resolved else noise) / 12 + 4 * roundoff * level / step**2
    return DifferenceStep(step, error, second, fourth, noise, 3 * h, num, "resolved" if resolved else "flat")
