"""The documented summary of the Hessian, and curvature block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.checks import check_choice, check_options
from ..core.keys import Key, check_key, fold_in
from ..core.layout import By, Layout
from ..core.objective import Loss, Theta
from ..linalg.eigen import Eigenpairs, Which, eigenpairs
from ..linalg.matvec import Matvec
from ..linalg.summary import SpectrumSummary, spectrum_summary
from ..linalg.trace import BlockTraces, block_traces
from .hessian import MATRICES, Matrix, hessian
from .sequence_forms import spacing


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
    trace_matvecs, damping, max_matvecs, check, rounding (default: that of the dtypes that the model computes in).

    Raises as `hessian` and `spectrum_summary` do.

    Yao, Gholami, Keutzer, Mahoney (2020), arXiv:1912.07145; Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159.

    >>> import torch, funcscope as fs
    >>> data = [(torch.diag(torch.tensor([2.0, 4.0, 6.0, 8.0])), torch.zeros(4, 1))]
    >>> net = fs.functional(torch.nn.Linear(4, 1, bias=False))
    >>> loss = fs.objective(net, data, fs.custom(lambda out, y: (out - y) ** 2 / 2))
    >>> summary = hessian_summary(loss, net.theta, key=fs.key(0), num=1)
    >>> round(summary.max_eigenvalue, 4), round(float(summary.trace.value), 4)       # x^2 / 4: 1, 4, 9, 16
    (16.0, 30.0)
    """
    check_key(key)
    check_choice("matrix", matrix, MATRICES)
    check_options("hessian_summary", spectrum_summary, options)
    theta = Loss.vector(loss, theta)
    options.setdefault("rounding", spacing(loss, theta) ** 0.5)
    return spectrum_summary(MATRICES[matrix](loss, theta, keep=keep, head_chunk=head_chunk), theta, key=key, **options)


def block_slices(layout: Layout, by: By) -> dict[str, list[slice]]:
    """The coordinates of every block of whole leaves, as slices of theta; neighbours are joined.

    >>> import torch
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
    theta = Loss.vector(loss, theta)
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
    watch: Callable[[Matvec], Matvec] | None = None,
    **options: Any,
) -> dict[str, Eigenpairs]:
    """The extreme eigenvalues of every diagonal block H_bb, block by block.

    Each block is the Hessian of the loss in its own parameters, the others held fixed: its products do not pay for the
    gradients of the others. Fewer than `num` where a block is smaller. options: those of `linalg.eigenpairs`; watch: what
    is used in the place of each block's product, one that counts, say.
    The largest is at most the largest of the whole matrix (Cauchy interlacing), and so is the smallest, from below.
    """
    check_key(key)
    check_choice("matrix", matrix, MATRICES)
    check_options("hessian_block_eigenvalues", eigenpairs, options)
    theta = Loss.vector(loss, theta)
    block_slices(loss.layout, by)  # refuses what does not keep parameters whole
    groups = loss.layout.group_of(by)
    blocks: dict[str, Eigenpairs] = {}
    for block in dict.fromkeys(groups.values()):
        part = only(loss, theta, [name for name, group in groups.items() if group == block])
        at = part.net.theta.to(theta)
        ends = "magnitude" if which == "both" and len(at) == 1 else which  # one value, which is both ends
        most = len(at) // 2 if ends == "both" else len(at)
        matvec = MATRICES[matrix](part, at, keep=keep)
        matvec = watch(matvec) if watch else matvec
        blocks[block] = eigenpairs(matvec, at, key=fold_in(key, block), num=min(num, most), which=ends, **options)
    return blocks


def only(loss: Loss, theta: Theta, names: list[str]) -> Loss:
    """The loss as a function of some of the parameters, the others held where theta has them."""
    return replace(loss, net=loss.net.only(names, loss.params(Loss.vector(loss, theta))))
