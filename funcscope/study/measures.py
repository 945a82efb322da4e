"""What the catalogue measures of one model beside the functions of the package: its loss, ranks, and ends of spectra."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.layout import Params
from ..core.masks import tokens_there
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..curvature.data_error import EigenvalueErrors, eigenvalue_errors
from ..curvature.fisher import empirical_fisher, exact_fisher
from ..curvature.hessian import hessian
from ..curvature.sequence_forms import spacing
from ..curvature.summary import MATRICES, Matrix, hessian_block_eigenvalues
from ..linalg.eigen import Eigenpairs, eigenpairs
from ..linalg.ranks import matrix_ranks
from ..linalg.summary import SpectrumSummary, spectrum_summary
from ..linalg.trace import TraceEstimate, hutchinson_trace
from . import digest


class MeanLoss(Result):
    """The loss on the data, with its standard error over sequences."""

    loss: Estimate = quantity("loss", unit="loss")
    num_sequences: int
    sums: Tensor = internal()
    """Of the losses of each sequence."""
    weights: Tensor = internal()
    data: str = internal()
    """The sum of what is scored: equal for two models that read the same tokens and labels."""
    shapes: str = internal()
    """The sum of the names and shapes of the parameters: equal for two models that have directions in common."""
    about: str = internal()
    """Which texts these are, where they come from a file: how many were used, skipped and cut."""

    @property
    def head(self) -> str:
        return f"loss over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        if not bool(self.loss.value.isfinite()):
            return [f"the loss is {float(self.loss.value)}: check the weights and the texts."]
        one = ["one sequence: there is no error over sequences."] if self.num_sequences < 2 else []
        return [*filter(None, [self.about]), *one]


def mean_loss(loss: Loss, params: Params, texts: str = "") -> MeanLoss:
    """The loss, token-weighted, with its linearised standard error over sequences."""
    with torch.no_grad():
        sums, weights = loss.terms(params)
    scored = int((weights != 0).sum())
    mean = Estimate(sums.sum() / weights.sum(), ratio_stderr(sums, weights), scored)
    data, shapes = digest.of_tensors(_scored(loss)), digest.of_json(loss.layout.shapes)
    return MeanLoss(mean, scored, sums.cpu(), weights.cpu(), data, shapes, texts)


def _scored(loss: Loss) -> list[Tensor]:
    """Real tokens, where they are, and targets: the id that stands at padding is each model's own affair."""
    tensors = []
    for inputs, targets in loss.batches:
        named = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
        mask = named.get("attention_mask")
        if isinstance(ids := named.get("input_ids"), Tensor) and isinstance(mask, (Tensor, Mapping)):
            named["input_ids"] = ids.masked_fill(~tokens_there(mask), 0)
        tensors += [value for _, value in sorted(named.items()) if isinstance(value, Tensor)]
        tensors += [value for value in torch.utils._pytree.tree_leaves(targets) if isinstance(value, Tensor)]
    return tensors


class MatrixRanks(Result):
    """The three ranks of every weight matrix."""

    effective_rank: Tensor = quantity("effective rank", per="matrix")
    spectral_rank: Tensor = quantity("spectral rank", per="matrix")
    participation_ratio: Tensor = quantity("participation ratio", per="matrix")
    matrices: list[str] = internal()

    @property
    def coords(self) -> Mapping[str, list[str]]:
        return {"matrix": self.matrices}

    @property
    def head(self) -> str:
        return f"dimensions that {counted(len(self.matrices), 'weight matrix', 'weight matrices')} use"


def effective_dimensionality(params: Params) -> MatrixRanks:
    """How many dimensions each weight matrix (a parameter of two dimensions) uses; see `matrix_ranks`."""
    ranks = {name: matrix_ranks(value) for name, value in params.items() if value.ndim == 2}
    if not ranks:
        raise ValueError("the model has no weight matrix: none of its parameters has two dimensions.")
    columns = torch.tensor([*ranks.values()], dtype=torch.float64).T
    return MatrixRanks(columns[0], columns[1], columns[2], list(ranks))


def hessian_trace(
    loss: Loss, theta: Tensor, *, key: Key, num: int = 64, keep: bool = True, head_chunk: int | None = None
) -> TraceEstimate:
    """Hutchinson's trace of the Hessian; see `hutchinson_trace`."""
    return hutchinson_trace(hessian(loss, theta, keep=keep, head_chunk=head_chunk), theta, key=key, num=num)


def fisher_information(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    method: Literal["empirical", "exact"] = "empirical",
    num: int = 5,
    keep: bool = True,
    **options: Any,
) -> SpectrumSummary:
    """Spectrum, trace and ranks of the Fisher information, or of the gradients' second moment ("empirical").

    method: `empirical` is the uncentred second moment of per-sequence gradients, and no Fisher information; `exact` is the
    Fisher information of the model's own distribution, the Gauss-Newton matrix where the loss is a cross-entropy.
    """
    check_choice("method", method, ("empirical", "exact"))
    matvec = (empirical_fisher if method == "empirical" else exact_fisher)(loss, theta, keep=keep)
    options.setdefault("rounding", spacing(loss, theta) ** 0.5)
    return spectrum_summary(matvec, theta, key=key, num=num, **options)


def hessian_largest_eigenvalues(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    matrix: Matrix = "hessian",
    num: int = 1,
    tol: float = 1e-2,
    keep: bool = True,
    head_chunk: int | None = None,
) -> Eigenpairs:
    """The largest eigenvalues of the Hessian with their residuals, and nothing else of its spectrum; see `eigenpairs`."""
    check_choice("matrix", matrix, MATRICES)
    matvec = MATRICES[matrix](loss, theta, keep=keep, head_chunk=head_chunk)
    return eigenpairs(matvec, theta, key=key, num=num, which="largest", tol=tol)


def hessian_eigenvalue_errors(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    matrix: Matrix = "hessian",
    num: int = 3,
    tol: float = 1e-3,
    keep: bool = True,
    head_chunk: int | None = None,
) -> EigenvalueErrors:
    """Eigenvalues from both ends with what other data would change in them; see `eigenvalue_errors`."""
    check_choice("matrix", matrix, MATRICES)
    matvec = MATRICES[matrix](loss, theta, keep=keep, head_chunk=head_chunk)
    pairs = eigenpairs(matvec, theta, key=key, num=num, which="both", tol=tol, vectors=True)
    return eigenvalue_errors(loss, theta, pairs, matrix=matrix)


class BlockEigenvalues(Result):
    """The largest eigenvalue of every diagonal block; made by `block_eigenvalues`."""

    values: Tensor = quantity("largest eigenvalue of the block", name="block_eigenvalues", per="block")
    residuals: Tensor = quantity("residual", per="block")
    converged: Tensor = quantity("converged", per="block", shown=False)
    num_matvecs: int = quantity("products", shown=False)
    blocks: list[str] = internal()

    @property
    def coords(self) -> Mapping[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"largest eigenvalues of {counted(len(self.blocks), 'block')}"

    @property
    def notes(self) -> list[str]:
        names = [name for name, done in zip(self.blocks, self.converged.tolist(), strict=True) if not done]
        return [f"not converged: {', '.join(names)}"] if names else []


def block_eigenvalues(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    by: str = "layer",
    matrix: Matrix = "hessian",
    tol: float = 1e-3,
    keep: bool = True,
) -> BlockEigenvalues:
    """The largest eigenvalue of every diagonal block of the Hessian; see `hessian_block_eigenvalues`."""
    pairs = hessian_block_eigenvalues(
        loss, theta, key=key, by=by, which="largest", matrix=matrix, tol=tol, keep=keep  # type: ignore[arg-type]
    )  # fmt: skip
    values, residuals, converged = (
        torch.stack([getattr(one, name)[0] for one in pairs.values()]) for name in ("values", "residuals", "converged")
    )
    return BlockEigenvalues(
        values, residuals, converged, num_matvecs=sum(one.num_matvecs for one in pairs.values()), blocks=list(pairs)
    )
