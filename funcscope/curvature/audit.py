"""Every way to a derivative that is used here, compared with differences of values: which are right for this model?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from ..core.checks import check_count
from ..core.directions import dot
from ..core.keys import Key, fold_in
from ..core.objective import Loss, Theta
from .audit_result import Audit, Verdict, Way
from .culprits import culprits_of
from .derivative_ways import PRODUCTS, nested, norm
from .differences import Derivative, differenced, moved_leaves, value_at, values_of
from .hessian import hessian, hessian_difference
from .product_check import has_kinks
from .pullbacks import ONE_AT_A_TIME
from .rows import cut

_SAME, _RESOLVED = 1e-3, 0.1
_SEQUENCES = 8


class Pair(NamedTuple):
    """A value, its judge, and the size of what was added up to it: rounding is relative to that."""

    value: float
    judge: Derivative
    size: float


def audit(loss: Loss, theta: Theta, *, key: Key, num: int = 3) -> Audit:
    r"""Which derivatives of this loss are right, to which order, and which module breaks those that are not.

    Along the gradient and random directions that move every parameter by its own size, `num` in all, slopes $g^\top d$,
    curvatures $d^\top H d$ and, for neighbouring directions, $e^\top H d$ are taken from values alone (float64, eleven steps,
    extrapolated, with an error: curvature/differences.py), and compared with gradient, `jvp`, `jvp` and `vjp` of the
    gradient, `jvp` of `jvp`, and the operators. Values are compared with those by `vmap`, leaf by leaf, of a sequence alone,
    and of a later call; a product by `vmap` with a loop's; u'Hv with v'Hu. Where a derivative is wrong or missing, each
    module is looked at alone, on the inputs that it gets in the first batch.

    A way is wrong where it is off by more than ten errors of the differences, rounding, and 0.1 %; in a model with kinks
    (ReLU, a maximum, routing), in the median of the comparisons, as a step may cross one. It is undecided where the
    differences are not known to 10 %, as everything is in bfloat16.

    num: at least 2. About 50 forward passes in float64 and 60 in the model's own dtype per direction.

    Raises ValueError where the loss at theta is not finite.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(3, 2).double())
    >>> batch = (torch.eye(3).double(), torch.tensor([0, 1, 1]))
    >>> result = audit(fs.objective(net, [batch], fs.classification), net.theta, key=fs.key(0))
    >>> result.right, "jvp of jvp" in result.named("right", order=2), result.culprits
    (True, True, ())
    """
    check_count("num", num, least=2)
    theta = Loss.vector(loss, theta)
    first, same = value_at(loss, theta), max(1e-6, 64 * loss.net.unit_roundoff)
    if not math.isfinite(first):
        raise ValueError(f"the loss at theta is {first}: it has no derivatives. Check the weights and the batch.")
    kinks = has_kinks(loss, theta)
    dirs = _directions(loss, theta, key, num)
    judges = _Judges(loss, theta, dirs, kinks)
    ways = [
        *_of_values(loss, theta, dirs),
        *(_way(name, 1, take, loss, kinks) for name, take in _slopes(loss, theta, dirs, judges).items()),
        *(_way(name, 2, take, loss, kinks) for name, take in _curvatures(loss, theta, dirs, judges).items()),
        *_of_products(loss, theta, dirs),
        _compared("a later call", 0, lambda: (torch.tensor(value_at(loss, theta)), torch.tensor(first)), same),
    ]
    broken = any(way.order and way.verdict in ("wrong", "missing") for way in ways)
    culprits = culprits_of(loss, theta, fold_in(key, "modules")) if broken else ()
    return Audit(tuple(ways), culprits, num, kinks, judges.dtype, key)


def _directions(loss: Loss, theta: Tensor, key: Key, num: int) -> list[Tensor]:
    """Random ones, and the gradient's, along which curvature is far above rounding; a tenth as long, as it is steep."""
    dirs = [moved_leaves(loss, theta, fold_in(key, i)) for i in range(num)]
    try:
        with torch.enable_grad(), ONE_AT_A_TIME:
            g = grad(loss)(theta)
    except (NotImplementedError, RuntimeError):
        return dirs
    length = norm(g)
    return [*dirs[:-1], g * (0.1 * norm(dirs[-1]) / length)] if 0 < length < math.inf else dirs


class _Judges:
    """Slopes along the directions; curvatures along them, along sums of neighbours, and of neighbours together."""

    def __init__(self, loss: Loss, theta: Tensor, dirs: list[Tensor], kinks: bool):
        values = values_of(loss)
        self.dtype = values.dtype
        self.slopes, self.curvatures = zip(*(differenced(values, theta, d, kinks) for d in dirs), strict=True)
        self.together = [differenced(values, theta, d + dirs[i - 1], kinks)[1] for i, d in enumerate(dirs)]
        before = [self.curvatures[-1], *self.curvatures[:-1]]
        self.mixed = [
            Derivative((b.value - c.value - a.value) / 2, (a.error + b.error + c.error) / 2)
            for b, c, a in zip(self.together, self.curvatures, before, strict=True)
        ]


def _slopes(loss: Loss, theta: Tensor, dirs: list[Tensor], judges: _Judges) -> dict[str, Callable[[], list[Pair]]]:
    def by_gradient() -> list[Pair]:
        g = grad(loss)(theta)
        return [Pair(dot(g, d), judge, norm(g) * norm(d)) for d, judge in zip(dirs, judges.slopes, strict=True)]

    def by_jvp() -> list[Pair]:
        values = (float(jvp(loss, (theta,), (d,))[1]) for d in dirs)
        return [Pair(value, judge, abs(judge.value)) for value, judge in zip(values, judges.slopes, strict=True)]

    return {"gradient": by_gradient, "jvp": by_jvp}


def _curvatures(loss: Loss, theta: Tensor, dirs: list[Tensor], judges: _Judges) -> dict[str, Callable[[], list[Pair]]]:
    def forms(matvec: Callable[[Tensor], Tensor]) -> list[Pair]:
        products = [matvec(d).detach() for d in dirs]
        pairs = []
        for i, (d, Hd) in enumerate(zip(dirs, products, strict=True)):
            pairs.append(Pair(dot(d, Hd), judges.curvatures[i], norm(d) * norm(Hd)))
            pairs.append(Pair(dot(dirs[i - 1], Hd), judges.mixed[i], norm(dirs[i - 1]) * norm(Hd)))
        return pairs

    def twice_forward() -> list[Pair]:
        lines = [*zip(dirs, judges.curvatures, strict=True)]
        lines += [(d + dirs[i - 1], judges.together[i]) for i, d in enumerate(dirs)]
        return [Pair(float(nested(loss, theta, d)), judge, abs(judge.value)) for d, judge in lines]

    return {
        **{name: lambda make=make: forms(make(loss, theta)) for name, make in PRODUCTS.items()},
        "jvp of jvp": twice_forward,
        "hessian": lambda: forms(hessian(loss, theta, check=False)),
        "hessian, keep=False": lambda: forms(hessian(loss, theta, keep=False, check=False)),
        "hessian_difference": lambda: _by_differences(loss, theta, forms),
    }


def _by_differences(loss: Loss, theta: Tensor, forms: Callable[[Any], list[Pair]]) -> list[Pair]:
    """Its own error belongs to the judge's: what it knows of itself is not held against it."""
    matvec: Any = hessian_difference(loss, theta)
    pairs = forms(matvec)
    return [Pair(p.value, p.judge._replace(error=p.judge.error + matvec.error() / 10 * p.size), p.size) for p in pairs]


def _way(name: str, order: int, take: Callable[[], list[Pair]], loss: Loss, kinks: bool) -> Way:
    with torch.enable_grad():
        return _tried(name, order, lambda: _judged(take(), loss.net.unit_roundoff, kinks))


def _tried(name: str, order: int, verdict: Callable[[], tuple[Verdict, float, float]]) -> Way:
    """A way that torch does not have is missing."""
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a way that is slow or rough: the table says so
            return Way(name, order, *verdict())
    except (NotImplementedError, RuntimeError, ValueError) as err:
        return Way(name, order, "missing", math.nan, math.nan, str(err).splitlines()[0][:80])


def _judged(pairs: list[Pair], unit_roundoff: float, kinks: bool) -> tuple[Verdict, float, float]:
    """Verdict, and the largest relative deviation with what is allowed there; the median where steps may cross kinks."""
    resolved = []
    for value, judge, size in pairs:
        scale = max(abs(value), abs(judge.value))
        error = 10 * judge.error + 64 * unit_roundoff * size
        if error <= _RESOLVED * scale:
            resolved.append((abs(value - judge.value) / scale, error / scale + _SAME))
    if not resolved:
        return "undecided", math.nan, math.nan
    ordered = sorted(resolved, key=lambda pair: pair[0] / pair[1])
    deviation, allowed = ordered[len(ordered) // 2 if kinks else -1]
    return "wrong" if deviation > allowed else "right", deviation, allowed


def _of_values(loss: Loss, theta: Tensor, dirs: list[Tensor]) -> Iterator[Way]:
    points = torch.stack([theta + 1e-2 * d for d in dirs])
    allowed = max(1e-6, 64 * loss.net.unit_roundoff)
    leaves = loss.params(points[0])
    yield _compared("vmap against a loop", 0, lambda: (vmap(loss)(points), torch.stack([*map(loss, points)])), allowed)
    yield _compared("leaf by leaf", 0, lambda: (loss.at_leaves(lambda k, _: leaves[k]), loss(points[0])), allowed)
    yield _compared("a sequence alone", 0, lambda: _alone(loss, theta), max(1e-5, allowed))


def _of_products(loss: Loss, theta: Tensor, dirs: list[Tensor]) -> Iterator[Way]:
    allowed = max(1e-5, 1e3 * loss.net.unit_roundoff)

    def mapped() -> tuple[Tensor, Tensor]:
        H = hessian(loss, theta, check=False)
        return vmap(H)(torch.stack(dirs)), torch.stack([*map(H, dirs)])

    def symmetric() -> tuple[Tensor, Tensor]:
        H = hessian(loss, theta, check=False)
        Hu, Hv = H(dirs[0]), H(dirs[1])
        size = (norm(Hu) * norm(dirs[1]) + norm(Hv) * norm(dirs[0])) / 2
        return torch.tensor([size, dot(dirs[1], Hu)]), torch.tensor([size, dot(dirs[0], Hv)])

    yield _compared("products by vmap", 2, mapped, allowed)
    yield _compared("symmetry", 2, symmetric, allowed)


def _alone(loss: Loss, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The first few sequences of the first batch."""
    one = replace(loss, batches=loss.batches[:1])
    sums, _ = one.terms(theta)
    singles = (cut(one.batches[0], slice(i, i + 1), len(sums)) for i in range(min(_SEQUENCES, len(sums))))
    rows = [replace(one, batches=(single,)).terms(theta)[0].sum() for single in singles]
    return torch.stack(rows), sums[: len(rows)]


def _compared(name: str, order: int, pair: Callable[[], tuple[Tensor, Tensor]], allowed: float) -> Way:
    def verdict() -> tuple[Verdict, float, float]:
        one, other = (x.double() for x in pair())
        size = float(other.norm())
        deviation = float((one - other).norm()) / size if size else float(one.norm() > 0)
        if allowed > _RESOLVED and deviation <= allowed:
            return "undecided", deviation, allowed
        return "right" if deviation <= allowed else "wrong", deviation, allowed

    with torch.no_grad():
        return _tried(name, order, verdict)
