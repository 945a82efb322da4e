"""How many tokens a Hugging Face model has positions for, where these are rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from .architectures import family_of
from .imported import Model

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

    Positions that are given (`position_ids`) are taken as they are.
    """
    limits = position_limits(model)
    if not limits:
        return
    for part, most in limits.items():
        name, length = _longest(part, inputs)
        if length > most and not _few_real(model, inputs, most):
            whose = f"the {part} of {type(model).__name__}" if part else type(model).__name__
            raise ValueError(
                f"`{name}` has {length} tokens, and {whose} has {most} positions: cut sequences to at most {most} tokens, "
                "columns of padding first, and with them whatever else has one entry a token."
            )


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


def _longest(part: str, inputs: Any) -> tuple[str, int]:
    """What the part reads, and how many tokens a sequence of it has; 0 where it is not known, or has positions of its own."""
    if not isinstance(inputs, Mapping):
        ids = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
        tokens = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
        return "input_ids", ids.shape[1] if tokens and part != "decoder" else 0
    start = "decoder_" if part == "decoder" else ""
    names = (f"{start}input_ids", f"{start}inputs_embeds", *(["labels"] if start else []))
    given = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].ndim >= 2}
    if not given or inputs.get(f"{start}position_ids") is not None:
        return names[0], 0
    name = next(iter(given))
    return name, given[name].shape[1]


def _few_real(model: Model, inputs: Any, most: int) -> bool:
    """Whether positions are counted in a mask, and few enough tokens are real."""
    mask, family = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None, family_of(model.config)
    if family is None or not family.counted or not isinstance(mask, Tensor) or mask.ndim != 2 or is_batchedtensor(mask):
        return False
    return int((mask != 0).sum(1).max()) <= most
