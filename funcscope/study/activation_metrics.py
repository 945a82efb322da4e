"""The metrics of what passes through a network: mechanisms, information, representation."""

from __future__ import annotations

from ..information.description_length import description_length
from ..information.of_layers import layer_entropy, layer_information
from ..information.of_outputs import (
    output_calibration,
    pid_analysis,
    prediction_divergence,
    usable_information_by_layer,
)
from ..mechanistic.ablation import ablation_effects
from ..mechanistic.attention import attention_patterns
from ..mechanistic.circuits import qk_ov_circuits
from ..mechanistic.induction import induction_heads
from ..mechanistic.induction_circuit import induction_circuit
from ..mechanistic.lens import jacobian_lens, logit_lens
from ..mechanistic.logit_attribution import logit_attribution
from ..mechanistic.text_attention import attention_on_text
from ..mechanistic.text_predictions import attribution_on_text, lens_on_text
from ..representation.gradient_dead import gradient_dead
from ..representation.of_layers import (
    curvature_of_stream,
    dimension_by_scale,
    feature_geometry,
    intrinsic_dimension,
    reconstruction_of_layers,
    similarity_of_layers,
)
from ..representation.of_units import (
    activation_sparsity,
    dead_neurons,
    perturbation_growth,
    stream_gains,
    weight_superposition,
)
from ..representation.over_training import similarity_to_last
from . import trajectories
from .metric import KEY, Metric, of_function

MECHANISTIC: tuple[Metric, ...] = (
    of_function(
        "qk_ov_circuits", qk_ov_circuits, ("net", "params"), category="mechanistic", cost=lambda _: 0,
        drawn=("copying_score", "ov_norm", "qk_norm", "q_composition", "k_composition", "v_composition"),
        reference="Elhage et al. (2021), A mathematical framework for transformer circuits",
    ),
    of_function(
        "logit_attribution", logit_attribution, ("loss", "params"), category="mechanistic", cost=lambda _: 2,
        drawn=("heads", "mlp"), reference="Elhage et al. (2021), A mathematical framework for transformer circuits",
        sentence="The embedding alone adds {embedding} to the target's logit of {logit}.",
    ),
    of_function(
        "logit_lens", logit_lens, ("loss", "params"), category="mechanistic", plan=("chunk",), cost=lambda _: 3,
        drawn=("kl", "log_prob", "rank", "agreement", "entropy"),
        reference="nostalgebraist (2020), Interpreting GPT: the logit lens",
    ),
    of_function(
        "jacobian_lens", jacobian_lens, ("loss", "params", KEY), category="mechanistic", plan=("chunk", "chunk_size"),
        more={"method": "probes", "num": 16}, drawn=("kl", "log_prob", "rank", "agreement", "jacobian_error"),
        cost=lambda s: 4 + 3 * (s["num"] if s["method"] == "probes" else 768),
    ),
    Metric(
        "induction_curves", trajectories.induction_curves, ("curves",), on="series", category="mechanistic",
        cost=lambda _: 0, reference="Olsson et al. (2022), arXiv:2209.11895",
    ),
    of_function(
        "attention_patterns", attention_patterns, ("loss", "params"), category="mechanistic", cost=lambda _: 1.5,
        drawn=("entropy", "distance", "self_attention", "sink", "previous", "duplicate", "induction"),
        reference="Olsson et al. (2022), arXiv:2209.11895",
    ),
    of_function(
        "attention_on_text", attention_on_text, ("loss", "params", "token_names"), category="mechanistic",
        drawn=("patterns",),
    ),
    of_function(
        "lens_on_text", lens_on_text, ("loss", "params", "token_names"), category="mechanistic", drawn=("probability",),
        reference="nostalgebraist (2020), Interpreting GPT: the logit lens",
    ),
    of_function(
        "attribution_on_text", attribution_on_text, ("loss", "params", "token_names"), category="mechanistic",
        cost=lambda _: 20, drawn=("attribution",), reference="Sundararajan, Taly, Yan (2017), arXiv:1703.01365",
    ),
    of_function(
        "induction_heads", induction_heads, ("net", "params", KEY), category="mechanistic",
        drawn=("induction", "z", "duplicate", "previous"), reference="Olsson et al. (2022), arXiv:2209.11895",
        sentence="On random tokens, the second copy has a loss that is lower than that of the first by {gain}.",
    ),
    of_function(
        "induction_circuit", induction_circuit, ("net", "params", KEY), category="mechanistic",
        drawn=("scores", "through_keys", "faithfulness", "random_faithfulness", "gain_without", "gain_without_random"),
        cost=lambda s: 20 + 10 * (1 + s["num_random"]), reference="Hanna, Pezzelle, Belinkov (2024), arXiv:2403.17806",
    ),
    of_function(
        "ablation_effects", ablation_effects, ("loss", "params", KEY), category="mechanistic", by_batch=True,
        plan=("chunk",), without=("units",), drawn=("effects",), cost=lambda _: 100,
        sentence="The loss is {loss}: by how much it changes where one of the {sites} alone is ablated (mode {mode}).",
    ),
)  # fmt: skip

INFORMATION: tuple[Metric, ...] = (
    of_function(
        "entropy", layer_entropy, ("loss", "params", KEY), category="information", cost=lambda _: 2,
        drawn=("spectral_rank",), reference="Giraldo, Rao, Principe (2015), doi:10.1109/TIT.2014.2370058",
        sentence="The outputs have an entropy of {output_entropy}.",
    ),
    of_function(
        "mutual_information", layer_information, ("loss", "params", KEY), category="information", cost=lambda _: 2,
        drawn=("with_next", "with_first"),
        reference="Misra et al. (2005), doi:10.1016/j.jmva.2003.10.003; Kraskov et al. (2004), arXiv:cond-mat/0305641",
    ),
    of_function(
        "usable_information", usable_information_by_layer, ("loss", "params", KEY), category="information", cost=lambda _: 5,
        drawn=("information", "accuracy"), reference="Xu et al. (2020), arXiv:2002.10689",
    ),
    of_function(
        "pid_analysis", pid_analysis, ("loss", "params", KEY), category="information", cost=lambda _: 5,
        reference="Barrett (2015), doi:10.1103/PhysRevE.91.052802",
        sentence="Of the next token, attention alone tells {unique_x}, the MLP alone {unique_y}, either {redundancy}.",
    ),
    of_function(
        "output_calibration", output_calibration, ("loss", "params", KEY), category="information", cost=lambda _: 2,
        drawn=("bin_accuracy",),
        reference="Guo et al. (2017), arXiv:1706.04599",
        sentence="The expected calibration error is {ece}, that of a calibrated model {ece_null}.",
    ),
    of_function(
        "prediction_divergence", prediction_divergence, ("loss", "start", "end"), on="pair", category="information",
        cost=lambda _: 4, reference="Lin (1991), doi:10.1109/18.61115",
        sentence="Predictions differ by {js} (Jensen-Shannon).",
    ),
    of_function(
        "description_length", description_length, ("loss", "theta"), category="information", more={"step": 0.05},
        cost=lambda _: 2, drawn=(), reference="Rissanen (1978), doi:10.1016/0005-1098(78)90005-5",
        sentence="Weights and labels take {total_bits} together.",
    ),
)  # fmt: skip

REPRESENTATION: tuple[Metric, ...] = (
    of_function(
        "dead_neurons", dead_neurons, ("loss", "params"), category="representation", cost=lambda _: 2,
        drawn=("dead", "frequency", "rms"), reference="Lu et al. (2019), arXiv:1903.06733",
    ),
    of_function(
        "gradient_dead", gradient_dead, ("loss", "params"), category="representation", cost=lambda _: 4,
        drawn=("unread", "untaught"),
    ),
    of_function(
        "activation_sparsity", activation_sparsity, ("loss", "params"), category="representation", cost=lambda _: 2,
        drawn=("hoyer", "gini", "active"), reference="Hurley, Rickard (2009), doi:10.1109/TIT.2009.2027527",
    ),
    of_function(
        "superposition", weight_superposition, ("net", "params"), category="representation", cost=lambda _: 1,
        plan=("chunk",), drawn=("square_ratio", "largest_overlap", "index"),
        reference="Elhage et al. (2022), arXiv:2209.10652",
    ),
    of_function(
        "feature_geometry", feature_geometry, ("loss", "params", KEY), category="representation", cost=lambda _: 2,
        drawn=("debiased_participation_ratio", "effective_rank"), reference="Gao et al. (2017), doi:10.1101/214262",
    ),
    of_function(
        "intrinsic_dimension", intrinsic_dimension, ("loss", "params", KEY), category="representation", cost=lambda _: 2,
        drawn=("mle", "censored"), reference="Facco et al. (2017), doi:10.1038/s41598-017-11873-y",
    ),
    of_function(
        "dimension_by_scale", dimension_by_scale, ("loss", "params", KEY), category="representation", cost=lambda _: 2,
        drawn=("dimension",), reference="Denti et al. (2022), doi:10.1038/s41598-022-20991-1",
    ),
    of_function(
        "layer_similarity", similarity_of_layers, ("loss", "params", KEY), category="representation", cost=lambda _: 3,
        drawn=("calibrated", "similarity"), reference="Kornblith et al. (2019), arXiv:1905.00414; arXiv:2602.14486",
    ),
    of_function(
        "linear_reconstruction", reconstruction_of_layers, ("loss", "params", KEY), category="representation",
        cost=lambda _: 5, drawn=("r2", "r2_train"),
    ),
    of_function(
        "residual_gains", stream_gains, ("loss", "params"), category="representation", cost=lambda _: 2,
        drawn=("gain", "change"),
    ),
    of_function(
        "perturbation_gains", perturbation_growth, ("loss", "params", KEY), category="representation",
        cost=lambda s: 1 + 3 * s["num"], drawn=("gain", "relative_gain"), reference="Poole et al. (2016), arXiv:1606.05340",
    ),
    of_function(
        "ricci_curvature", curvature_of_stream, ("loss", "params", KEY), category="representation", cost=lambda _: 3,
        drawn=("curvature",), reference="Ollivier (2009), doi:10.1016/j.jfa.2008.11.001",
        sentence="The mean curvature of the last stream is {mean}.",
    ),
    of_function(
        "similarity_to_last", similarity_to_last, ("loss", "thetas", "steps", KEY), on="series", category="representation",
        cost=lambda _: 10, drawn=("calibrated", "similarity"), reference="Kornblith et al. (2019), arXiv:1905.00414",
    ),
)  # fmt: skip
