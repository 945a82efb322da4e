"""Mechanisms inside a transformer: what heads look at, read and write, what layers say of the next token, what decides."""

from .ablation import AblationEffects, ablation_effects
from .attention import AttentionPatterns, attention_patterns
from .circuit_faithfulness import CircuitFaithfulness, circuit_faithfulness
from .circuits import HeadCircuits, full_circuit, qk_ov_circuits
from .edge_attribution import EdgeAttribution, edge_attribution, edge_patching
from .induction import InductionHeads, induction_heads, repeated_tokens
from .induction_circuit import InductionCircuit, induction_circuit
from .integrated_gradients import IntegratedGradients, TokenAttribution, integrated_gradients, token_attribution
from .jacobians import MeanJacobians, PositionJacobian, mean_jacobians, position_jacobian
from .lens import JacobianLens, LogitLens, jacobian_lens, logit_lens
from .logit_attribution import (
    Contributions,
    LogitAttribution,
    logit_attribution,
    logit_contributions,
)
from .patching import PatchingEffects, activation_patching, attribution_patching
from .rollout import attention_flow, attention_rollout
from .score_attribution import ScoreAttribution, qk_attribution
from .scores import SCORES, pattern_scores
from .text_attention import TextAttention, attention_on_text
from .text_predictions import TextAttribution, TextLens, attribution_on_text, lens_on_text
from .weights import HeadWeights, head_weights

__all__ = [
    "SCORES",
    "AblationEffects",
    "AttentionPatterns",
    "CircuitFaithfulness",
    "Contributions",
    "EdgeAttribution",
    "HeadCircuits",
    "HeadWeights",
    "InductionCircuit",
    "InductionHeads",
    "IntegratedGradients",
    "JacobianLens",
    "LogitAttribution",
    "LogitLens",
    "MeanJacobians",
    "PatchingEffects",
    "PositionJacobian",
    "ScoreAttribution",
    "TextAttention",
    "TextAttribution",
    "TextLens",
    "TokenAttribution",
    "ablation_effects",
    "activation_patching",
    "attention_flow",
    "attention_on_text",
    "attention_patterns",
    "attention_rollout",
    "attribution_on_text",
    "attribution_patching",
    "circuit_faithfulness",
    "edge_attribution",
    "edge_patching",
    "full_circuit",
    "head_weights",
    "induction_circuit",
    "induction_heads",
    "integrated_gradients",
    "jacobian_lens",
    "lens_on_text",
    "logit_attribution",
    "logit_contributions",
    "logit_lens",
    "mean_jacobians",
    "pattern_scores",
    "position_jacobian",
    "qk_attribution",
    "qk_ov_circuits",
    "repeated_tokens",
    "token_attribution",
]
