"""The local learning coefficient: how fast the volume of low loss around weights shrinks, by Langevin chains."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_instance, check_number, check_positive
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from .chain_diagnostics import LEAST_DRAWS
from .langevin import Chains, langevin_chains
from .learning_coefficient_result import LEAST_CHAINS, LearningCoefficient

FAR = 10.0
"""A chain that is so many times further away, or higher up, than any stable one has diverged."""


def learning_coefficient(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num_chains: int = 4,
    num_steps: int = 600,
    burn_in: int = 200,
    step_size: float = 1e-4,
    localization: float = 1000.0,
    inverse_temperature: float | None = None,
    batch_size: int | None = None,
    chunk_size: int = 4,
) -> LearningCoefficient:
    r"""How degenerate the loss is around trained weights: the local learning coefficient, by Langevin dynamics.

    $$\hat\lambda = n \beta \big(\mathbb{E}\, L(w) - L(w^*)\big), \qquad
      w \sim e^{-n \beta L(w) - \frac\gamma2 \|w - w^*\|^2}, \qquad \beta = 1 / \ln n,$$

    half the number of weights at a regular minimum, less where directions are flat to higher order, whatever the curvature
    in the others is. The expectation is the mean over `num_chains` chains that start at $w^*$, of `num_steps` steps each, the
    first `burn_in` left out (`langevin_chains`); the standard error is over chains, with one degree of freedom less than
    there are.

    n is the number of scored sequences, and L the mean over their tokens, as in the literature: sequences are the
    independent draws. Only $n \beta$ enters; for the likelihood of all tokens give `inverse_temperature` as often as there
    are tokens to a sequence. The estimate depends on $\varepsilon$ (`step_size`), $\gamma$ (`localization`) and
    $\beta$: for a quadratic loss with curvatures h it is

    $$\tfrac12 \sum_i \frac{n \beta h_i}{p_i\, (1 - \varepsilon p_i / 4)}, \qquad p_i = n \beta h_i + \gamma,$$

    which lacks directions below $h_i \sim \gamma / n \beta$ and is infinite from $\varepsilon p_i = 4$ on; a chain
    forgets where it began in $2 / \varepsilon p_i$ steps, at most $2 / \varepsilon \gamma$, which is that of directions
    without curvature. Proof: proofs/langevin_quadratic.py. What $\varepsilon$ adds to it is measured along the chains, as
    `step_excess`: $\tfrac\varepsilon8\, \mathbb{E}\, g \cdot (g + \gamma (w - w^*))$, g the gradient of $n \beta L$; all of
    it for a quadratic loss, its order elsewhere. A note says where it is above 10 % of the estimate and beyond its errors;
    from half on the estimate is not resolved. Another says where the localisation alone holds the chains.

    Settings, in this order. $\gamma$: chains go as far as $\sqrt{P / \gamma}$, and the estimate is of the loss at that
    distance; take a fraction of the norm of the weights, and the same $\gamma$ for all that is compared. $\varepsilon$:
    $0.1 / \gamma$, by which flat directions relax in 20 steps and spread by 2.5 % too much; less where the sharpness h makes
    $\varepsilon (n \beta h + \gamma)$ larger than 1. `burn_in`: $10 / \varepsilon \gamma$ at least, 5 relaxation times
    (`num_relaxations`; below one, a note says so), and draws of several times that. Then `learning_coefficient_sweep` at half
    and twice the step size: the same estimate, with R-hat at most 1.1, is one of the weights and not of the sampler.

    A chain has diverged whose losses are not finite, lie n beta times more than 10 P above that at the weights in the mean
    (no learning coefficient is above P / 2), or whose mean square distance is above 10 times the $P / \gamma$ of the
    localisation alone. It is counted and left out; without half of the chains there is no estimate. Buffers, such as the
    running statistics of batch norms, stay those of $w^*$. Of 95 % intervals (Student's t over 4 chains, a quadratic, 200
    repetitions) 96 % hold the exact mean of these finite chains.

    batch_size: sequences of a minibatch; None is the whole loss, whose gradients have no noise. Its noise adds to the spread
    of the chains, and so to the estimate. It is in the losses, too, and brings R-hat close to 1 even where chains have not
    mixed: look for settings on the whole loss. chunk_size: chains that are evaluated together.

    `num_chains * num_steps` gradients: 3 forward passes each, of a minibatch, or of the whole data.

    Raises ValueError for settings out of range, a single sequence without `inverse_temperature`, a batch larger than the
    data, and where the loss at theta is not finite.

    Lau, Furman, Wang, Murfet, Wei (2023), arXiv:2308.12108; Watanabe (2013), A widely applicable Bayesian information
    criterion.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 2))
    >>> loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    >>> found = learning_coefficient(loss, net.theta, key=fs.key(0), num_chains=2, num_steps=9, burn_in=3)
    >>> found.traces.shape, float(found.traces[0, 0]), found.num_diverged
    (torch.Size([2, 9]), 0.0, 0)
    """
    check_instance("loss", loss, Loss, "`fs.objective(fs.functional(model), batches, criterion)`")
    check_key(key)
    _check_settings(num_chains, num_steps, burn_in, chunk_size, step_size, localization)
    point = loss.vector(theta)
    loss.check_function()
    loss.baseline(point)
    num, rows = _sequences(loss, point)
    beta = _inverse_temperature(inverse_temperature, num)
    if batch_size is not None:
        check_count("batch_size", batch_size)
        if batch_size > rows:
            raise ValueError(f"`batch_size` must be at most the {rows} sequences of the loss, got {batch_size}.")
    chains = langevin_chains(
        loss, point, key=key, num_chains=num_chains, num_steps=num_steps, step_size=step_size, strength=num * beta,
        localization=localization, batch_size=batch_size, chunk_size=chunk_size,
    )  # fmt: skip
    settings: dict[str, Any] = {"step_size": step_size, "localization": localization, "burn_in": burn_in}
    return LearningCoefficient(
        traces=chains.excess, square_distances=chains.square_distance,
        diverged=_diverged(chains, burn_in, num * beta, localization, len(point)),
        num_samples=num, num_parameters=len(point), inverse_temperature=beta, batch_size=batch_size, key=key,
        pull=None if batch_size is not None else chains.pull, **settings,
    )  # fmt: skip


def _check_settings(
    num_chains: int, num_steps: int, burn_in: int, chunk_size: int, step_size: float, localization: float
) -> None:
    check_count("num_chains", num_chains, LEAST_CHAINS)
    check_count("burn_in", burn_in, 0)
    check_count("num_steps", num_steps, burn_in + LEAST_DRAWS)
    check_count("chunk_size", chunk_size)
    check_positive("step_size", step_size)
    check_number("localization", localization, 0.0)


def _sequences(loss: Loss, theta: Tensor) -> tuple[int, int]:
    """How many are scored, and how many there are."""
    with torch.no_grad():
        weights = loss.terms(theta)[1]
    return int((weights != 0).sum()), len(weights)


def _inverse_temperature(given: float | None, num: int) -> float:
    if given is not None:
        check_positive("inverse_temperature", given)
        return float(given)
    if num < 2:
        raise ValueError("`inverse_temperature` must be given for a single sequence: 1 / ln n is none for n = 1.")
    return 1 / math.log(num)


def _diverged(chains: Chains, burn_in: int, strength: float, localization: float, num: int) -> Tensor:
    finite = chains.excess.isfinite().all(1) & chains.square_distance.isfinite().all(1)
    high = strength * chains.excess[:, burn_in:].mean(1) > FAR * num
    far = localization * chains.square_distance[:, burn_in:].mean(1) > FAR * num
    return ~finite | high | far
