"""The documented summary of the Hessian, and curvature block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from ..core.checks import check_choice, check_options
from ..core.keys import Key, check_key, fold_in
from ..core.layout import By, Layout
from ..core.objective import Loss, Theta
from ..linalg.eigen import Eigenpairs, Which, eigenpairs
from ..linalg.matvec import Matvec
from ..linalg.summary import SpectrumSummary, spectrum_summary
from ..linalg.trace import BlockTraces, block_traces
from .ggn import ggn
from .hessian import hessian
from .pullbacks import flat

Matrix = Literal["hessian", "ggn"]
_MATRICES = {"hessian": hessian, "ggn": ggn}


def hessian_summary(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    matrix: Matrix = "hessian",
    keep: bool = True,
    head_chunk: int | None = None,
    **options: Any,
) -> SpectrumSummary:
    """Both ends of the Hessian's spectrum, its trace and its density, with residuals and standard errors.

    matrix: `ggn` for the Gauss-Newton matrix instead, the Fisher information where the loss is a cross-entropy.
    keep, head_chunk: see `hessian`. options: those of `linalg.spectrum_summary`: num, tol, num_probes, steps,
    trace_matvecs, damping, max_matvecs, check.

    Raises as `hessian` and `spectrum_summary` do.

    Yao, Gholami, Keutzer, Mahoney (2020), arXiv:1912.07145; Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159.

    >>> from funcscope.core import criterion, keys, model, objective
    >>> net = model.functional(torch.nn.Linear(4, 1, bias=False))
    >>> square = criterion.custom(lambda out, y: (out - y) ** 2 / 2)
    >>> data = [(torch.diag(torch.tensor([2.0, 4.0, 6.0, 8.0])), torch.zeros(4, 1))]
    >>> found = hessian_summary(objective.objective(net, data, square), net.theta, key=keys.key(0), num=1)
    >>> round(found.max_eigenvalue, 4), round(float(found.trace.value), 4)       # x^2 / 4: 1, 4, 9, 16
    (16.0, 30.0)
    """
    check_key(key)
    check_choice("matrix", matrix, _MATRICES)
    check_options("hessian_summary", spectrum_summary, options)
    theta = flat(loss, theta)
    return spectrum_summary(_MATRICES[matrix](loss, theta, keep=keep, head_chunk=head_chunk), theta, key=key, **options)


def block_slices(layout: Layout, by: By) -> dict[str, list[slice]]:
    """The coordinates of every block of whole leaves, as slices of theta; neighbours are joined.

    >>> from funcscope.core.layout import Layout
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> block_slices(Layout.of(net), "layer")
    {'0': [slice(0, 9, None)], '2': [slice(9, 13, None)]}
    """
    if by == "filter":
        raise ValueError("`by` must keep parameters whole: 'tensor', 'layer', 'module' or a callable, got 'filter'.")
    blocks: dict[str, list[slice]] = {}
    for leaf, group in zip(layout.leaves, layout.group_of(by).values(), strict=True):
        slices = blocks.setdefault(group, [])
        if slices and slices[-1].stop == leaf.offset:
            slices[-1] = slice(slices[-1].start, leaf.slice.stop)
        else:
            slices.append(leaf.slice)
    return blocks


def hessian_block_traces(
    loss: Loss, theta: Theta, *, key: Key, by: By = "layer", num: int = 32, matvec: Matvec | None = None
) -> BlockTraces:
    """tr(H_bb) of every block b at once, from one sweep of `num` products with random signs; unbiased.

    by: `tensor`, `layer` (transformer blocks), `module` (attention, mlp, embedding, norm, other), or a callable on names.
    matvec: another matrix over theta, or a Hessian whose graph is kept already.

    The blocks' errors include their coupling to the other blocks; see `linalg.block_traces`.
    """
    theta = flat(loss, theta)
    matvec = hessian(loss, theta) if matvec is None else matvec
    return block_traces(matvec, theta, block_slices(loss.layout, by), key=key, num=num)


def hessian_block_eigenvalues(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    by: By = "layer",
    num: int = 1,
    which: Which = "magnitude",
    matrix: Matrix = "hessian",
    keep: bool = True,
    **options: Any,
) -> dict[str, Eigenpairs]:
    """The extreme eigenvalues of every diagonal block H_bb, block by block.

    Each block is the Hessian of the loss in its own parameters, the others held fixed: its products do not pay for the
    gradients of the others. Fewer than `num` where a block is smaller. options: those of `linalg.eigenpairs`.
    The largest is at most the largest of the whole matrix (Cauchy interlacing), and so is the smallest, from below.
    """
    check_key(key)
    check_choice("matrix", matrix, _MATRICES)
    check_options("hessian_block_eigenvalues", eigenpairs, options)
    theta = flat(loss, theta)
    block_slices(loss.layout, by)  # refuses what does not keep parameters whole
    groups = loss.layout.group_of(by)
    found: dict[str, Eigenpairs] = {}
    for block in dict.fromkeys(groups.values()):
        part = only(loss, theta, [name for name, group in groups.items() if group == block])
        at = part.net.theta.to(theta)
        single = which == "both" and len(at) == 1  # one value, which is both ends
        num_here = min(num, len(at) // 2 if which == "both" and not single else len(at))
        found[block] = eigenpairs(
            _MATRICES[matrix](part, at, keep=keep),
            at,
            key=fold_in(key, block),
            num=num_here,
            which="magnitude" if single else which,
            **options,
        )
    return found


def only(loss: Loss, theta: Theta, names: list[str]) -> Loss:
    """The loss as a function of some of the parameters, the others held where theta has them."""
    at: Mapping[str, torch.Tensor] = loss.params(flat(loss, theta))
    return replace(loss, net=loss.net.only(names, at))
