"""What ranks must agree on before and in a product: values of the loss that no tensor says, and vectors that are plain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..core.apart import coupled, tolerance
from ..core.batches import Prepared, num_rows, parts_between
from ..core.checks import check_flat
from ..core.objective import Loss, Theta
from ..core.processes import Processes
from ..core.purity import moved


def check_same_loss(loss: Loss, theta: Theta, batches: Prepared, ranks: Processes) -> None:
    """The first sequence of all data that is scored has one loss on every rank, up to the model's rounding.

    That tells criteria of one name apart, activations, and objects among the inputs. A batch that cannot be cut is whole.
    """
    num = sum(num_rows(pair) for pair in batches)
    for part, *_ in (part for i in range(num) for part in parts_between(batches, i, i + 1)):
        each = ranks.together("comparing a loss near theta", lambda part=part: _terms(loss, theta, part))
        for rank, terms in enumerate(each):
            if not _equal(terms, each[0], tolerance(loss)):
                totals = [float(sums.sum()) for sums, _ in (terms, each[0])]
                raise ValueError(
                    f"the loss of one sequence near theta of rank {rank} is {totals[0]:.6g}, that of rank 0 {totals[1]:.6g}: "
                    "every rank must have the same model and criterion, and these have other functions of one name, other "
                    "activations or other objects among the inputs; make them by the same code on all."
                )
        if bool(each[0][1].any()):
            return


def check_cuts(loss: Loss, theta: Theta, cuts: Iterable[tuple[Any, Any, slice | None]]) -> None:
    """The sequences of a batch that is cut have the losses that they have in the whole of it."""
    for part, whole, at in cuts:
        alone, beside = (_terms(loss, theta, pair)[0] for pair in (part, whole))
        if at is None:  # what a rank with fewer parts does meanwhile
            continue
        off = (alone - beside[at]).abs().max() if len(alone) == at.stop - at.start else float("inf")
        if float(off) > tolerance(loss) * float(beside.abs().max()):
            raise ValueError(f"sequences of one rank have other losses without those of the next: {coupled()}")


def check_vector(v: Tensor, num: int) -> None:
    """Raises ValueError for what is no vector of `num` entries, is mapped over, or would be differentiated."""
    check_flat("v", v, num)
    if torch._C._functorch.is_functorch_wrapped_tensor(v) or (v.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "`v` must be a plain vector: products over several ranks are neither mapped nor differentiated. Give one "
            "vector at a time, detached or under `torch.no_grad()`."
        )


def _terms(loss: Loss, theta: Theta, pair: Any) -> tuple[Tensor, Tensor]:
    """Sums and weights near theta: at theta itself losses may be rounding and no more."""
    with torch.no_grad():
        sums, weights = replace(loss, batches=(pair,)).terms(tree_map(moved, theta))
    return sums.double().cpu(), weights.double().cpu()


def _equal(terms: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], rtol: float) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=0, equal_nan=True)
        for x, y in zip(terms, others, strict=True)
    )
