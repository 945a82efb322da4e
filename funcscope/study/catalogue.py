"""All metrics by name: data about the functions of the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..curvature.ascent_sharpness import asam_sharpness, sam_sharpness
from ..curvature.average_sharpness import average_sharpness
from ..curvature.critical import critical_sharpness
from ..curvature.gram import gradient_norms
from ..curvature.m_sharpness import m_sharpness
from ..curvature.summary import hessian_block_traces, hessian_summary
from ..fisher.conflicts import task_conflicts
from ..fisher.methods import compare_methods
from ..fisher.spectrum import fisher_spectrum
from ..fisher.tasks import fisher_importance, fisher_overlap, qkov_interference
from ..landscape.bezier import connect
from ..landscape.flatness import flatness
from ..landscape.path import linear_path
from ..landscape.truncation import num_refined
from . import landscapes, measures, trajectories
from .activation_metrics import INFORMATION, MECHANISTIC, REPRESENTATION
from .metric import CATALOGUE as CATALOGUE
from .metric import KEY, Metric, of_function, register
from .metric import metric as metric
from .parameter_metrics import GRADIENTS, TWO_TASKS, WEIGHTS

PRODUCT = 6
"""Forward passes that one product with the Hessian costs, the graph being kept."""


def of_summary(settings: Mapping[str, Any]) -> float:
    """Forward passes of a spectrum's summary; the eigenvalues take what they often take."""
    products = 40 + 6 * settings["num"] + settings["trace_matvecs"] + settings["num_probes"] * settings["steps"]
    return float(PRODUCT * products)


SUMMARY = {"tol": 1e-3, "num_probes": 8, "steps": 40, "trace_matvecs": 64}

for _one in (
    Metric("mean_loss", measures.mean_loss, ("loss", "params", "texts"), category="loss", sentence="The loss is {loss}."),
    of_function(
        "directional_losses", landscapes.directional, ("loss", "params", KEY),
        drawn=("delta_mean", "curvature_mean", "dir_grad_delta_corr", "delta_losses", "slopes", "curvatures"),
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
        "loss_landscape_2d", landscapes.loss_landscape_2d, ("loss", "theta", KEY),
        drawn=("grid_losses", "roughness"),
        category="landscape",
        cost=lambda s: s["n_points"] ** 2 + 2, reference="Li et al. (2018), arXiv:1712.09913",
        sentence="On the plane the loss lies between {loss_min} and {loss_max}.",
    ),
    of_function(
        "hessian_eigenvalues", hessian_summary, ("loss", "theta", KEY),
        version=2,
        drawn=("max_eigenvalue", "min_eigenvalue", "trace", "negative_fraction", "effective_rank", "eigenvalues"),
        category="curvature", plan=("keep", "head_chunk"),
        cost=of_summary, more={"num": 5, **SUMMARY}, reference="Ghorbani et al. (2019), arXiv:1901.10159",
        sentence="The largest eigenvalue of the Hessian is {max_eigenvalue} (residual {max_residual}), its trace {trace}.",
    ),
    of_function(
        "hessian_trace", measures.hessian_trace, ("loss", "theta", KEY), category="curvature",
        plan=("keep", "head_chunk"), drawn=("value",), cost=lambda s: PRODUCT * s["num"],
        sentence="The trace of the Hessian is {value}.",
    ),
    of_function(
        "fisher_information", measures.fisher_information, ("loss", "theta", KEY),
        version=2,
        drawn=("trace", "max_eigenvalue", "effective_rank"),
        category="fisher", plan=("keep",),
        cost=of_summary, more=SUMMARY, sentence="The trace is {trace}, the effective rank {effective_rank}.",
    ),
    of_function(
        "fisher_spectrum", fisher_spectrum, ("loss", "theta", KEY), category="fisher", version=2,
        plan=("chunk_size", "eigensolve_device"), without=("jitter",),
        drawn=("largest_eigenvalue", "spectral_rank", "global_eigenvalues", "coupling_debiased"), cost=lambda _: 4,
        reference="Papyan (2019), arXiv:1901.08244",
        sentence="Of the gradients' second moment the trace is {global_trace}, the largest eigenvalue "
        "{global_largest_eigenvalue}; {off_block_mass_debiased} of its squares lie off the blocks.",
    ),
    of_function(
        "fisher_importance", fisher_importance, ("loss", "theta", KEY), category="fisher", by_batch=True,
        drawn=("share", "relative_density"), cost=lambda s: 5 * s["num"],
    ),
    of_function(
        "fisher_methods", compare_methods, ("loss", "theta", KEY), category="fisher", by_batch=True,
        drawn=("trace", "disagreement", "seconds"), cost=lambda s: (60 + PRODUCT * s["num"]) * len(s["methods"]),
        reference="Martens, Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884",
    ),
    of_function(
        "fisher_overlap", fisher_overlap, (*TWO_TASKS, KEY), on="tasks", category="fisher", version=2, by_batch=True,
        drawn=("jaccard", "halves"), cost=lambda s: 10 * s["num"],
        sentence="The parameters that each task needs most overlap by {total_kappa}, where 0 is chance and 1 are the same.",
    ),
    of_function(
        "cross_task_conflicts", task_conflicts, (*TWO_TASKS, KEY), on="tasks", category="fisher", version=2,
        plan=("chunk_size",), drawn=("cosine", "q_conflict"), cost=lambda _: 12,
    ),
    of_function(
        "qkov_interference", qkov_interference, (*TWO_TASKS, KEY), on="tasks", category="fisher",
        plan=("chunk_size",), drawn=("heads", "q_heads"), cost=lambda _: 20,
    ),
    of_function(
        "sam_sharpness", sam_sharpness, ("loss", "theta"),
        drawn=("absolute", "relative"),
        category="curvature", cost=lambda s: 4 + 3 * s["steps"],
        reference="Foret et al. (2021), arXiv:2010.01412", sentence="A step up the gradient raises the loss by {absolute}.",
    ),
    of_function(
        "asam_sharpness", asam_sharpness, ("loss", "theta"), category="curvature", cost=lambda _: 7,
        drawn=("absolute", "relative"), reference="Kwon et al. (2021), arXiv:2102.11600",
        sentence="A step up the gradient, in units of the weights, raises the loss by {absolute}.",
    ),
    of_function(
        "average_sharpness", average_sharpness, ("loss", "theta", KEY), category="curvature", without=("trace",),
        drawn=("sharpness", "values"), cost=lambda s: 1 + 2 * s["num"],
        sentence="Steps of length {epsilon} in random directions raise the loss by {sharpness} on average.",
    ),
    of_function(
        "critical_sharpness", critical_sharpness, ("loss", "theta"), category="curvature", drawn=("value",),
        cost=lambda _: 15, sentence="Along the gradient, the critical sharpness is {value}.",
    ),
    Metric(
        "effective_dimensionality", measures.effective_dimensionality, ("params",), category="weights", cost=lambda _: 0,
        reference="Roy and Vetterli (2007)", drawn=("effective_rank", "participation_ratio"),
    ),
    of_function(
        "hessian_largest_eigenvalues", measures.hessian_largest_eigenvalues, ("loss", "theta", KEY), category="curvature",
        plan=("keep", "head_chunk"), cost=lambda s: float(PRODUCT * (15 + 5 * s["num"])),
    ),
    of_function(
        "hessian_eigenvalue_errors", measures.hessian_eigenvalue_errors, ("loss", "theta", KEY), category="curvature",
        version=2,
        plan=("keep", "head_chunk"), cost=lambda s: float(PRODUCT * (46 + 6 * s["num"])), reference="Kato (1995), II.2",
    ),
    of_function(
        "hessian_block_traces", hessian_block_traces, ("loss", "theta", KEY), category="curvature", without=("matvec",),
        cost=lambda s: PRODUCT * s["num"],
    ),
    of_function(
        "hessian_block_eigenvalues", measures.block_eigenvalues, ("loss", "theta", KEY), category="curvature", plan=("keep",),
        cost=lambda _: PRODUCT * 60,
    ),
    of_function(
        "gradient_norms", gradient_norms, ("loss", "theta"), category="gradients", plan=("chunk_size",), cost=lambda _: 3,
        reference="Goodfellow (2015), arXiv:1510.01799",
    ),
    Metric(
        "m_sharpness", m_sharpness, ("loss", "theta"), {"m": 1, "epsilon": 0.01}, category="curvature", cost=lambda _: 5,
        drawn=("sharpness", "values"), by_batch=True,
        reference="Foret et al. (2021), arXiv:2010.01412",
    ),
    of_function(
        "flatness_profile", landscapes.flatness_profile, ("loss", "theta", KEY), category="landscape", at="phases",
        drawn=("pair_mean", "expected_delta_loss"),
        cost=lambda s: 2 + 2 * s["n_directions"] * (1 + len(s["epsilons"])) + PRODUCT * s["products"],
    ),
    of_function(
        "loss_lines", landscapes.loss_lines, ("loss", "theta", KEY), category="landscape", at="phases",
        drawn=("losses",), cost=lambda s: s["num_directions"] * s["num"],
    ),
    Metric("training_curves", trajectories.training_curves, ("curves",), on="series", category="training", cost=lambda _: 0),
    of_function(
        "trajectory_plane", trajectories.trajectory_plane, ("loss", "thetas", "steps"), on="series", category="landscape",
        drawn=("grid_losses",), cost=lambda s: s["num"] ** 2 + 2, reference="Li et al. (2018), arXiv:1712.09913",
    ),
    of_function(
        "barrier_matrix", trajectories.barrier_matrix, ("loss", "members", "names"), on="series", category="landscape",
        cost=lambda s: 10 * s["num"], reference="Frankle et al. (2020), arXiv:1912.05671",
    ),
    of_function(
        "linear_path", linear_path, ("loss", "start", "end"), on="pair", category="landscape", without=("metric", "buffers"),
        drawn=("losses",), cost=lambda s: s["num"], reference="Goodfellow et al. (2015), arXiv:1412.6544",
        sentence="The barrier on the line is {barrier_max}, above the chord {barrier_linear}.",
    ),
    of_function(
        "bezier_connection", connect, ("loss", "start", "end", KEY), on="pair", category="landscape",
        without=("metric", "buffers"), cost=lambda s: 3 * s["steps"] * s["points"] + s["num"],
        reference="Garipov et al. (2018), arXiv:1802.10026",
    ),
    Metric(
        "loss_comparison", trajectories.loss_comparison, ("names", "mean_loss"), on="pair", category="loss",
        cost=lambda _: 0, sentence="The losses differ by {difference}, paired over sequences (p = {p_value}).",
    ),
    Metric(
        "directional_comparison", trajectories.directional_comparison, ("names", "mean_loss", "directional_losses"),
        on="pair", category="landscape", cost=lambda _: 0,
    ),
    *MECHANISTIC, *INFORMATION, *REPRESENTATION, *GRADIENTS, *WEIGHTS,
):  # fmt: skip
    register(_one)
