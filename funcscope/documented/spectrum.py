"""`compute_hessian_eigenvalues_lanczos` as documented."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.checks import check_count
from ..core.keys import key
from ..curvature.summary import hessian_summary
from .scoring import loss_of


def compute_hessian_eigenvalues_lanczos(
    model: nn.Module, batch: Any, k: int = 5, max_iter: int | None = None, tol: float = 1e-3, seed: int = 42
) -> dict[str, Any]:
    r"""Both ends of the spectrum of a batch's Hessian, its trace and its shape, as the documented dictionary.

    `top_eigenvalues` (k, descending), `max_eigenvalue`, `min_eigenvalue`, `condition_number` (damped, `damping` beside it),
    `trace`, `spectral_gap`, `has_negative_eigenvalues`, `negative_fraction`, `effective_rank`, `lanczos_iterations`,
    `residuals`, `converged`; sampled numbers have their standard error under `<name>_stderr`. See `fs.hessian_summary`.

    k: eigenvalues from each end, fewer where the model has fewer than 2 k parameters. max_iter: the most products that they
    take; None: until they have converged, within 100 and 20 per value. tol: residuals relative to the largest |eigenvalue|.

    Where this differs from the document: there, the k algebraically largest Ritz values after 20 steps were kept, negative
    curvature was looked for among these, the condition number was their ratio, and trace and effective rank were absent.

    Raises as `hessian_summary` does, and as `sample_directional_losses` for the batch.

    >>> import torch
    >>> spectrum = compute_hessian_eigenvalues_lanczos(nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), k=2)
    >>> spectrum["has_negative_eigenvalues"], bool(spectrum["spectral_gap"] > 0)
    (False, True)
    """
    loss = loss_of(model, batch)
    num = min(k, loss.layout.num // 2)
    if max_iter is not None:
        check_count("max_iter", max_iter, least=2 * num)
    return hessian_summary(loss, loss.net.theta, key=key(seed), num=num, tol=tol, max_matvecs=max_iter).asdict()
