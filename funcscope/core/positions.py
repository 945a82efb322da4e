"""Positions of a Hugging Face model: for how many tokens it has them, and whether it reads those that are given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from .architectures import family_of, has_alibi
from .brief_masks import is_brief
from .imported import Model, is_pretrained
from .masks import tokens_there

_TABLES = ("wpe", "position_embeddings", "embed_positions")
_known: WeakKeyDictionary[nn.Module, Mapping[str, int]] = WeakKeyDictionary()


def position_limits(model: Model) -> Mapping[str, int]:
    """The most tokens for the parts `encoder` and `decoder`, where a table says so; "" is the part of a model of one part.

    Rows before the first position do not count: that of padding in RoBERTa, two in OPT and BART. Rotary, relative and other
    positions that are computed at any length are not there, nor are the frames of sound.
    """
    if model not in _known:
        limits: dict[str, int] = {}
        for part, rows in _tables(model):
            limits[part] = min(rows, limits.get(part, rows))
        _known[model] = limits
    return _known[model]


def check_positions(model: Model, inputs: Any) -> None:
    """Raises ValueError for sequences longer than the table: an index out of range, which on a GPU ends the process.

    Positions that are given (`position_ids`) are taken as they are by a model that reads them. Of one that does not, which
    would leave them out without a word, those are refused that say something else than it counts itself: texts that are
    packed into a row would see each other. Distances are what counts where positions are no rows of a table.
    """
    limits = position_limits(model)
    if isinstance(inputs, Mapping):
        for start in ("", "decoder_"):
            _check_read(model, inputs, start, absolute=bool(limits))
    for part, most in limits.items():
        name, length = _longest(model, part, inputs)
        if length > most and not _few_real(model, inputs, most):
            whose = f"the {part} of {type(model).__name__}" if part else type(model).__name__
            raise ValueError(
                f"`{name}` has {length} tokens, and {whose} has {most} positions: cut sequences to at most {most} tokens, "
                "columns of padding first, and with them whatever else has one entry a token."
            )


def _check_read(model: Model, inputs: Mapping[str, Any], start: str, *, absolute: bool) -> None:
    given, mask = inputs.get(f"{start}position_ids"), inputs.get(f"{start}attention_mask")
    if not isinstance(given, Tensor) or _reads(model, start):
        return
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    if any(isinstance(x, Tensor) and is_batchedtensor(x) for x in (given, *masks)):
        return
    if _differ(given if given.ndim > 1 else given[None], mask, _shape(inputs, start), absolute):
        raise ValueError(
            f"`{start}position_ids` are not read by {type(model).__name__}, which counts otherwise: leave them out, and "
            f"pass one text in each row, padded, with an `{start}attention_mask`."
        )


def _reads(model: Model, start: str) -> bool:
    parts = (part for part in model.modules() if is_pretrained(part))
    named = any(f"{start}position_ids" in inspect.signature(type(part).forward).parameters for part in parts)
    return named and not has_alibi(model.config)  # a Falcon names them always


def _shape(inputs: Mapping[str, Any], start: str) -> tuple[int, ...] | None:
    """Rows and tokens, where they are known."""
    given = (inputs.get(name) for name in _names(start))
    return next((tuple(x.shape[:2]) for x in given if isinstance(x, Tensor) and x.ndim >= 2), None)


def _differ(position: Int[Tensor, "..."], mask: Any, shape: tuple[int, ...] | None, absolute: bool) -> bool:
    """Whether tokens that see each other are at other distances than in the row; absolute: or anywhere else than there."""
    rows, length = shape or position.shape[-2:]
    if position.ndim != 2 or position.shape[1] != length or len(position) not in (1, rows):
        return True
    real = torch.ones_like(position, dtype=torch.bool) if mask is None else tokens_there(mask)
    shift = position - torch.arange(length, device=position.device)
    if absolute:
        return bool((real & (shift != 0)).any())
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] > 1 and not is_brief(mask):
        return bool((_pairs(mask, real) & (shift[:, :, None] != shift[:, None, :])).any())
    first = shift.expand(len(real), -1).gather(1, real.int().argmax(1, keepdim=True))
    return bool((real & (shift != first)).any())


def _pairs(mask: Tensor, real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t t"]:
    """Which real query sees which key."""
    seen = mask == 0 if mask.is_floating_point() else mask != 0
    return seen.any(1) & real[:, :, None]


def _tables(model: Model) -> Iterator[tuple[str, int]]:
    both = model.config.is_encoder_decoder
    for path, module in model.named_modules():
        *parents, name = path.split(".")
        part = next((each for each in ("encoder", "decoder") if both and each in parents), "")
        if isinstance(module, nn.Embedding) and name in _TABLES and not (part == "encoder" and _is_sound(model)):
            yield part, module.num_embeddings - _first(model.get_submodule(".".join(parents)), name, module)
        sines = getattr(module, "embed_positions", None)  # GPT-J's, one in every layer
        if isinstance(sines, Tensor) and sines.ndim == 2:
            yield part, len(sines)


def _first(parent: nn.Module, name: str, table: nn.Module) -> int:
    """The row of the first position. A skeleton's table has lost its row of padding, which RoBERTa's embeddings name, too."""
    padding = getattr(parent, "padding_idx", None) if name == "position_embeddings" else None
    padding = padding if table.padding_idx is None else table.padding_idx
    return int(getattr(table, "offset", 0)) if padding is None else int(padding) + 1  # type: ignore[arg-type]


def _is_sound(model: Model) -> bool:
    return model.main_input_name == "input_features"


def _longest(model: Model, part: str, inputs: Any) -> tuple[str, int]:
    """What the part reads, and how many tokens a sequence of it has; 0 where it is not known, or has positions of its own."""
    if not isinstance(inputs, Mapping):
        ids = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
        tokens = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
        return "input_ids", ids.shape[1] if tokens and part != "decoder" else 0
    start = "decoder_" if part == "decoder" else ""
    names = _names(start)
    given = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].ndim >= 2}
    if not given or (inputs.get(f"{start}position_ids") is not None and _reads(model, start)):
        return names[0], 0
    name = next(iter(given))
    return name, given[name].shape[1]


def _names(start: str) -> tuple[str, ...]:
    """Of inputs that have an entry for each token."""
    return f"{start}input_ids", f"{start}inputs_embeds", *(["labels"] if start else [])


def _few_real(model: Model, inputs: Any, most: int) -> bool:
    """Whether positions are counted in a mask, and few enough tokens are real."""
    mask, family = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None, family_of(model.config)
    if family is None or not family.counted or not isinstance(mask, Tensor) or mask.ndim != 2 or is_batchedtensor(mask):
        return False
    return int((mask != 0).sum(1).max()) <= most
