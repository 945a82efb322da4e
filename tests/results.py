"""One example of every result of the package, made by the function that users call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from problems import seeded
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import funcscope as fs
from funcscope.core.estimate import Crossed, Estimate
from funcscope.core.result import Result
from funcscope.core.softmax import Labels
from funcscope.curvature import batch_dependence, edge_of_stability, gradient_norms, gram, routing_changes
from funcscope.curvature.fisher import fisher_diagonal_mc
from funcscope.fisher import (
    compare_methods,
    fisher_diagonal,
    fisher_groups,
    fisher_overlap,
    fisher_spectrum,
    head_interference,
    head_views,
    importance,
    mask_overlap,
    pruning_mask,
    task_conflicts,
)
from funcscope.gradients import (
    alignment_trajectory,
    gradient_aggregation,
    gradient_alignment,
    gradient_dispersion,
    gradient_flow,
    gradient_noise,
    gradient_pathology,
    gradient_trajectory,
    influence,
    linear_datamodeling_score,
    most_influential,
    self_influence,
    tracin,
    tracin_self_influence,
)
from funcscope.information import (
    compressed_weights,
    description_length,
    divergence_sums,
    expected_calibration_error,
    information_profile,
    layer_entropy,
    layer_information,
    mutual_information_infonce,
    output_divergence,
    output_entropy,
    pid,
    probe_selectivity,
    spectral_entropy,
    usable_information,
)
from funcscope.information.sequence_sums import SequenceSums
from funcscope.linalg import SpectralDensity, block_traces, hutchinson_diagonal
from funcscope.mechanistic import (
    ablation_effects,
    activation_patching,
    attention_on_text,
    attention_patterns,
    attribution_on_text,
    circuit_faithfulness,
    edge_attribution,
    induction_circuit,
    induction_heads,
    integrated_gradients,
    jacobian_lens,
    lens_on_text,
    logit_attribution,
    logit_lens,
    position_jacobian,
    qk_attribution,
    qk_ov_circuits,
    token_attribution,
)
from funcscope.representation import (
    activation_spectra,
    cka,
    gradient_dead,
    gride,
    layer_dimensions,
    layer_similarity,
    linear_reconstruction,
    ollivier_ricci,
    perturbation_gains,
    residual_gains,
    selectivity,
    similarity_to_last,
    sparsity,
    superposition,
    two_nn,
    unit_activity,
    volume_growth,
)
from funcscope.study.landscapes import flatness_profile
from funcscope.study.measures import block_eigenvalues, effective_dimensionality, mean_loss
from funcscope.study.trajectories import induction_curves, loss_comparison, training_curves, trajectory_plane
from funcscope.weights import (
    PermutationGroup,
    early_bird,
    elasticity,
    function_distance,
    iterative_magnitude_pruning,
    layer_spectra,
    masked_training,
    merge_curves,
    modularity_score,
    permutation_groups,
    plasticity,
    pruning_robustness,
    separability,
    task_interference,
    task_vectors,
    ticket_overlap,
    weight_distance,
    weight_matching,
    weight_modularity,
    winning_tickets,
)

NUM = 6
BLOCKS = {"in": [slice(0, 16)], "out": [slice(16, 26)]}


@cache
def loss() -> fs.Loss:
    """A small classifier on six sequences."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    inputs = fs.normal(fs.key(1), torch.zeros(NUM, 3, dtype=torch.float64))
    return fs.objective(fs.functional(model), [(inputs, torch.tensor([0, 1, 0, 1, 1, 0]))], fs.classification)


@cache
def second_loss() -> fs.Loss:
    """Another task for the same classifier."""
    inputs = fs.normal(fs.key(3), torch.zeros(NUM, 3, dtype=torch.float64))
    return fs.objective(loss().net, [(inputs, torch.tensor([1, 0, 0, 1, 0, 1]))], fs.classification)


@cache
def theta() -> torch.Tensor:
    return loss().net.theta


@cache
def language() -> fs.Loss:
    """A small language model on six sequences."""
    config = GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8, bos_token_id=1, eos_token_id=1)
    net = fs.functional(seeded(0, lambda: GPT2LMHeadModel(config).double()))
    return fs.objective(net, [{"input_ids": seeded(1, lambda: torch.randint(1, 9, (NUM, 5)))}], fs.causal_lm)


def activations() -> dict[str, torch.Tensor]:
    """Of two layers, four tokens of each of eight sequences."""
    x = fs.normal(fs.key(4), torch.zeros(32, 3, dtype=torch.float64))
    return {"0": x, "1": torch.cat([x[:, :2].tanh(), x[:, :1] * x[:, 1:2]], 1)}


def sequences() -> torch.Tensor:
    return torch.arange(8).repeat_interleave(4)


def words() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[1, 2, 3, 4]])}


def matrix() -> Callable[[torch.Tensor], torch.Tensor]:
    return fs.hessian(loss(), theta())


def density() -> SpectralDensity:
    return fs.spectral_density(matrix(), theta(), key=fs.key(0), num_probes=3, steps=6)


def pairs() -> Result:
    return fs.eigenpairs(matrix(), theta(), key=fs.key(0), num=2, vectors=True)


def other() -> torch.Tensor:
    return theta() + fs.normal(fs.key(2), theta())


def accuracy(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return out.argmax(-1) == labels


def axes() -> fs.Axes:
    return fs.plane_directions(loss().net, key=fs.key(0))


def sampled(at: torch.Tensor) -> fs.DirectionalLosses:
    what = {"two_sided": True, "compute_gradient": True, "compute_curvature": True}
    return fs.directional_losses(loss(), at, key=fs.key(0), n_samples=4, span=0.1, **what)


def comparison() -> Result:
    return fs.compare_directional(sampled(theta()), sampled(1.1 * theta()))


def interference() -> Result:
    """Of a language model of one layer."""
    config = GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=4, bos_token_id=1, eos_token_id=1)
    net = fs.functional(seeded(0, lambda: GPT2LMHeadModel(config)))
    ids = seeded(1, lambda: torch.randint(1, 9, (3, 2, 4)))
    a, b, held = (fs.objective(net, [{"input_ids": each}], fs.causal_lm) for each in ids)
    return head_interference(a, b, held, net.theta, views=head_views(net, config), key=fs.key(0), num=9)


@cache
def language_loss() -> fs.Loss:
    """Of a language model of one layer on three sequences."""
    config = GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=4, bos_token_id=1, eos_token_id=1)
    ids = seeded(1, lambda: torch.randint(1, 9, (3, 4)))
    return fs.objective(fs.functional(seeded(0, lambda: GPT2LMHeadModel(config))), [{"input_ids": ids}], fs.causal_lm)


def two_inputs() -> tuple:
    """The model, sequences, the same with another second token, and a metric."""
    net, clean = language_loss().net, language_loss().batches[0][0]["input_ids"]
    corrupt = clean.clone()
    corrupt[:, 1] = (clean[:, 1] + 1) % 9
    return net, net.params, clean, corrupt, lambda logits: logits[:, -1, 5] - logits[:, -1, 2]


def faithfulness() -> Result:
    options = {"sizes": [1, 4], "num_random": 2, "num_exact": 3}
    return circuit_faithfulness(*two_inputs(), edge_attribution(*two_inputs()), key=fs.key(0), **options)


def cloud() -> torch.Tensor:
    return fs.normal(fs.key(0), torch.zeros(60, 3, dtype=torch.float64))


def labelled() -> dict:
    """Two layers at twelve rows, labels and sequences."""
    x = fs.normal(fs.key(4), torch.zeros(12, 3))
    return {"layers": {"a": x, "b": x.square()}, "labels": (x[:, 0] > 0).long(), "groups": torch.arange(12) // 2}


def predictions(scale: float = 1.0) -> torch.Tensor:
    return scale * fs.normal(fs.key(5), torch.zeros(NUM, 4, 9))


def scored_labels() -> Labels:
    return fs.causal_lm.prepare(language().batches[0][0]["input_ids"][:, :4])[1]


def hidden() -> list[PermutationGroup]:
    """The hidden units of the classifier."""
    with torch.random.fork_rng():
        return permutation_groups(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))


def routing() -> Result:
    """Of a mixture of four experts, under two steps."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MixtralConfig(vocab_size=9, num_local_experts=4, num_key_value_heads=1, **sizes)
    net = fs.functional(seeded(0, lambda: MixtralForCausalLM(config)))
    steps = torch.stack([scale * fs.normal(fs.key(0), net.theta) for scale in (0.0, 1.0)])
    return routing_changes(fs.objective(net, [words()], fs.causal_lm), net.theta, steps)


EXAMPLES: dict[str, Callable[[], Result]] = {
    "Estimate": lambda: Estimate.of(torch.tensor([1.0, 2.0, 4.0])),
    "Crossed": lambda: Crossed.of_rows(Estimate.of(torch.tensor([0.0, 2.0])), torch.tensor([[0.5, -0.5], [1.0, -1.0]])),
    "TraceEstimate": lambda: fs.xtrace(matrix(), theta(), key=fs.key(0), num=8),
    "BlockTraces": lambda: block_traces(
        matrix(), theta(), {"in": [slice(0, 16)], "out": [slice(16, 26)]}, key=fs.key(0), num=3
    ),
    "DiagonalEstimate": lambda: hutchinson_diagonal(matrix(), theta(), key=fs.key(0), num=4),
    "Solution": lambda: fs.conjugate_gradient(matrix(), theta(), damping=10.0),
    "Eigenpairs": pairs,
    "SpectralDensity": density,
    "SpectralMass": lambda: density().mass_between(0.0, 1.0),
    "SpectrumSummary": lambda: fs.spectrum_summary(matrix(), theta(), key=fs.key(0), num=2, num_probes=3, steps=6),
    "FisherDiagonal": lambda: fisher_diagonal_mc(loss(), theta(), key=fs.key(0), num=3),
    "MethodComparison": lambda: compare_methods(loss(), theta(), key=fs.key(0), num=2, num_directions=2, rank=2),
    "GramSpectrum": lambda: fisher_spectrum(loss(), theta(), key=fs.key(0), by="tensor", folds=5),
    "Kfac": lambda: fs.curvature.ekfac_factors(loss(), theta(), key=fs.key(0), num=2),
    "CriticalSharpness": lambda: fs.critical_sharpness(loss(), theta()),
    "EdgeOfStability": lambda: edge_of_stability(loss(), theta(), key=fs.key(0), learning_rate=0.1),
    "MSharpness": lambda: fs.m_sharpness(loss(), theta(), m=2),
    "SamSharpness": lambda: fs.sam_sharpness(loss(), theta()),
    "AverageSharpness": lambda: fs.average_sharpness(
        loss(), theta(), key=fs.key(0), num=3, trace=Estimate.of(torch.ones(2))
    ),
    "SharpnessComparison": lambda: fs.compare_sharpness(loss(), theta(), loss(), 2 * theta()),
    "RoutingChanges": routing,
    "SequenceForms": lambda: fs.sequence_forms(loss(), theta(), torch.stack([theta(), 2 * theta()])),
    "EigenvalueErrors": lambda: fs.eigenvalue_errors(loss(), theta(), pairs()),
    "EigenvalueDifferences": lambda: fs.compare_eigenvalues(*2 * [fs.eigenvalue_errors(loss(), theta(), pairs())]),
    "TraceErrors": lambda: fs.trace_errors(loss(), theta(), key=fs.key(0), num=3),
    "Axes": axes,
    "Trajectory": lambda: fs.principal_directions([theta(), other(), -theta()]),
    "LossPlane": lambda: fs.loss_plane(loss(), theta(), axes(), num=(3, 4), metric={"accuracy": accuracy}),
    "LossLines": lambda: fs.loss_lines(loss(), theta(), axes(), num=5, relative_span=True),
    "LossPath": lambda: fs.linear_path(loss(), theta(), other(), num=5, metric={"accuracy": accuracy}),
    "BarrierMatrix": lambda: fs.barrier_matrix(
        loss(), [theta(), other(), -theta()], num=3, metric={"accuracy": accuracy}
    ),
    "Connection": lambda: fs.connect(
        loss(), theta(), other(), key=fs.key(0), steps=2, num=4, metric={"accuracy": accuracy}
    ),
    "DirectionalLosses": lambda: sampled(theta()),
    "Truncation": lambda: sampled(theta()).truncation,
    "Comparison": comparison,
    "Difference": lambda: comparison().differences["curvature_mean"],
    "Pairs": lambda: comparison().differences["delta_mean"].pairs,
    "Flatness": lambda: fs.flatness(loss(), theta(), key=fs.key(0), n_directions=4),
    "LearningCoefficient": lambda: fs.landscape.learning_coefficient(
        loss(), theta(), key=fs.key(0), num_chains=2, num_steps=7, burn_in=2, batch_size=3
    ),
    "LearningCoefficientSweep": lambda: fs.landscape.learning_coefficient_sweep(
        loss(), theta(), key=fs.key(0), step_sizes=(1e-4, 1e-3, 1e-2), num_chains=2, num_steps=7, burn_in=2
    ),
    "DirectionalCurvatures": lambda: fs.landscape.directional_curvatures(
        loss(), theta(), fs.directions(loss().net, key=fs.key(0), num=3)
    ),
    "DifferenceStep": lambda: fs.landscape.difference_step(
        loss(), theta(), fs.directions(loss().net, key=fs.key(0), num=1)[0]
    ),
    "Grams": lambda: gram(loss(), theta(), by="tensor"),
    "Norms": lambda: gradient_norms(loss(), theta(), by="tensor"),
    "GradientFlow": lambda: gradient_flow(loss(), theta(), num_groups=3),
    "GradientPathology": lambda: gradient_pathology(loss(), theta(), num_groups=3),
    "GradientDispersion": lambda: gradient_dispersion(loss(), theta(), num_groups=3),
    "GradientNoise": lambda: gradient_noise(loss(), theta(), by="tensor"),
    "BatchDependence": lambda: batch_dependence(loss(), theta(), num=3),
    "Audit": lambda: fs.audit(loss(), theta(), key=fs.key(0)),
    "MeanLoss": lambda: mean_loss(loss(), loss().layout.unravel(theta())),
    "BlockEigenvalues": lambda: block_eigenvalues(loss(), theta(), key=fs.key(0), by="tensor"),
    "FlatnessProfile": lambda: flatness_profile(
        loss(), theta(), key=fs.key(0), n_directions=3, epsilons=(0.01, 0.1), products=3
    ),
    "TrainingCurves": lambda: training_curves(
        {"step": np.array([0, 10])}
        | dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), np.array([0.5, np.nan]))
    ),
    "InductionCurves": lambda: induction_curves(
        {"step": np.array([0, 10])}
        | {
            f"{name}{end}": np.array([0.5, 0.7]) * scale
            for name in ("second_loss", "gain", "induction", "previous")
            for end, scale in (("", 1.0), ("_stderr", 0.1))
        }
    ),
    "LossComparison": lambda: loss_comparison(
        ["a", "b"], [mean_loss(loss(), loss().layout.unravel(scale * theta())) for scale in (1, 2)]
    ),
    "TrajectoryPlane": lambda: trajectory_plane(loss(), [theta(), other(), -theta()], [0, 5, 10], num=3),
    "DiagonalFisher": lambda: fisher_diagonal(loss(), theta(), method="exact"),
    "GroupedFisher": lambda: fisher_groups(theta().square(), loss().layout, by="row"),
    "HeadInterference": interference,
    "Importance": lambda: importance(theta().square(), loss().layout),
    "FisherOverlap": lambda: fisher_overlap(loss(), second_loss(), theta(), key=fs.key(0), by="tensor", num=1),
    "PruningMask": lambda: pruning_mask(theta().square(), loss().layout, sparsity=0.5),
    "MaskOverlap": lambda: mask_overlap(theta() > 0, other() > 0, loss().layout),
    "TaskConflicts": lambda: task_conflicts(loss(), second_loss(), theta(), key=fs.key(0), by="tensor", num=19),
    "GradientAlignment": lambda: gradient_alignment(
        {"a": loss(), "b": second_loss()}, theta(), key=fs.key(0), by="tensor", num=19
    ),
    "Aggregation": lambda: gradient_aggregation(
        {"a": loss(), "b": second_loss()}, theta(), key=fs.key(0), methods=["mean"]
    ),
    "AlignmentTrajectory": lambda: alignment_trajectory(loss(), [theta(), other(), -theta()], [0, 5, 10]),
    "GradientTrajectory": lambda: gradient_trajectory(loss(), theta(), steps=3),
    "Separability": lambda: separability(loss(), second_loss(), theta(), key=fs.key(0), by="tensor", num=19),
    "TaskInterference": lambda: task_interference(loss(), second_loss(), theta(), by="tensor"),
    "Modularity": lambda: modularity_score(loss(), theta(), key=fs.key(0), by="tensor", num=3),
    "WeightModularity": lambda: weight_modularity(
        [loss().net.params["0.weight"], loss().net.params["2.weight"]], key=fs.key(0), num=3
    ),
    "HeadCircuits": lambda: qk_ov_circuits(language().net, language().net.params),
    "LogitAttribution": lambda: logit_attribution(language(), language().net.params),
    "ScoreAttribution": lambda: qk_attribution(
        language().net, language().net.params, words(), layer=1, head=0, query=3, key=1
    ),
    "LogitLens": lambda: logit_lens(language(), language().net.params),
    "JacobianLens": lambda: jacobian_lens(language(), language().net.params, key=fs.key(0), method="probes", num=2),
    "PositionJacobian": lambda: position_jacobian(
        language().net, language().net.params, words(), key=fs.key(0), method="probes", num=4
    ),
    "AttentionPatterns": lambda: attention_patterns(language(), language().net.params),
    "TextLens": lambda: lens_on_text(language(), language().net.params),
    "TextAttribution": lambda: attribution_on_text(language(), language().net.params),
    "TextAttention": lambda: attention_on_text(language(), language().net.params),
    "InductionHeads": lambda: induction_heads(language().net, language().net.params, key=fs.key(0), num=4),
    "InductionCircuit": lambda: induction_circuit(
        language().net, language().net.params, key=fs.key(0), num=3, num_nodes=2, num_random=2
    ),
    "IntegratedGradients": lambda: integrated_gradients(lambda x: x.square().sum(1), torch.ones(2, 3)),
    "TokenAttribution": lambda: token_attribution(*two_inputs()[:3]),
    "AblationEffects": lambda: ablation_effects(
        language_loss(), language_loss().net.params, mode="resample", key=fs.key(0)
    ),
    "PatchingEffects": lambda: activation_patching(*two_inputs()),
    "EdgeAttribution": lambda: edge_attribution(*two_inputs()),
    "CircuitFaithfulness": faithfulness,
    "UnitActivity": lambda: unit_activity(language().net, language().net.params, [words()], rule="relative"),
    "GradientDead": lambda: gradient_dead(language(), language().net.params),
    "Sparsity": lambda: sparsity({"a": cloud().view(4, 15, 3)}, torch.ones(4, 15, dtype=torch.bool)),
    "Superposition": lambda: superposition({"a": cloud(), "b": cloud()[:5]}),
    "Selectivity": lambda: selectivity({"a": cloud()}, torch.arange(60) % 3, key=fs.key(0)),
    "ResidualGains": lambda: residual_gains(language().net, language().net.params, language().batches[0][0]),
    "PerturbationGains": lambda: perturbation_gains(
        language().net, language().net.params, language().batches[0][0], key=fs.key(0), num=2
    ),
    "VolumeGrowth": lambda: volume_growth(cloud(), torch.tensor([0, 3]), key=fs.key(0), num=20, num_radii=6, window=3),
    "RicciCurvature": lambda: ollivier_ricci(cloud(), k=3, num=9, key=fs.key(0)),
    "Entropy": lambda: output_entropy(SequenceSums.of(torch.tensor([[3.0, 1.0], [2.0, 1.0]]))),
    "LayerEntropy": lambda: layer_entropy(language(), language().net.params, key=fs.key(0)),
    "LayerInformation": lambda: layer_information(language(), language().net.params, key=fs.key(0), dims=1),
    "SimilarityToLast": lambda: similarity_to_last(
        language(), [language().net.theta.flip(0), language().net.theta], [0, 5], key=fs.key(0), num=19
    ),
    "SpectralEntropy": lambda: spectral_entropy(theta().view(13, 2)),
    "MutualInformation": lambda: mutual_information_infonce(
        theta().view(13, 2), other().view(13, 2), key=fs.key(0), num_candidates=4, steps=2
    ),
    "Similarity": lambda: cka(*activations().values(), sequences(), key=fs.key(5), num=19),
    "LayerSimilarity": lambda: layer_similarity(activations(), groups=sequences(), key=fs.key(5), num=19),
    "ActivationSpectra": lambda: activation_spectra(activations(), sequences()),
    "TwoNN": lambda: two_nn(activations()["0"], sequences()),
    "LayerDimensions": lambda: layer_dimensions(activations(), sequences()),
    "DimensionByScale": lambda: gride(activations()["0"], sequences(), neighbours=[2, 4]),
    "LinearReconstruction": lambda: linear_reconstruction(activations(), sequences(), key=fs.key(5), alphas=[0.1, 1.0]),
    "UsableInformation": lambda: usable_information(
        labelled()["layers"]["a"], labelled()["labels"], groups=labelled()["groups"], key=fs.key(0), folds=3
    ),
    "ProbeSelectivity": lambda: probe_selectivity(
        labelled()["layers"]["a"], labelled()["labels"], groups=labelled()["groups"], key=fs.key(0), folds=3
    ),
    "InformationProfile": lambda: information_profile(**labelled(), key=fs.key(0), folds=3),
    "PID": lambda: pid(torch.arange(16) % 2, torch.arange(16) // 8, torch.arange(16) % 3, key=fs.key(0), num=5),
    "OutputDivergence": lambda: output_divergence(divergence_sums(predictions(), predictions(2.0), torch.ones(NUM, 4))),
    "Calibration": lambda: expected_calibration_error(predictions(), scored_labels(), key=fs.key(0), bins=3, num=50),
    "DescriptionLength": lambda: description_length(loss(), theta(), step=0.1),
    "CompressedWeights": lambda: compressed_weights(loss().net.params, step=0.1),
    "TracIn": lambda: tracin(loss(), second_loss(), [theta(), other()], learning_rates=[0.1, 0.2], by="tensor"),
    "TracInSelfInfluence": lambda: tracin_self_influence(loss(), [theta(), other()], [0, 10], by="tensor"),
    "Influence": lambda: influence(loss(), second_loss(), theta(), key=fs.key(0)),
    "SelfInfluence": lambda: self_influence(loss(), theta(), key=fs.key(0)),
    "MostInfluential": lambda: most_influential(loss(), second_loss(), theta(), key=fs.key(0), num_texts=2),
    "DatamodelingScore": lambda: linear_datamodeling_score(
        theta()[:12].view(4, 3), torch.eye(4) > 0, theta()[2:26].view(2, 4, 3), key=fs.key(0), num=50
    ),
    "PruningRobustness": lambda: pruning_robustness(
        loss(), theta(), key=fs.key(0), sparsities=(0.0, 0.5, 1.0), num_random=2, num_draws=2
    ),
    "IterativePruning": lambda: iterative_magnitude_pruning(
        masked_training(loss(), steps=2), theta(), loss().layout, key=fs.key(0), rounds=2, loss=loss()
    ),
    "WinningTickets": lambda: winning_tickets(loss(), theta(), key=fs.key(0), rounds=1, num=2, steps=2),
    "Plasticity": lambda: plasticity(loss(), theta(), key=fs.key(0), num=2, steps=2),
    "EarlyBird": lambda: early_bird(loss(), [theta(), other(), -theta()], [0, 5, 10], window=2),
    "TicketOverlap": lambda: ticket_overlap(loss(), [theta(), other(), -theta()], ["a", "b", "c"]),
    "LayerSpectra": lambda: layer_spectra(
        {"flat": cloud().view(-1, 20), "wide": cloud().view(-1, 15).exp()}, key=fs.key(0), num_bootstrap=9, num_null=19
    ),
    "MatrixRanks": lambda: effective_dimensionality(loss().layout.unravel(theta())),
    "TaskVectors": lambda: task_vectors(theta(), [other(), -theta()], loss().layout, by="tensor", names=["a", "b"]),
    "MergeCurves": lambda: merge_curves(
        {"a": loss(), "b": second_loss()},
        {"a": other(), "b": -theta()},
        theta(),
        key=fs.key(0),
        methods=("ties", "fisher"),
        coefficients=(0.0, 0.5),
        num=1,
    ),
    "FunctionDistance": lambda: function_distance(loss(), theta(), other()),
    "Elasticity": lambda: elasticity(loss(), theta(), other(), 0.5 * (theta() + other())),
    "WeightDistance": lambda: weight_distance(theta(), other(), loss().layout),
    "WeightMatching": lambda: weight_matching(theta(), other(), loss().layout, hidden(), key=fs.key(0)),
}


@cache
def example(name: str) -> Result:
    return EXAMPLES[name]()


CLOCKED = {"MethodComparison": ("seconds", "mebibytes")}
"""Of results that say what they took."""


def timed_as(first: Result, again: Result) -> Result:
    """The second, with the times of the first."""
    return replace(again, **{name: getattr(first, name) for name in CLOCKED.get(type(first).__name__, ())})
