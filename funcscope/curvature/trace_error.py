"""Errors over data of a trace, beside those over its random probes."""

from __future__ import annotations

import torch

from ..core.checks import check_count
from ..core.estimate import Crossed
from ..core.keys import Key, check_key, fold_in, rademacher
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal
from .sequence_forms import NUMBERS, Matrix, SequenceForms, check_sum, sequence_forms
from .summary import MATRICES


class TraceErrors(Result):
    """A trace from random probes and a sample of sequences, with the errors of both; made by `trace_errors`."""

    forms: SequenceForms = internal()
    key: Key

    @derived("trace")
    def trace(self) -> Crossed:
        return self.forms.mean

    @property
    def head(self) -> str:
        return f"trace from {len(self.forms.terms)} probes and {len(self.forms.weights)} sequences"

    @property
    def notes(self) -> list[str]:
        return self.forms.notes

    def minus(self, other: TraceErrors) -> Crossed:
        """The difference to another model's trace, in pairs of sequences, and of probes where the keys are the same.

        Raises ValueError for other sequences or another number of probes.
        """
        return self.forms.minus(other.forms).mean


def trace_errors(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num: int = 32,
    matrix: Matrix = "hessian",
    group: int | None = None,
    chunk_size: int | None = None,
    check: bool = True,
) -> TraceErrors:
    r"""The trace by Hutchinson's estimate, with its error over the probes, over the sequences, and over both.

    $$\widehat{\mathrm{tr}} = \frac{1}{m} \sum_j \frac{\sum_i z_j^\top H_i z_j}{\sum_i w_i}.$$

    z are random signs, probe j from `fold_in(key, j)`: those of `linalg.hutchinson_trace`, whose value and error over probes
    this has. More probes leave the error over sequences where it is. check: one product of the whole, for the first probe,
    must agree with the sum over sequences.

    Raises ValueError where it does not (statistics of the batch), and as `sequence_forms` does.

    Hutchinson (1990), doi:10.1080/03610919008812866.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(1, 1, bias=False)), fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1))], square)
    >>> print(trace_errors(loss, net.theta, key=fs.key(0), num=2).trace)          # the mean of x^2: 1, 4, 9
    4.667 ± 0 over 2 draws, ± 2.3 over data, ± 2.3 in all
    """
    check_key(key)
    check_count("num", num)
    theta = Loss.vector(loss, theta)
    rows, together = [], max(1, NUMBERS // len(theta))  # probes are as long as theta
    for first in range(0, num, together):
        probes = torch.stack([rademacher(fold_in(key, j), theta) for j in range(first, min(first + together, num))])
        rows.append(sequence_forms(loss, theta, probes, matrix=matrix, group=group, chunk_size=chunk_size))
    forms = SequenceForms(torch.cat([row.terms for row in rows]), rows[0].weights, rows[0].group)
    if check:
        z = rademacher(fold_in(key, 0), theta)
        with torch.no_grad():
            whole = (z @ MATRICES[matrix](loss, theta)(z)).cpu().double()[None]
        scale = forms.terms[0].abs().sum() / forms.weights.sum()
        check_sum(forms.values[:1], whole, scale.new_zeros(1), torch.finfo(theta.dtype).eps, float(scale))
    return TraceErrors(forms, key)
