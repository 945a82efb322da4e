"""The diagonal of the Fisher information: exact, sampled, empirical, each by its name and with its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from ..core.apart import coupled, tolerance
from ..core.checks import check_choice, check_count
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, internal, quantity
from ..curvature.fisher import fisher_diagonal_mc
from ..curvature.gram import Unit
from ..curvature.outputs import total_weight
from ..curvature.rows import gradient_chunks, micro_batches, sizes_of
from ..curvature.whitening import check_finite
from .accumulators import Welford

Method = Literal["exact", "monte_carlo", "empirical"]


class DiagonalFisher(Result):
    """The diagonal of the Fisher information, or of the second moment of gradients at the data's labels."""

    value: Float[Tensor, " p"] = quantity("diagonal entry", per="parameter", stderr="stderr")
    trace: Float[Tensor, ""] = quantity("trace", stderr="trace_stderr")
    method: str
    unit: str
    num: int
    """Sequences, or draws of all labels."""
    stderr: Float[Tensor, " p"] = internal()
    trace_stderr: Float[Tensor, ""] = internal()

    @property
    def head(self) -> str:
        over = "draws of all labels" if self.method == "monte_carlo" else "sequences"
        what = {"exact": "exact", "monte_carlo": "sampled", "empirical": "empirical"}[self.method]
        return f"{what} Fisher diagonal per {self.unit} of {len(self.value)} entries, errors over {self.num} {over}"


def fisher_diagonal(
    loss: Loss,
    theta: Theta,
    *,
    method: Method = "monte_carlo",
    unit: Unit = "token",
    key: Key | None = None,
    num: int = 8,
    chunk_size: int = 8,
) -> DiagonalFisher:
    r"""Diagonal of the Fisher information per scored token, or per sequence, under one of three names that are not the same.

    `exact`: $\frac1W \sum_t w_t \sum_y p_t(y)\, s_{ty}^2$, all labels in closed form: T V backward passes for a sequence of T
    tokens and V classes, for small vocabularies. `monte_carlo`: the same in expectation, from `num` draws of all labels
    (`fisher_diagonal_mc`, two forward and one backward pass a draw). `empirical`: $\frac1W \sum_t w_t g_t^2$ at the data's
    labels, no Fisher information unless the data come from the model.

    unit: `sequence` is the mean over sequences that have a scored position. For the first two it is the token's times W / n,
    as scores of different tokens are uncorrelated. For `empirical`, $\frac1n \sum_b (\sum_{t \in b} w_t g_t)^2$, which is
    another number: gradients of a sequence's tokens go together.
    key, num: for `monte_carlo` only.

    The same whatever the batches, the number of sequences and their lengths, up to what other data say: squares are of single
    tokens or sequences. A document squares the mean gradient of a batch and divides by its tokens once more, which falls
    twentyfold from batches of 1 to 8 of the same data.

    Errors of `exact` and `empirical` are over sequences (of a ratio, $\frac{n}{n-1} \sum_b (q_b - F W_b)^2 / W^2$); those of
    `monte_carlo` are over draws at these data. nan for one sequence or draw.

    Raises ValueError for a criterion without labels, weights other than 0 and 1 for the Fisher information of sequences,
    sequences that see each other, a gradient that is not finite, and `monte_carlo` without a key.

    Kunstner, Balles, Hennig (2019), arXiv:1905.12558.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([0, 0]))], fs.classification)
    >>> fisher_diagonal(loss, torch.zeros(2), method="exact").value      # p (1 - p)
    tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    check_choice("method", method, ("exact", "monte_carlo", "empirical"))
    check_choice("unit", unit, ("sequence", "token"))
    check_count("chunk_size", chunk_size)
    theta = Loss.vector(loss, theta)
    _check_criterion(loss, method, unit)
    if method == "monte_carlo":
        if key is None:
            raise ValueError("`key` must be given for method='monte_carlo', which draws labels: `key=fs.key(0)`.")
        return _sampled(loss, theta, unit, key, num)
    total = Welford.start(torch.zeros(len(theta) + 1, dtype=torch.float64, device=theta.device))
    for x, weight in _squares(loss, theta, method, unit, chunk_size):
        total = total.update(torch.cat([x, x.sum()[None]]) / weight, weight)
    return _of(total, method, unit)


def _sampled(loss: Loss, theta: Tensor, unit: Unit, key: Key, num: int) -> DiagonalFisher:
    check_key(key)
    check_count("num", num)
    factor = total_weight(loss, theta) / _num_scored(loss, theta) if unit == "sequence" else 1.0
    total = Welford.start(torch.zeros(len(theta) + 1, dtype=torch.float64, device=theta.device))
    for i in range(num):
        draw = factor * fisher_diagonal_mc(loss, theta, key=fold_in(key, i), num=1).value.double()
        total = total.update(torch.cat([draw, draw.sum()[None]]))
    return _of(total, "monte_carlo", unit)


def _of(total: Welford, method: Method, unit: Unit) -> DiagonalFisher:
    """Running moments of the diagonal and, last, its trace."""
    (value, trace), (stderr, trace_stderr) = ((x[:-1].clone(), x[-1].clone()) for x in (total.mean, total.stderr))
    return DiagonalFisher(value, trace, method, unit, total.num, stderr, trace_stderr)


def _num_scored(loss: Loss, theta: Tensor) -> int:
    with torch.no_grad():
        return int((loss.terms(theta)[1] != 0).sum())


def _squares(
    loss: Loss, theta: Tensor, method: Method, unit: Unit, chunk_size: int
) -> Iterator[tuple[Float[Tensor, " p"], float]]:
    """Of every sequence that has a scored position: its squares, and what they count."""
    with torch.no_grad():
        sums, weights = loss.terms(theta)
    if method == "empirical" and unit == "sequence":
        rows = (row for chunk in gradient_chunks(loss, theta, chunk_size=chunk_size) for row in chunk)
        for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            check_finite(row, i, loss.layout)
            if weight != 0:
                yield row.double().square(), 1.0
        return
    parts = micro_batches(loss, 1)
    sizes_of(parts, len(weights))
    for i, (part, whole, weight) in enumerate(zip(parts, sums, weights, strict=True)):
        if weight == 0:
            continue
        with torch.no_grad():
            (alone,), _ = part.terms(theta)
        if float((alone - whole).abs()) > tolerance(loss) * float(whole.abs() + 1):
            raise ValueError(
                f"the loss of a sequence alone is {float(alone)}, in its batch {float(whole)}: {coupled(1)}"
            )
        made = _of_sequence(part, theta, method, chunk_size)
        check_finite(made, i, loss.layout)
        yield made, float(weight) if unit == "token" else 1.0


def _of_sequence(part: Loss, theta: Tensor, method: Method, chunk_size: int) -> Float[Tensor, " p"]:
    """sum_t w_t g_t^2, or sum_t w_t sum_y p_t(y) s_ty^2, of one sequence."""
    ((inputs, targets),) = part.batches
    weight = targets.weight.flatten()
    scored = weight.nonzero()[:, 0]

    def outputs(t: Tensor) -> Tensor:
        return part.net.apply(part.params(t), inputs)

    def losses(t: Tensor) -> Tensor:
        return part.criterion.scored(outputs(t), targets)[0].flatten()[scored]

    if method == "empirical":
        return _sum_of_squares(losses, theta, torch.diag(weight[scored].to(theta.dtype).sqrt()), chunk_size)

    def logits(t: Tensor) -> Tensor:
        return outputs(t).flatten(0, -2)[scored]

    with torch.no_grad():
        p = logits(theta).double().softmax(-1)
    total = torch.zeros(theta.shape, dtype=torch.float64, device=theta.device)
    for at, w in enumerate(weight[scored].tolist()):
        scores = (w * p[at]).sqrt()[:, None] * (p[at] - torch.eye(p.shape[1], dtype=p.dtype, device=p.device))

        def one(t: Tensor, at: int = at) -> Tensor:
            return logits(t)[at]

        total += _sum_of_squares(one, theta, scores, chunk_size)
    return total


def _sum_of_squares(
    function: Callable[[Tensor], Tensor], theta: Tensor, cotangents: Float[Tensor, "m k"], chunk_size: int
) -> Float[Tensor, " p"]:
    value, pull = vjp(function, theta)
    total = torch.zeros(theta.shape, dtype=torch.float64, device=theta.device)
    for chunk in cotangents.to(value.dtype).split(chunk_size):
        total += vmap(pull)(chunk)[0].double().square().sum(0)
    return total


def _check_criterion(loss: Loss, method: Method, unit: Unit) -> None:
    if (
        not loss.criterion.positionwise
        and not (method == "empirical" and unit == "sequence")
        and method != "monte_carlo"
    ):
        raise ValueError(
            f"`method={method!r}` per {unit} needs a criterion over labels, one loss at each position, got "
            f"{loss.criterion!r}: take 'empirical' with unit='sequence', or 'monte_carlo' of one that draws its targets."
        )
    if unit == "token" or method == "empirical":
        return
    if any(bool(((t.weight != 0) & (t.weight != 1)).any()) for _, t in loss.batches if hasattr(t, "weight")):
        raise ValueError("weights must be 0 or 1 for the Fisher information of sequences: take unit='token'.")
