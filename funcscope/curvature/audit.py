"""Every way to a derivative that is used here, compared with differences of values: which are right for this model?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..core.batches import cut
from ..core.checks import check_count
from ..core.keys import Key, fold_in
from ..core.objective import Loss, Theta
from ..core.pack import storable
from ..core.result import Derived, Result, derived
from ..core.tables import counted
from ..core.vectors import dot, norm
from .culprits import Culprit, culprits_of
from .derivatives import METHODS, Derivative, Method, along, differenced, has_kinks, moved_leaves, value_at, values_of
from .hessian import hessian, hessian_difference
from .pullbacks import ONE_AT_A_TIME

_SAME, _RESOLVED = 1e-3, 0.1
_SEQUENCES = 8

OPERATORS = {
    "hessian": Method(2, partial(hessian, check=False)),
    "hessian, keep=False": Method(2, partial(hessian, keep=False, check=False)),
    "hessian_difference": Method(2, hessian_difference),
}
"""What an audit compares beside the methods of torch."""

Verdict = Literal["right", "wrong", "missing", "undecided"]


@storable
@dataclass(frozen=True)
class Way:
    """One way to a number, compared with another that does not share its faults.

    order: of the derivative; 0 for values. deviation: the largest difference from the judge, relative to the larger of both;
    allowed: what the judge's error and rounding explain, relative to the same. nan where nothing was compared.
    """

    name: str
    order: int
    verdict: Verdict
    deviation: float
    allowed: float
    reason: str = ""


def _column(attribute: str, label: str) -> Derived[list[Any]]:
    return derived(label, per="way")(lambda result: [getattr(way, attribute) for way in result.ways])


class Audit(Result):
    """Which derivatives of a loss are right, judged by differences of its values. Made by `audit`."""

    ways: tuple[Way, ...]
    culprits: tuple[Culprit, ...]
    num_directions: int
    has_kinks: bool
    values_dtype: torch.dtype
    key: Key

    @property
    def right(self) -> bool:
        """No way is wrong; some may be missing or undecided."""
        return all(way.verdict != "wrong" for way in self.ways)

    def named(self, verdict: Verdict, order: int | None = None) -> tuple[str, ...]:
        """The ways of one verdict, of one order or of all."""
        return tuple(way.name for way in self.ways if way.verdict == verdict and order in (None, way.order))

    order = _column("order", "order of the derivative")
    verdict = _column("verdict", "verdict")
    deviation = _column("deviation", "deviation from the judge, relative")
    allowed = _column("allowed", "deviation that is explained, relative")
    reason = _column("reason", "reason")

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"way": [way.name for way in self.ways]}

    @property
    def notes(self) -> list[str]:
        sound = [name for name in OPERATORS if name in self.named("right", 2)]
        advice = f"second derivatives that can be trusted: {', '.join(sound) or 'none'}"
        return [*map(str, self.culprits), *([] if self.right else [advice])]

    def asdict(self) -> dict[str, Any]:
        """Plain numbers and names."""
        parts = {"ways": [asdict(way) for way in self.ways], "culprits": [asdict(each) for each in self.culprits]}
        return super().asdict() | parts | {"values_dtype": str(self.values_dtype).removeprefix("torch.")}

    @property
    def head(self) -> str:
        pieces = ", piecewise smooth" if self.has_kinks else ""
        dtype = str(self.values_dtype).removeprefix("torch.")
        along = counted(self.num_directions, "direction")
        return f"derivatives along {along}, judged by differences of values in {dtype}{pieces}"


def audit(loss: Loss, theta: Theta, *, key: Key, num: int = 3) -> Audit:
    r"""Which derivatives of this loss are right, to which order, and which module breaks those that are not.

    Along the gradient and random directions that move every parameter by its own size, `num` in all, slopes $g^\top d$,
    curvatures $d^\top H d$ and, for neighbouring directions, $e^\top H d$ are taken from values alone (eleven steps,
    extrapolated, with an error: curvature/derivatives.py; in float64, and so is what a model casts to float32), and compared
    with gradient, `jvp`, `jvp` and `vjp` of the gradient, `jvp` of `jvp`, and the operators. Values are compared with those
    by `vmap`, leaf by leaf, of a sequence alone, and of a later call; a product by `vmap` with a loop's; u'Hv with v'Hu.
    Where a derivative is wrong or missing, each module is looked at alone, on the inputs that it gets in the first batch.

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
    subject = _Subject(loss, theta, key, num)
    rough, products = max(1e-5, same), max(1e-5, 1e3 * loss.net.unit_roundoff)
    ways = (
        subject.same("vmap against a loop", 0, subject.mapped_values, same),
        subject.same("leaf by leaf", 0, subject.leaf_by_leaf, same),
        subject.same("a sequence alone", 0, subject.alone, rough),
        *(subject.right(name, method) for name, method in {**METHODS, **OPERATORS}.items()),
        subject.same("products by vmap", 2, subject.mapped_products, products),
        subject.same("symmetry", 2, subject.symmetric, products),
        subject.same("a later call", 0, lambda: torch.tensor([value_at(loss, theta), first]), same),
    )
    broken = any(way.order and way.verdict in ("wrong", "missing") for way in ways)
    culprits = culprits_of(subject.values, theta, fold_in(key, "modules")) if broken else ()
    return Audit(ways, culprits, num, subject.kinks, subject.values.dtype, key)


def _way(name: str, order: int, verdict: Callable[[], tuple[Verdict, float, float]]) -> Way:
    """The verdict, the deviation and what is allowed; a way that torch does not have is missing."""
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a way that is slow or rough: the table says so
            return Way(name, order, *verdict())
    except (NotImplementedError, RuntimeError, ValueError) as err:
        return Way(name, order, "missing", math.nan, math.nan, str(err).splitlines()[0][:80])


class _Subject:
    """What is examined: a loss, at a point, along directions, with derivatives along these from values alone."""

    def __init__(self, loss: Loss, theta: Tensor, key: Key, num: int):
        self.loss, self.theta, self.kinks, values = loss, theta, has_kinks(loss, theta), values_of(loss)
        self.values, self.dirs = values, _directions(loss, theta, key, num)
        self.sums = [d + self.dirs[i - 1] for i, d in enumerate(self.dirs)]
        self.slopes, self.curvatures = zip(*(differenced(values, theta, d, self.kinks) for d in self.dirs), strict=True)
        self.together = [differenced(values, theta, d, self.kinks)[1] for d in self.sums]
        before = [self.curvatures[-1], *self.curvatures[:-1]]
        self.mixed = [
            Derivative((b.value - c.value - a.value) / 2, (a.error + b.error + c.error) / 2)
            for b, c, a in zip(self.together, self.curvatures, before, strict=True)
        ]

    def same(self, name: str, order: int, pair: Callable[[], Any], allowed: float) -> Way:
        """Whether two tensors are one, up to what is allowed relative to the second."""

        @torch.no_grad()
        def verdict() -> tuple[Verdict, float, float]:
            one, other = (x.double() for x in pair())
            size = float(other.norm())
            deviation = float((one - other).norm()) / size if size else float(one.norm() > 0)
            if allowed > _RESOLVED and deviation <= allowed:
                return "undecided", deviation, allowed
            return "right" if deviation <= allowed else "wrong", deviation, allowed

        return _way(name, order, verdict)

    def right(self, name: str, method: Method) -> Way:
        """Whether a method has the derivatives of the values; see `audit`."""

        @torch.enable_grad()
        def verdict() -> tuple[Verdict, float, float]:
            resolved = [each for each in self._compared(method) if each is not None]
            if not resolved:
                return "undecided", math.nan, math.nan
            ordered = sorted(resolved, key=lambda pair: pair[0] / pair[1])
            deviation, allowed = ordered[len(ordered) // 2 if self.kinks else -1]
            return "wrong" if deviation > allowed else "right", deviation, allowed

        return _way(name, method.order, verdict)

    def _compared(self, method: Method) -> Iterator[tuple[float, float] | None]:
        """Deviation and what is allowed, relative, of every derivative; None where differences do not decide.

        Along every direction; in second order also for neighbours: e'Hd, or along their sum where only numbers are.
        The error of a method that knows its own (`hessian_difference`) belongs to the judge's: not held against it.
        """
        of, dirs = method.of(self.loss, self.theta), self.dirs
        derivatives = [of(d).detach() for d in dirs]
        probes = [*zip(derivatives, dirs, self.slopes if method.order == 1 else self.curvatures, strict=True)]
        if method.order == 2 and derivatives[0].ndim:
            probes += zip(derivatives, [dirs[-1], *dirs[:-1]], self.mixed, strict=True)
        elif method.order == 2:
            probes += ((of(d).detach(), d, judge) for d, judge in zip(self.sums, self.together, strict=True))
        own = getattr(of, "error", float)() / 5  # a typical error, not a bound: half of it again is nothing wrong
        for derivative, d, judge in probes:
            value, size = along(derivative, d), norm(d) * norm(derivative) if derivative.ndim else abs(judge.value)
            scale = max(abs(value), abs(judge.value))
            error = 10 * (judge.error + own * size) + 64 * self.loss.net.unit_roundoff * size
            resolved = error <= _RESOLVED * scale
            yield (abs(value - judge.value) / scale, error / scale + _SAME) if resolved else None

    def mapped_values(self) -> tuple[Tensor, Tensor]:
        points = torch.stack([self.theta + 1e-2 * d for d in self.dirs])
        return vmap(self.loss)(points), torch.stack([*map(self.loss, points)])

    def leaf_by_leaf(self) -> tuple[Tensor, Tensor]:
        point = self.theta + 1e-2 * self.dirs[0]
        leaves = self.loss.params(point)
        return self.loss.at_leaves(lambda k, _: leaves[k]), self.loss(point)

    def alone(self) -> tuple[Tensor, Tensor]:
        """The first few sequences of the first batch."""
        one = replace(self.loss, batches=self.loss.batches[:1])
        sums, _ = one.terms(self.theta)
        singles = (cut(one.batches[0], slice(i, i + 1), len(sums)) for i in range(min(_SEQUENCES, len(sums))))
        rows = [replace(one, batches=(single,)).terms(self.theta)[0].sum() for single in singles]
        return torch.stack(rows), sums[: len(rows)]

    def mapped_products(self) -> tuple[Tensor, Tensor]:
        H = hessian(self.loss, self.theta, check=False)
        return vmap(H)(torch.stack(self.dirs)), torch.stack([*map(H, self.dirs)])

    def symmetric(self) -> tuple[Tensor, Tensor]:
        u, v, *_ = self.dirs
        Hu, Hv = map(hessian(self.loss, self.theta, check=False), (u, v))
        size = (norm(Hu) * norm(v) + norm(Hv) * norm(u)) / 2
        return torch.tensor([size, dot(v, Hu)]), torch.tensor([size, dot(u, Hv)])


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
