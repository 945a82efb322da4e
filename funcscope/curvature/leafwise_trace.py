"""Traces of the Hessian and the Gauss-Newton matrix of models that fill the memory: probes that exist a leaf at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor
from torch.func import jvp

from ..core.checks import check_choice, check_count
from ..core.keys import Key, check_key, draw, fold_in
from ..core.layout import Layout
from ..core.leaf_rows import Part, extent, row_slices
from ..core.objective import Loss, Theta, per_sequence
from ..core.tables import counted
from .hessian import Matrix
from .leaf_lines import BatchLine, second_derivatives
from .outputs import hessian_of
from .pullbacks import ONE_AT_A_TIME, named_if_missing
from .sequence_forms import SequenceForms, TraceErrors


def leafwise_trace(loss: Loss, theta: Theta, *, key: Key, num: int = 8, matrix: Matrix = "hessian") -> TraceErrors:
    r"""The trace by Hutchinson's estimate with errors over probes and sequences, at the memory of the largest parameter.

    $$\widehat{\mathrm{tr}} = \frac{1}{m} \sum_j \frac{\sum_i q_{ji}}{\sum_i w_i}, \qquad
      q_{ji} = \frac{d^2}{da^2} L_i(\theta + a z_j)\Big|_0 \quad\text{or}\quad (J_i z_j)^\top M_i\, (J_i z_j),$$

    $L_i$ the summed token losses of sequence i, $z_j$ random signs, drawn from `fold_in(key, j)` a few rows of a leaf at a
    time while the model runs. Forward mode over forward mode keeps no graph, and one `jvp` gives the Gauss-Newton form:
    nothing of the length of theta is made, and the matrices of a large vocabulary exist some rows at a time. Of a model that
    fits, `trace_errors` has the same from products, sooner for many probes.

    theta: `net.params` as they are stored, so that no copy is made, or a vector. matrix: as in `trace_errors`.
    Cost: per probe one pass of some 8 forwards, for `ggn` some 3, and two draws of theta's length. Tangents have the dtype
    that the model computes in: in bfloat16 a form carries a relative error of some 1e-2, which
    `functional(dtype=torch.float32)` takes away at the memory of that leaf in float32.

    Assumes that a row of the output belongs to the sequence of that row. The error over data is that at these probes, and
    larger than the one of the trace itself where probes are few. Forms of a few large eigenvalues are skewed: below some 12
    probes an interval covers less than its level, 87 % instead of 95 % of a small net's Gauss-Newton trace at 6.

    Raises ValueError where a kernel has no forward derivative, where a form is not finite, and for `ggn` of a criterion whose
    outputs do not have a row per sequence.

    Hutchinson (1990), doi:10.1080/03610919008812866.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))], square)
    >>> print(leafwise_trace(loss, net.params, key=fs.key(0), num=2).trace)          # the mean of x^2: 1, 4, 9
    4.667 ± 0 over 2 draws, ± 2.3 over data, ± 2.3 in all
    """
    check_key(key)
    check_count("num", num)
    check_choice("matrix", matrix, get_args(Matrix))
    params = loss.leaves(theta)
    loss.check_function()
    form = second_derivatives if matrix == "hessian" else _gauss_newton
    rows, weights = [], Tensor()
    with named_if_missing(loss, "the trace needs forward derivatives"), ONE_AT_A_TIME:
        for j in range(num):
            signs = _Signs(loss.layout, fold_in(key, j), next(iter(params.values())).device)
            parts = [form(BatchLine(loss, params, signs, batch)) for batch in loss.batches]
            sums, weights = (torch.cat(each).cpu().double() for each in zip(*parts, strict=True))
            rows.append(sums)
    real = weights != 0
    forms = torch.stack(rows)[:, real]
    if bad := int((~forms.isfinite()).sum()):
        raise ValueError(
            f"{bad} of {forms.numel()} forms, of {counted(num, 'probe')} and {counted(forms.shape[1], 'sequence')}, are not "
            "finite: check the weights and the batch, or compute in a wider dtype (`dtype` of `functional`)."
        )
    return TraceErrors(SequenceForms(forms, weights[real]), key)


class _Signs:
    """A probe, some rows of a leaf at a time."""

    def __init__(self, layout: Layout, key: Key, device: torch.device):
        self.layout, self.key, self.device = layout, key, device

    def parts(self, name: str) -> Iterator[Part]:
        leaf = self.layout.by_name[name]
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        for rows in row_slices(leaf):
            span, shape = extent(leaf, rows)
            z = draw(fold_in(self.key, name), leaf.numel, "rademacher", *span, device=self.device)
            yield Part(rows, z.view(shape).to(self.device, dtype))


def _gauss_newton(line: BatchLine) -> tuple[Tensor, Tensor]:
    criterion = line.loss.criterion
    out, moved = jvp(line.outputs, *line.ends)
    _, weight = criterion.scored(out, line.targets)
    weights = per_sequence(weight)
    if out.ndim == 0 or len(out) != len(weights):
        raise ValueError(
            f"the outputs have the shape {tuple(out.shape)} and the batch has {len(weights)} sequences: parts of the "
            'Gauss-Newton matrix need a row for each. Take `matrix="hessian"`, or `fs.hutchinson_trace` of `fs.ggn`.'
        )
    curved = hessian_of(criterion, out, line.targets, moved)
    return per_sequence(moved.double() * curved.double()), weights
