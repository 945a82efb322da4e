"""How far a training step moves each parameter relative to its size, and which units no gradient comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_positive
from ..core.layout import By, Leaf
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.vectors import Leaves, inner
from .dispersion import dispersion_of
from .left_out import GroupedGradients, block_norms, error_notes, forward_blocks, joined, num_nonfinite, sampling_notes

Values = Float[Tensor, " b"]
Each = Float[Tensor, " t"]


class GradientPathology(Result):
    """Relative updates, and units without a gradient; made by `gradient_pathology`."""

    update: Values = quantity("relative update", per="block", name="effective_learning_rate", stderr="update_stderr")
    dispersion: Values = quantity(
        "Gini coefficient of the gradient", per="block", name="gradient_dispersion", stderr="dispersion_stderr"
    )
    parameter_update: Each = quantity("relative update", per="parameter", stderr="parameter_update_stderr")
    vanishing: Bool[Tensor, " t"] = quantity("step is too small", per="parameter")
    exploding: Bool[Tensor, " t"] = quantity("step is too large", per="parameter")
    radial: Each = quantity("cosine of gradient and parameter", per="parameter", stderr="radial_stderr")
    angular_rate: Each = quantity("learning rate over squared length", per="parameter")
    dead: Each = quantity("share of units without gradient", per="parameter", name="dead_neurons", stderr="dead_stderr")
    num_nonfinite: Int[Tensor, " t"] = quantity(
        "entries of the gradient that are not finite", per="parameter", shown=False
    )
    learning_rate: float
    vanishing_below: float
    exploding_above: float
    num_sequences: int
    num_groups: int
    num_unscored: int
    own_step: bool
    """Whether the step is the gradient."""
    update_stderr: Values = internal()
    dispersion_stderr: Values = internal()
    parameter_update_stderr: Each = internal()
    radial_stderr: Each = internal()
    dead_stderr: Each = internal()
    blocks: list[str] = internal()
    parameters: list[str] = internal()

    @derived("parameters whose step is too small")
    def num_vanishing(self) -> int:
        return int(self.vanishing.sum())

    @derived("parameters whose step is too large")
    def num_exploding(self) -> int:
        return int(self.exploding.sum())

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks, "parameter": self.parameters}

    @property
    def head(self) -> str:
        step = "the gradient" if self.own_step else "the step that was given"
        return f"relative updates by {step} at a learning rate of {self.learning_rate:g}"

    @property
    def notes(self) -> list[str]:
        notes = [] if self.own_step else ["The step was given: its updates have no errors over sequences."]
        if none := [name for name, x in zip(self.parameters, self.angular_rate, strict=True) if x.isnan()]:
            notes.append(f"Parameters that are 0 have no relative update: {', '.join(none)}.")
        if bad := [name for name, x in zip(self.parameters, self.num_nonfinite, strict=True) if x]:
            notes.append(f"The gradient is not finite in {', '.join(bad)}: look at the weights or the batch.")
        if self.own_step:
            notes += error_notes(self.parameters, self.radial, self.radial_stderr, self.num_groups)
        return notes + sampling_notes(self.num_groups, self.num_unscored)


def gradient_pathology(
    loss: Loss,
    theta: Theta,
    *,
    learning_rate: float = 1e-3,
    step: Theta | None = None,
    by: By = "layer",
    vanishing: float = 1e-7,
    exploding: float = 0.1,
    num_groups: int = 8,
) -> GradientPathology:
    r"""How far one training step moves every block and parameter relative to its length, and which units get no gradient.

    $$u_b = \eta\, \frac{\lVert \mathrm{step}_b \rVert}{\lVert \theta_b \rVert},$$

    the documented effective learning rate, around $10^{-3}$ in a healthy training. A parameter's step is too small where
    $u < $ `vanishing`, too large where $u >$ `exploding` or the step is not finite. A parameter that is 0 has no u, nan, and
    is neither unless its step is not finite. A document compares $\lVert g \rVert$ with $10^{-7} \eta$: the larger the
    learning rate, the sooner it calls a gradient too small.

    step: what the learning rate multiplies, theta becoming theta - eta step: the gradient of the mean loss by default; a flat
    vector or a dict, Adam's preconditioned gradient for example. A step that is given has no error over sequences.
    radial: $\langle g, \theta \rangle / (\lVert g \rVert \lVert \theta \rVert)$, 0 up to rounding for a parameter that is
    followed by a norm, so that its length does not matter. Of such a one the direction alone learns, at the rate
    `angular_rate`, $\eta / \lVert \theta \rVert^2$; nan for one that is 0.
    dead: the share of rows of a weight (output units; columns of a Hugging Face Conv1D) whose gradient is exactly 0 in each
    of the groups of sequences: nothing in these data moves the weights into the unit. nan for vectors, for tables of
    embeddings, whose rows are tokens, and where the gradient is not finite. Units by their activations:
    `representation.gradient_dead`.
    dispersion: see `gradient_dispersion`.

    Errors are the jackknife's over `num_groups` groups of sequences. Noise of the data is in every length; see
    `gradient_noise`. Cost and memory: as of `gradient_dispersion`.

    Raises ValueError for rates and thresholds that are not above 0, for a step of other shape, and as `gradient_flow` does.

    Relative updates: You, Gitman, Ginsburg (2017), arXiv:1708.03888; angular rates: van Laarhoven (2017), arXiv:1706.05350.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(2, 2), torch.zeros(2, 1))], fs.custom(lambda out, y: 3 * out[:, 0]))
    >>> result = gradient_pathology(loss, torch.tensor([3.0, 4.0, 0.0, 0.0]), learning_rate=0.1)
    >>> round(float(result.update), 4), float(result.dead), int(result.num_exploding)              # .1 |(3, 3)| / 5
    (0.0849, 0.5, 0)
    """
    for name, value in (("learning_rate", learning_rate), ("vanishing", vanishing), ("exploding", exploding)):
        check_positive(name, value)
    given = None if step is None else loss.wide_leaves(step, "step")
    theta = Loss.vector(loss, theta)
    blocks = forward_blocks(loss, by)
    made = GroupedGradients(loss, theta, num_groups)
    whole, names = made.whole, [name for names in blocks.values() for name in names]
    steps = _Steps(made.leaves, blocks, {name: [name] for name in names}, learning_rate)
    rest, reached = [], dict[str, list[Tensor]]()
    for part in made.each():
        rest.append(steps.numbers(part.rest))
        _note_reached(reached, part.own, loss.layout.by_name)
    if not rest:
        _note_reached(reached, whole, loss.layout.by_name)
    values, errors = steps.numbers(whole), _errors(rest)
    if given is not None:
        values |= steps.updates(given)
        errors = {key: x for key, x in errors.items() if key not in steps.updates(given)}
    for key, x in values.items():
        errors.setdefault(key, torch.full_like(x, math.nan))
    u, step_sizes = values["parameter_update"], block_norms(whole if given is None else given, steps.single)
    dead = torch.stack([_dead(reached.get(name, [])) for name in names], 1)
    nonfinite, lengths = num_nonfinite(whole, steps.single), block_norms(made.leaves, steps.single)
    stderrs = {f"{key}_stderr": x for key, x in errors.items()}
    return GradientPathology(
        **values, **stderrs, vanishing=u < vanishing, exploding=(u > exploding) | ~step_sizes.isfinite(),
        angular_rate=torch.where(lengths > 0, learning_rate / lengths.square(), math.nan),
        dead=torch.where(nonfinite > 0, math.nan, dead[0]), dead_stderr=torch.where(nonfinite > 0, math.nan, dead[1]),
        num_nonfinite=nonfinite, learning_rate=learning_rate, vanishing_below=vanishing, exploding_above=exploding,
        num_sequences=made.num_sequences, num_groups=len(made.groups), num_unscored=made.num_unscored,
        own_step=given is None, blocks=list(blocks), parameters=names,
    )  # fmt: skip


@dataclass(frozen=True)
class _Steps:
    """Relative updates and shapes of gradients, by block and by parameter."""

    theta: Leaves
    blocks: dict[str, list[str]]
    single: dict[str, list[str]]
    learning_rate: float

    def updates(self, g: Leaves) -> dict[str, Tensor]:
        """Of a step; nan for what is 0."""
        made = {}
        for name, groups in (("update", self.blocks), ("parameter_update", self.single)):
            lengths = block_norms(self.theta, groups)
            made[name] = torch.where(lengths > 0, self.learning_rate * block_norms(g, groups) / lengths, math.nan)
        return made

    def numbers(self, g: Leaves) -> dict[str, Tensor]:
        """Of a gradient."""
        spread = torch.stack([dispersion_of(joined(g, each))[0] for each in self.blocks.values()])
        return {**self.updates(g), "dispersion": spread, "radial": _cosines(g, self.theta, list(self.single))}


def _errors(rest: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By name, from the values without each group."""
    return {key: jackknife_stderr(torch.stack([x[key] for x in rest], -1)) for key in rest[0]} if rest else {}


def _cosines(g: Leaves, theta: Leaves, names: list[str]) -> Each:
    """nan where a length is 0 or not finite."""

    def cosine(name: str) -> float:
        a, b = {name: g[name]}, {name: theta[name]}
        square = inner(a, a) * inner(b, b)
        return inner(a, b) / math.sqrt(square) if 0 < square < math.inf else math.nan

    return torch.tensor([cosine(name) for name in names], dtype=torch.float64)


def _note_reached(reached: dict[str, list[Tensor]], g: Leaves, leaves: Mapping[str, Leaf]) -> None:
    """Of every weight that is no table, which of its units the gradient of a group comes to."""
    for name, x in g.items():
        leaf = leaves[name]
        if leaf.filter_dim is not None and leaf.owner != "Embedding":
            rows = x.movedim(leaf.filter_dim, 0).flatten(1)
            reached.setdefault(name, []).append((rows != 0).any(1).cpu())


def _dead(groups: list[Tensor]) -> Float[Tensor, "2"]:
    """The share of units that no group reaches, with the jackknife's error; nan where there are none."""
    if not groups:
        return torch.full((2,), math.nan, dtype=torch.float64)
    table = torch.stack(groups).double()
    times = table.sum(0)
    dead = (times == 0).double().mean()
    without = torch.stack([((times - row) == 0).double().mean() for row in table])
    error = jackknife_stderr(without) if len(groups) > 1 else dead * math.nan
    return torch.stack([dead, error])
