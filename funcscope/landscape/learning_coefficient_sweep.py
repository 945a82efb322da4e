"""Whether the local learning coefficient is one of the weights or of the sampler: estimates over step sizes, a plateau."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_number, check_options, check_positive
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, quantity
from .learning_coefficient import learning_coefficient
from .learning_coefficient_result import LearningCoefficient

LEAST_STEPS = 3
"""Step sizes that make a plateau."""
EPSILON = ("localization", "epsilon")


class LearningCoefficientSweep(Result):
    """The local learning coefficient over step sizes for each localisation, and where it does not depend on them."""

    estimates: Float[Tensor, "g e"] = quantity(
        "local learning coefficient by step size", per=EPSILON, stderr="estimates_stderr"
    )
    estimates_stderr: Float[Tensor, "g e"]
    r_hat: Float[Tensor, "g e"] = quantity("split R-hat by step size", per=EPSILON)
    num_diverged: Float[Tensor, "g e"] = quantity("chains that diverged by step size", per=EPSILON)
    learning_coefficient: Float[Tensor, " g"] = quantity(
        "local learning coefficient on the plateau", per="localization", stderr="learning_coefficient_stderr"
    )
    """nan without a plateau."""
    learning_coefficient_stderr: Float[Tensor, " g"]
    plateau_from: Float[Tensor, " g"] = quantity("smallest step size of the plateau", per="localization")
    plateau_to: Float[Tensor, " g"] = quantity("largest step size of the plateau", per="localization")
    step_sizes: list[float]
    localizations: list[float]
    tolerance: float
    num_samples: int

    @property
    def coords(self) -> dict[str, list[float]]:
        return {"localization": self.localizations, "epsilon": self.step_sizes}

    @property
    def head(self) -> str:
        return f"local learning coefficient over {len(self.step_sizes)} step sizes (n = {self.num_samples:,})"

    @property
    def notes(self) -> list[str]:
        none = [
            f"{g:g}" for g, value in zip(self.localizations, self.learning_coefficient, strict=True) if value.isnan()
        ]
        if not none:
            return []
        return [
            f"no plateau in the step size at localisation {', '.join(none)}: nowhere do {LEAST_STEPS} neighbouring step "
            f"sizes, with mixed chains around a minimum, agree within {self.tolerance:.0%} beyond their errors. The "
            "estimates are of the sampler as much as of the weights, and none is given as the learning coefficient."
        ]


def learning_coefficient_sweep(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    step_sizes: Sequence[float] = (5e-5, 1e-4, 2e-4),
    localizations: Sequence[float] = (1000.0,),
    tolerance: float = 0.2,
    **options: Any,
) -> LearningCoefficientSweep:
    r"""`learning_coefficient` over step sizes and localisations, with a test of whether it depends on the step size.

    Too small a step, and the chains have not left $w^*$ when they end; too large a one, and they spread by the step itself.
    A plateau is a run of 3 or more neighbouring step sizes without a diverged chain, with R-hat at most 1.1, around weights
    at a minimum, in which every two estimates are shown to be alike: their difference and twice its error together are at
    most `tolerance` times the mean of the run. (That they do not differ significantly would let wide errors pass for
    agreement.) The longest run counts, of equally long ones that of the smaller steps. Its mean is the value, with the error
    of a mean of independent estimates; what the step size moves it by within the tolerance comes on top. The settings that
    show one are in `learning_coefficient`; step sizes of $0.05$, $0.1$ and $0.2 / \gamma$ suit one localisation $\gamma$.

    Every pair of settings has chains of its own, drawn from `key` and these settings, so that a sweep with further ones
    repeats those that were there. The cost is that of all estimates. options: of `learning_coefficient`.

    Raises ValueError for fewer than 3 step sizes, and as `learning_coefficient` does; TypeError for unknown options.

    Lau et al. (2023), arXiv:2308.12108, appendix on calibration.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 2))
    >>> loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    >>> found = learning_coefficient_sweep(loss, net.theta, key=fs.key(0), num_chains=2, num_steps=9, burn_in=3)
    >>> found.learning_coefficient.isnan().all().item(), len(found.notes)       # six draws show no plateau
    (True, 1)
    """
    check_key(key)
    sizes = sorted({float(each) for each in step_sizes})
    for each in sizes:
        check_positive("step_sizes", each)
    if len(sizes) < LEAST_STEPS:
        raise ValueError(f"`step_sizes` must be {LEAST_STEPS} different ones at least, got {list(step_sizes)}.")
    gammas = sorted({float(each) for each in localizations})
    if not gammas:
        raise ValueError("`localizations` must hold one at least.")
    check_number("tolerance", tolerance, 0.0)
    check_options("options", learning_coefficient, options)
    made = [
        [learning_coefficient(loss, theta, key=fold_in(key, f"{eps!r} {gamma!r}"), step_size=eps, localization=gamma,
                              **options) for eps in sizes]
        for gamma in gammas
    ]  # fmt: skip
    return _swept(made, sizes, gammas, tolerance)


def _swept(
    made: list[list[LearningCoefficient]], sizes: list[float], gammas: list[float], tolerance: float
) -> LearningCoefficientSweep:
    value, stderr = (
        torch.stack([torch.stack([getattr(one.learning_coefficient, name) for one in row]) for row in made])
        for name in ("value", "stderr")
    )
    r_hat, diverged = (
        torch.tensor([[float(getattr(one, name)) for one in row] for row in made], dtype=torch.float64)
        for name in ("r_hat", "num_diverged")
    )
    resolved = torch.tensor([[not one.unresolved for one in row] for row in made])
    valid = (diverged == 0) & resolved
    runs = [plateau(*row, tolerance=tolerance) for row in zip(value, stderr, valid, strict=True)]
    rows = [_on(run, *row, sizes) for run, row in zip(runs, zip(value, stderr, strict=True), strict=True)]
    mean, error, low, high = torch.tensor(rows, dtype=torch.float64).T
    return LearningCoefficientSweep(
        estimates=value, estimates_stderr=stderr, r_hat=r_hat, num_diverged=diverged, learning_coefficient=mean,
        learning_coefficient_stderr=error, plateau_from=low, plateau_to=high, step_sizes=sizes, localizations=gammas,
        tolerance=tolerance, num_samples=made[0][0].num_samples,
    )  # fmt: skip


def plateau(value: Tensor, stderr: Tensor, valid: Tensor, *, tolerance: float) -> range | None:
    """The longest run of valid places, of the first of these, whose values are alike: see `learning_coefficient_sweep`."""
    num = len(value)
    for size in range(num, LEAST_STEPS - 1, -1):
        for start in range(num - size + 1):
            run = slice(start, start + size)
            if bool(valid[run].all()) and _are_alike(value[run], stderr[run], tolerance):
                return range(start, start + size)
    return None


def _are_alike(value: Tensor, stderr: Tensor, tolerance: float) -> bool:
    most = tolerance * float(value.mean())
    return all(
        float((value[i] - value[j]).abs() + 2 * (stderr[i].square() + stderr[j].square()).sqrt()) <= most
        for i, j in combinations(range(len(value)), 2)
    )


def _on(run: range | None, value: Tensor, stderr: Tensor, sizes: list[float]) -> tuple[float, float, float, float]:
    """Mean, its error and the ends of a plateau."""
    if run is None:
        return (math.nan,) * 4
    own = slice(run.start, run.stop)
    return float(value[own].mean()), float(stderr[own].square().sum().sqrt()) / len(run), sizes[run[0]], sizes[run[-1]]
