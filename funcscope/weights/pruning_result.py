"""What pruning does to a loss, curve by curve."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from ..core.estimate import Crossed
from ..core.keys import Key
from ..core.result import Result, derived, quantity
from ..core.tables import counted

Curves = Float[Tensor, "c s"]
RANDOM = "random"
"""The name of the baseline among the scores: always the last."""
_AXES = ("score", "sparsity")


class PruningRobustness(Result):
    """Loss against sparsity for each score, and for random masks: the last of the curves, a mean over draws."""

    delta_loss: Curves = quantity(
        "loss above that of the whole model", unit="loss", per=_AXES, stderr="delta_loss_stderr"
    )
    delta_loss_stderr: Curves
    """Paired, over sequences; of the random masks, over draws and sequences."""
    loss: Curves = quantity("loss", unit="loss", per=_AXES, shown=False)
    accuracy: Curves | None = quantity(
        "share of labels that are predicted", per=_AXES, stderr="accuracy_stderr", shown=False
    )
    accuracy_stderr: Curves | None
    area: Float[Tensor, " c"] = quantity(
        "mean loss added over the sparsities", unit="loss", per="score", stderr="area_stderr"
    )
    area_stderr: Float[Tensor, " c"]
    critical_sparsity: Float[Tensor, " c"] = quantity(
        "sparsity at which the threshold is reached", per="score", stderr="critical_sparsity_stderr"
    )
    critical_sparsity_stderr: Float[Tensor, " c"]
    random_stderr_draws: Float[Tensor, " s"] = quantity(
        "error of the random masks over draws", unit="loss", per="sparsity", shown=False
    )
    random_stderr_data: Float[Tensor, " s"] = quantity(
        "error of the random masks over sequences", unit="loss", per="sparsity", shown=False
    )
    random_area: Crossed = quantity("mean loss that random masks add", unit="loss")
    density: Float[Tensor, "c s b"] = quantity("share kept", per=("score", "sparsity", "block"), shown=False)
    baseline_loss: float = quantity("loss of the whole model", unit="loss")
    scores: list[str]
    sparsities: list[float]
    blocks: list[str]
    pruned: str
    """What is removed: weights, heads, neurons."""
    num_prunable: int
    """How many of these there are."""
    scope: str
    threshold: float
    unit: str
    num_random: int
    num_sequences: int
    num_forwards: int
    """Passes over the data that the curves took, without those of the scores."""
    key: Key

    @derived("perplexity by that of the whole model", per=_AXES, stderr="perplexity_ratio_stderr", shown=False)
    def perplexity_ratio(self) -> Curves | None:
        """exp of the added loss, where that is a cross-entropy."""
        return self.delta_loss.exp() if self.unit == "nats" else None

    @property
    def perplexity_ratio_stderr(self) -> Curves | None:
        return self.delta_loss.exp() * self.delta_loss_stderr if self.unit == "nats" else None

    @property
    def coords(self) -> dict[str, list]:
        return {"score": self.scores, "sparsity": self.sparsities, "block": self.blocks}

    @property
    def head(self) -> str:
        over = f"{counted(self.num_sequences, 'sequence')}, {counted(self.num_random, 'random mask')} a sparsity"
        return f"pruning of {self.num_prunable:,} {self.pruned} ({self.scope}), over {over}"

    @property
    def notes(self) -> list[str]:
        made = []
        for name, place, curve in zip(self.scores, self.critical_sparsity, self.delta_loss, strict=True):
            if math.isnan(float(place)):
                made.append(f"The curve of {name} {_why(curve, self.threshold)}: it has no critical sparsity.")
        if not bool(self.delta_loss.isfinite().all()):
            made.append("A loss is not finite at some sparsity: what is made of it is undefined.")
        if self.num_sequences < 2:
            made.append("There is one sequence, and no error over sequences.")
        if self.num_random < 2:
            made.append("There is one draw of random masks, and no error over draws.")
        return made


def _why(curve: Float[Tensor, " s"], threshold: float) -> str:
    finite = curve[curve.isfinite()]
    if len(finite) and float(finite[0]) >= threshold:
        return f"starts at or above {threshold:g}"
    return f"does not reach {threshold:g}"
