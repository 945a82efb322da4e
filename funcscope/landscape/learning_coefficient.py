"""The local learning coefficient: how fast the volume of low loss around weights shrinks, by Langevin chains."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count, check_instance, check_number, check_positive
from ..core.estimate import Estimate
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .chain_diagnostics import LEAST_DRAWS, effective_samples, split_r_hat
from .langevin import Chains, langevin_chains

LEAST_CHAINS = 2
FAR = 10.0
"""A chain that is so many times further away, or higher up, than any stable one has diverged."""
MIXED = 1.1
"""The largest R-hat of chains that count as mixed."""
OFTEN = 0.5


class LearningCoefficient(Result):
    """The local learning coefficient with its error over chains, and what the chains say of themselves.

    `learning_coefficient`: nan where fewer than half of the chains, or fewer than two, are left.
    """

    traces: Float[Tensor, "c t"] = quantity("loss above that at the weights", unit="loss", per=("chain", "t"))
    """At every step, burn-in too; of a minibatch, over what the same sequences have at the weights."""
    square_distances: Float[Tensor, "c t"] = internal()
    diverged: Bool[Tensor, " c"] = internal()
    num_samples: int
    """n: sequences that are scored."""
    num_parameters: int
    inverse_temperature: float
    step_size: float
    localization: float
    burn_in: int
    batch_size: int | None
    key: Key

    @property
    def coords(self) -> dict[str, range]:
        chains, steps = self.traces.shape
        return {"chain": range(chains), "t": range(steps)}

    @derived("local learning coefficient")
    def learning_coefficient(self) -> Estimate:
        made = Estimate.of(self.chain_estimates[~self.diverged])
        nan = torch.tensor(math.nan, dtype=torch.float64)
        return made if self.is_estimated else Estimate(nan, nan, made.num)

    @derived("local learning coefficient of the chain", per="chain")
    def chain_estimates(self) -> Float[Tensor, " c"]:
        return self.num_samples * self.inverse_temperature * self._draws.mean(1)

    @derived("split R-hat of the losses")
    def r_hat(self) -> float:
        return split_r_hat(self._draws[~self.diverged])

    @derived("effective number of draws")
    def num_effective(self) -> float:
        return effective_samples(self._draws[~self.diverged])

    @derived("share of draws below the loss at the weights")
    def negative_share(self) -> float:
        return float((self._draws[~self.diverged] < 0).double().mean())

    @derived("chains that diverged")
    def num_diverged(self) -> int:
        return int(self.diverged.sum())

    @derived("root mean square distance from the weights", per="chain")
    def distances(self) -> Float[Tensor, " c"]:
        return self.square_distances[:, self.burn_in :].mean(1).sqrt()

    @property
    def is_estimated(self) -> bool:
        left = len(self.diverged) - self.num_diverged
        return left >= LEAST_CHAINS and 2 * left >= len(self.diverged)

    @property
    def head(self) -> str:
        chains, steps = self.traces.shape
        data = "the whole loss" if self.batch_size is None else f"minibatches of {counted(self.batch_size, 'sequence')}"
        return (
            f"local learning coefficient by {counted(chains, 'chain')} of {counted(steps - self.burn_in, 'draw')} behind "
            f"{counted(self.burn_in, 'step')} of burn-in, on {data} (n = {self.num_samples:,})"
        )

    @property
    def unresolved(self) -> list[str]:
        """Chains that have not mixed, and weights at no minimum, have no learning coefficient."""
        return ["learning_coefficient"] if self._on_mixing or self._on_minimum else []

    @property
    def notes(self) -> list[str]:
        return [text for text in (self._on_divergence, self._on_mixing, self._on_minimum, self._on_size) if text]

    @property
    def _draws(self) -> Tensor:
        return self.traces[:, self.burn_in :]

    @property
    def _on_divergence(self) -> str:
        if not self.num_diverged:
            return ""
        names = ", ".join(str(i) for i in self.diverged.nonzero()[:, 0].tolist())
        then = "the estimate is of the others." if self.is_estimated else "too few are left for an estimate."
        return f"{counted(self.num_diverged, 'chain')} of {len(self.diverged)} diverged ({names}): take smaller steps; {then}"

    @property
    def _on_mixing(self) -> str:
        if not self.is_estimated or self.r_hat <= MIXED:
            return ""
        return (
            f"R-hat is {self.r_hat:.3g}: the chains have not mixed, and the error does not hold what they have not seen. "
            "Take more steps, a longer burn-in or a stronger localisation."
        )

    @property
    def _on_minimum(self) -> str:
        if not self.is_estimated or (self.negative_share <= OFTEN and float(self.learning_coefficient.value) >= 0):
            return ""
        return (
            f"{self.negative_share:.0%} of the draws have less loss than the weights: these are at no minimum of this loss, "
            "and the estimate is no learning coefficient."
        )

    @property
    def _on_size(self) -> str:
        made, most = self.learning_coefficient, self.num_parameters / 2
        if not float(made.value) > most:
            return ""
        chance = float(made.value - 2 * made.stderr) <= most
        return (
            f"the estimate is above {most:,g}, half the number of weights, which no learning coefficient is: "
            + ("by less than two of its errors, which may be chance; or " if chance else "")
            + "the steps are too large, or the gradients too noisy."
        )


def learning_coefficient(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    num_chains: int = 4,
    num_steps: int = 600,
    burn_in: int = 200,
    step_size: float = 1e-4,
    localization: float = 100.0,
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
    forgets where it began in $2 / \varepsilon p_i$ steps. Proof: proofs/langevin_quadratic.py. `learning_coefficient_sweep`
    looks for step sizes among which the estimate does not change.

    A chain has diverged whose losses are not finite, lie n beta times more than 10 P above that at the weights in the mean
    (no learning coefficient is above P / 2), or whose mean square distance is above 10 times the $P / \gamma$ of the
    localisation alone. It is counted and left out; without half of the chains there is no estimate. Buffers, such as the
    running statistics of batch norms, stay those of $w^*$. Of 95 % intervals (Student's t over 4 chains, a quadratic, 200
    repetitions) 96 % hold the exact mean of these finite chains.

    batch_size: sequences of a minibatch; None is the whole loss, whose gradients have no noise. Its noise adds to the spread
    of the chains, and so to the estimate. chunk_size: chains that are evaluated together.

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
    _check_settings(num_chains, num_steps, burn_in, step_size, localization)
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
        num_samples=num, num_parameters=len(point), inverse_temperature=beta, batch_size=batch_size, key=key, **settings,
    )  # fmt: skip


def _check_settings(num_chains: int, num_steps: int, burn_in: int, step_size: float, localization: float) -> None:
    check_count("num_chains", num_chains, LEAST_CHAINS)
    check_count("burn_in", burn_in, 0)
    check_count("num_steps", num_steps, burn_in + LEAST_DRAWS)
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
