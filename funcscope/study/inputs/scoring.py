"""What is scored in one tokenised text, task by task: the ids that the model sees and the labels that it is held to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...core.criterion import IGNORE
from ...core.keys import Key, fold_in, uniform
from .pretrained import Task
from .tokens import Tokens, check_ids, embedding_rows


class Row(NamedTuple):
    """One sequence of a batch, before padding."""

    ids: list[int]
    types: list[int]
    labels: list[int] | int
    """One for each token, or for each that is to be said, or one for the sequence."""
    num_scored: int


RowOf = Callable[[Tokens, int], Row | None]
"""(text, its number among the rows) -> its row, or None where it is too short to be scored."""


def row_maker(
    task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, key: Key | None, mask_fraction: float
) -> RowOf:
    """How texts become rows for this task. Raises ValueError for what the task lacks."""
    if task == "causal":
        return _causal_row
    if task == "classification":
        return partial(_class_row, config=model.config)
    if task == "seq2seq":
        return _translated_row
    if key is None:
        raise ValueError("`key` is needed for the task 'masked', which draws the masked tokens: pass `key=fs.key(0)`.")
    if not 0 < mask_fraction <= 1:
        raise ValueError(f"`mask_fraction` must be above 0 and at most 1, got {mask_fraction!r}.")
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: the task 'masked' needs the tokenizer of a masked model.")
    check_ids([tokenizer.mask_token_id], tokenizer, embedding_rows(model), "the mask token")
    special = frozenset(tokenizer.all_special_ids)
    return partial(_masked_row, mask=tokenizer.mask_token_id, special=special, key=key, fraction=mask_fraction)


def block_row(ids: list[int]) -> Row:
    """Every token is scored but the first."""
    return Row(ids, [0] * len(ids), ids, len(ids) - 1)


def _causal_row(tokens: Tokens, _index: int) -> Row | None:
    return block_row(tokens.ids)._replace(types=tokens.types) if len(tokens.ids) > 1 else None


def _translated_row(tokens: Tokens, _index: int) -> Row | None:
    if tokens.target is None:
        raise ValueError(f"{tokens.where}: no target; the task 'seq2seq' needs a second text (`second_field`).")
    whole = tokens.ids and tokens.target
    return Row(tokens.ids, tokens.types, tokens.target, len(tokens.target)) if whole else None


def _masked_row(
    tokens: Tokens, index: int, *, mask: int, special: frozenset[int], key: Key, fraction: float
) -> Row | None:
    content = [place for place, token in enumerate(tokens.ids) if token not in special]
    if not content:
        return None
    draws = uniform(fold_in(key, index), torch.zeros(len(content), dtype=torch.float32))
    num = max(1, round(fraction * len(content)))
    chosen = {content[i] for i in draws.argsort(stable=True)[:num].tolist()}
    ids = [mask if place in chosen else token for place, token in enumerate(tokens.ids)]
    labels = [token if place in chosen else IGNORE for place, token in enumerate(tokens.ids)]
    return Row(ids, tokens.types, labels, num)


def _class_row(tokens: Tokens, _index: int, *, config: PreTrainedConfig) -> Row | None:
    label = tokens.label
    if label is None:
        raise ValueError(f"{tokens.where}: no label; the task 'classification' needs one (`label_field`).")
    number = config.label2id.get(label) if isinstance(label, str) else label
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < config.num_labels:
        known = ", ".join(map(repr, list(config.label2id)[:5]))
        raise ValueError(
            f"{tokens.where}: the label {label!r} is no class of the model: a number from 0 to {config.num_labels - 1}, "
            f"or a name in its `label2id` ({known})."
        )
    names = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if not isinstance(label, str) and not any(re.fullmatch(r"LABEL_\d+", name) for name in names):
        warnings.warn(  # the same text each time, and shown once
            f"labels are numbers, and the model names its classes {', '.join(map(repr, names[:5]))}: they are taken in the "
            "order of its `label2id`. Where the file counts otherwise, the losses are those of other classes.",
            stacklevel=2,
        )
    return Row(tokens.ids, tokens.types, number, 1) if tokens.ids else None
