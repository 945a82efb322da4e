"""Lists of metrics with their settings: what the commands measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Preset = Mapping[str, Mapping[str, Any]]
"""By metric, the settings in which it differs from its catalogue's."""

DIRECTIONAL: Preset = {"mean_loss": {}, "directional_losses": {}}
COMPARISON: Preset = {**DIRECTIONAL, "loss_comparison": {}, "directional_comparison": {}}
CURVATURE: Preset = {
    "mean_loss": {},
    "hessian_eigenvalues": {},
    "hessian_eigenvalue_errors": {},
    "hessian_block_traces": {},
    "hessian_block_eigenvalues": {},
    "sam_sharpness": {},
    "asam_sharpness": {},
    "average_sharpness": {},
    "critical_sharpness": {},
}
LANDSCAPE: Preset = {"mean_loss": {}, "loss_landscape_2d": {}, "loss_lines": {"span": 0.1}, "landscape_flatness": {}}
PATH: Preset = {"mean_loss": {}, "loss_comparison": {}, "linear_path": {}}
RUN: Preset = {
    "training_curves": {},
    "mean_loss": {},
    "directional_losses": {},
    "hessian_largest_eigenvalues": {},
    "hessian_trace": {"num": 16},
    "sam_sharpness": {"norm_threshold": 0.0},
    "landscape_flatness": {},
    "effective_dimensionality": {},
    "flatness_profile": {},
    "loss_landscape_2d": {"at": "phases", "span": 0.5, "normalization": "filter"},
    "loss_lines": {},
    "trajectory_plane": {},
    "linear_path": {"num": 41},
    "directional_comparison": {},
}
"""Of a training run: the curves, what is measured at every checkpoint, then at its phases, then of all together."""
ACTIVATIONS: Preset = {
    "entropy": {},
    "feature_geometry": {},
    "intrinsic_dimension": {},
    "dead_neurons": {},
    "superposition": {},
    "layer_similarity": {"at": "phases", "num": 99},
}
"""How residual streams and units are laid out, at every checkpoint."""
TEXT: Preset = {
    "mean_loss": {},
    "loss_comparison": {},
    "directional_losses": {"n_samples": 10, "span": 0.1},
    "fisher_spectrum": {},
    "fisher_importance": {},
    "fisher_methods": {"num": 4, "num_directions": 4, "rank": 3},
    "fisher_overlap": {"num": 4},
    "cross_task_conflicts": {},
    "qkov_interference": {},
    "linear_path": {"num": 11},
    "gradient_alignment": {},
    "task_interference": {},
    "separability": {},
    "task_vectors": {},
    "merge_curves": {"num": 4},
    "pruning_robustness": {"sparsities": (0.0, 0.2, 0.4, 0.6, 0.8), "num_draws": 4},
    "ticket_overlap": {},
    "modularity_score": {},
    **ACTIVATIONS,
    "output_calibration": {},
    "prediction_divergence": {},
}
"""Of a base model and those fine-tuned from it, on the data of each: what the demonstration of the family `text` measures."""
INFLUENCE: Preset = {"most_influential": {"method": "ekfac", "num_texts": 3}}
"""Of a model on texts that it was trained on and others that it was not: the last part of that demonstration."""
INDUCTION: Preset = {
    "training_curves": {},
    "induction_curves": {},
    "mean_loss": {},
    "induction_heads": {},
    "induction_circuit": {"at": "phases"},
    "attention_patterns": {},
    "attention_on_text": {"at": "phases"},
    "lens_on_text": {"at": "phases"},
    "attribution_on_text": {"at": "phases"},
    "directional_losses": {},
    "landscape_flatness": {},
    "sam_sharpness": {"norm_threshold": 0.0},
    **ACTIVATIONS,
    "similarity_to_last": {},
}
"""Of models that grow induction heads: the curves, then what is measured at every checkpoint on the probe."""
