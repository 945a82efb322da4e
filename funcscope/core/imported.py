"""Classes without their import, which takes as long as torch's or longer: who has an instance has it imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Config = Any
"""A `PreTrainedConfig`."""
Model = Any
"""A `PreTrainedModel`."""


def is_pretrained(module: object) -> bool:
    """Whether it is a `PreTrainedModel`.

    >>> is_pretrained(1)
    False
    """
    return _is(module, "transformers.modeling_utils", "PreTrainedModel")


def is_new_gelu(module: object) -> bool:
    """Whether it is the GELU of GPT-2, whose cube has no fused kernel."""
    return _is(module, "transformers.activations", "NewGELUActivation")


def is_compiled(module: object) -> bool:
    """Whether `torch.compile` has made it."""
    return _is(module, "torch._dynamo.eval_frame", "OptimizedModule")


def is_dtensor(x: object) -> bool:
    """Whether a tensor is one rank's part of one on several ranks, as `fully_shard` makes of parameters."""
    return _is(x, "torch.distributed.tensor", "DTensor")


def layer_names(model: Any) -> tuple[str, ...]:
    """The names of the layers of a model of transformers: what it can checkpoint, the outermost; none of another's."""
    names: list[str] = []
    for name, part in model.named_modules():
        inner = names and name.startswith(f"{names[-1]}.")
        if not inner and _is(part, "transformers.modeling_layers", "GradientCheckpointingLayer"):
            names.append(name)
    return tuple(names)


def register_attention(name: str, kernel: Callable[..., Any]) -> None:
    """Make a kernel known to the models of transformers, whose configurations choose it by name.

    Where a model makes a mask itself, it is the one of eager attention: for a name without one transformers makes none.
    """
    sys.modules["transformers.modeling_utils"].AttentionInterface.register(name, kernel)
    register_masks(name, sys.modules["transformers.masking_utils"].eager_mask)


def register_masks(name: str, make: Callable[..., Any]) -> None:
    """The masks that such models make themselves."""
    sys.modules["transformers.masking_utils"].AttentionMaskInterface.register(name, make)


def register_experts(name: str, kernel: Callable[..., Any]) -> None:
    """The same for mixtures of experts."""
    sys.modules["transformers.modeling_utils"].ALL_EXPERTS_FUNCTIONS.register(name, kernel)


def _is(value: object, module: str, name: str) -> bool:
    known = sys.modules.get(module)
    return known is not None and isinstance(value, getattr(known, name))
