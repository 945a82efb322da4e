"""What Langevin chains say of the local learning coefficient, and whether they may be believed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .chain_diagnostics import effective_samples, split_r_hat

LEAST_CHAINS = 2
MIXED = 1.1
"""The largest R-hat of chains that count as mixed."""
OFTEN = 0.5
NOTABLE, MOSTLY = 0.1, 0.5
"""Shares of an estimate that are of the steps: that a note names, and beyond which it is of nothing else."""
UNFELT = 0.1
"""That of one direction along which the loss rises with the tenth power: below it, chains have met no rise at all."""
RELAXED = 5
"""Relaxation times after which flat directions have all their variance but exp(-10) of it."""


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
    pull: Float[Tensor, "c t"] | None = internal(default=None)
    """`Chains.pull`, of the whole loss."""

    @property
    def coords(self) -> dict[str, range]:
        chains, steps = self.traces.shape
        return {"chain": range(chains), "t": range(steps)}

    @property
    def axis_titles(self) -> dict[str, str]:
        return {"t": "step of the chain"}

    @derived("local learning coefficient")
    def learning_coefficient(self) -> Estimate:
        made = Estimate.of(self.chain_estimates[~self.diverged])
        nan = torch.tensor(math.nan, dtype=torch.float64)
        return made if self.is_estimated else Estimate(nan, nan, made.num)

    @derived("part of it that is of the size of the steps")
    def step_excess(self) -> Estimate | None:
        """None for minibatches, whose noise is in their gradients, and where there is no estimate."""
        if self.pull is None or not self.is_estimated:
            return None
        return Estimate.of(self.step_size / 8 * self.pull[~self.diverged, self.burn_in :].mean(1))

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

    @derived("burn-in in relaxation times of flat directions")
    def num_relaxations(self) -> float:
        """Of 2 / (step size times localisation) steps each."""
        return self.burn_in * self.step_size * self.localization / 2

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
        """Chains that have not mixed, weights at no minimum, and numbers of the sampler are no learning coefficient."""
        of_steps = self._step_share > MOSTLY
        return ["learning_coefficient"] if self._on_mixing or self._on_minimum or of_steps else []

    @property
    def notes(self) -> list[str]:
        every = (
            self._on_divergence,
            self._on_burn_in,
            self._on_mixing,
            self._on_minimum,
            self._on_steps,
            self._on_size,
            self._on_localization,
        )
        return [text for text in every if text]

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
    def _on_burn_in(self) -> str:
        if self.num_relaxations >= 1:
            return ""
        if not self.localization:
            return (
                "directions without curvature spread for as long as the chains run, as nothing holds them, and what the loss "
                "makes of that grows with the number of steps. Take a localisation."
            )
        pull = self.step_size * self.localization / 2
        return (
            f"directions without curvature forget where they began in {1 / pull:,.0f} steps, and have "
            f"{1 - (1 - pull) ** (2 * self.burn_in):.0%} of their variance after the {self.burn_in:,} of the burn-in: the "
            f"estimate is of how far the chains have come. Take a burn-in of {RELAXED / pull:,.0f} steps, a stronger "
            "localisation, or larger steps where the estimate does not change with their size."
        )

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
    def _step_share(self) -> float:
        """Of the estimate; 0 where nothing is measured, or no more than the error of the estimate."""
        made, steps = self.learning_coefficient, self.step_excess
        if steps is None or not float(steps.value) > 2 * float(made.stderr):
            return 0.0
        return float(steps.value) / float(made.value) if float(made.value) > 0 else 0.0

    @property
    def _on_steps(self) -> str:
        if self._step_share <= NOTABLE:
            return ""
        return (
            f"about {self._step_share:.0%} of the estimate is of the size of the steps, by which sharp directions spread too "
            f"far: take steps of {self.step_size * NOTABLE / self._step_share:.1g}, and a burn-in that is longer by as much."
        )

    @property
    def _on_localization(self) -> str:
        made = self.learning_coefficient
        if not self.is_estimated or self._on_burn_in or not 0 <= float(made.value) < UNFELT - 2 * float(made.stderr):
            return ""
        return (
            f"the chains stay where the loss rises by less than {UNFELT:g} of its temperature: the localisation holds them, "
            "and the estimate is of it. Take a weaker one, with larger steps."
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
