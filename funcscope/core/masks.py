"""Attention masks of Hugging Face models, made outside the model: float, 4-D, added to the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

KNOWN = frozenset(
    {
        "gpt2",
        "llama",
        "qwen2",
        "bert",
        "roberta",
        "distilbert",
        "electra",
        "mistral",
        "gpt_neo",
        "gpt_neox",
        "olmo",
        "t5",
    }
)
"""Model types whose logits under these masks were compared with the untouched model's."""


CLEAN = frozenset({"gpt2", "bert", "roberta", "distilbert", "electra"})
"""Of these, the ones that compute in the dtype of their parameters; the others take norms or softmax in float32."""


def with_float_mask(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with a float mask of shape (B, 1, T, T): 0 where attention may look, the dtype's lowest number elsewhere.

    Causal where the model's attention is causal, with its sliding window where it has one; a mapping of two masks
    where some layers slide and others do not. Position ids that start again inside a row, without a mask, are sequences
    packed into one row, which do not see each other. An encoder-decoder gets the decoder's inputs, made of `labels`
    where they are not given, and a mask for each side. A float 4-D mask, or such a mapping, is passed on as it is.
    """
    if model.config.is_encoder_decoder:
        inputs = _with_decoder(model, inputs)
    elif "labels" in inputs:
        raise ValueError("`labels` are no input of the model: they belong to the criterion, which scores its output.")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point()):
        return dict(inputs)
    if not {"input_ids", "inputs_embeds"} & inputs.keys():
        return dict(inputs)  # no tokens: images, say
    if model.config.model_type not in KNOWN:
        raise ValueError(
            f"how {model.config.model_type!r} masks its attention is not known here: pass a float mask of shape "
            '(batch, 1, tokens, tokens), or `attention="keep"` to `functional` for values and first derivatives.'
        )
    return {**inputs, "attention_mask": _masks(model, inputs, _visible(inputs), _dtype(model))}


def _with_decoder(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's inputs (the labels moved right by one, the start token first) and its causal mask."""
    rest = {name: x for name, x in inputs.items() if name != "labels"}
    if rest.get("decoder_input_ids") is None and rest.get("decoder_inputs_embeds") is None:
        if inputs.get("labels") is None:
            raise ValueError("an encoder-decoder needs `labels` or `decoder_input_ids` beside its `input_ids`.")
        rest["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    mask = rest.get("decoder_attention_mask")
    as_it_is = isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point()
    if model.config.model_type in KNOWN and not as_it_is:
        given = {name.removeprefix("decoder_"): x for name, x in rest.items() if name.startswith("decoder_")}
        visible = _visible(given)
        causal = visible if visible.shape[-2] > 1 else visible & (_back(visible) >= 0)
        rest["decoder_attention_mask"] = _additive(causal, _dtype(model))
    return rest


def _masks(
    model: PreTrainedModel, inputs: Mapping[str, Any], visible: Bool[Tensor, "b #1 #q k"], dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    if visible.shape[-2] > 1:  # a boolean mask of four dimensions says all
        return _additive(visible, dtype)
    if model.config.is_encoder_decoder:
        return _additive(visible, dtype)  # one row for all queries: those of the encoder and those of the decoder
    if not any(getattr(module, "is_causal", False) for module in model.modules()):
        return _additive(visible.expand(-1, -1, visible.shape[-1], -1), dtype)
    back = _back(visible)
    full = visible & _same_sequence(inputs) & (back >= 0)
    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if not window or kinds == {"full_attention"} or getattr(model.config, "use_sliding_window", True) is False:
        return _additive(full, dtype)
    sliding = full & (back < window)
    if "full_attention" in kinds:
        return {"full_attention": _additive(full, dtype), "sliding_attention": _additive(sliding, dtype)}
    return _additive(sliding, dtype)


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
    position = inputs.get("position_ids")
    if position is None or inputs.get("attention_mask") is not None:
        return True
    sequence = (position.diff(dim=-1, prepend=position[:, :1] - 1) != 1).cumsum(-1)
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


def _back(visible: Tensor) -> Int[Tensor, "t t"]:
    """How far position k lies before position q."""
    position = torch.arange(visible.shape[-1], device=visible.device)
    return position[:, None] - position[None, :]


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, a large negative number elsewhere.

    The query of a padding token may look at nothing; it is given everything, as a softmax over nothing is nan, and its
    output is read by nobody. The number is one that float32 holds: some models take the softmax in float32 always.
    """
    allowed = allowed | ~allowed.any(-1, keepdim=True)
    hidden = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, hidden)
