"""Gradients of the loss: how they flow through the blocks, what of them is noise, which samples and tasks they come from."""

from .influence import Influence, influence
from .influential_texts import MostInfluential, most_influential
from .lds import DatamodelingScore, half_subsets, linear_datamodeling_score
from .self_influence import SelfInfluence, TracInSelfInfluence, self_influence, tracin_self_influence
from .tracin import TracIn, batch_rates, checkpoint_rates, tracin

__all__ = [
    "DatamodelingScore",
    "Influence",
    "MostInfluential",
    "SelfInfluence",
    "TracIn",
    "TracInSelfInfluence",
    "batch_rates",
    "checkpoint_rates",
    "half_subsets",
    "influence",
    "linear_datamodeling_score",
    "most_influential",
    "self_influence",
    "tracin",
    "tracin_self_influence",
]
