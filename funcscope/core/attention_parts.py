"""Attention that is written into a layer, by blocks of queries: the layer's own code, as it runs when a text is continued.

A block of queries goes through the layer as new tokens do, with the keys and values of the blocks before it in the place of
a cache, inside `remat`: no graph holds a matrix of queries by keys, and each block's keys and values are held once.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import attention_blocks
from .architectures import has_alibi
from .attention_blocks import spans
from .attention_formulas import Span
from .brief_masks import additive, brief, is_brief, spelt_out
from .imported import Model, register_masks
from .remat import rematerialised

PARTS = "funcscope_parts"
WRITTEN = ("BloomAttention", "FalconAttention", "GPTNeoSelfAttention", "MptAttention")
"""Layers of transformers whose scores are of their own making, for causal models."""
CACHES = ("cache", "layer_past")
ROWS = ("hidden_states", "position_embeddings", "position_ids", "residual")
"""Arguments with an entry for each query, in their second dimension."""


def takes_parts(model: Model) -> bool:
    """Whether a model's attention is one of those; a Falcon's with ALiBi makes a mask of all pairs for every head."""
    falcon = model.config.model_type == "falcon" and has_alibi(model.config)
    return not falcon and any(map(_is_written, model.modules()))


def use_parts(skeleton: Model) -> None:
    """Each such layer by blocks, where its mask is one in brief."""
    register_masks(PARTS, _mask)
    skeleton.config._attn_implementation = PARTS  # where modules read it at every call, transformers only warns
    for module in skeleton.modules():
        if _is_written(module) and not isinstance(module, InParts):  # not one that a functional was made of already
            kind: Any = type(module)
            module.__class__ = _in_parts(kind)


def _is_written(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in WRITTEN and kind.__module__.startswith("transformers.models.")


@functools.cache
def _in_parts(kind: Any) -> Any:
    return type(kind.__name__, (InParts, kind), {"__module__": kind.__module__})


class InParts(nn.Module):
    """The first base of a layer's class."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        own = super().forward
        takes = inspect.signature(own)
        named = dict(takes.bind(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        cache = next(name for name in CACHES if name in takes.parameters)
        mask, num = named.pop("attention_mask", None), named["hidden_states"].shape[1]
        if named.pop(cache, None) is not None or not (is_brief(mask) or _hides_keys(mask, num)):
            return own(*args, **kwargs)
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        outs: list[Tensor] = []
        past: list[tuple[Tensor, Tensor]] = []
        for at in spans(num, num, True, 0):
            block = rematerialised(functools.partial(_block, self, cache, at))
            out, keys, values = block(state, {name: _cut(name, value, at) for name, value in named.items()}, mask, past)
            outs.append(out)
            past.append((keys, values))
        return torch.cat(outs, 1), None


def _block(
    module: nn.Module,
    cache: str,
    at: Span,
    state: dict[str, Tensor],
    part: dict[str, Any],
    mask: Tensor,
    past: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    before = _Before(past)
    given = {**part, cache: before, "attention_mask": _part_of(mask, at, part["hidden_states"].dtype)}
    out = functional_call(module, state, (), given)[0]
    return out, *before.new


def _cut(name: str, value: Any, at: Span) -> Any:
    """The part of an argument that a block of queries sees."""
    if isinstance(value, tuple):
        return tuple(_cut(name, x, at) for x in value)
    if name in ROWS and isinstance(value, Tensor):
        return value[:, at.rows]
    return value[..., at.keys] if name == "alibi" and value is not None else value


def _hides_keys(mask: Tensor | None, num: int) -> bool:
    """Whether it says which keys are padding, and no more."""
    return mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1 != num


def _part_of(mask: Tensor, at: Span, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block; or, where keys are said, where to hide them."""
    if is_brief(mask):
        return additive(spelt_out(mask, *at), dtype)
    rows, keys = (torch.arange(part.start, part.stop, device=mask.device) for part in at)
    return mask[..., at.keys] | (keys > rows[:, None])


class _Before:
    """A cache that holds the blocks before one, and takes note of what that adds."""

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]]):
        self.past = past

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        self.new = keys, values
        return tuple(torch.cat([*(block[i] for block in self.past), self.new[i]], -2) for i in (0, 1))

    def get_seq_length(self, *_: Any) -> int:
        return sum(keys.shape[-2] for keys, _ in self.past)


def _mask(q_length: int, mask_function: Any, attention_mask: Tensor | None, q_offset: int = 0, **given: Any) -> Tensor:
    """The one that a model asks for which makes its mask itself: in brief for long texts, where it is causal and no more."""
    masks = sys.modules["transformers.masking_utils"]
    if q_offset or mask_function is not masks.causal_mask_function or q_length <= max(attention_blocks.LONG, 3):
        said = {"mask_function": mask_function, "attention_mask": attention_mask, "q_offset": q_offset}
        return masks.eager_mask(q_length=q_length, **said, **given)
    last = torch.arange(1, q_length + 1, dtype=torch.int32, device=given["device"])
    if attention_mask is None:
        attention_mask = last.new_ones(given["batch_size"], q_length, dtype=torch.bool)
    return brief(attention_mask.bool()[:, None, None], torch.zeros_like(last), last)
