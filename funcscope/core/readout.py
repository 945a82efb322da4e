"""The last linear layer of a model apart from its body, where the output is known to be that layer and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .architectures import has_linear_head
from .forward import logits_of
from .imported import Model, is_pretrained


class Head(NamedTuple):
    """Names of the last linear layer's parameters, as in `Layout.names` unless they are frozen."""

    weight: str
    bias: str | None


def head_of(module: Model, output: Callable[[Any], Tensor]) -> Head | None:
    """The head of a model whose return value becomes a tensor by `output`; None where body and head are not known apart."""
    if not is_pretrained(module) or not has_linear_head(module.config):
        return None
    last = module.get_output_embeddings()
    if type(last) is not nn.Linear or output is not logits_of or not _is_as_compared(module, last):
        return None
    names = {id(param): name for name, param in module.named_parameters()}
    return Head(names[id(last.weight)], None if last.bias is None else names[id(last.bias)])


class Body(nn.Module):
    """A Hugging Face model without its head."""

    def __init__(self, whole: Model):
        super().__init__()
        self.whole = whole

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.whole.base_model(*args, **kwargs).last_hidden_state


def _is_as_compared(model: Model, head: nn.Module) -> bool:
    """A causal model of transformers itself, with nothing hooked to it that may change its output on the way."""
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    own = type(model).__module__.startswith("transformers.models.")
    parts = (model, model.base_model, head)
    hooked = any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts)
    return causal and own and not hooked
