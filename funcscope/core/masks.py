"""Attention masks of Hugging Face models, made outside the model: float, 4-D, added to the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from .architectures import FULL, SLIDING, Family, computes_in_float32, family_of, has_alibi, layer_types, remedy, window
from .brief_masks import additive, brief, is_brief, spelt_out
from .imported import Config, Model


def with_float_mask(model: Model, inputs: Mapping[str, Any], *, brief_above: int | None = None) -> dict[str, Any]:
    """`inputs` with a float mask of shape (B, 1, T, T): 0 where attention may look, the dtype's lowest number elsewhere.

    Causal where the model's attention is causal, with its sliding window where it has one; a mapping of two masks
    where some layers slide and others do not. Position ids that start again inside a row, without a mask, are sequences
    packed into one row, which do not see each other. An encoder-decoder gets the decoder's inputs, made of `labels`
    where they are not given, and a mask for each side. A float 4-D mask, or such a mapping, is passed on as it is, and so
    is the 2-D mask of a model that counts its distances in it (ALiBi).

    brief_above: masks of more tokens are written in brief (core/brief_masks.py); None: those in brief are spelt out.
    """
    if model.config.is_encoder_decoder:
        inputs = _with_decoder(model, inputs, brief_above)
    elif "labels" in inputs:
        raise ValueError("`labels` are no input of the model: they belong to the criterion, which scores its output.")
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        return dict(inputs)  # no tokens: images, say
    mask = inputs.get("attention_mask")
    _check_given(model.config, inputs)
    _check_padding(model, inputs)
    if has_alibi(model.config):
        return dict(inputs)
    if _is_brief(mask):
        return (
            dict(inputs) if brief_above is not None else {**inputs, "attention_mask": _spelt_out(mask, _dtype(model))}
        )
    family = family_of(model.config)
    if isinstance(mask, Mapping) or _is_additive(mask):
        if isinstance(mask, Tensor) and family is not None and family.boolean and brief_above is None:
            return {**inputs, "attention_mask": _with_what_follows(mask)}
        return dict(inputs)
    if family is None:
        kind = model.config.model_type
        raise ValueError(f"how a {kind!r} model masks its attention is not known here: {remedy(model.config)}")
    if family.attention == "none":
        return _running_states(model.config, inputs)
    visible = _visible(inputs)
    make = _masks if brief_above is None or visible.shape[-1] <= max(brief_above, 3) else _brief_masks
    masks = make(model, family, inputs, visible)
    return {**inputs, **_positions(family, inputs), "attention_mask": masks}


def tokens_there(mask: Tensor | Mapping[str, Tensor]) -> Bool[Tensor, "b t"]:
    """Where a mask of any form, or those of layers of several types, leaves a token: one that may be seen."""
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if mask.ndim == 2:
        return mask != 0
    if is_brief(mask):
        return mask[:, 0, 0] != 0
    seen = mask == 0 if mask.is_floating_point() else mask != 0
    return seen.any(-2).any(1)


def _check_given(config: Config, inputs: Mapping[str, Any]) -> None:
    """A mask that says all can be used as it is."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return
    family, (length, mixed) = family_of(config), window(config)
    types = layer_types(config)
    if (mixed and mask.shape[-1] > (length or 0)) or (family is None and len(types) > 1):
        instead = remedy(config) if family is None else f"pass one of shape (batch, tokens), or a mapping from {types}."
        raise ValueError(
            f"the layers of a {config.model_type!r} model are of several types, and one mask would serve them all alike: "
            f"{instead}"
        )
    if has_alibi(config):
        raise ValueError(
            f"a {config.model_type!r} model counts distances in its `attention_mask`: "
            f"pass one of shape (batch, tokens), got {tuple(mask.shape)}."
        )
    if family is not None and family.counted and inputs.get("position_ids") is None:
        raise ValueError(
            f"a {config.model_type!r} model counts its positions in a mask of shape (batch, tokens): pass that, or "
            f"`position_ids` beside a mask of shape {tuple(mask.shape)}."
        )


def _check_padding(model: Model, inputs: Mapping[str, Any]) -> None:
    """The lowest float64, which some models hide scores with, is -inf in float32: a softmax over nothing."""
    mask, family = inputs.get("attention_mask"), family_of(model.config)
    of_its_own = has_alibi(model.config) or (family is not None and family.boolean)
    if not of_its_own or not isinstance(mask, Tensor) or mask.ndim != 2 or is_batchedtensor(mask):
        return
    if _dtype(model) is torch.float64 and computes_in_float32(model.config) and not bool(mask[:, 0].all()):
        raise ValueError(
            f"a {model.config.model_type!r} model in float64 gives nan for texts that are padded on the left: pad them on "
            "the right, or compute in float32."
        )


def _running_states(config: Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The 2-D mask as it is: padding on the right is after all that is read.

    A model whose states run through the text leaves out padding on the left where rows are several, and not in a single one,
    so that a sequence would have other gradients alone than in its batch.
    """
    mask = _visible(inputs)[:, 0]
    if mask.shape[-2] > 1:
        raise ValueError(
            f"a {config.model_type!r} model has no attention: pass an `attention_mask` of shape (batch, tokens)."
        )
    if not is_batchedtensor(mask) and not bool(mask[:, 0, 0].all()):
        raise ValueError(f"a {config.model_type!r} model runs through padding on the left: pad texts on the right.")
    return {**inputs, "attention_mask": mask[:, 0].long()}


def _positions(family: Family, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Positions as the model counts them in the 2-D mask that it does not get."""
    if not family.counted or inputs.get("position_ids") is not None:
        return {}
    mask = _visible(inputs)[:, 0, 0].long()
    return {"position_ids": mask.cumsum(-1) * mask - 1}


def _with_decoder(model: Model, inputs: Mapping[str, Any], brief_above: int | None) -> dict[str, Any]:
    """The decoder's inputs (the labels moved right by one, the start token first) and its causal mask."""
    rest = {name: x for name, x in inputs.items() if name != "labels"}
    if rest.get("decoder_input_ids") is None and rest.get("decoder_inputs_embeds") is None:
        if inputs.get("labels") is None:
            raise ValueError("an encoder-decoder needs `labels` or `decoder_input_ids` beside its `input_ids`.")
        rest["decoder_input_ids"] = _moved_right(model, inputs["labels"])
    mask = rest.get("decoder_attention_mask")
    if is_brief(mask):
        return rest if brief_above is not None else {**rest, "decoder_attention_mask": _spelt_out(mask, _dtype(model))}
    if family_of(model.config) is None or _is_additive(mask):
        return rest
    visible = _visible({name.removeprefix("decoder_"): x for name, x in rest.items() if name.startswith("decoder_")})
    return {**rest, "decoder_attention_mask": _decoder_mask(visible, _dtype(model), brief_above)}


def _decoder_mask(visible: Bool[Tensor, "b 1 #q k"], dtype: torch.dtype, brief_above: int | None) -> Tensor:
    if visible.shape[-2] > 1:
        return additive(visible, dtype)
    if brief_above is None or visible.shape[-1] <= max(brief_above, 3):
        return additive(visible & (_back(visible) >= 0), dtype)
    position = torch.arange(visible.shape[-1], dtype=torch.int32, device=visible.device)
    return brief(visible, torch.zeros_like(position), position + 1)


def _moved_right(model: Model, labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config  # Whisper's, which has a function for it outside the model
    start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], 1)


def _masks(
    model: Model, family: Family, inputs: Mapping[str, Any], visible: Bool[Tensor, "b #1 #q k"]
) -> Tensor | dict[str, Tensor]:
    dtype = _dtype(model)
    if family.attention == "both" or visible.shape[-2] > 1:
        return additive(visible, dtype)  # one row for all queries, the encoder's and the decoder's; or all is said
    back, (length, mixed) = _back(visible), window(model.config)
    if _sees_all(model, family):
        full, near = visible.expand(-1, -1, visible.shape[-1], -1), back.abs() <= (length or 0)
    else:
        full = visible & (back >= 0) & (_same_sequence(inputs) if family.packs else True)
        near = back < (length or 0)
    if length is None:
        return additive(full, dtype)
    sliding = additive(full & near, dtype)
    return {FULL: additive(full, dtype), SLIDING: sliding} if mixed else sliding


def _brief_masks(
    model: Model, family: Family, inputs: Mapping[str, Any], visible: Bool[Tensor, "b #1 #q k"]
) -> Tensor | dict[str, Tensor]:
    if family.attention == "both" or visible.shape[-2] > 1:
        return _masks(model, family, inputs, visible)
    if family.boolean:
        return additive(visible, _dtype(model))  # what follows is hidden block by block
    position = torch.arange(visible.shape[-1], dtype=torch.int32, device=visible.device)
    length, mixed = window(model.config)
    if _sees_all(model, family):
        full = brief(visible, None, None)
        ends = (position - (length or 0), position + (length or 0) + 1)
    else:
        first = _start_of_sequence(inputs, position) if family.packs else torch.zeros_like(position)
        full = brief(visible, first, position + 1)
        ends = (torch.maximum(first, position + 1 - (length or 0)), position + 1)
    if length is None:
        return full
    sliding = brief(visible, *ends)
    return {FULL: full, SLIDING: sliding} if mixed else sliding


def _with_what_follows(mask: Tensor) -> Tensor:
    """A mask of keys alone, as `_brief_masks` makes it of such models, for all queries."""
    if mask.shape[-2] > 1:
        return mask
    visible = mask == 0
    return additive(visible & (_back(visible) >= 0), mask.dtype)


def _sees_all(model: Model, family: Family) -> bool:
    return family.attention == "encoder" and not any(getattr(module, "is_causal", False) for module in model.modules())


def _visible(inputs: Mapping[str, Any]) -> Bool[Tensor, "b #1 #q k"]:
    mask = inputs.get("attention_mask")
    if mask is None:
        tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        return torch.ones(tokens.shape[0], 1, 1, tokens.shape[1], dtype=torch.bool, device=tokens.device)
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"`attention_mask` must have shape (batch, tokens) or (batch, 1, tokens, tokens), got {tuple(mask.shape)}."
        )
    return mask.bool() if mask.ndim == 4 else mask.bool()[:, None, None, :]


def _same_sequence(inputs: Mapping[str, Any]) -> Bool[Tensor, "*b 1 t t"] | bool:
    """Which positions belong to one sequence, where several are packed into a row: a step other than 1 starts a new one."""
    starts = _starts(inputs)
    if starts is None:
        return True
    sequence = starts.cumsum(-1)
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


def _start_of_sequence(inputs: Mapping[str, Any], position: Int[Tensor, " t"]) -> Int[Tensor, "*b t"]:
    """Where the sequence that a position belongs to begins."""
    starts = _starts(inputs)
    return torch.zeros_like(position) if starts is None else torch.where(starts, position, 0).cummax(-1).values


def _starts(inputs: Mapping[str, Any]) -> Bool[Tensor, "b t"] | None:
    """Where a sequence begins of several packed into a row; None where nothing says that there are several."""
    position = inputs.get("position_ids")
    if position is None or inputs.get("attention_mask") is not None:
        return None
    return position.diff(dim=-1, prepend=position[:, :1] - 1) != 1


def _back(visible: Tensor) -> Int[Tensor, "t t"]:
    """How far position k lies before position q."""
    position = torch.arange(visible.shape[-1], dtype=torch.int32, device=visible.device)
    return position[:, None] - position[None, :]


def _dtype(model: Model) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _is_brief(mask: Any) -> TypeGuard[Tensor | Mapping[str, Tensor]]:
    return all(map(is_brief, mask.values())) if isinstance(mask, Mapping) else is_brief(mask)


def _spelt_out(mask: Tensor | Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    if isinstance(mask, Mapping):
        return {kind: additive(spelt_out(part), dtype) for kind, part in mask.items()}
    return additive(spelt_out(mask), dtype)


def _is_additive(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point()
