"""The metrics of gradients, of weights and of models that are merged."""

from __future__ import annotations

from ..curvature.edge_of_stability import edge_of_stability
from ..gradients.aggregation import gradient_aggregation
from ..gradients.alignment import gradient_alignment
from ..gradients.dispersion import gradient_dispersion
from ..gradients.flow import gradient_flow
from ..gradients.influence import influence
from ..gradients.influential_texts import most_influential
from ..gradients.noise import gradient_noise
from ..gradients.pathology import gradient_pathology
from ..gradients.self_influence import self_influence, tracin_self_influence
from ..gradients.trajectory import alignment_trajectory, gradient_trajectory
from ..landscape.learning_coefficient import learning_coefficient
from ..landscape.learning_coefficient_sweep import learning_coefficient_sweep
from ..weights.early_bird import early_bird
from ..weights.interference import task_interference
from ..weights.layer_spectra import layer_spectra
from ..weights.modularity import modularity_score
from ..weights.plasticity import plasticity
from ..weights.pruning import pruning_robustness, structured_pruning
from ..weights.separability import separability
from ..weights.winning_tickets import winning_tickets
from . import merged_models
from .metric import KEY, Metric, of_function

TWO_TASKS = ("first_loss", "second_loss", "theta")
EXPERTS = ("task_losses", "experts", "theta")
CHAINS = {"num_chains": 4, "num_steps": 600, "burn_in": 200}

GRADIENTS: tuple[Metric, ...] = (
    of_function(
        "gradient_flow", gradient_flow, ("loss", "theta"), category="gradients", cost=lambda _: 8,
        drawn=("rms", "mean_gradient_norm", "gradient_variance", "log_ratio", "slope"),
        sentence="The logarithm of the gradient's root mean square changes by {slope}.",
        reference="Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks",
    ),
    of_function(
        "gradient_pathology", gradient_pathology, ("loss", "theta"), category="gradients", without=("step",),
        cost=lambda _: 8, drawn=("effective_learning_rate", "gradient_dispersion", "radial"),
        sentence="{num_vanishing} parameters take steps that are too small, {num_exploding} too large.",
        reference="You, Gitman, Ginsburg (2017), arXiv:1708.03888",
    ),
    of_function(
        "gradient_dispersion", gradient_dispersion, ("loss", "theta"), category="gradients", cost=lambda _: 8,
        drawn=("gini", "participation_ratio", "entropy", "top_mass"),
        reference="Hurley, Rickard (2009), doi:10.1109/TIT.2009.2027527",
    ),
    of_function(
        "gradient_noise", gradient_noise, ("loss", "theta"), category="gradients", plan=("chunk_size",),
        cost=lambda _: 5, drawn=("square", "trace", "snr_square", "noise_scale"),
        sentence="The gradient's squared signal-to-noise ratio is {total_snr_square}, its noise scale {total_noise_scale}.",
        reference="McCandlish et al. (2018), arXiv:1812.06162",
    ),
    of_function(
        "gradient_trajectory", gradient_trajectory, ("loss", "theta"), category="gradients",
        drawn=("losses", "norms", "cosine_next", "cosine_first"), cost=lambda s: 3 * (1 + s["steps"]),
        sentence="A short descent removes {relative_drop} of the loss; its path is straight to {straightness}.",
        reference="Cohen et al. (2021), arXiv:2103.00065",
    ),
    of_function(
        "edge_of_stability", edge_of_stability, ("loss", "theta", KEY), category="curvature",
        plan=("keep", "head_chunk"), without=("preconditioner",), drawn=("product", "share", "critical_share"),
        cost=lambda _: 6 * 30 + 15, reference="Cohen et al. (2021), arXiv:2103.00065",
        sentence="Learning rate times sharpness is {product} (threshold {threshold}); the learning rate is {critical_share} "
        "of the critical one.",
    ),
    of_function(
        "self_influence", self_influence, ("loss", "theta", KEY), category="gradients", plan=("chunk_size",),
        drawn=("values",), cost=lambda s: 6 * s["num"] + 3, reference="Koh, Liang (2017), arXiv:1703.04730",
        sentence="Left out, a sequence's own loss would rise by {mean} nats; a tenth of the sequences has {top_share} of the "
        "sum.",
    ),
    of_function(
        "influence", influence, (*TWO_TASKS, KEY), on="tasks", category="gradients", plan=("chunk_size",),
        more={"test": "mean"}, drawn=("left_out",), cost=lambda _: 200, reference="Grosse et al. (2023), arXiv:2308.03296",
    ),
    of_function(
        "most_influential", most_influential, (*TWO_TASKS, "token_names", KEY), on="tasks", category="gradients",
        drawn=("rise",), cost=lambda _: 200, reference="Grosse et al. (2023), arXiv:2308.03296",
        sentence="Leaving a training text out moves the test loss by about {spread}.",
    ),
    of_function(
        "tracin_self_influence", tracin_self_influence, ("loss", "thetas", "steps"), on="series", category="gradients",
        plan=("chunk_size",), drawn=("at_step", "by_block", "values"), cost=lambda _: 8,
        reference="Pruthi et al. (2020), arXiv:2002.08484",
        sentence="A sequence owes {self_share} of the fall of its loss to itself.",
    ),
    of_function(
        "alignment_trajectory", alignment_trajectory, ("loss", "thetas", "steps"), on="series", category="gradients",
        drawn=("cosine_next", "cosine_update", "cosine_first", "cosine_last", "square"), cost=lambda _: 6,
        reference="Cohen et al. (2021), arXiv:2103.00065",
    ),
    of_function(
        "gradient_alignment", gradient_alignment, ("task_losses", "theta", KEY), on="experts", category="gradients",
        plan=("chunk_size",), drawn=("cosine", "conflict", "cosine_of_all"), cost=lambda _: 20,
        reference="Yu et al. (2020), arXiv:2001.06782",
    ),
    of_function(
        "gradient_aggregation", gradient_aggregation, ("task_losses", "theta", KEY), on="experts", category="gradients",
        plan=("chunk_size",), drawn=("weights", "inner", "num_conflicts"), cost=lambda _: 20,
        reference="Quinton, Rey (2024), arXiv:2406.16232",
    ),
    of_function(
        "learning_coefficient", learning_coefficient, ("loss", "theta", KEY), category="landscape", plan=("chunk_size",),
        drawn=("learning_coefficient", "traces", "chain_estimates"), reference="Lau et al. (2023), arXiv:2308.12108",
        cost=lambda s: 3 * s["num_chains"] * s["num_steps"],
        sentence="The local learning coefficient is {learning_coefficient}, with R-hat {r_hat}.",
    ),
    of_function(
        "learning_coefficient_sweep", learning_coefficient_sweep, ("loss", "theta", KEY), category="landscape",
        at="phases", more=CHAINS, drawn=("estimates", "learning_coefficient"),
        cost=lambda s: 3 * s["num_chains"] * s["num_steps"] * len(s["step_sizes"]) * len(s["localizations"]),
        reference="Lau et al. (2023), arXiv:2308.12108",
        sentence="On the plateau the local learning coefficient is {learning_coefficient}.",
    ),
)  # fmt: skip

WEIGHTS: tuple[Metric, ...] = (
    of_function(
        "modularity_score", modularity_score, ("loss", "theta", KEY), category="weights", plan=("chunk_size",),
        drawn=("coupling", "community"), cost=lambda _: 4, reference="Filan et al. (2021), arXiv:2103.03386",
        sentence="{off_block_mass} of the squares lie off the blocks; Q is {modularity}, {null_quantile} for permuted "
        "couplings.",
    ),
    of_function(
        "separability", separability, (*TWO_TASKS, KEY), on="tasks", category="weights", plan=("chunk_size",),
        drawn=("separability",), cost=lambda _: 12,
        sentence="The separability of the tasks is {separability_of_all} (p {p_differ_of_all}).",
    ),
    of_function(
        "task_interference", task_interference, TWO_TASKS, on="tasks", category="weights", plan=("chunk_size",),
        drawn=("change", "predicted", "second_order"), cost=lambda _: 16,
        reference="Kirkpatrick et al. (2017), arXiv:1612.00796",
    ),
    of_function(
        "pruning_robustness", pruning_robustness, ("loss", "theta", KEY), category="weights", without=("calibration",),
        plan=("chunk_size",), drawn=("delta_loss", "area", "critical_sparsity", "accuracy"),
        cost=lambda s: (len(s["scores"]) + s["num_random"]) * len(s["sparsities"]) + 5 + 4 * s["num_draws"],
        reference="Sun et al. (2024), arXiv:2306.11695; Molchanov et al. (2017), arXiv:1611.06440",
        sentence="With random masks the loss rises by {random_area} on average over the sparsities, from {baseline_loss}.",
    ),
    of_function(
        "structured_pruning", structured_pruning, ("loss", "theta", KEY), category="weights", without=("calibration",),
        plan=("chunk_size",), drawn=("delta_loss", "area", "critical_sparsity"),
        cost=lambda s: (len(s["scores"]) + s["num_random"]) * len(s["sparsities"]) + 5 + 4 * s["num_draws"],
        reference="Michel, Levy, Neubig (2019), arXiv:1905.10650",
    ),
    of_function(
        "winning_tickets", winning_tickets, ("loss", "theta", KEY), category="weights", at="phases", drawn=("losses",),
        cost=lambda s: 3.0 * s["num"] * (s["rounds"] + 3) * s["steps"], reference="Frankle, Carbin (2019), arXiv:1803.03635",
        sentence="At a sparsity of {sparsity} the ticket is {ticket_excess} above the dense network, and a random one "
        "{random_excess} above the ticket.",
    ),
    of_function(
        "plasticity", plasticity, ("loss", "theta", KEY), category="weights",
        drawn=("remaining_loss", "memorised_share", "losses"), cost=lambda s: 3.0 * s["num"] * s["steps"],
        reference="Lyle et al. (2023), arXiv:2303.01486",
        sentence="Of a loss of {initial_loss} on new targets, {remaining_loss} remain after {steps} steps of training.",
    ),
    of_function(
        "early_bird", early_bird, ("loss", "thetas", "steps"), on="series", category="weights", cost=lambda _: 0,
        drawn=("distance", "window_distance", "distance_to_last"), reference="You et al. (2020), arXiv:1909.11957",
        sentence="Masks settle at step {emergence_step}; random ones are {chance_distance} apart.",
    ),
    of_function(
        "ticket_overlap", merged_models.ticket_overlap, EXPERTS, on="experts", category="weights", cost=lambda _: 0,
        drawn=("kappa",), reference="Frankle, Carbin (2019), arXiv:1803.03635",
    ),
    of_function(
        "layer_spectra", layer_spectra, ("params", KEY), category="weights", cost=lambda _: 0,
        drawn=("alpha", "random_distance", "stable_rank"), reference="Martin, Mahoney (2021), arXiv:1810.01075",
    ),
    of_function(
        "task_vectors", merged_models.task_vectors, EXPERTS, on="experts", category="weights", cost=lambda _: 0,
        drawn=("norms", "relative_norms", "total_cosines", "total_sign_conflicts", "kappa"),
        reference="Ilharco et al. (2023), arXiv:2212.04089",
    ),
    of_function(
        "ties_merging", merged_models.ties_merging, (*EXPERTS, KEY), on="experts", category="weights",
        drawn=("mean_deltas", "best_loss", "gain"), cost=lambda s: 2 * (len(s["coefficients"]) + 36),
        reference="Yadav et al. (2023), arXiv:2306.01708",
    ),
    of_function(
        "fisher_merging", merged_models.fisher_merging, (*EXPERTS, KEY), on="experts", category="weights",
        drawn=("mean_deltas", "best_loss", "gain", "diagonal_ratio"),
        cost=lambda s: 2 * (len(s["coefficients"]) + 3 * s["num"] + 12),
        reference="Matena, Raffel (2022), arXiv:2111.09832",
    ),
    of_function(
        "merge_curves", merged_models.merge_curves, (*EXPERTS, KEY), on="experts", category="weights",
        drawn=("mean_deltas", "best_loss", "gain", "increase", "quadratic", "diagonal"),
        cost=lambda s: 2 * (len(s["methods"]) * (len(s["coefficients"]) + 6) + 3 * s["num"] + 3),
        reference="Jin et al. (2023), arXiv:2212.09849; Yadav et al. (2023), arXiv:2306.01708",
    ),
)  # fmt: skip
