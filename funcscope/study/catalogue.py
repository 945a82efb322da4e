"""All metrics by name: data about the functions of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..curvature.ascent_sharpness import asam_sharpness, sam_sharpness
from ..curvature.average_sharpness import average_sharpness
from ..curvature.critical import critical_sharpness
from ..curvature.fisher import empirical_fisher, exact_fisher
from ..curvature.hessian import hessian
from ..curvature.summary import hessian_summary
from ..landscape.axes import plane_directions
from ..landscape.directional import Sampling, prepare
from ..landscape.flatness import flatness
from ..landscape.planes import LossPlane, loss_plane
from ..landscape.sampling import SamplingSettings
from ..landscape.truncation import num_refined
from ..linalg.ranks import matrix_ranks
from ..linalg.summary import SpectrumSummary, spectrum_summary
from ..linalg.trace import TraceEstimate, hutchinson_trace
from .metric import CATALOGUE as CATALOGUE
from .metric import KEY, Metric, of_function, register
from .metric import metric as metric

PRODUCT = 6
"""Forward passes that one product with the Hessian costs, the graph being kept."""


class MeanLoss(Result):
    """The loss on the data, with its standard error over sequences."""

    loss: Estimate = quantity("loss", unit="loss")
    num_sequences: int

    @property
    def head(self) -> str:
        return f"loss over {self.num_sequences} sequences"

    @property
    def notes(self) -> list[str]:
        if not bool(self.loss.value.isfinite()):
            return [f"the loss is {float(self.loss.value)}: check the weights and the texts."]
        return ["one sequence: there is no error over sequences."] if self.num_sequences < 2 else []


def mean_loss(loss: Loss, params: Params) -> MeanLoss:
    """The loss, token-weighted, with its linearised standard error over sequences."""
    with torch.no_grad():
        sums, weights = loss.terms(params)
    scored = int((weights != 0).sum())
    return MeanLoss(Estimate(sums.sum() / weights.sum(), ratio_stderr(sums, weights), scored), scored)


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
        return f"dimensions that {len(self.matrices)} weight matrices use"


def effective_dimensionality(params: Params) -> MatrixRanks:
    """How many dimensions each weight matrix (a parameter of two dimensions) uses; see `matrix_ranks`."""
    ranks = {name: matrix_ranks(value) for name, value in params.items() if value.ndim == 2}
    if not ranks:
        raise ValueError("the model has no weight matrix: none of its parameters has two dimensions.")
    columns = torch.tensor([*ranks.values()], dtype=torch.float64).T
    return MatrixRanks(columns[0], columns[1], columns[2], list(ranks))


def directional(
    loss: Loss,
    params: Params,
    *,
    key: Key,
    n_samples: int = 50,
    span: float = 0.1,
    normalize: str = "filter",
    distribution: str = "normal",
    relative_span: bool = False,
    slopes: bool = True,
    curvature: str | None = "difference",
    chunk: int | None = None,
) -> Sampling:
    """Losses, slopes and curvatures along random directions, on both sides: `directional_losses`, a row at a time."""
    return prepare(
        loss,
        params,
        SamplingSettings(
            key=key, num=n_samples, lengths=(span,), normalize=normalize, distribution=distribution,
            relative=relative_span, slope="auto" if slopes else None, curvature=curvature, chunk=chunk,
        ),
    )  # fmt: skip


def loss_landscape_2d(
    loss: Loss,
    theta: Tensor,
    *,
    key: Key,
    n_points: int = 25,
    span: float = 0.1,
    normalization: str = "layer",
    chunk: int | None = None,
) -> LossPlane:
    """The loss on the plane through theta along two random directions, orthogonal in every group; see `loss_plane`."""
    base = loss.net.layout.unravel(theta)
    axes = plane_directions(loss.net, key=key, normalize=normalization, base=base)  # type: ignore[arg-type]
    return loss_plane(loss, theta, axes, num=n_points, span=span, chunk=chunk)


def hessian_trace(loss: Loss, theta: Tensor, *, key: Key, num: int = 64, keep: bool = True) -> TraceEstimate:
    """Hutchinson's trace of the Hessian; see `hutchinson_trace`."""
    return hutchinson_trace(hessian(loss, theta, keep=keep), theta, key=key, num=num)


def fisher_information(
    loss: Loss, theta: Tensor, *, key: Key, method: str = "empirical", num: int = 5, keep: bool = True, **options: Any
) -> SpectrumSummary:
    """Spectrum, trace and ranks of the Fisher information, or of the gradients' second moment ("empirical").

    method: `empirical` is the uncentred second moment of per-sequence gradients, and no Fisher information; `exact` is the
    Fisher information of the model's own distribution, the Gauss-Newton matrix where the loss is a cross-entropy.
    """
    check_choice("method", method, ("empirical", "exact"))
    matvec = (empirical_fisher if method == "empirical" else exact_fisher)(loss, theta, keep=keep)
    return spectrum_summary(matvec, theta, key=key, num=num, **options)


def of_summary(settings: Mapping[str, Any]) -> float:
    """Forward passes of a spectrum's summary; the eigenvalues take what they often take."""
    products = 40 + 6 * settings["num"] + settings["trace_matvecs"] + settings["num_probes"] * settings["steps"]
    return float(PRODUCT * products)


SUMMARY = {"tol": 1e-3, "num_probes": 8, "steps": 40, "trace_matvecs": 64}

for _one in (
    Metric("mean_loss", mean_loss, ("loss", "params"), category="loss", sentence="The loss is {loss}."),
    of_function(
        "directional_losses", directional, ("loss", "params", KEY),
        drawn=("delta_mean", "curvature_mean", "dir_grad_delta_corr", "delta_losses", "curvatures"),
        category="landscape",
        cost=lambda s: 5 + 2 * s["n_samples"] + 4 * num_refined(s["n_samples"]),
        sentence="Along random directions the loss changes by {delta_mean} on average.",
        reference="Li et al. (2018), arXiv:1712.09913",
    ),
    of_function(
        "landscape_flatness", flatness, ("loss", "theta", KEY),
        drawn=("mean_delta_loss", "flatness_ratio", "pair_mean", "delta_losses"),
        category="landscape", without=("directions",),
        cost=lambda s: 2 + (1 + s["two_sided"]) * s["n_directions"],
        sentence="A step of length {epsilon} raises the loss by {mean_delta_loss} on average.",
    ),
    of_function(
        "loss_landscape_2d", loss_landscape_2d, ("loss", "theta", KEY),
        drawn=("grid_losses", "roughness"),
        category="landscape",
        cost=lambda s: s["n_points"] ** 2 + 2, reference="Li et al. (2018), arXiv:1712.09913",
        sentence="On the plane the loss lies between {loss_min} and {loss_max}.",
    ),
    of_function(
        "hessian_eigenvalues", hessian_summary, ("loss", "theta", KEY),
        drawn=("max_eigenvalue", "min_eigenvalue", "trace", "negative_fraction", "effective_rank"),
        category="curvature", plan=("keep", "head_chunk"),
        cost=of_summary, more={"num": 5, **SUMMARY}, reference="Ghorbani et al. (2019), arXiv:1901.10159",
        sentence="The largest eigenvalue of the Hessian is {max_eigenvalue} (residual {max_residual}), its trace {trace}.",
    ),
    of_function(
        "hessian_trace", hessian_trace, ("loss", "theta", KEY), category="curvature", plan=("keep",),
        cost=lambda s: PRODUCT * s["num"], sentence="The trace of the Hessian is {value}.",
    ),
    of_function(
        "fisher_information", fisher_information, ("loss", "theta", KEY),
        drawn=("trace", "max_eigenvalue", "effective_rank"),
        category="fisher", plan=("keep",),
        cost=of_summary, more=SUMMARY, sentence="The trace is {trace}, the effective rank {effective_rank}.",
    ),
    of_function(
        "sam_sharpness", sam_sharpness, ("loss", "theta"),
        drawn=("absolute", "relative"),
        category="curvature", cost=lambda s: 4 + 3 * s["steps"],
        reference="Foret et al. (2021), arXiv:2010.01412", sentence="A step up the gradient raises the loss by {absolute}.",
    ),
    of_function(
        "asam_sharpness", asam_sharpness, ("loss", "theta"), category="curvature", cost=lambda _: 7,
        reference="Kwon et al. (2021), arXiv:2102.11600",
    ),
    of_function(
        "average_sharpness", average_sharpness, ("loss", "theta", KEY), category="curvature", without=("trace",),
        cost=lambda s: 1 + 2 * s["num"],
    ),
    of_function(
        "critical_sharpness", critical_sharpness, ("loss", "theta"), category="curvature", cost=lambda _: 15,
    ),
    Metric(
        "effective_dimensionality", effective_dimensionality, ("params",), category="weights", cost=lambda _: 0,
        reference="Roy and Vetterli (2007)",
    ),
):  # fmt: skip
    register(_one)
