"""How far two models are from each other: in their weights, in what they say, and how much of a change was undone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_instance
from ..core.criterion import Labels
from ..core.divergences import js_divergence, kl_divergence
from ..core.estimate import wide
from ..core.layout import Layout
from ..core.objective import Loss, Theta, check_point
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr, ratio_stderr
from ..core.vectors import dot
from .task_vectors import flat_of


class WeightDistance(Result):
    """Distances of the tensors of two models."""

    distances: Float[Tensor, " t"] = quantity("distance", per="tensor")
    norms: Float[Tensor, " t"] = quantity("norm of the first", per="tensor", shown=False)
    names: list[str] = internal()

    @derived("distance relative to the first", per="tensor")
    def relative(self) -> Float[Tensor, " t"]:
        """nan for a tensor of 0."""
        return torch.where(self.norms > 0, self.distances / self.norms, math.nan)

    @derived("root mean square of the relative distances")
    def rms_relative(self) -> float:
        """Over the tensors whose relative distance is defined."""
        there = self.relative[~self.relative.isnan()]
        return float(there.square().mean().sqrt()) if len(there) else math.nan

    @derived("distance of the whole")
    def total(self) -> float:
        return float(self.distances.square().sum().sqrt())

    @derived("distance of the whole relative to the first")
    def total_relative(self) -> float:
        norm = float(self.norms.square().sum().sqrt())
        return self.total / norm if norm else math.nan

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"tensor": self.names}

    @property
    def head(self) -> str:
        return f"distance of two models in {len(self.names)} tensors"

    @property
    def notes(self) -> list[str]:
        zeros = [name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if norm == 0]
        made = ["weights are given, not sampled: exact for these two; units that were permuted count as far apart."]
        return made + [f"{name} of the first model is 0: it has no relative distance." for name in zeros[:1]]


def weight_distance(first: Theta, second: Theta, layout: Layout) -> WeightDistance:
    r"""$\|W_1 - W_2\|_F$ of every tensor, relative to $\|W_1\|_F$, and the root mean square over tensors.

    Not symmetric. Permuting hidden units changes it and not the function: `weight_matching` first, for models of other seeds.

    Raises ValueError for other lengths and for numbers that are not finite.

    >>> layout = Layout.of(torch.nn.Linear(2, 1))
    >>> found = weight_distance(torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, 3.0, 1.0]), layout)
    >>> found.relative.tolist(), found.rms_relative
    ([0.2, nan], 0.2)
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    ends = [layout.unravel(flat_of(*each, layout), cast=False) for each in (("first", first), ("second", second))]
    pairs = [(one.double(), other.double()) for one, other in zip(*(x.values() for x in ends), strict=True)]
    distances, norms = (
        [math.sqrt(dot(x, x)) for x in each] for each in ([a - b for a, b in pairs], [a for a, _ in pairs])
    )
    columns = torch.tensor([distances, norms], dtype=torch.float64)
    return WeightDistance(columns[0].clone(), columns[1].clone(), list(layout.names))


class FunctionDistance(Result):
    """Divergences of what two models say at the scored positions of the same data."""

    kl: float = quantity("divergence of the second from the first", unit="nats", stderr="kl_stderr")
    kl_reverse: float = quantity("divergence of the first from the second", unit="nats", stderr="kl_reverse_stderr")
    js: float = quantity("Jensen-Shannon divergence", unit="nats", stderr="js_stderr")
    disagreement: float = quantity("share of positions with another first choice", stderr="disagreement_stderr")
    kl_stderr: float
    kl_reverse_stderr: float
    js_stderr: float
    disagreement_stderr: float
    num_sequences: int
    rounding: float = quantity("divergence by rounding of logits", unit="nats", shown=False)

    @property
    def head(self) -> str:
        return f"distance of two models' predictions over {self.num_sequences} sequences"

    @property
    def notes(self) -> list[str]:
        made = ["a single sequence has no standard error."] * (self.num_sequences < 2)
        if math.isnan(self.kl):
            made.append("predictions of a model are nan: look at its weights.")
        elif math.inf in (self.kl, self.kl_reverse):
            made.append("a divergence is infinite: one model gives probability 0 to what the other can say.")
        if self.kl <= self.rounding:
            made.append(f"no divergence is resolved: rounding of logits alone makes up to {self.rounding:.1g} nats.")
        if self.num_sequences > 1 and self.disagreement in (0.0, 1.0):
            made.append(
                "all positions agree, or none does: an error of 0 over so few sequences bounds no rare exception."
            )
        return made


def function_distance(loss: Loss, first: Theta, second: Theta, *, chunk: int = 64) -> FunctionDistance:
    r"""How differently two models of one architecture predict, position by position of the same data.

    $$\mathrm{KL} = \frac{\sum_{it} w_{it} \sum_v p_{itv} (\log p_{itv} - \log q_{itv})}{\sum_{it} w_{it}}, \qquad
      \mathrm{JS} = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \qquad m = \tfrac12 (p + q),$$

    p of the first, q of the second model, w the weights of the targets: padding and what is not scored do not count. In log
    space and float64; batch after batch, `chunk` positions at a time. Errors over sequences.

    A document takes the logarithm of a softmax, which is 0 times minus infinity where a probability underflows.

    Raises ValueError for outputs that are no logits of labels.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([0, 1]))], fs.classification)
    >>> round(function_distance(loss, torch.tensor([500.0, -500.0]), torch.tensor([-500.0, 500.0])).js, 6)      # ln 2
    0.693147
    """
    check_count("chunk", chunk)
    names = ("kl", "kl_reverse", "js", "disagreement", "rounding")
    columns = _sums(loss, (first, second), chunk, _pairwise)
    values = (columns[:-1].sum(1) / columns[-1].sum()).tolist()
    errors = ratio_stderr(columns[:-1], columns[-1]).tolist()
    made = dict(zip(names, values, strict=True)) | {f"{k}_stderr": e for k, e in zip(names, errors, strict=True)}
    num, rounding = int((columns[-1] != 0).sum()), made.pop("rounding")
    return FunctionDistance(
        **{k: v for k, v in made.items() if k != "rounding_stderr"}, num_sequences=num, rounding=rounding
    )


class Elasticity(Result):
    """How much of a change of what a model says was undone by another one."""

    kl_changed: float = quantity(
        "divergence of the changed model from the base", unit="nats", stderr="kl_changed_stderr"
    )
    kl_restored: float = quantity(
        "divergence of the restored model from the base", unit="nats", stderr="kl_restored_stderr"
    )
    elasticity: float = quantity("elasticity", stderr="elasticity_stderr")
    kl_changed_stderr: float
    kl_restored_stderr: float
    elasticity_stderr: float
    num_sequences: int
    rounding: float = quantity("divergence by rounding of logits", unit="nats", shown=False)

    @property
    def head(self) -> str:
        return f"elasticity over {self.num_sequences} sequences"

    @property
    def notes(self) -> list[str]:
        made = ["a single sequence has no standard error."] * (self.num_sequences < 2)
        if math.isnan(self.kl_changed + self.kl_restored):
            return [*made, "predictions of a model are nan: look at its weights."]
        if math.isnan(self.elasticity):
            made.append(
                "the changed model says what the base says, to the rounding of logits "
                f"({self.rounding:.1g} nats): there is nothing to undo."
            )
        return made


def elasticity(loss: Loss, base: Theta, changed: Theta, restored: Theta, *, chunk: int = 64) -> Elasticity:
    r"""1 where a model that was changed and then changed again predicts as the base does, 0 where nothing was undone.

    $$E = \frac{e^{-K_r} - e^{-K_c}}{1 - e^{-K_c}}, \qquad K_c = \mathrm{KL}(\text{base} \| \text{changed}), \quad
      K_r = \mathrm{KL}(\text{base} \| \text{restored}),$$

    means over scored positions (`function_distance`). Negative where the second change led further away; nan where the first
    changed nothing, or no more than rounding of logits does ($8 \epsilon^2 \sum_v p_v z_v^2$ with the base's logits z of
    machine precision $\epsilon$: errors of four units in the last place). The error is the jackknife over sequences,
    in which both divergences move together.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 1), torch.tensor([0, 1]))], fs.classification)
    >>> base, changed = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> elasticity(loss, base, changed, base).elasticity, elasticity(loss, base, changed, changed).elasticity
    (1.0, 0.0)
    """
    check_count("chunk", chunk)
    columns = _sums(loss, (base, changed, restored), chunk, _from_base)
    scored = columns[:, columns[-1] != 0]
    changed_kl, restored_kl, rounding = (scored[:3].sum(1) / scored[3].sum()).tolist()
    errors = ratio_stderr(scored[:2], scored[3]).tolist()
    rest = scored.sum(1, keepdim=True) - scored
    left_out, num = _elastic(rest[0] / rest[3], rest[1] / rest[3]), scored.shape[1]
    value = stderr = math.nan
    if changed_kl > rounding:
        value = float(_elastic(*torch.tensor([changed_kl, restored_kl], dtype=torch.float64)))
        stderr = float(jackknife_stderr(left_out)) if num > 1 else math.nan
    return Elasticity(changed_kl, restored_kl, value, errors[0], errors[1], stderr, num, rounding)


def _elastic(changed: Tensor, restored: Tensor) -> Tensor:
    """By expm1: 1 - exp(-K) of a small K to its last digits."""
    moved = -torch.expm1(-changed)
    return torch.where(moved > 0, 1 + torch.expm1(-restored) / moved, math.nan)


@torch.no_grad()
def _sums(loss: Loss, thetas: Sequence[Theta], chunk: int, numbers) -> Float[Tensor, "k n"]:  # type: ignore[no-untyped-def]
    """Per sequence, weighted sums over its positions of what `numbers` makes of log-probabilities, of rounding, and of 1."""
    for theta in thetas:
        check_point(loss, theta)
    params, parts = [loss.params(theta) for theta in thetas], []
    for inputs, targets in loss.batches:
        if not isinstance(targets, Labels):
            raise ValueError(f"`loss` must score labels by logits, and {loss.criterion!r} has other targets.")
        outs = [loss.net.apply(each, inputs) for each in params]
        total, weight = wide(outs[0].device), targets.weight
        columns = None
        for at in (weight != 0).nonzero().split(chunk):
            logs = [out[tuple(at.T)].to(total).log_softmax(-1) for out in outs]
            rounding = _rounding(outs[0][tuple(at.T)], logs[0])
            made = torch.stack([*numbers(*logs), rounding, torch.ones_like(rounding)]) * weight[tuple(at.T)].to(total)
            columns = made.new_zeros(len(made), len(weight)) if columns is None else columns
            columns.index_add_(1, at[:, 0], made)
        if columns is not None:
            parts.append(columns.cpu().double())
    return torch.cat(parts, 1)


def _pairwise(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """KL both ways, Jensen-Shannon, another argmax."""
    forward, differ = kl_divergence(p, q), (p.argmax(-1) != q.argmax(-1)).to(p.dtype)
    differ = torch.where(forward.isnan(), math.nan, differ)  # nan is no first choice
    return forward, kl_divergence(q, p), js_divergence(p, q), differ


def _from_base(base: Tensor, changed: Tensor, restored: Tensor) -> tuple[Tensor, ...]:
    return kl_divergence(base, changed), kl_divergence(base, restored)


def _rounding(logits: Tensor, p: Tensor) -> Tensor:
    """The divergence, to second order, of logits that are off by four units in the last place."""
    squares = torch.where(p == -math.inf, 0.0, logits.to(p.dtype).square() * p.exp())
    return 8 * torch.finfo(logits.dtype).eps ** 2 * squares.sum(-1)
