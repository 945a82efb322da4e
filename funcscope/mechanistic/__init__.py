"""Mechanisms inside a transformer: what heads look at, read and write, and what layers say of the next token."""

from .attention import AttentionPatterns, attention_patterns
from .circuits import HeadCircuits, full_circuit, qk_ov_circuits
from .induction import InductionHeads, induction_heads, repeated_tokens
from .jacobians import MeanJacobians, PositionJacobian, mean_jacobians, position_jacobian
from .lens import JacobianLens, LogitLens, jacobian_lens, logit_lens
from .logit_attribution import (
    Contributions,
    LogitAttribution,
    logit_attribution,
    logit_contributions,
)
from .rollout import attention_flow, attention_rollout
from .score_attribution import ScoreAttribution, qk_attribution
from .scores import SCORES, pattern_scores
from .weights import HeadWeights, head_weights

__all__ = [
    "SCORES",
    "AttentionPatterns",
    "Contributions",
    "HeadCircuits",
    "HeadWeights",
    "InductionHeads",
    "JacobianLens",
    "LogitAttribution",
    "LogitLens",
    "MeanJacobians",
    "PositionJacobian",
    "ScoreAttribution",
    "attention_flow",
    "attention_patterns",
    "attention_rollout",
    "full_circuit",
    "head_weights",
    "induction_heads",
    "jacobian_lens",
    "logit_attribution",
    "logit_contributions",
    "logit_lens",
    "mean_jacobians",
    "pattern_scores",
    "position_jacobian",
    "qk_attribution",
    "qk_ov_circuits",
    "repeated_tokens",
]
