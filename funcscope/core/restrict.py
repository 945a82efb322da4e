"""The loss on a line, a plane or a subspace, as a function phi of the coefficients.

Slopes, curvatures, lines, planes and barriers are values, derivatives and vmaps of phi.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_count, check_device, check_flat, check_positive
from .directions import Direction, stack
from .leaf_rows import Part
from .objective import Loss, Theta, check_point

LAZY_ABOVE = 2**24
"""Directions with more numbers than this in all are made leaf by leaf while the model runs (64 MiB of float32)."""

Phi = Callable[[Tensor | float | int], Float[Tensor, ""]]


@runtime_checkable
class Leaves(Protocol):
    """Whatever can say where to go, some rows of a leaf at a time (`directions.row_slices`); they are the caller's."""

    def parts(self, name: str) -> Iterator[Part]: ...


@runtime_checkable
class LeafDirection(Leaves, Protocol):
    """The same, of known length."""

    @property
    def norm(self) -> float: ...


def restrict(
    loss: Loss,
    base: Theta,
    dirs: Tensor | Leaves | Sequence[Direction],
    *,
    lazy: bool | None = None,
) -> Phi:
    r"""$\varphi(a) = L(\theta + \sum_i a_i d_i)$, a function of k coefficients.

    base: theta as a flat vector or as a dict of parameters.
    dirs: k directions (a sequence of `Direction`, or a tensor of shape (k, P)): phi takes shape (k,). One direction
    (a `Direction`, or shape (P,)): phi takes a scalar.
    lazy: make each leaf of the perturbed parameters when the model uses it, at the memory of the largest leaf in the
    dtype that the model computes in, and draw it again at every evaluation and batch; or hold the directions densely.
    Default: lazy above 2^24 numbers. A lazy phi of one direction takes a plain float for the least memory and time, where
    no derivative is wanted.

    phi composes with `grad`, `jvp`, `jvp` of `jvp` (outside of `no_grad`: SiLU has no second derivative inside) and
    `vmap`; a `vmap` over coefficients draws each direction once.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(1, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2)
    >>> loss = objective.objective(net, [(torch.ones(1, 1), torch.zeros(1, 1))], square)
    >>> phi = restrict(loss, torch.tensor([3.0]), torch.tensor([1.0]))          # (3 + a)^2
    >>> float(phi(torch.tensor(1.0))), float(torch.func.grad(phi)(torch.tensor(0.0)))
    (16.0, 6.0)
    """
    check_point(loss, base)
    if not isinstance(dirs, (Tensor, Leaves, Sequence)):
        raise TypeError(
            f"`dirs` must be directions or a tensor, got a {type(dirs).__name__}: `fs.directions(net, key=fs.key(0), num=2)`."
        )
    single = not isinstance(dirs, Sequence) and not (isinstance(dirs, Tensor) and dirs.ndim == 2)
    if isinstance(dirs, Tensor):
        if lazy:
            raise ValueError("`lazy` needs directions that can be made leaf by leaf, not a dense tensor.")
        check_flat("dirs", dirs if single else dirs[0], loss.layout.num)
        return _dense(loss, base, dirs)
    listed: Sequence[Leaves] = [dirs] if single else dirs  # type: ignore[list-item, assignment]
    check_count("the number of directions", len(listed))
    if lazy is None:
        lazy = len(listed) * loss.layout.num > LAZY_ABOVE
    if lazy:
        return _lazy(loss, base, listed, single)
    rows = stack(listed)  # type: ignore[arg-type]
    return _dense(loss, base, rows[0] if single else rows)


def grid(num: int, *, span: float, dtype: torch.dtype = torch.float32) -> Float[Tensor, "m 2"]:
    """The points of a num x num grid on [-span, span]^2, first coefficient slowest: reshape results to (num, num).

    >>> grid(3, span=0.5)[:4].tolist()
    [[-0.5, -0.5], [-0.5, 0.0], [-0.5, 0.5], [0.0, -0.5]]
    """
    check_count("num", num, least=2)
    check_positive("span", span)
    axis = torch.linspace(-span, span, num, dtype=dtype)
    return torch.cartesian_prod(axis, axis)


def _dense(loss: Loss, base: Theta, dirs: Tensor) -> Phi:
    theta = base if isinstance(base, Tensor) else loss.layout.ravel(base, dirs.dtype)
    check_device("the direction", dirs.device, "theta", theta.device)

    def phi(a: Tensor | float | int) -> Tensor:
        _check_coefficients(a, tuple(dirs.shape[:-1]))
        if not isinstance(a, Tensor):
            return loss(torch.add(theta, dirs, alpha=float(a)))
        a = a.to(dirs.dtype)
        return loss(theta + (a * dirs if dirs.ndim == 1 else a @ dirs))

    return phi


def _lazy(loss: Loss, base: Theta, dirs: Sequence[Leaves], single: bool) -> Phi:
    params = loss.leaves(base)

    def phi(a: Tensor | float | int) -> Tensor:
        _check_coefficients(a, () if single else (len(dirs),))
        steps = list(a) if isinstance(a, Tensor) and not single else [a]

        def leaf(name: str, _: Tensor) -> Tensor:
            return moved_leaf(params[name], steps, [d.parts(name) for d in dirs], loss.layout.by_name[name].dtype)

        return loss.at_leaves(leaf)

    return phi


def _check_coefficients(a: Tensor | float | int, shape: tuple[int, ...]) -> None:
    got = tuple(a.shape) if isinstance(a, Tensor) else () if isinstance(a, Real) else f"a {type(a).__name__}"
    if got != shape:
        what = f"a tensor of shape {shape}, one per direction" if shape else "a number, as there is one direction"
        raise ValueError(
            f"phi takes its coefficients as {what}; got {got}. Arrays and lists become tensors by `torch.as_tensor`; several "
            "points are `torch.func.vmap(phi)(points)`."
        )


def moved_leaf(
    value: Tensor, steps: Sequence[Tensor | float | int], dirs: Sequence[Iterator[Part]], dtype: torch.dtype
) -> Tensor:
    """value + sum of step * direction in `dtype`, computed in the directions' own, a few rows at a time."""
    out = None
    for rows, moved in moved_rows(value, steps, dirs):
        if moved.shape == value.shape:
            return moved.to(dtype)
        if out is None:
            out = moved.new_empty(value.shape, dtype=dtype)  # of `moved`, as it is mapped and differentiated like it
        out[rows] = moved
    assert out is not None
    return out


def moved_rows(value: Tensor, steps: Sequence[Tensor | float | int], dirs: Sequence[Iterator[Part]]) -> Iterator[Part]:
    """value + sum of step * direction, some rows at a time, in the directions' dtype."""
    for parts in zip(*dirs, strict=True):
        rows = parts[0].rows
        moved = value[rows] if value.ndim else value
        for step, part in zip(steps, parts, strict=True):
            moved = _stepped(moved, step, part.values)
        yield Part(rows, moved)


def _stepped(value: Tensor, step: Tensor | float | int, part: Tensor) -> Tensor:
    """value + step * part, in the dtype of the part."""
    if not isinstance(step, Tensor):
        return torch.add(value.to(part.dtype), part, alpha=float(step))
    return torch.addcmul(value.to(part.dtype), step.to(part.dtype), part)
