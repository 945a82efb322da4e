"""`compute_sam_sharpness` and `compare_model_sharpness` as documented."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..core.keys import key
from ..core.objective import Loss, Theta, objective
from ..curvature.ascent_sharpness import sam_sharpness
from ..curvature.data_error import eigenvalue_errors
from ..curvature.hessian import hessian
from ..curvature.sharpness_comparison import Eigenvalue, compare_sharpness
from ..linalg.eigen import eigenpairs
from .scoring import loss_of


def compute_sam_sharpness(
    model: nn.Module, batch: Any, epsilon: float = 0.01, adaptive_epsilon: bool = False, norm_threshold: float = 1e-6
) -> float:
    r"""How far the loss of a batch rises in a step of length epsilon up its gradient, in nats.

    $$L(\theta + \epsilon\, g / \|g\|) - L(\theta).$$

    The `absolute` of `curvature.sam_sharpness`, whose result has the parts, the standard error and the rounding, too. Model
    and batch as in `sample_directional_losses`; no gradient is left in the parameters. adaptive_epsilon: epsilon is
    relative, $\epsilon \|\theta\|$. norm_threshold: the document's, absolute.

    Where this differs from the document: no gradient has to be computed before (its function read `.grad`, whatever batch it
    was of), and the value is neither an estimate of the largest eigenvalue nor a check of it: see `curvature.sam_sharpness`.

    Raises ValueError as `sam_sharpness` does, at a gradient below `norm_threshold` above all, and as
    `sample_directional_losses` does for the batch.

    Foret, Kleiner, Mobahi, Neyshabur (2021), Sharpness-aware minimization for efficiently improving generalization.

    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> compute_sam_sharpness(model, (torch.eye(3), torch.tensor([0, 1, 0])), epsilon=0.1) > 0
    True
    """
    loss = loss_of(model, batch)
    options = {"epsilon": epsilon, "adaptive_epsilon": adaptive_epsilon, "norm_threshold": norm_threshold}
    return sam_sharpness(loss, loss.net.params, curvature=False, **options).absolute  # type: ignore[arg-type]


def compare_model_sharpness(
    model_a: nn.Module, model_b: nn.Module, dataloader: Iterable[Any], epsilon: float = 0.01, seed: int = 0
) -> dict[str, Any]:
    r"""Which of two models is sharper on the same data, as the documented dictionary.

    `sharper_model`, "A" or "B" by SAM's step as in the document (None where equal); `sam_ratio`, A over B;
    `eigenvalue_ratio` of the largest eigenvalues of the Hessian; `hessian_confirms`, whether the eigenvalues name the same
    model. Beside these, `asdict()` of `curvature.compare_sharpness`, and `eigenvalue_difference` with `_stderr` over the
    sequences. A model is sharper on other data, too, where `sam_difference_interval` or `eigenvalue_difference_interval`
    (95 %) leaves 0 out. Differences are A - B; ratios have no unit, differences of SAM nats.

    dataloader: batches, all of which are used. epsilon: absolute, the same for both. seed: of the eigenvalues' iteration.

    Where this differs from the document: there, the first batch decides, and an assertion demands that both measures agree,
    so that `hessian_confirms` is always true; they may disagree (see `curvature.compare_sharpness`).

    Raises ValueError for no batch, and as `compute_sam_sharpness` does.

    Foret et al. (2021), as above.

    >>> import torch
    >>> data = [(torch.eye(3), torch.tensor([0, 1, 0]))]
    >>> model = nn.Linear(3, 2)
    >>> compare_model_sharpness(model, model, data)["sam_ratio"]
    1.0
    """
    batches = list(dataloader)
    if not batches:
        raise ValueError("`dataloader` has no batch: there is nothing to compare on.")

    def largest(loss: Loss, theta: Theta) -> Eigenvalue:
        pairs = eigenpairs(hessian(loss, theta), loss.net.theta, key=key(seed), num=1, which="largest", vectors=True)
        return Eigenvalue(float(pairs.values[0]), float(pairs.residuals[0]), eigenvalue_errors(loss, theta, pairs))

    firsts = [loss_of(model, batches[0]) for model in (model_a, model_b)]  # all are scored as the first one is
    a, b = (objective(first.net, batches, first.criterion) for first in firsts)
    result = compare_sharpness(a, a.net.params, b, b.net.params, epsilon=epsilon, eigenvalues=largest)
    gap = result.eigenvalue_difference
    assert gap is not None  # both sides have errors
    return {
        "sharper_model": result.sharper_by_sam,
        "hessian_confirms": result.agree,
        **result.asdict(),
        "sam_difference_interval": result.sam_interval,
        "eigenvalue_difference": float(gap.values[0]),
        "eigenvalue_difference_stderr": float(gap.stderr[0]),
        "eigenvalue_difference_interval": tuple(gap.intervals()[0].tolist()),
    }
