"""How a model is called: its arguments, its attention kernel, and its errors in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Inputs = Tensor | tuple | Mapping[str, Any]

WRITES = "Leave the write out, or do it in training mode only."

_REMEDIES = {
    "setup_context": "the forward pass calls an `autograd.Function` of the old style or reentrant checkpointing, which "
    "torch.func cannot differentiate: give the function a `setup_context`, or switch the checkpointing off",
    "saved tensor hooks": "gradient checkpointing (or another saved-tensor hook) is switched on, which torch.func cannot "
    "differentiate: switch it off in the model, `gradient_checkpointing_disable()` for one of Hugging Face",
    "requires_grad_()": "the forward pass or a hook calls `requires_grad_()`, which no function may: take it out, or "
    "switch gradient checkpointing off",
    "mutate a captured Tensor": "the forward pass writes to a buffer or another tensor of its own, and is no function of "
    f"theta. {WRITES[:-1]}",
    "dynamic shape": "the forward pass makes tensors whose size depends on values (a boolean mask as an index, `nonzero`, "
    "`unique`), which `vmap` refuses: weigh by `torch.where` instead, or take a plan without vmap (`chunk=1`)",
    "Cannot access data pointer": "the forward pass takes values out of torch (`.tolist()`, `.numpy()`), which torch.func "
    "cannot follow: compute with tensors, or, where only `vmap` refuses it, take a plan without (`chunk=1`)",
    ".item()": "the forward pass reads a value by `.item()`, which `vmap` refuses: compute with the tensor itself, or take "
    "a plan without vmap (`chunk=1`)",
    "data-dependent control flow": "the forward pass branches on a value, which `vmap` refuses: write it as `torch.where`, "
    "or take a plan without vmap (`chunk=1`)",
}
_UNMAPPED = (
    "Batching rule not implemented",
    "vmap: we do not yet support",
    "does not have vmap support",
    "dynamic shape",
    "Cannot access data pointer",
    ".item()",
    "data-dependent control flow",
)
"""What torch says where a function can be called and not mapped."""
_DTYPES = ("same dtype", "scalar type", "Input type", "dtype mismatch", "expected dtype")


class ForwardError(ValueError, RuntimeError):
    """A forward pass that cannot be run or differentiated as it is."""


def is_unmapped(err: RuntimeError) -> bool:
    """It is `vmap` that refuses, so that a loop may do."""
    return not isinstance(err, NotImplementedError) and any(words in str(err) for words in _UNMAPPED)


def arguments(inputs: Inputs) -> tuple[tuple, dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def logits_of(out: Any) -> Tensor:
    """The `.logits` of a model's return value, or the tensor that it is itself."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned a {type(out).__name__} without `.logits`; "
            "pass `output=lambda out: ...` to `functional` to say which tensor is scored."
        )
    return logits


@contextmanager
def named_errors(inputs: Any, dtypes: set[torch.dtype]) -> Iterator[None]:
    """Errors of torch that say neither the rule nor the remedy get both; all others pass unchanged.

    dtypes: those of the model's parameters.
    """
    try:
        yield
    except RuntimeError as err:
        reason = str(err).split("\n", 1)[0]
        for words, remedy in _REMEDIES.items():
            if words in reason:
                raise ForwardError(f"{remedy} ({reason[:100]}).") from err
        given = {x.dtype for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point()}
        if any(words in reason for words in _DTYPES) and given - dtypes:
            theirs, ours = (", ".join(sorted(map(str, names))) for names in (given - dtypes, dtypes))
            raise ForwardError(
                f"the inputs are {theirs} and the model is {ours}: cast the inputs, `x.to({ours.split(', ')[0]})`, or the "
                f"model ({reason[:100]})."
            ) from err
        raise
