"""A model with a low-rank adapter: merged into its weights, or beside them, with a theta of the adapter's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...core.checks import check_choice
from ..adapter import Adapter, LowRank

Trainable = Literal["all", "adapter"]


class Adapted(nn.Module):
    """A linear layer beside which a product of two small ones runs: base(x) + scale * up(down(x))."""

    def __init__(self, base: nn.Module, part: LowRank):
        super().__init__()
        self.base, self.scale = base, part.scale
        self.down, self.up = _linear(part.a), _linear(part.b)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + (self.scale * self.up(self.down(x.to(self.down.weight.dtype)))).to(y.dtype)


def adapt(model: PreTrainedModel, adapter: Adapter, path: Path, trainable: Trainable = "all") -> PreTrainedModel:
    """The model with its adapter, in place.

    trainable: `all` merges, W + scale B A in float32 at least, rounded once to the dtype of W, so that the model has the
    modules that it always has; `adapter` puts A and B beside W, and leaves nothing but these, and parameters that the
    adapter replaces, with `requires_grad`: theta is what was trained.

    Raises ValueError for modules that the model does not have, or that are no linear layers, for other shapes, and for
    weights that are tied to others, as those would change with them.
    """
    check_choice("trainable", trainable, get_args(Trainable))
    layers = {name: _layer(model, name, part, path) for name, part in adapter.low_rank.items()}
    model.requires_grad_(trainable == "all")
    _replace(model, adapter, path)
    for name, layer in layers.items():
        if trainable == "all":
            _merge(layer, adapter.low_rank[name])
        else:
            model.set_submodule(name, Adapted(layer, adapter.low_rank[name]))
    return model


def _replace(model: PreTrainedModel, adapter: Adapter, path: Path) -> None:
    """Parameters that were trained as a whole."""
    known = dict(model.named_parameters())
    for name, value in adapter.replaced.items():
        if name not in known:
            raise ValueError(
                f"the adapter in {path} replaces `{name}`, which its model in {adapter.base} does not have."
            )
        _check_untied(model, known[name], name, path)
        if known[name].shape != value.shape:
            raise ValueError(
                f"the adapter in {path} replaces `{name}` by one of shape {tuple(value.shape)}, and that of its model in "
                f"{adapter.base} is {tuple(known[name].shape)}: it belongs to another model."
            )
        known[name].data = value.to(known[name].dtype)
        known[name].requires_grad_()


def _merge(layer: nn.Module, part: LowRank) -> None:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    wide = torch.promote_types(torch.promote_types(weight.dtype, part.a.dtype), torch.float32)
    change = part.scale * (part.b.to(wide) @ part.a.to(wide))
    with torch.no_grad():
        layer.weight.data = (weight.to(wide) + (change.T if isinstance(layer, Conv1D) else change)).to(weight.dtype)  # type: ignore[union-attr]


def _layer(model: PreTrainedModel, name: str, part: LowRank, path: Path) -> nn.Linear | Conv1D:
    layer = dict(model.named_modules()).get(name)
    if layer is None:
        raise ValueError(
            f"the adapter in {path} is for a module `{name}`, which a {type(model).__name__} does not have: it belongs to "
            "another model, or to one for another task."
        )
    if type(layer) not in (nn.Linear, Conv1D):
        raise ValueError(
            f"the adapter in {path} is for `{name}`, a {type(layer).__name__}, and only linear layers are read: merge it "
            "into its model (`merge_and_unload`)."
        )
    wanted = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
    if (part.b.shape[0], part.a.shape[1]) != tuple(wanted):
        raise ValueError(
            f"the adapter in {path} has a product of shape {(part.b.shape[0], part.a.shape[1])} for `{name}`, whose weight "
            f"is {tuple(wanted)}: it belongs to another model."
        )
    _check_untied(model, layer.weight, f"{name}.weight", path)
    return layer


def _check_untied(model: PreTrainedModel, param: Tensor, name: str, path: Path) -> None:
    holders = [f"{at}.{key}" for at, part in model.named_modules() for key, x in part._parameters.items() if x is param]
    if len(holders) > 1:
        raise ValueError(
            f"the adapter in {path} changes `{name}`, which is tied to `{next(x for x in holders if x != name)}`, and would "
            "change that, too: untie them in the model (`tie_word_embeddings`)."
        )


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made
