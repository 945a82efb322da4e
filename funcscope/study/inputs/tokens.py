"""From a text to the token ids that one model takes: its special tokens, its longest sequence, its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.checks import check_count
from ...core.positions import position_limits
from .text import Example


class Tokens(NamedTuple):
    """One tokenised text, whole or its first part."""

    ids: list[int]
    types: list[int]
    """Token types; 0 where the tokenizer makes none."""
    truncated: bool
    label: int | str | None
    where: str
    target: list[int] | None = None
    """What an encoder-decoder is to say."""


def tokenise(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    max_length: int | None,
    *,
    targets: bool = False,
) -> Iterator[Tokens]:
    """The texts as token ids with the special tokens of the tokenizer, a text at a time; the tokenizer stays as it was.

    A second text follows the first in one sequence, as the tokenizer joins pairs, or is a sequence of its own (`targets`). A
    longer text loses the end of its content and keeps its special tokens, so that it has `max_length` ids (None: whole).
    Raises ValueError for an id that the embedding of `rows` rows does not have.
    """
    for index, example in enumerate(examples):
        where = example.where or f"text {index}"
        with _unchanged(tokenizer):
            texts = [(example.text, None if targets else example.second)]
            texts += [(example.second, None)] if targets and example.second is not None else []
            made = [
                tokenizer(
                    *each, return_special_tokens_mask=True, return_token_type_ids=True, return_attention_mask=False,
                    verbose=False,
                )
                for each in texts
            ]  # fmt: skip
        keep = [_kept(each["special_tokens_mask"], max_length) for each in made]
        ids, *target = [[each["input_ids"][i] for i in places] for each, places in zip(made, keep, strict=True)]
        for part in (ids, *target):
            check_ids(part, tokenizer, rows, where)
        cut = any(len(places) < len(each["input_ids"]) for each, places in zip(made, keep, strict=True))
        types = [made[0]["token_type_ids"][i] for i in keep[0]]
        yield Tokens(ids, types, cut, example.label, where, target[0] if target else None)


def check_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> None:
    """The embedding has a row for each of the ids."""
    if ids and max(ids) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise ValueError(
            f"{where}: the token {token!r} has the id {max(ids)}, and the model's input embedding has {rows} rows: "
            "the tokenizer is another model's."
        )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_length(name: str, length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """`length` tokens fit the model, and leave room for content beside the special tokens."""
    check_count(name, length, 2)
    most = max_positions(model)
    if most is not None and length > most:
        raise ValueError(
            f"`{name}` is {length}, and the {type(model).__name__} has {most} positions: pass at most {most}."
        )
    special = tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise ValueError(
            f"`{name}` is {length}, and the tokenizer adds {special} special tokens: pass more than {special}."
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model takes; None where its configuration names no limit.

    It is that of the position table where there is one, of an encoder-decoder the shorter (`core.positions`).
    """
    if limits := position_limits(model):
        return min(limits.values())
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def _kept(special: list[int], most: int | None) -> list[int]:
    """The places that stay: special tokens at both ends, and as much of the content before the last ones as has room."""
    if most is None or len(special) <= most:
        return list(range(len(special)))
    tail = sum(takewhile(bool, reversed(special)))
    return [*range(most - tail), *range(len(special) - tail, len(special))]


@contextmanager
def _unchanged(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Puts back a truncation and padding that the tokenizer was saved with: every call of it takes them away."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (backend.truncation, backend.padding) if backend is not None else (None, None)
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
