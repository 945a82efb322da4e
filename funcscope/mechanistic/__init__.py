"""What happens inside a transformer: attribution, ablation and patching of its parts."""

from .ablation import AblationEffects, ablation_effects
from .edge_attribution import (
    CircuitFaithfulness,
    EdgeAttribution,
    circuit_faithfulness,
    edge_attribution,
    edge_patching,
)
from .integrated_gradients import IntegratedGradients, TokenAttribution, integrated_gradients, token_attribution
from .patching import PatchingEffects, activation_patching, attribution_patching

__all__ = [
    "AblationEffects",
    "CircuitFaithfulness",
    "EdgeAttribution",
    "IntegratedGradients",
    "PatchingEffects",
    "TokenAttribution",
    "ablation_effects",
    "activation_patching",
    "attribution_patching",
    "circuit_faithfulness",
    "edge_attribution",
    "edge_patching",
    "integrated_gradients",
    "token_attribution",
]
