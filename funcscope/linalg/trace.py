"""The trace of a symmetric operator, and of its blocks, from products with random vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Distribution, Key, fold_in, normal, rademacher, random
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..core.vectors import dot
from .algebra import Slices, check_slices
from .diagonal import check_draws, check_sampled, narrow, sketch, unit_products
from .matvec import Matvec, Products
from .space import Like, Space, space_of

Method = Literal["hutchinson", "hutch++", "xtrace", "exact"]


class TraceEstimate(Estimate):
    """A trace as the mean of `samples`, with its standard error and its price; prints the number of products as n.

    stderr: sd / sqrt(number of samples); nan where there is one sample only, 0 for `exact`.
    """

    value: Float[Tensor, ""] = quantity("trace", stderr="stderr")
    num_matvecs: int
    method: Method
    samples: Float[Tensor, " n"] = quantity("sample of the trace", per="probe")
    """What `value` is the mean of, float64 on the CPU: one per probe; for XTrace one per vector left out."""

    @classmethod
    def of_samples(cls, samples: Float[Tensor, " n"], num_matvecs: int, method: Method) -> TraceEstimate:
        mean = Estimate.of(samples)
        stderr = torch.zeros_like(mean.value) if method == "exact" else mean.stderr
        return cls(mean.value, stderr, mean.num, num_matvecs, method, samples)

    def __str__(self) -> str:
        return f"{float(self.value):.4g} ± {float(self.stderr):.2g} (n = {self.num_matvecs})"


class BlockTraces(Result):
    """Traces of several blocks from the same probes, by name: `traces["head"]` is an `Estimate`."""

    samples: dict[str, Float[Tensor, " n"]] = internal()
    total: TraceEstimate = quantity("trace", name="trace")

    def __getitem__(self, name: str) -> Estimate:
        return Estimate.of(self.samples[name])

    @derived("trace of the block", per="block", name="block_trace")
    def estimates(self) -> dict[str, Estimate]:
        return {name: self[name] for name in self.samples}

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": list(self.samples)}

    @property
    def head(self) -> str:
        probes = len(next(iter(self.samples.values())))
        return f"traces of {counted(len(self.samples), 'block')} from {counted(probes, 'probe')}"


def hutchinson_trace(
    matvec: Matvec, like: Like, *, key: Key, num: int, distribution: Distribution = "rademacher"
) -> TraceEstimate:
    r"""Trace of A from `num` products with random vectors; unbiased for every square A.

    $$\widehat{\mathrm{tr}} = \tfrac1m \textstyle\sum_i z_i^\top A z_i, \qquad
      \mathrm{Var} = \tfrac2m \big(\|A\|_F^2 - \textstyle\sum_j A_{jj}^2\big)\ \ (A = A^\top)$$

    for random signs, and $2\|A\|_F^2/m$ for `distribution="normal"`, which is never less.

    like: shape (P,), gives dtype and device, or `net.shares` of a model on several ranks; num = m, the number of samples and
    of products. Samples are independent,
    probe i depends on `fold_in(key, i)` only. One probe has no standard error: it is nan.

    Hutchinson (1990), doi:10.1080/03610919008812866. Mean and variances: proofs/hutchinson.py.

    >>> from funcscope.core.keys import key
    >>> print(hutchinson_trace(lambda v: 2 * v, torch.zeros(5), key=key(0), num=4))  # signs are exact on a diagonal
    10 ± 0 (n = 4)
    """
    space = space_of(like)
    check_draws(key, num, 1, distribution)
    products = Products(matvec, space)
    return TraceEstimate.of_samples(_forms(products, space, key, num, distribution), num, "hutchinson")


def block_traces(
    matvec: Matvec, like: Float[Tensor, " p"], groups: Mapping[str, Slices], *, key: Key, num: int
) -> BlockTraces:
    r"""Traces of all diagonal blocks $A_{bb}$ from one sweep of `num` products; unbiased for every square A.

    $$\widehat{\mathrm{tr}}_b = \tfrac1m \textstyle\sum_i z_{i,b}^\top (A z_i)_b, \qquad
      \mathrm{Var} = \tfrac1m \Big(2\|A_{bb}\|_F^2 - 2\textstyle\sum_{j \in b} A_{jj}^2
      + \sum_{c \ne b} \|A_{bc}\|_F^2\Big)\ \ (A = A^\top)$$

    for random signs z. The last sum is the price of one sweep for all blocks: the coupling to the other coordinates,
    which probes of one block at a time (`masked`) would not have. Two blocks have covariance $\|A_{bc}\|_F^2/m$.

    groups: name -> slices of the flat vector. Where they share no coordinate and leave none out, the estimates sum to
    `total`, the Hutchinson estimate with the same key, sample by sample up to rounding. Groups may overlap each other.
    One probe has no standard error: it is nan.

    Raises ValueError where a group is empty, holds a coordinate twice or reaches over the end.

    Hutchinson (1990), doi:10.1080/03610919008812866. Mean, variance, covariance: proofs/hutchinson.py.

    >>> from funcscope.core.keys import key
    >>> halves = {"first": [slice(0, 2)], "last": [slice(2, 5)]}
    >>> print(block_traces(lambda v: 2 * v, torch.zeros(5), halves, key=key(0), num=4)["last"])
    6 ± 0 (n = 4)
    """
    check_sampled(like, key, num, 1)
    for name, slices in groups.items():
        check_slices(f"groups[{name!r}]", slices, len(like))
    products = Products(matvec)
    samples, total = {name: torch.zeros(num, dtype=torch.float64) for name in groups}, []
    for i in range(num):
        z = rademacher(fold_in(key, i), like)
        az = products(z)
        for name, slices in groups.items():
            samples[name][i] = sum(dot(z[s], az[s]) for s in slices)
        total.append(dot(z, az))
    return BlockTraces(samples, TraceEstimate.of_samples(torch.tensor(total, dtype=torch.float64), num, "hutchinson"))


def hutchpp_trace(
    matvec: Matvec, like: Float[Tensor, " p"], *, key: Key, num: int, distribution: Distribution = "rademacher"
) -> TraceEstimate:
    r"""Trace of A, exact on the part that a third of the products finds, Hutchinson's estimate on the rest; unbiased.

    $$\mathrm{tr}(Q^\top A Q) + \tfrac1g \textstyle\sum_i z_i^\top (I - QQ^\top) A (I - QQ^\top) z_i$$

    with Q an orthonormal basis of A times $\lfloor m/3 \rfloor$ random vectors and $g = m - 2 \lfloor m/3 \rfloor$
    fresh vectors z. For A of rank below m/3, exact up to rounding; for positive semi-definite A the relative error is
    of order 1/m, Hutchinson's $1/\sqrt m$.

    like: shape (P,), gives dtype and device; num = m, at least 3. Fewer products are taken where A has a lower rank.
    From P products on, the unit vectors are taken instead: `exact`. Memory: m/3 vectors. Given Q the samples are
    independent, so that the standard error is that of a mean; with m = 3 there is one sample and it is nan.

    Meyer, Musco, Musco and Woodruff (2021), doi:10.1137/1.9781611976496.16.

    >>> from funcscope.core.keys import key
    >>> first = torch.tensor([3.0, 0, 0, 0, 0, 0, 0])
    >>> print(hutchpp_trace(lambda v: first * v, torch.zeros(7), key=key(0), num=6))
    3 ± 0 (n = 5)
    """
    check_sampled(like, key, num, 3, distribution)
    products = Products(matvec)
    if num >= len(like):
        return _exact(products, like)
    third, seed = num // 3, fold_in(key, "sketch")
    basis = sketch(products, lambda i: random(fold_in(seed, i), like, distribution), like, third).basis

    def rest(z: Tensor) -> Tensor:
        return z - (basis @ z) @ basis

    forms = _forms(products, space_of(like), fold_in(key, "rest"), num - 2 * third, distribution, rest)
    head = sum(dot(q, products(q)) for q in basis)
    return TraceEstimate.of_samples(head + forms, products.num, "hutch++")


def xtrace(matvec: Matvec, like: Float[Tensor, " p"], *, key: Key, num: int) -> TraceEstimate:
    r"""Trace of A by exchangeable test vectors: each is the fresh probe of the basis that all others make; unbiased.

    $$\widehat{\mathrm{tr}} = \tfrac1k \textstyle\sum_i \Big( \mathrm{tr}(Q_i^\top A Q_i)
      + (P - \mathrm{rank}\, Q_i) \, \dfrac{u_i^\top A u_i}{u_i^\top u_i} \Big), \qquad
      u_i = (I - Q_i Q_i^\top)\, \omega_i$$

    with $k = \lfloor m/2 \rfloor$ normal vectors $\omega$ and $Q_i$ an orthonormal basis of $A \omega_j$, $j \ne i$.
    Dividing by the length of u leaves its direction only, uniform on the unit sphere outside $Q_i$: the scatter of the
    length is gone, and an operator c I has none at all. One sketch serves all $Q_i$: with $A\Omega = QR$, $Q_i$ is Q
    without one direction, from $R^{-\top}$.

    like: shape (P,), float32 or float64, gives dtype and device; num = m, at least 2; of an odd number one is not
    used. From P products on, the unit vectors are taken instead: `exact`. For A of rank below k exact up to rounding,
    with k + rank products: what a product adds to the basis below k times the dtype's epsilon of the largest product is
    rounding and adds no direction. Memory: k vectors; time: $O(k^2 P)$ beside the products.

    stderr is sd / sqrt(k) of the k leave-one-out estimates (nan for k = 1). Any two share k - 2 vectors, so that they
    are not independent, and it is low rather than high: over 200 keys at P = 200 it was 0.8 to 1.0 of the true
    scatter, and |error| < 2 stderr in 70 to 90 % (Hutchinson: 85 to 95 %). Do not rely on it with k < 8, where the
    spectrum has a step at about k (0.63 of the true scatter), and where only rounding is left, which is not in it.

    Epperly, Tropp and Webber (2024), doi:10.1137/23M1548323.

    >>> from funcscope.core.keys import key
    >>> trace = xtrace(lambda v: 2 * v, torch.zeros(9, dtype=torch.float64), key=key(0), num=6)
    >>> round(float(trace.value), 9), float(trace.stderr) < 1e-12
    (18.0, True)
    """
    check_sampled(like, key, num, 2)
    products = Products(matvec)
    if num >= len(like):
        return _exact(products, like)
    k = num // 2
    space = sketch(products, lambda i: normal(fold_in(key, i), like), like, k)
    small = torch.stack([narrow(space.basis @ products(q)) for q in space.basis]) if space.rank else torch.zeros(0, 0)
    small = ((small + small.T) / 2).double()
    inside, squares = torch.zeros_like(space.coefs), torch.zeros(k, dtype=torch.float64)
    for i in range(k):  # drawn again: kept, they would double the memory
        omega = normal(fold_in(key, i), like)
        inside[:, i], squares[i] = narrow(space.basis @ omega), dot(omega, omega)
    out = space.left_out
    x = inside - out * (out * inside).sum(0)
    head = small.trace() - (out * (small @ out)).sum(0)
    form = space.forms - 2 * (x * space.coefs).sum(0) + (x * (small @ x)).sum(0)
    free = len(like) - space.rank + out.any(0).double()
    return TraceEstimate.of_samples(head + free * form / (squares - x.square().sum(0)), products.num, "xtrace")


def _forms(
    products: Products,
    space: Space,
    key: Key,
    num: int,
    distribution: Distribution,
    change: Callable[[Tensor], Tensor] = lambda z: z,
) -> Float[Tensor, " n"]:
    """z'Az for `num` draws, each changed before use."""
    probes = (change(space.draw(fold_in(key, i), distribution)) for i in range(num))
    return torch.tensor([space.dot(z, products(z)) for z in probes], dtype=torch.float64)


def _exact(products: Products, like: Tensor) -> TraceEstimate:
    trace = unit_products(products, like).cpu().double().sum()
    return TraceEstimate.of_samples(trace[None], products.num, "exact")
