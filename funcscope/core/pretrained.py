"""Hugging Face's classes without their import, which takes longer than torch's: who has an instance has it imported."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

Config = Any
"""A `PreTrainedConfig`."""
Model = Any
"""A `PreTrainedModel`."""


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a `PreTrainedModel`.

    >>> is_pretrained(nn.Linear(1, 1))
    False
    """
    return _is(module, "transformers.modeling_utils", "PreTrainedModel")


def is_new_gelu(module: nn.Module) -> bool:
    """Whether it is the GELU of GPT-2, whose cube has no fused kernel."""
    return _is(module, "transformers.activations", "NewGELUActivation")


def _is(value: object, module: str, name: str) -> bool:
    known = sys.modules.get(module)
    return known is not None and isinstance(value, getattr(known, name))
