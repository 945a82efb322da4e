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

    The `absolute` of `curvature.sam_sharpness`, whose result has the parts, the standard error and the rounding, too. The
    model is in eval mode here whatever mode it is in, and is not touched: no gradient is left in its parameters. batch: a
    mapping, a tensor of token ids or `(inputs, targets)`, scored as in `sample_directional_losses`.
    adaptive_epsilon: epsilon is relative, $\epsilon \|\theta\|$; the document has the word and the documented system
    never had the option. norm_threshold: the document's, absolute.

    Where this differs from the document: no gradient has to be computed before (the document's function read `.grad`,
    whatever batch it was of). It is no estimate of the largest eigenvalue, whose relation `epsilon^2 lambda_max / 2` holds
    for the ball's maximum at a stationary point only, nor a check of it: see `curvature.sam_sharpness`.

    Raises ValueError as `sam_sharpness` does, at a gradient below `norm_threshold` above all, and for a batch that has no
    tensors or no known score.

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
    model; and beside these `sam_ratio_stderr`, `sam_difference`, `sam_difference_stderr`, `eigenvalue_ratio_interval` (what
    the residuals leave of the ratio), `sharper_by_eigenvalue`, `eigenvalue_difference` with `_stderr` over the sequences,
    and the 95 % intervals `sam_difference_interval` and `eigenvalue_difference_interval`: a model is sharper on other data,
    too, where they leave 0 out. Differences are A - B. Ratios have no unit, differences of SAM nats.

    dataloader: batches, all of which are used. epsilon: absolute, the same for both. seed: of the eigenvalues' iteration.

    Where this differs from the document: there, an assertion demands that both measures agree, and `hessian_confirms` is
    always true; they measure different things and may disagree (see `curvature.compare_sharpness`). There, the first batch
    decides.

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
        flat = loss.layout.ravel(loss.leaves(theta), loss.net.theta.dtype)
        found = eigenpairs(hessian(loss, theta), flat, key=key(seed), num=1, which="largest", vectors=True)
        errors = eigenvalue_errors(loss, theta, found)
        return Eigenvalue(float(found.values[0]), float(found.residuals[0]), errors)

    a, b = (_loss_on_all(model, batches) for model in (model_a, model_b))
    found = compare_sharpness(a, a.net.params, b, b.net.params, epsilon=epsilon, eigenvalues=largest)
    gap = found.eigenvalue_difference
    assert gap is not None  # both sides have errors
    return {
        "sharper_model": found.sharper_by_sam,
        "hessian_confirms": found.agree,
        "sam_ratio": float(found.sam_ratio.value),
        "eigenvalue_ratio": found.eigenvalue_ratio,
        "sam_ratio_stderr": float(found.sam_ratio.stderr),
        "sam_difference": float(found.sam_difference.value),
        "sam_difference_stderr": float(found.sam_difference.stderr),
        "eigenvalue_ratio_interval": found.eigenvalue_ratio_interval,
        "sharper_by_eigenvalue": found.sharper_by_eigenvalue,
        "sam_difference_interval": found.sam_interval,
        "eigenvalue_difference": float(gap.values[0]),
        "eigenvalue_difference_stderr": float(gap.stderr[0]),
        "eigenvalue_difference_interval": tuple(gap.intervals()[0].tolist()),
    }


def _loss_on_all(model: nn.Module, batches: list[Any]) -> Loss:
    """The mean over all batches, scored as the first one is."""
    first = loss_of(model, batches[0])
    return objective(
        first.net, [tuple(batch) if isinstance(batch, list) else batch for batch in batches], first.criterion
    )
