"""Mechanisms inside a transformer: what its heads read and write, and what its layers say of the next token."""

from .circuits import HeadCircuits, full_circuit, qk_ov_circuits
from .jacobians import MeanJacobians, PositionJacobian, mean_jacobians, position_jacobian
from .lens import JacobianLens, LogitLens, jacobian_lens, logit_lens
from .logit_attribution import (
    Contributions,
    LogitAttribution,
    logit_attribution,
    logit_contributions,
)
from .score_attribution import ScoreAttribution, qk_attribution
from .weights import HeadWeights, head_weights

__all__ = [
    "Contributions",
    "HeadCircuits",
    "HeadWeights",
    "JacobianLens",
    "LogitAttribution",
    "LogitLens",
    "MeanJacobians",
    "PositionJacobian",
    "ScoreAttribution",
    "full_circuit",
    "head_weights",
    "jacobian_lens",
    "logit_attribution",
    "logit_contributions",
    "logit_lens",
    "mean_jacobians",
    "position_jacobian",
    "qk_attribution",
    "qk_ov_circuits",
]
