"""How much the loss rises in a small step in a random direction: `flatness`, at several lengths `flatness_profile`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_positive
from ..core.directions import Direction, Normalize, norm, stack
from ..core.keys import Key
from ..core.objective import Loss, Theta
from ..core.restrict import restrict
from .directional import plan_of
from .directional_result import Plan
from .evaluator import mapped, points_at_once
from .flatness_result import Flatness
from .precision import is_half, loss_rounding, realised, unmoved, warn_if_swallowed
from .residuals import Residuals, residuals
from .sampling import Arguments, CommonDirections, SamplingSettings, centre_at, centred, copies
from .terms import PerSequence, Values


def flatness(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    n_directions: int = 50,
    epsilon: float = 0.1,
    relative: bool = False,
    normalize: Normalize = "global",
    two_sided: bool = True,
    threshold: float = 0.1,
    chunk: int | None = None,
    directions: CommonDirections | None = None,
) -> Flatness:
    r"""How much the loss rises when all parameters together take a step of length epsilon in a random direction.

    Low values are a flat neighbourhood. It describes the loss on the given batches at the given distance, in the given
    parametrisation: rescaling layers changes it and not the function (Dinh et al.), and a shrinking norm of the weights
    alone makes an absolute epsilon a larger step (`epsilon_relative`).

    $$\Delta_i^\pm = L(\theta \pm \epsilon d_i) - L(\theta), \qquad e_i = (\Delta_i^+ + \Delta_i^-)/2, \qquad
      E[\Delta] = E[e] = \frac{\epsilon^2}{2P}\, \mathrm{tr}\, H + O(\epsilon^4) \ \text{ for unit } d_i.$$

    Losses in nats where the criterion is a cross-entropy. The documented statistics (mean, median, max, sd, 90th and 10th
    percentile, `flatness_ratio`) are of the one-sided $\Delta_i^+$; `pair_mean` is the mean of $e_i$, with its error from
    pairs. Every statistic but the two shares has an error over directions and one over sequences, which are taken for random
    samples. Pairs cancel the gradient and all odd orders exactly; at an equal number of evaluations they have the smaller
    error only where the gradient is not small (`pair_variance_ratio`): proofs/antithetic_pairs.py.

    theta: a flat vector of shape (P,), or a dict of parameters.
    epsilon: with `global`, d has norm 1 in the space of all parameters and epsilon is the length of the step; with
    `filter` and `layer`, d has the norm of theta (group by group, see `core.directions.directions`), and epsilon is a share
    of it. relative: epsilon is a share of $\|\theta\|$ in every mode. The result has the length (`displacement`) and the
    share (`epsilon_relative`) in any case.
    two_sided: also $\Delta^-$, for twice the evaluations.
    threshold: nats, for `flatness_fraction`: `flatness_ratio` compares with 0.1 of a baseline that may fall by decades.
    chunk: directions per `vmap`; 1 is a plain loop. Default: that of `loss_plane`; leaf by leaf from 2^22 parameters with
    one batch, as in `directional_losses`.
    directions: `common_directions(net, key=key, num=...)`, drawn once for many checkpoints; the numbers are the same
    without. The same key gives the same `global` directions at every theta in any case, so that differences between
    checkpoints do not have the scatter of the draw.

    Assumes that float32 resolves the losses and the steps: take a criterion `.in_dtype(torch.float64)` for losses below
    1e-5 or so, and a float64 model for steps near 1e-6 of the weights. All deltas share the rounding error of the baseline.
    The expansion needs a loss with four derivatives. In a ReLU network kinks enter at the same order $\epsilon^2$, and the
    Hessian of autodiff does not have them, so that there the mean is no proxy of its trace but for small epsilon.

    Raises ValueError for an epsilon that is not a finite positive number, fewer than one direction, `directions` of
    another key, net or mode, shapes and devices that do not fit, a relative step at theta = 0, and where the loss at theta
    is not finite or not the same twice.

    Hochreiter, Schmidhuber (1997), Flat minima, doi:10.1162/neco.1997.9.1.1; Dinh, Pascanu, Bengio, Bengio (2017), Sharp
    minima can generalize for deep nets; Hammersley, Morton (1956), A new Monte Carlo technique: antithetic variates.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = criterion.custom(lambda out, y: (out - y) ** 2 / 2)
    >>> loss = objective.objective(net, [(torch.eye(2) * 2**0.5, torch.zeros(2, 1))], half_square)    # L = |theta|^2 / 2
    >>> result = flatness(loss, torch.tensor([3.0, 4.0]), key=keys.key(0), n_directions=4)
    >>> round(float(result.pair_mean.value), 5), round(float(result.second_order.value), 2)     # epsilon^2 / 2, tr H
    (0.005, 2.0)
    """
    return flatness_profile(
        loss,
        theta,
        key=key,
        epsilons=(epsilon,),
        n_directions=n_directions,
        relative=relative,
        normalize=normalize,
        two_sided=two_sided,
        threshold=threshold,
        chunk=chunk,
        directions=directions,
    )[0]


def flatness_profile(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    epsilons: float | Sequence[float],
    n_directions: int = 50,
    relative: bool = False,
    normalize: Normalize = "global",
    two_sided: bool = True,
    threshold: float = 0.1,
    chunk: int | None = None,
    directions: CommonDirections | None = None,
) -> tuple[Flatness, ...]:
    r"""`flatness` at several lengths of the step, along the same directions, each of which is drawn once.

    One result per epsilon, in their order; formulas, units, assumptions, errors and sources as in `flatness`. Where
    `second_order` changes with epsilon, orders above the second (or kinks) matter: proofs/antithetic_pairs.py.
    Raises ValueError also for no epsilon at all.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)    # L = |theta|^2 / 2
    >>> profile = flatness_profile(loss, torch.ones(2), key=keys.key(0), epsilons=(0.1, 0.2), n_directions=4)
    >>> [round(float(result.pair_mean.value), 4) for result in profile]
    [0.005, 0.02]
    """
    settings = SamplingSettings(
        key=key,
        num=n_directions,
        lengths=tuple(epsilons) if isinstance(epsilons, Iterable) else (epsilons,),
        normalize=normalize,
        relative=relative,
        two_sided=two_sided,
        chunk=chunk,
        arguments=Arguments("n_directions", "epsilons", "relative", "epsilon"),
    )
    if not settings.lengths:
        raise ValueError("`epsilons` is empty: name at least one length of the step, for example (0.1,).")
    check_positive("threshold", threshold)
    return _profile(loss, theta, settings, float(threshold), directions)


def _profile(
    loss: Loss, theta: Theta, settings: SamplingSettings, threshold: float, common: CommonDirections | None
) -> tuple[Flatness, ...]:
    settings.check(loss, theta)
    plan, base = _planned(loss, settings.chunk, common), loss.leaves(theta)
    dirs, param_norm = settings.drawn(loss.net, base, common), norm(base)
    steps, sides = settings.steps(dirs[0], param_norm), (1, -1) if settings.two_sided else (1,)
    signed = [sign * step for step in steps for sign in sides]
    rows = None if common is None else common.rows
    with torch.no_grad():
        baseline, centre, scored = _centre(loss, theta, plan, dirs, len(signed), rows)
        for step in steps:
            share = step * dirs[0].norm / param_norm if param_norm else math.inf
            warn_if_swallowed(realised(loss.layout, base, dirs[0], step), step, share)
        still = [unmoved(loss.layout, base, dirs[0], step) for step in steps]
        parts = [residuals(terms, scored, len(centre)) for terms in _terms(loss, theta, dirs, rows, signed, plan)]
    losses, beside = (torch.cat([x.cpu().double() for x in column]) for column in zip(*parts, strict=True))
    by_length = ([_sides(x) for x in columns.split(len(sides), dim=1)] for columns in (losses - baseline, beside))
    centre = centre.cpu().double()
    known: dict[str, Any] = {
        "baseline_loss": baseline,
        "direction_norm": dirs[0].norm,
        "param_norm": param_norm,
        "threshold": threshold,
        "loss_rounding": 0.0 if is_half(loss.layout) else loss_rounding(baseline, loss.net.unit_roundoff, len(scored)),
        "num_forwards": 1 + copies(loss, plan, len(dirs), len(signed)) + len(dirs) * len(sides),
        "num_params": loss.layout.num,
        "relative": settings.relative,
        "normalize": settings.normalize,
        "key": settings.key,
        "plan": plan,
    }
    return tuple(
        Flatness(
            up, down, float(length), step, residuals=Residuals(centre, *row, num=len(scored)), unmoved=share, **known
        )
        for length, step, share, (up, down), row in zip(settings.lengths, steps, still, *by_length, strict=True)
    )


def _centre(
    loss: Loss, theta: Theta, plan: Plan, dirs: tuple[Direction, ...], steps: int, rows: Tensor | None
) -> tuple[float, Tensor, Tensor]:
    """`centre_at`; where the plan is a loop, by the kernels of the loop: differences have no rounding of others in them."""
    num = len(dirs) * steps
    if plan.lazy or plan.chunk > 1:
        return centre_at(loss, theta, plan, num, dirs, steps, rows)
    values, params = Values(loss), loss.params(theta)
    terms, (sums, weights) = torch.stack(values(params)), values(params)
    return centred(terms, sums.sum() / weights.sum(), loss, num)


def _sides(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return x[:, 0].clone(), x[:, 1].clone() if x.shape[1] == 2 else None


def _terms(
    loss: Loss, theta: Theta, dirs: tuple[Direction, ...], rows: Tensor | None, steps: list[float], plan: Plan
) -> Iterator[Float[Tensor, "m k 2 n"]]:
    """Sums and weights per sequence at every step along every direction, some directions at a time."""
    per = PerSequence.of(loss)
    if plan.lazy:
        params = loss.leaves(theta)
        for direction in dirs:
            yield torch.stack(_along_lazy(per, params, direction, steps))[None]
        return
    flat = theta if isinstance(theta, Tensor) else loss.layout.ravel(theta, dirs[0].scales.dtype)
    values, point = Values(loss), None
    for first in range(0, len(dirs), plan.chunk):
        last = min(first + plan.chunk, len(dirs))
        part = stack(dirs[first:last]) if rows is None else rows[first:last]
        if plan.chunk > 1:
            terms = [mapped(lambda row, a=a: restrict(per, flat, row)(a), part, "chunk=1") for a in steps]
        else:
            point = (
                part.new_empty(len(flat), dtype=torch.promote_types(part.dtype, flat.dtype)) if point is None else point
            )
            terms = [torch.stack(values(torch.add(flat, part[0], alpha=a, out=point)))[None] for a in steps]
        yield torch.stack(terms, dim=1)


def _along_lazy(loss: Loss, params: Mapping[str, Tensor], direction: Direction, steps: list[float]) -> list[Tensor]:
    phi = restrict(loss, params, direction, lazy=True)
    if len(steps) == 1 or loss.net.attention == "keep" or not loss.is_mapped():
        return [phi(a) for a in steps]
    signed = torch.tensor(steps, dtype=direction.scales.dtype, device=direction.scales.device)
    return list(mapped(phi, signed, "chunk=1"))  # one draw serves them all


def _planned(loss: Loss, chunk: int | None, common: CommonDirections | None) -> Plan:
    """As for directional losses where leaves are made one by one, else as for planes; rows that are there are used."""
    plan = plan_of(loss, chunk, False if common is not None else None)
    return plan if plan.lazy or chunk is not None else plan._replace(chunk=points_at_once(loss))
