"""Attention by blocks of queries: exact derivatives of every order at a memory that is linear in the length.

A block of queries sees its keys through the model's own eager attention, inside `remat` (core/remat.py), so that no graph
holds a matrix of queries by keys. Where that attention is a softmax of scaled products and no more, its derivatives are
closed forms (core/attention_formulas.py). Masks are written in brief, three numbers a position, and made block by block.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .architectures import family_of, window
from .attention_formulas import Attention, Span
from .brief_masks import additive, is_brief, spelt_out
from .imported import Model, register_attention
from .memory import without_holes
from .position_biases import give_briefly, has_distances, taken
from .remat import by_formula, rematerialised

KERNEL = "funcscope_blocks"
ROWS = 128
"""Queries in a block."""
LONG = 1024
"""Tokens up to which all queries are one block: whole scores are faster there, and smaller than what surrounds them."""


def use_blocks(skeleton: Model) -> None:
    register_attention(KERNEL, _by_blocks)
    skeleton.set_attn_implementation(KERNEL)
    give_briefly(skeleton)


def calls_by_name(model: Model) -> bool:
    """Whether a model calls its attention by name, with scores of queries, keys, masks and biases that are known here.

    What transformers' own files write out is taken as that; another's attention may be anything.
    """
    family = family_of(model.config)
    attends = (family is None or family.attention != "none") and bool(model._can_set_attn_implementation())
    biased = any(hasattr(x, "relative_attention_bias") and not has_distances(x) for x in model.modules())
    theirs = all(own is None or own.__module__.startswith("transformers.") for own in map(_written, model.modules()))
    upcast = getattr(model.config, "reorder_and_upcast_attn", False)  # of GPT-2, in its eager attention alone
    return attends and theirs and not biased and not upcast


def _by_blocks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in the place of an attention function of its own."""
    eager, num, config = _eager_of(module), query.shape[-2], getattr(module, "config", None)
    if attention_mask is None and getattr(module, "is_causal", False) and num > 1:
        raise ValueError(
            f"a {type(module).__name__} was called without a mask, and would see what follows: pass a mapping with "
            '`input_ids`, or make the functional with `attention="eager"`.'
        )
    bias = options.get("position_bias")
    if bias is not None:
        options["position_bias"] = bias = bias if bias.numel() else None
    if not is_brief(attention_mask) and (num <= LONG or _has_pairs(options, num, key.shape[-2])):
        if bias is not None:
            options["position_bias"] = taken(bias, slice(num), slice(key.shape[-2]), num)
        return eager(module, query, key, value, attention_mask, **options)
    if num > LONG and query.device.type == "cpu":
        _keep_heap_whole()
    causal, back = getattr(module, "is_causal", False), options.get("sliding_window") or 0
    if config is None or window(config)[0] is None:
        back = 0  # a number that is passed on and that no mask heeds
    own = {name: param for name, param in module._parameters.items() if param is not None}
    blocks = tuple(
        spans(num, key.shape[-2], causal and is_brief(attention_mask), back if is_brief(attention_mask) else 0)
    )
    lowered = torch.is_autocast_enabled(query.device.type)  # to the dtypes of the model's own products
    if not own and not lowered and (attention_mask is None or attention_mask.shape[1] == 1):
        scale = scale_of(eager, module, query, options)
        if scale is not None:
            mask = query.new_zeros(0) if attention_mask is None else attention_mask
            call = Attention(scale, query.shape[1] // key.shape[1], blocks)
            return by_formula(call.formula(), query, key, value, mask)[0], None
    parts = []
    for rows, keys in blocks:
        attend = rematerialised(_Block(eager, module, num, rows, keys))
        parts.append(attend(query[..., rows, :], key, value, attention_mask, own, options))
    return torch.cat(parts, 1), None


def _has_pairs(options: Mapping[str, Any], num: int, num_keys: int) -> bool:
    """Whether an option that is not known here has a number for each pair of a query and a key."""
    others = (x for name, x in options.items() if name != "position_bias")
    return any(isinstance(x, Tensor) and x.shape[-2:] == (num, num_keys) for x in others)


def spans(num: int, num_keys: int, causal: bool, back: int) -> Iterator[Span]:
    """Blocks of queries with the keys that a mask lets them see; a window of an encoder reaches as far to both sides."""
    for start in range(0, num, ROWS):
        rows, keys = slice(start, min(start + ROWS, num)), slice(0, num_keys)
        if causal or back:
            last = rows.stop if causal else min(rows.stop + back - 1, num)
            keys = slice(max(0, start + 1 - back) if back else 0, last)
        yield Span(rows, keys)


def scale_of(eager: Callable, module: nn.Module, query: Tensor, options: Mapping[str, Any]) -> float | None:
    """The scale where a model's own attention is a softmax of scaled products; None where it is more.

    Its values say so, on a few numbers of float64: caps, sinks and biases change them. A softmax that is taken in float32
    whatever the scores are is plain in float32 alone; in other dtypes its derivatives are rounded as the model's are.
    """
    scale = options.get("scaling")
    heads, width = query.shape[1], query.shape[-1]
    scale = float(width**-0.5 if scale is None else scale)
    known = _PLAIN.setdefault(module, {})
    said = sorted((name, x) for name, x in options.items() if isinstance(x, float | int | str))
    given = eager, heads, width, tuple(said)
    if given not in known:
        known[given] = _plain_in(eager, module, heads, width, scale, options)
    return scale if known[given] in ("every dtype", query.dtype) else None


_PLAIN: WeakKeyDictionary[nn.Module, dict[Any, torch.dtype | str | None]] = WeakKeyDictionary()


@torch.no_grad()
def _plain_in(
    eager: Callable, module: nn.Module, heads: int, width: int, scale: float, options: Mapping[str, Any]
) -> torch.dtype | str | None:
    """The dtypes in which an attention is a softmax of scaled products."""
    num = 80
    q, k, v = (
        torch.sin(torch.arange(7 * i, 7 * i + heads * num * width).double() ** 2).view(1, heads, num, width)
        for i in (1, 2, 3)
    )
    q = q * torch.logspace(0, 3, num).double()[:, None]  # of large scores, too
    hidden = torch.zeros(1, 1, num, num).double().masked_fill(torch.ones(num, num).triu(1).bool(), -1e30)
    try:
        found = eager(_Stand(module, {"num_key_value_groups": 1}), q, k, v, hidden, **options)[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None  # it asks for more than that
    scores = scale * q @ k.mT + hidden
    for kind, p in (
        ("every dtype", scores.softmax(-1)),
        (torch.float32, scores.softmax(-1, dtype=torch.float32).double()),
    ):
        if torch.allclose(found, (p @ v).transpose(1, 2), rtol=0, atol=1e-13):
            return kind
    return None


@functools.cache
def _keep_heap_whole() -> None:
    """Once: scores of blocks have as many sizes as there are blocks."""
    without_holes()


class _Block:
    """Some queries on the keys that they may see."""

    def __init__(self, eager: Callable, module: nn.Module, num: int, rows: slice, keys: slice):
        self.eager, self.module, self.num, self.rows, self.keys = eager, module, num, rows, keys

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, own: Mapping[str, Tensor], options: dict
    ) -> Tensor:
        key, value = key[..., self.keys, :], value[..., self.keys, :]  # here: a part for every block is not kept
        if is_brief(mask):
            mask = additive(spelt_out(mask, self.rows, self.keys), query.dtype)
        elif mask is not None:
            mask = mask[..., self.rows if mask.shape[-2] > 1 else slice(None), self.keys]
        if options.get("position_bias") is not None:
            options = {**options, "position_bias": taken(options["position_bias"], self.rows, self.keys, self.num)}
        groups, num = getattr(self.module, "num_key_value_groups", 1), query.shape[-2]
        if own or groups == 1 or mask is None or mask.shape[1] > 1:
            return self.eager(_Stand(self.module, own), query, key, value, mask, **options)[0]
        query = query.unflatten(1, (-1, groups)).flatten(2, 3)  # heads that share keys are more queries of these
        mask = mask.expand(*mask.shape[:-2], num, mask.shape[-1]).repeat(1, 1, groups, 1)
        stand = _Stand(self.module, {"num_key_value_groups": 1})
        out = self.eager(stand, query, key, value, mask, **options)[0]
        return out.unflatten(1, (groups, num)).permute(0, 2, 3, 1, 4).flatten(2, 3)


class _Stand:
    """A module with some of its attributes replaced."""

    def __init__(self, module: nn.Module, replaced: Mapping[str, Any]):
        self.module, self.replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self.replaced[name] if name in self.replaced else getattr(self.module, name)


def _eager_of(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    own = _written(module)
    if own is None:
        raise ValueError(
            f'{type(module).__name__} writes out no attention of its own: pass `attention="eager"` instead of "blocks".'
        )
    return own


def _written(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The attention that a module's own file writes out."""
    files = (sys.modules.get(kind.__module__) for kind in type(module).__mro__)
    return next((own for file in files if (own := getattr(file, "eager_attention_forward", None)) is not None), None)
