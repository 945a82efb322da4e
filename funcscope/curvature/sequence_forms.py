"""Quadratic forms v'Hv, and traces, taken apart into what each sequence adds to them: where errors over data come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import Crossed, Estimate
from ..core.keys import Key, check_key, fold_in, rademacher
from ..core.objective import Loss, Theta
from ..core.progress import tick
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..linalg.matvec import Matvec
from .hessian import MATRICES, Matrix
from .leafwise import terms_at
from .outputs import Outputs
from .pullbacks import ONE_AT_A_TIME, kept_gradient, kept_sandwich, named_if_missing
from .rows import mapped, micro_batches, sizes_of

UNITS = 128
"""Groups of sequences that an error over data is taken from at most, unless `group` says otherwise: it is good to 6 %."""
NUMBERS = 2**22
"""Of the products of sequences that are made at once, unless `chunk_size` says otherwise."""


class SequenceForms(Result):
    r"""$q_{ji} = v_j^\top A_i v_j$ of k vectors and n sequences that are scored; made by `sequence_forms`.

    $A_i$ is the matrix of the *sum* of the weighted token losses of sequence i, so that the form of the mean is
    $\sum_i q_{ji} / \sum_i w_i$. Float64 on the CPU. Two of the same vectors, or of each model's own, on the same
    sequences have a difference, `second - first`, with errors in pairs.
    """

    terms: Float[Tensor, "k n"] = quantity("form of the sum", per=("vector", "sequence"))
    weights: Float[Tensor, " n"] = quantity("weight", per="sequence")
    group: int = 1
    """Sequences that are taken together, as one of n: errors are then those over groups."""

    @derived("form", per="vector", name="forms", stderr="stderr")
    def values(self) -> Float[Tensor, " k"]:
        """The forms of the whole."""
        return self.terms.sum(1) / self.weights.sum()

    @derived("standard error over sequences", per="vector", shown=False)
    def stderr(self) -> Float[Tensor, " k"]:
        """Of each value, over the sequences (linearised: `ratio_stderr`); nan for one sequence."""
        return ratio_stderr(self.terms, self.weights)

    @derived("mean of the forms")
    def mean(self) -> Crossed:
        """The mean over the vectors, taken for a random sample of all, with its errors over vectors and sequences."""
        rows = (self.terms - self.values[:, None] * self.weights) / self.weights.sum() / len(self.terms)
        return Crossed.of_rows(Estimate.of(self.values), rows)

    @property
    def head(self) -> str:
        over = counted(len(self.weights), "sequence")
        return f"forms of {counted(len(self.terms), 'vector')} over {over}{' (groups)' * (self.group > 1)}"

    @property
    def coords(self) -> dict[str, range]:
        return {"vector": range(len(self.terms))}

    @property
    def notes(self) -> list[str]:
        sizes = {"draws": len(self.terms), "data": len(self.weights)}
        return [f"no error over {what}: there is one of them only" for what, num in sizes.items() if num < 2]

    def paired_with(self, other: SequenceForms) -> bool:
        """Whether both score the same sequences with the same weights, which is taken to mean the same data."""
        same = self.group == other.group and self.terms.shape == other.terms.shape
        return same and torch.equal(self.weights, other.weights)

    def minus(self, other: SequenceForms) -> SequenceForms:
        """The differences, vector by vector and sequence by sequence. Raises ValueError where they are not paired."""
        if not self.paired_with(other):
            raise ValueError(
                f"forms of {tuple(other.terms.shape)} vectors and sequences cannot be taken in pairs from "
                f"{tuple(self.terms.shape)}, or their weights differ: both need the same batches and as many vectors."
            )
        return SequenceForms(self.terms - other.terms, self.weights, self.group)


class TraceErrors(Result):
    """A trace from random probes and a sample of sequences, with the errors of both; made by `trace_errors`."""

    forms: SequenceForms = internal()
    key: Key

    @derived("trace")
    def trace(self) -> Crossed:
        return self.forms.mean

    @property
    def head(self) -> str:
        return (
            f"trace from {counted(len(self.forms.terms), 'probe')} and {counted(len(self.forms.weights), 'sequence')}"
        )

    @property
    def notes(self) -> list[str]:
        return self.forms.notes

    def minus(self, other: TraceErrors) -> Crossed:
        """The difference to another model's trace, in pairs of sequences, and of probes where the keys are the same.

        Raises ValueError for other sequences or another number of probes.
        """
        return self.forms.minus(other.forms).mean


def sequence_forms(
    loss: Loss,
    theta: Theta,
    vectors: Float[Tensor, "k p"],
    *,
    matrix: Matrix = "hessian",
    group: int | None = None,
    chunk_size: int | None = None,
) -> SequenceForms:
    r"""What every sequence adds to $v^\top A v$, for each of some vectors: the error over data of any such form.

    matrix: the Hessian of the loss, or its Gauss-Newton matrix. Reverse mode over reverse mode, as `hessian` computes it,
    sequence by sequence: one product per vector and sequence, on one sequence each.
    group: neighbouring sequences of a batch that are taken together; default: as many as make 128 groups, single ones up
    to 128 sequences. Errors over groups are as right as those over sequences, from fewer numbers.
    chunk_size: single sequences whose products exist at once, each of the length of theta (default: 4 million numbers in
    all; one at a time needs no rule of `vmap`).

    Every tensor of a batch has as many rows as the batch has sequences, or one, which serves all; what couples the rows of
    a batch (statistics of the batch) makes the parts differ from the whole: `eigenvalue_errors` and `trace_errors` check
    that they add up to it.

    Raises ValueError where batches cannot be cut by rows, and where a kernel has no second derivative.

    >>> import funcscope as fs
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False)), fs.custom(lambda out, y: (out - y)[:, 0] ** 2)
    >>> loss = fs.objective(net, [(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 1))], square)
    >>> sequence_forms(loss, torch.zeros(2), torch.eye(2)).terms.tolist()               # 2 x^2 in the first coordinate
    [[2.0, 8.0], [0.0, 0.0]]
    """
    rows, weights, group = _tables(
        loss, theta, vectors, lambda v, image: (v @ image)[None], matrix=matrix, group=group, chunk_size=chunk_size
    )
    return SequenceForms(rows[:, :, 0].T, weights, group)


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
        check_sum(forms.values[:1], whole, scale.new_zeros(1), spacing(loss, theta), float(scale))
    return TraceErrors(forms, key)


def crossed_forms(
    loss: Loss, theta: Theta, vectors: Float[Tensor, "k p"], **options: Any
) -> tuple[Float[Tensor, "k n l"], Float[Tensor, " n"], int]:
    r"""Per vector and sequence: $v_l^\top A_i v_j$ for every l, and last $\|A_i v_j\|^2$; the weights; the size of groups."""

    def parts(_: Tensor, image: Tensor) -> Tensor:
        return torch.cat([rows @ image, (image @ image)[None]])

    rows = vectors.to(Loss.vector(loss, theta))
    table, weights, size = _tables(loss, theta, vectors, parts, **options)
    return table.transpose(0, 1), weights, size


def spacing(loss: Loss, theta: Tensor) -> float:
    """Of numbers in the coarsest dtype between theta and the loss: a float64 model may take its norms in float32."""
    return max(2 * loss.net.unit_roundoff, torch.finfo(theta.dtype).eps)


def check_sum(parts: Tensor, whole: Tensor, residuals: Tensor, eps: float, scale: float | None = None) -> None:
    """What the sequences add up to is the whole, up to the residual and the rounding of products."""
    allowed = residuals + eps**0.5 * (float(whole.abs().max()) if scale is None else scale)
    off = (parts - whole).abs()
    if bool((off > allowed).any()):
        worst = int((off - allowed).argmax())
        raise ValueError(
            f"the sequences add up to {float(parts[worst]):.6g} where the whole has {float(whole[worst]):.6g}: take the "
            "pairs of this loss, theta and `matrix`; or the rows of a batch are coupled (statistics of the batch), so that "
            "sequences have no parts of their own; or a derivative is wrong under `vmap`, which `chunk_size=1` leaves out."
        )


def _tables(
    loss: Loss,
    theta: Theta,
    vectors: Tensor,
    parts: Callable[[Tensor, Tensor], Tensor],
    *,
    matrix: Matrix,
    group: int | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, int]:
    """`parts(v, A_i v)` of every scored unit and vector, the weights of those units, and the sequences in each."""
    check_choice("matrix", matrix, get_args(Matrix))
    theta = Loss.vector(loss, theta)
    if vectors.ndim != 2 or vectors.shape[1] != len(theta):
        raise ValueError(f"`vectors` must have shape (k, {len(theta)}), got {tuple(vectors.shape)}.")
    if chunk_size is None:
        chunk_size = max(1, NUMBERS // len(theta))
    check_count("chunk_size", chunk_size)
    weights = terms_at(loss, theta).weights
    group = -(-len(weights) // UNITS) if group is None else group
    check_count("group", group)
    rows, cut = vectors.to(theta), micro_batches(loss, group if group > 1 else chunk_size)
    sizes = sizes_of(cut, len(weights))
    with named_if_missing(loss, "the error over data needs second derivatives"):
        chunks = zip(cut, sizes, strict=True)
        table = torch.cat([_chunk(part, num, theta, rows, matrix, parts, together=group > 1) for part, num in chunks])
    if group > 1:
        weights = torch.stack([x.sum() for x in weights.split(sizes)])
    return table[weights != 0], weights[weights != 0], group


def _chunk(
    part: Loss, num: int, theta: Tensor, vectors: Tensor, matrix: Matrix, parts: Callable[..., Tensor], together: bool
) -> Tensor:
    """The rows of one micro-batch: one for it all `together`, or one per sequence, several by `vmap`."""

    def of(batch: tuple[Any, Any]) -> Tensor:
        product = _PRODUCTS[matrix](Outputs(part, batch), theta)
        return torch.stack([parts(v, product(v)) for v in vectors])

    tick("forward")
    with torch.enable_grad(), ONE_AT_A_TIME:
        batch = part.batches[0]
        table = of(batch)[None] if together or num == 1 else mapped(of, batch, num)
    return table.detach().cpu().double()


_PRODUCTS: dict[str, Callable[[Outputs, Tensor], Matvec]] = {
    "hessian": lambda part, theta: kept_gradient(part.sum, theta),
    "ggn": lambda part, theta: kept_sandwich(theta, part, part.gauss_newton),
}
