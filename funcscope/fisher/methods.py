"""Ways to approximate the Fisher information, side by side on one matrix: what each says of it, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_finite_params
from ..core.keys import Key, check_key, fold_in
from ..core.memory import peak_growth
from ..core.objective import Loss, Theta
from ..core.result import Result, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..curvature.fisher import empirical_fisher, exact_fisher, fisher_diagonal_mc
from ..curvature.gram import gram
from ..curvature.kfac_factors import ekfac_factors, kfac_factors, scored_losses
from ..curvature.leafwise import terms_at
from ..curvature.outputs import total_weight
from ..curvature.rows import gradient_chunks
from ..linalg.eigen import eigenpairs
from ..linalg.trace import hutchinson_trace

Method = Literal["lanczos", "diagonal", "kfac", "ekfac", "gram"]
METHODS: tuple[Method, ...] = ("lanczos", "diagonal", "kfac", "ekfac", "gram")


class MethodComparison(Result):
    """The Fisher information per scored token, as several methods have it."""

    trace: Float[Tensor, " m"] = quantity("trace of these data, error over draws", per="method", stderr="trace_stderr")
    trace_data_stderr: Float[Tensor, " m"] = quantity(
        "error of the trace over sequences and draws", per="method", shown=False
    )
    """Of the Gram's trace alone; nan for the others, which have no number of a single sequence."""
    max_eigenvalue: Float[Tensor, " m"] = quantity("largest eigenvalue", per="method")
    disagreement: Float[Tensor, " m"] = quantity(
        "relative error of v'Fv along held-out scores, error over these", per="method", stderr="disagreement_stderr"
    )
    seconds: Float[Tensor, " m"] = quantity("time", unit="seconds", per="method")
    mebibytes: Float[Tensor, " m"] = quantity("peak memory above that before", unit="MiB", per="method")
    trace_stderr: Float[Tensor, " m"] = internal()
    disagreement_stderr: Float[Tensor, " m"] = internal()
    num: int
    """Draws of all labels, or probes."""
    num_directions: int
    methods: list[str] = internal()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"method": self.methods}

    @property
    def head(self) -> str:
        return (
            f"{len(self.methods)} approximations of the Fisher information, compared along {self.num_directions} scores"
        )

    @property
    def notes(self) -> list[str]:
        return [
            "errors of traces are over draws of labels or probes at these data, which all methods share; those of the "
            "disagreement over directions, for the draws that were made.",
            "kfac takes a layer's inputs and output gradients for independent: its trace and v'Fv have a bias that more "
            "draws do not remove. The trace of ekfac has none; its v'Fv, as that of diagonal, is without what is off a "
            "diagonal.",
            "the largest entry of a diagonal is at most the largest eigenvalue; a Gram's is too large for few sequences.",
            "time and memory are those of this machine, measured once; no memory where the system does not tell it.",
        ]


class _Approximation(NamedTuple):
    trace: Tensor | float
    trace_stderr: Tensor | float
    max_eigenvalue: Tensor | float
    quadratic: Callable[[Tensor], Tensor]
    trace_data_stderr: Tensor | float = math.nan


def compare_methods(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num: int = 8,
    num_directions: int = 8,
    rank: int = 5,
    methods: Sequence[Method] = METHODS,
) -> MethodComparison:
    r"""Trace, largest eigenvalue and quadratic forms of the Fisher information by every method, with time and memory.

    All approximate one matrix, `exact_fisher`, with labels drawn from the model. `lanczos`: its `rank` largest eigenvalues by
    products with the exact matrix, and Hutchinson's trace from `num` probes. `diagonal`: `fisher_diagonal_mc` from `num`
    draws. `kfac`, `ekfac`: from `num` draws. `gram`: $\frac1W \sum_b g_b g_b^\top$ through inner products, the mean of `num`
    draws: of their traces, largest eigenvalues and quadratic forms.

    Errors of traces are over draws of all labels (probes) at these data, nan for one draw: what tells the methods apart, as
    the data are the same. How far the trace is that of other data says `trace_data_stderr`, over sequences and their draws:
    of $\sum_b t_b / \sum_b w_b$, t_b the mean over draws of $\lVert g_b \rVert^2$, w_b the weight of sequence b.

    The disagreement is the mean over `num_directions` unit vectors v of $|v^\top M v / v^\top F v - 1|$, v the scores of
    single sequences with labels of a draw that no method saw: directions in which F is large, as isotropic ones would compare
    traces again. Its error is over these directions, for the draws that were made: other draws move all of them together.
    `lanczos` leaves out all but its `rank` eigenvectors there.

    The document's comparison had constants for memory and no number for agreement.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(3, 2))
    >>> loss = fs.objective(net, [(torch.eye(3), torch.tensor([0, 1, 0]))], fs.classification)
    >>> compare_methods(loss, net.theta, key=fs.key(0), num=2, rank=2, methods=("lanczos", "kfac")).methods
    ['lanczos', 'kfac']
    """
    check_key(key)
    for name, value in (("num", num), ("num_directions", num_directions), ("rank", rank)):
        check_count(name, value)
    for method in methods:
        check_choice("methods", method, METHODS)
    theta = Loss.vector(loss, theta)
    check_finite_params(loss.params(theta), "the Fisher information is")
    directions = _held_out(loss, theta, fold_in(key, "held out"), num_directions)
    product = exact_fisher(loss, theta)
    exact = torch.stack([v @ product(v) for v in directions])
    columns: list[list[float]] = []
    for method in methods:
        start = time.perf_counter()
        made, memory = peak_growth(lambda method=method: _WAYS[method](loss, theta, fold_in(key, method), num, rank))
        seconds = time.perf_counter() - start
        off = (torch.stack([made.quadratic(v) for v in directions]).double() / exact.double() - 1).abs()
        error = float(off.std() / len(off) ** 0.5) if len(off) > 1 else float("nan")
        sizes = made.trace, made.trace_data_stderr, made.max_eigenvalue
        values = *sizes, off.mean(), seconds, memory, made.trace_stderr, error
        columns.append([float(value) for value in values])
    return MethodComparison(
        *torch.tensor(columns, dtype=torch.float64).T.contiguous(),
        num=num,
        num_directions=len(directions),
        methods=list(methods),
    )


def _held_out(loss: Loss, theta: Tensor, key: Key, num: int) -> list[Tensor]:
    """Unit vectors along the scores of single sequences with labels from the model."""
    rows: list[Tensor] = []
    for chunk in gradient_chunks(_scored(loss, theta, key), theta, chunk_size=num):
        rows += [row / row.norm() for row in chunk if bool(row.any())]
        if len(rows) >= num:
            break
    if not rows:
        raise ValueError("all scores are 0: the model is sure of every label, and its Fisher information is 0.")
    return rows[:num]


def _scored(loss: Loss, theta: Tensor, key: Key) -> Loss:
    """The loss with labels drawn from the model."""
    return scored_losses(loss, theta, key, "model", 1)[1][0]


def _lanczos(loss: Loss, theta: Tensor, key: Key, num: int, rank: int) -> _Approximation:
    matvec = exact_fisher(loss, theta)
    pairs = eigenpairs(matvec, theta, key=fold_in(key, 0), num=min(rank, len(theta)), which="largest", vectors=True)
    trace = hutchinson_trace(matvec, theta, key=fold_in(key, 1), num=num)
    vectors = pairs.vectors
    assert vectors is not None
    return _Approximation(
        trace.value,
        trace.stderr,
        pairs.values[0],
        lambda v: ((vectors @ v).square() * pairs.values.to(v)).sum(),
    )


def _diagonal(loss: Loss, theta: Tensor, key: Key, num: int, rank: int) -> _Approximation:  # noqa: ARG001
    made = [fisher_diagonal_mc(loss, theta, key=fold_in(key, i), num=1).value for i in range(num)]
    traces = torch.stack([one.double().sum() for one in made])
    mean = torch.stack(made).mean(0)
    error = traces.std() / num**0.5 if num > 1 else math.nan
    return _Approximation(traces.mean(), error, mean.max(), lambda v: (mean * v.square()).sum())


def _kfac(loss: Loss, theta: Tensor, key: Key, num: int, rank: int) -> _Approximation:  # noqa: ARG001
    made = kfac_factors(loss, theta, key=key, num=num)
    return _Approximation(made.trace, made.trace_stderr, made.max_eigenvalue(), made.quadratic)


def _ekfac(loss: Loss, theta: Tensor, key: Key, num: int, rank: int) -> _Approximation:  # noqa: ARG001
    made = ekfac_factors(loss, theta, key=key, num=num)
    return _Approximation(made.trace, made.trace_stderr, made.max_eigenvalue(), made.quadratic)


def _gram(loss: Loss, theta: Tensor, key: Key, num: int, rank: int) -> _Approximation:  # noqa: ARG001
    drawn, total = scored_losses(loss, theta, key, "model", num)[1], total_weight(loss, theta)
    inner = torch.stack([gram(each, theta, by="none").total for each in drawn]) / total
    squares, weights = inner.diagonal(dim1=1, dim2=2), terms_at(loss, theta).weights
    used = int((weights != 0).sum())

    def quadratic(v: Tensor) -> Tensor:
        each = [v @ empirical_fisher(one, theta, keep=False)(v) for one in drawn]
        return torch.stack(each).mean() * used / total

    return _Approximation(
        squares.sum(1).mean(),
        squares.sum(1).std() / num**0.5 if num > 1 else math.nan,
        torch.linalg.eigvalsh(inner)[:, -1].mean(),
        quadratic,
        ratio_stderr(squares.mean(0) * total, weights.to(squares)),
    )


_WAYS = {"lanczos": _lanczos, "diagonal": _diagonal, "kfac": _kfac, "ekfac": _ekfac, "gram": _gram}
