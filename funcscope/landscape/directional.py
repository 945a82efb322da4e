"""The loss along random directions: `directional_losses`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_choice
from ..core.directions import Direction, Normalize, norm
from ..core.keys import Distribution, Key
from ..core.memory import hand_back
from ..core.objective import Loss, Theta
from .directional_result import DirectionalLosses, Plan, amounting
from .evaluator import GRADIENT_UP_TO
from .per_direction import Request, sampled
from .precision import is_half, loss_error, realised, unmoved, warn_if_swallowed
from .sampling import SamplingSettings, centre_at, copies
from .truncation import STEPS, num_refined

CHUNKED_UP_TO = 2**20
"""Models of at most this many parameters are evaluated 8 directions at a time."""
LAZY_FROM = 2**22
"""Models of at least this many parameters are perturbed leaf by leaf, when the objective has one batch."""


def directional_losses(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    n_samples: int = 50,
    span: float = 0.5,
    normalize: Normalize = "filter",
    distribution: Distribution = "normal",
    relative_span: bool = False,
    global_renorm: bool = False,
    two_sided: bool = False,
    compute_gradient: bool = False,
    compute_curvature: bool = False,
    curvature: Literal["difference", "exact"] = "difference",
    slope: Literal["auto", "gradient", "jvp"] = "auto",
    chunk: int | None = None,
    lazy: bool | None = None,
) -> DirectionalLosses:
    r"""The loss at a step from theta along `n_samples` random directions, with slopes and curvatures.

    Says how the loss changes around theta: its typical rise, its scatter over directions, its curvature. It describes
    the loss on the given batches at the given distance; it does not by itself predict generalisation.

    $$L_i^\pm = L(\theta \pm h d_i), \quad s_i = \nabla L \cdot d_i, \quad
      c_i = \frac{L_i^+ + L_i^- - 2 L_0}{h^2} = d_i^\top H d_i + O(h^2 \|d_i\|^4).$$

    Losses are in nats where the criterion is a cross-entropy; $s_i$ and $c_i$ are per unit of the coefficient h;
    divide by $\|d\|^2$ (`rayleigh_quotients`) for curvature per unit of distance. For `global` directions
    $E[c] = \mathrm{tr}(H)/P$, for `filter` and `layer` $E[c] = \sum_f (\|\theta_f\|^2 / n_f)\, \mathrm{tr}(H_{ff})$ over
    their groups f (proofs/expected_curvature.py). Error and best step of the difference: proofs/central_difference.py.

    theta: a flat vector of shape (P,), or a dict of parameters, which is not copied where `lazy` holds. The document's
    `model`, `data_batch` and `loss_fn` are `loss` with its net, batches and criterion; its `seed` is `key`, its
    `batch_config` is `chunk` and the list of batches.
    normalize: `filter` is the document's `use_filter_norm=True`; `global` is `use_filter_norm=False`, with or without
    `global_renorm` (unit norm both times); `layer` is between the two. $\|d\| = \|\theta\|$ for `filter` and `layer`, so
    that there h is a relative step already.
    span: the step h. relative_span: the displacement $h \|d\|$ is span x $\|\theta\|$ in every mode.
    global_renorm: make $\|d\| = 1$ after filter normalisation. This changes the unit of h and nothing else: one scalar
    keeps every ratio between filters (the document says that it destroys them).
    two_sided: also $L^-$. compute_gradient: slopes, exact: by one gradient and a dot product per direction, or by one
    `jvp` per direction (`slope`; "auto" takes the gradient for two directions or more, where it is cheaper, up to 2^28
    parameters: beyond, where leaves are made as they are used, it takes the `jvp`, which needs no second set of weights).
    compute_curvature: from the two-sided difference, which is also taken at h/2 and h/4 along a tenth of the directions, 3 to
    16 of them (`truncation`: what the step does to it); or `exact`, d'Hd by a product with the Hessian, whose graph is kept
    (some 6 forwards a direction), and for the error over sequences the same of every sequence, at 10 more: along all
    directions up to 2^20 parameters, else along a tenth of them, from which means have that error, and spreads and
    percentiles of curvatures have not. Above 2^28 parameters leaf by leaf, where no gradient is made, `exact` is `jvp` of
    `jvp`; torch has that wrong for some operations (`det`, `linalg.solve`, fused norms called directly).
    chunk: directions per `vmap`; 1 is a plain loop. lazy: perturb leaf by leaf while the model runs, at the memory of
    the largest leaf. Defaults by size: chunks of 8 up to 2^20 parameters; lazy from 2^22 with a single batch, and above
    2^28 in any case.

    Directions are independent: direction i depends on `fold_in(key, i)` and on the norms of the unperturbed theta. No
    sample is dropped or clipped: non-finite ones are counted in the result and left out of its statistics, pair by pair
    where two are compared. The document's thresholds on roughness (0.15, 0.25) are not provided: sd / |mean| mixes
    slope, curvature and the level of the loss; for unit directions it tends to 0 as the model grows, and dividing by a
    small loss makes a good model look rough.

    Raises ValueError for a span that is not positive, fewer than one sample, curvature by difference without
    `two_sided`, shapes and devices that do not fit, and where the loss at theta is not finite or not the same twice.
    Warns where half precision swallows part of the step (below 0.01 of ||theta||), and for `global_renorm` with `filter` or
    `layer`, with the numbers. Half precision: the step that is realised is measured on the first direction (`realised`),
    rounding enters `curvature_noise_floor`, and `precision_note` says where it may decide the sign of a curvature;
    `functional(model, dtype=torch.float32)` computes exactly at the stored weights, at the memory of one leaf more.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = criterion.custom(lambda out, y: (out - y) ** 2 / 2)
    >>> loss = objective.objective(net, [(torch.eye(2) * 2**0.5, torch.zeros(2, 1))], half_square)    # L = |theta|^2 / 2
    >>> result = directional_losses(loss, torch.tensor([3.0, 4.0]), key=keys.key(0), n_samples=4, span=0.1,
    ...                             two_sided=True, compute_curvature=True)
    >>> round(result.baseline_loss, 3), [round(q, 3) for q in result.rayleigh_quotients.tolist()]
    (12.5, [1.0, 1.0, 1.0, 1.0])
    """
    return prepare(loss, theta, settings_of(locals())).run()


def settings_of(given: Mapping[str, Any]) -> SamplingSettings:
    """What the arguments of `directional_losses` ask for, by their names."""
    check_choice("curvature", given["curvature"], ("difference", "exact"))
    check_choice("slope", given["slope"], ("auto", "gradient", "jvp"))
    return SamplingSettings(
        key=given["key"],
        num=given["n_samples"],
        lengths=(given["span"],),
        normalize=given["normalize"],
        distribution=given["distribution"],
        relative=given["relative_span"],
        unit_norm=given["global_renorm"],
        two_sided=given["two_sided"],
        slope=given["slope"] if given["compute_gradient"] else None,
        curvature=given["curvature"] if given["compute_curvature"] else None,
        chunk=given["chunk"],
        lazy=given["lazy"],
    )


@dataclass(frozen=True, eq=False)
class Sampling:
    """One call of `directional_losses`, checked and ready: to be evaluated in one go, or row by row by who watches.

    `rows(first)` are the columns of direction `first` and on, chunk by chunk; `result(rows)` is what they amount to.
    """

    loss: Loss
    theta: Theta
    dirs: tuple[Direction, ...]
    request: Request
    plan: Plan
    centre: Tensor
    """Residuals of the sequences at theta."""
    settings: dict[str, Any]
    """The fields of the result that are known beforehand."""

    def run(self) -> DirectionalLosses:
        return self.result(list(self.rows()))

    def rows(self, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """Columns of losses, slopes and curvatures on the CPU in float64: one dict per chunk of directions."""
        if first >= len(self.dirs):
            return
        with torch.no_grad():
            for row in sampled(self.loss, self.theta, self.dirs, self.request, self.plan, first):
                yield {name: values.cpu().double() for name, values in row.items()}

    def result(self, rows: Sequence[dict[str, Tensor]]) -> DirectionalLosses:
        column = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return amounting(column, self.centre, self.request.refined, len(self.request.scored), self.settings)


def prepare(loss: Loss, theta: Theta, settings: SamplingSettings) -> Sampling:
    """Everything of `directional_losses` that comes before the first sample: checks, directions, plan, baseline."""
    settings.check(loss, theta)
    _check(settings)
    plan, base = plan_of(loss, settings.chunk, settings.lazy), loss.leaves(theta)
    dirs, param_norm = settings.drawn(loss.net, base), norm(base)
    (step,) = settings.steps(dirs[0], param_norm)
    _warn_renorm(settings, step, param_norm)
    if is_large(loss, plan):
        hand_back()
    with torch.no_grad():
        baseline, centre, scored = centre_at(loss, theta, plan, settings.num, dirs, 1 + settings.two_sided)
        differenced = settings.curvature == "difference" and is_half(loss.layout)
        off = loss_error(loss, base) if differenced else math.nan
        rounded = realised(loss.layout, base, dirs[0], step, off)
    warn_if_swallowed(rounded, settings.lengths[0], step * dirs[0].norm / param_norm if param_norm else math.inf)
    request = _request(loss, plan, settings, step, scored, len(centre))
    known = {
        "baseline_loss": baseline,
        "direction_norms": torch.tensor([direction.norm for direction in dirs], dtype=torch.float64),
        "param_norm": param_norm,
        "actual_span": step,
        "realised": rounded,
        "unmoved": unmoved(loss.layout, base, dirs[0], step) if rounded is None else rounded.unmoved,
        "plan": plan,
        **_settings(loss, settings),
        **_costs(loss, plan, settings, request, math.isfinite(off)),
    }
    return Sampling(loss, theta, dirs, request, plan, centre.cpu().double(), known)


def is_large(loss: Loss, plan: Plan) -> bool:
    """Whether a second set of weights is too much."""
    return plan.lazy and loss.layout.num > GRADIENT_UP_TO


def _request(loss: Loss, plan: Plan, settings: SamplingSettings, step: float, scored: Tensor, groups: int) -> Request:
    exact, large = settings.curvature == "exact", is_large(loss, plan)
    slope = None if settings.slope is None else _slope(loss, plan, settings.slope, settings.num)
    refined = num_refined(settings.num) if settings.curvature is not None and not (exact and large) else 0
    if refined and exact and loss.layout.num <= CHUNKED_UP_TO:
        refined = settings.num
    curvature: Literal["jvp", "product"] = "jvp" if large else "product"
    return Request(step, settings.two_sided, slope, curvature if exact else None, refined, scored, groups)


def _settings(loss: Loss, settings: SamplingSettings) -> dict[str, Any]:
    """What was asked for, by the names of the result."""
    return {
        "span": settings.lengths[0],
        "normalize": settings.normalize,
        "distribution": settings.distribution,
        "relative_span": settings.relative,
        "global_renorm": settings.unit_norm,
        "compute_curvature": settings.curvature is not None,
        "unit_roundoff": loss.net.unit_roundoff,
        "homogeneous_dtype": len({leaf.dtype for leaf in loss.layout.leaves}) == 1,
        "key": settings.key,
    }


def _costs(loss: Loss, plan: Plan, settings: SamplingSettings, request: Request, measured: bool) -> dict[str, int]:
    """Evaluations of each kind. measured: the loss also in full precision."""
    num, sides, second = settings.num, 1 + settings.two_sided, request.curvature or ""
    finer = 0 if second else len(STEPS) * request.refined
    return {
        "num_forwards": 1 + copies(loss, plan, num, sides) + num * sides + finer + 2 * measured,
        "num_gradients": int(request.slope == "gradient"),
        "num_jvps": num * (request.slope == "jvp"),
        "num_second_jvps": {"jvp": num, "product": request.refined}.get(second, 0),
        "num_matvecs": num * (second == "product"),
    }


def _slope(loss: Loss, plan: Plan, slope: str, num: int) -> Literal["gradient", "jvp"]:
    """One gradient serves all directions, but it is another set of weights."""
    if slope == "auto":
        return "jvp" if (num == 1 or is_large(loss, plan)) and loss.net.attention != "keep" else "gradient"
    return "jvp" if slope == "jvp" else "gradient"


def _check(settings: SamplingSettings) -> None:
    """What differences need."""
    (span,) = settings.lengths
    if span * span < 1e-300:
        raise ValueError(f"`span` must have a square that is not 0, got {span!r}: curvatures are divided by it.")
    if settings.curvature == "difference" and not settings.two_sided:
        raise ValueError(
            "`compute_curvature` by difference needs losses on both sides: "
            'pass `two_sided=True`, or `curvature="exact"`.'
        )


def plan_of(loss: Loss, chunk: int | None, lazy: bool | None) -> Plan:
    """How directions are evaluated: in chunks, one at a time, or leaf by leaf."""
    size = loss.layout.num
    if lazy and chunk not in (None, 1):
        raise ValueError(f"`lazy` makes one direction at a time; leave `chunk` out, or pass 1 (got {chunk}).")
    if lazy is None:
        once = len(loss.batches) == 1  # each batch draws anew: worth it where a second set of weights would not fit
        lazy = chunk is None and (size > GRADIENT_UP_TO or (size >= LAZY_FROM and once))
    if lazy:
        return Plan(lazy=True, chunk=1, threads=torch.get_num_threads())
    mapped = size <= CHUNKED_UP_TO and loss.net.attention != "keep"  # torch maps fused attention by a loop of its own
    chunk = chunk or (8 if mapped else 1)
    return Plan(lazy=False, chunk=chunk if chunk == 1 or loss.is_mapped() else 1, threads=torch.get_num_threads())


def _warn_renorm(settings: SamplingSettings, step: float, param_norm: float) -> None:
    if not settings.unit_norm or settings.normalize == "global":
        return
    warnings.warn(
        f"`global_renorm` after {settings.normalize!r} normalisation divides every direction by ||theta|| = "
        f"{param_norm:.4g} and changes nothing else: the displacement is {step:.4g} instead of "
        f"{settings.lengths[0] * param_norm:.4g}, a relative step of {step / param_norm:.2e}. Leave it out, or use "
        "`relative_span=True`.",
        stacklevel=4,
    )
