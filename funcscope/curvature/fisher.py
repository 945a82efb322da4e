"""The Fisher information of a model's predictions: exact, sampled, and empirical. Three matrices, three names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad
from torch.utils._pytree import tree_map

from ..core.apart import check_apart
from ..core.checks import check_choice, check_count
from ..core.criterion import Criterion
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.progress import tick
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..linalg.matvec import Matvec
from .hessian import ggn
from .leafwise import terms_at
from .outputs import Outputs, total_of, total_weight
from .pullbacks import AtOutputs, sandwich


def exact_fisher(loss: Loss, theta: Theta, *, keep: bool = True, head_chunk: int | None = None) -> Matvec:
    r"""v -> F v with the exact (true, type-2) Fisher information per scored token, labels summed over in closed form.

    $$F = \frac1W \sum_t w_t\, \mathbb E_{y \sim p_t}\big[s_t s_t^\top\big], \qquad
      s_t = \nabla_\theta \log p_\theta(y \mid x_{\le t}).$$

    For cross-entropy this is the generalised Gauss-Newton matrix, and computed as such (proofs/gauss_newton_fisher.py).
    The data's labels do not enter. Per sequence it is T times as large (cross terms vanish in expectation).

    Raises ValueError for a criterion that has no predictive distribution (`sample`), as `custom` ones.

    Martens (2020), arXiv:1412.1193; Kunstner, Balles, Hennig (2019), arXiv:1905.12558, for the three meanings.
    """
    theta = Loss.vector(loss, theta)
    _check_distribution(loss.criterion)
    return ggn(loss, theta, keep=keep, head_chunk=head_chunk)


def fisher_mc(loss: Loss, theta: Theta, *, key: Key, num: int = 1, keep: bool = True, first: int = 0) -> Matvec:
    r"""v -> F v with `num` labels per token drawn from the model: unbiased for `exact_fisher`, of rank <= num * tokens.

    $$\hat F = \frac{1}{W m} \sum_{t,i} w_t\, s_{ti} s_{ti}^\top, \qquad y_{ti} \sim p_\theta(\cdot \mid x_{\le t}).$$

    Position t is scored against its own draw: a draw that is moved by one, as labels are, has a score whose mean is not 0.
    The draws are made here, once, one stream per sequence, so that the matvec is one fixed symmetric matrix and batching
    changes nothing; another key is another matrix. Its mean over keys: proofs/gauss_newton_fisher.py.
    first: the number of the loss's first sequence, where it is a part of a larger data set.

    Raises as `exact_fisher` does.
    """
    check_key(key)
    check_count("num", num)
    theta = Loss.vector(loss, theta)
    _check_distribution(loss.criterion)
    _check_apart(loss, theta)
    drawn = label_draws(loss, theta, key, num, first)
    return sandwich(loss, theta, _scored_by(_by_token, loss, drawn), 1 / (num * total_weight(loss, theta)), keep)


def empirical_fisher(
    loss: Loss, theta: Theta, *, unit: Literal["sequence", "token"] = "sequence", keep: bool = True
) -> Matvec:
    r"""v -> E v, the uncentred second moment of the gradients at the data's own labels: not a Fisher information.

    `token`: $E = \frac1W \sum_t w_t\, g_t g_t^\top$ with $g_t = \nabla \ell_t$. `sequence`: $E = \frac1n \sum_b g_b g_b^\top$
    with $g_b = \sum_{t \in b} w_t g_t$, over the n sequences that have a scored position. The unit is part of the result:
    sums over T tokens make the second about T times the first, and more where a sequence's gradients agree.

    Equal to the Fisher information in expectation only where the data come from the model (proofs/gauss_newton_fisher.py). No
    gradient is stored: one product is J' of the scores times their own inner product with J v.

    Kunstner, Balles, Hennig (2019), arXiv:1905.12558.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> data = [(torch.ones(1, 1), torch.tensor([0]))]
    >>> loss = fs.objective(net, data, fs.classification)
    >>> empirical_fisher(loss, torch.zeros(2))(torch.tensor([1.0, 0.0]))      # g = (-1/2, 1/2)
    tensor([ 0.2500, -0.2500])
    """
    check_choice("unit", unit, ("sequence", "token"))
    theta = Loss.vector(loss, theta)
    by = _by_token if unit == "token" else _by_sequence
    check_apart(loss, 1)
    if unit == "token":
        _check_apart(loss, theta)
    scale = total_weight(loss, theta) if unit == "token" else _num_sequences(loss, theta)
    parts = _scored_by(by, loss, [[targets] for _, targets in loss.batches])
    return sandwich(loss, theta, parts, 1 / scale, keep)


def _num_sequences(loss: Loss, theta: Tensor) -> float:
    """Those with a scored position."""
    return loss.over_ranks(float((terms_at(loss, theta).weights != 0).sum()))


class FisherDiagonal(Result):
    """The diagonal of the Fisher information, estimated from `num` draws of all labels."""

    value: Float[Tensor, " p"] = quantity("diagonal entry", per="parameter", stderr="stderr")
    stderr: Float[Tensor, " p"] = internal()
    """Of each entry, over the draws; nan for one draw."""
    num: int

    @derived("trace")
    def trace(self) -> Float[Tensor, ""]:
        return self.value.double().sum()

    @property
    def head(self) -> str:
        return f"Fisher diagonal of {len(self.value)} entries from {counted(self.num, 'draw')} of all labels"


def fisher_diagonal_mc(loss: Loss, theta: Theta, *, key: Key, num: int = 8) -> FisherDiagonal:
    r"""The diagonal of `exact_fisher`, unbiased, by two forward and one backward pass over the data per draw.

    $$\widehat{\mathrm{diag} F} = \frac{1}{W} \sum_b \Big(\sum_{t \in b} \sqrt{w_t}\, s_t\Big)^2, \qquad y_t \sim p_t,$$

    squared coordinate by coordinate, b over batches: with weights of 0 and 1, sum T_b^2 gbar_b^2 / sum T_b. Scores of labels
    that were drawn from the model are uncorrelated with mean 0, so that the cross terms vanish in expectation; those of the
    data's labels are not, and the same formula with them is no Fisher information (proofs/sampled_fisher.py). The standard
    error is that over draws. Entries are means of squares, skewed where the model is sure of most labels and a rare draw has
    most of the information: +- 2 errors of a single entry may then cover two thirds instead of 95 % at 8 draws, and 80 % at
    32. Sums over many entries, the trace above all, do not suffer from that.

    Raises as `exact_fisher` does.
    """
    check_key(key)
    check_count("num", num)
    theta = Loss.vector(loss, theta)
    _check_distribution(loss.criterion)
    check_roots(terms_at(loss, theta).weights)
    scale = total_weight(loss, theta)
    mean, scatter = torch.zeros_like(theta), torch.zeros_like(theta)
    for i in range(num):
        draw = _squares(loss, theta, fold_in(key, i)) / scale
        step = draw - mean
        mean += step / (i + 1)
        scatter += step * (draw - mean)
    stderr = (scatter / (num * (num - 1))).sqrt() if num > 1 else torch.full_like(mean, float("nan"))
    return FisherDiagonal(mean, stderr, num)


def check_roots(weights: Tensor) -> None:
    """Raises ValueError for weights that have no square root, with which scores are weighted."""
    if bool((weights < 0).any()):
        raise ValueError("weights must be at least 0: their square roots are those of the scores.")


def _squares(loss: Loss, theta: Tensor, key: Key) -> Tensor:
    """Sum over batches of the squared sum of sqrt(w) s."""
    out = torch.zeros_like(theta)
    for (inputs, _), labels in zip(loss.batches, label_draws(loss, theta, key, 1), strict=True):

        def rooted(t: Tensor, inputs=inputs, labels=labels[0]) -> Tensor:
            tick("forward")
            losses, weight = loss.criterion.scored(loss.net.apply(loss.params(t), inputs), labels)
            return (losses * weight.sqrt()).sum()

        out += grad(rooted)(theta).square()
    return out


def label_draws(loss: Loss, theta: Theta, key: Key, num: int, first: int = 0) -> list[list[Any]]:
    r"""Per batch, `num` targets whose labels are drawn from the model, $y_t \sim p_\theta(\cdot \mid x_{\le t})$.

    Targets are what `loss.criterion.scored` takes in place of the data's. Draw i of sequence r of all comes from the child
    (i, r) of the key, so that batching changes nothing: all sampled Fishers have the same labels under one key. r counts
    from `first`.

    Raises ValueError for a criterion that has no predictive distribution (`sample`).

    Martens (2020), arXiv:1412.1193.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([0, 0]))], fs.classification)
    >>> ((labels,),) = label_draws(loss, torch.tensor([0.0, 99.0]), fs.key(0), 1)
    >>> labels.index
    tensor([1, 1])
    """
    _check_distribution(loss.criterion)
    drawn: list[list[Any]] = []
    sample = loss.criterion.sample
    assert sample is not None
    for batch in loss.batches:
        with torch.no_grad():
            (out,) = Outputs(loss, batch).of(theta)
        singles = [tree_map(lambda x, r=r: x[r : r + 1], (out, batch[1])) for r in range(len(out))]
        keys = [[fold_in(fold_in(key, i), first + r) for r in range(len(out))] for i in range(num)]
        draws = [
            [sample(single[0], single[1], each) for single, each in zip(singles, row, strict=True)] for row in keys
        ]
        drawn.append([tree_map(lambda *leaves: torch.cat(leaves), *rows) for rows in draws])
        first += len(out)
    return drawn


def _scored_by(
    by: Callable[[Criterion, Tensor, Any, Tensor], Tensor], loss: Loss, targets: list[list[Any]]
) -> list[tuple[Outputs, AtOutputs]]:
    """Every batch with the sum of what `by` makes of its targets, several of which a batch may have."""

    def middle(several: list[Any]) -> AtOutputs:
        return lambda outs, moved: (sum(by(loss.criterion, outs[0], one, moved[0]) for one in several),)  # type: ignore[return-value]

    return [(Outputs(loss, batch), middle(several)) for batch, several in zip(loss.batches, targets, strict=True)]


def _by_token(criterion: Criterion, out: Tensor, targets: Any, v: Tensor) -> Tensor:
    """sum over positions of w s (s . v)."""
    score, weight = _scores(criterion, out, targets)
    inner = (score * v).flatten(weight.ndim).sum(-1) if score.ndim > weight.ndim else score * v
    return score * _over(inner * weight, score)


def _by_sequence(criterion: Criterion, out: Tensor, targets: Any, v: Tensor) -> Tensor:
    """sum over sequences of (sum of w s) times its inner product with v."""
    score = grad(lambda z: total_of(criterion, z, targets))(out)
    return score * _over((score * v).reshape(len(score), -1).sum(-1), score)


def _check_apart(loss: Loss, theta: Tensor) -> None:
    """Each loss looks at its own outputs only: weights on the losses are then weights on their gradients."""
    for inputs, targets in loss.batches if not loss.criterion.positionwise else ():
        with torch.no_grad():
            out = loss.net.apply(loss.params(theta), inputs)
        score, weight = _scores(loss.criterion, out, targets)
        factor = 1 + torch.arange(weight.numel(), device=out.device).reshape(weight.shape) / max(1, weight.numel())
        apart = weight.shape == out.shape[: weight.ndim]
        if not apart or not torch.allclose(
            score * _over(factor, score), _scores(loss.criterion, out, targets, factor)[0]
        ):
            raise ValueError(
                f"losses of shape {tuple(weight.shape)} from outputs of shape {tuple(out.shape)} are not one per position: "
                "single positions have no scores of their own. Give the criterion outputs of the losses' shape and one "
                'more dimension of classes, or take `empirical_fisher(unit="sequence")`.'
            )


def _scores(criterion: Criterion, out: Tensor, targets: Any, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The gradient of every position's loss in its own outputs, and the weights; 0 where nothing is scored."""

    def losses(z: Tensor) -> tuple[Tensor, Tensor]:
        loss, weight = criterion.scored(z, targets)
        return (loss * factor).sum(), weight

    return grad(losses, has_aux=True)(out)


def _over(x: Tensor, like: Tensor) -> Tensor:
    """x with as many dimensions as `like`, new ones last."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim)).to(like.dtype)


def _check_distribution(criterion: Criterion) -> None:
    if criterion.sample is None:
        raise ValueError(
            f"the Fisher information needs the model's predictive distribution, and {criterion!r} has no `sample`: take "
            "`ggn` for the curvature of the loss, `empirical_fisher` for the second moment of its gradients, or a "
            "criterion with both `sample` and `output_hessian`."
        )
