"""Batches of token ids from texts: cut, masked, labelled and padded, with the counts of what was left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.checks import check_choice, check_count
from ...core.criterion import IGNORE
from ...core.keys import Key, check_key
from ...core.tables import counted
from .pretrained import Task
from .scoring import Row, RowOf, block_row, row_maker
from .text import Example
from .tokens import Tokens, check_ids, check_length, embedding_rows, tokenise

_OTHERS = {"image_classification": ("images", "image_batches"), "speech": ("recordings", "speech_batches")}


@dataclass(frozen=True, eq=False)
class Data:
    """Batches for `objective`, and what is in them. Made by `make_batches`; `str` says it in one line."""

    batches: list[dict[str, Tensor]]
    """Each has `input_ids`, `attention_mask` and `labels`, and `token_type_ids` where the tokenizer makes them."""
    num_samples: int
    """Sequences in the batches."""
    num_tokens: int
    """Their tokens, without padding."""
    num_scored: int
    """Positions that the criterion scores: the total weight of the objective."""
    num_too_short: int
    """Texts in which nothing can be scored, skipped; with packing, also the last, short block."""
    num_truncated: int
    """Texts of which the end was cut off."""
    limit: str = ""
    """What is to be known about where they end."""

    def __str__(self) -> str:
        return (
            f"{counted(self.num_samples, 'sequence')} in {counted(len(self.batches), 'batch', 'batches')}: "
            f"{counted(self.num_tokens, 'token')}, {self.num_scored} scored; {self.num_too_short} too short, "
            f"{self.num_truncated} truncated{self.limit and '; '}{self.limit}"
        )


def make_batches(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    task: Task,
    num_samples: int = 64,
    max_seq_length: int = 128,
    batch_size: int = 8,
    packing: bool = False,
    key: Key | None = None,
    mask_fraction: float = 0.15,
) -> Data:
    """The first `num_samples` usable texts as batches, in their order: text i is in batch i // batch_size.

    Texts are cut to `max_seq_length` tokens, special tokens included, and padded on the right to the longest of their
    batch. The objective over the batches is the mean over all scored tokens, whatever `batch_size`. No more examples
    are read than are needed, and tokenizer and model stay as they are.

    causal: the labels are the ids, -100 at padding. A text of fewer than two tokens is skipped and counted.
    packing (causal only): the ids of all texts in one row, an end-of-text token between two where the tokenizer has one,
    cut into blocks of `max_seq_length`; the last, shorter block is dropped and counted, unless it is the only one.
    Attention is not separated: it reaches from a text into those before it. `num_samples` counts blocks.
    masked: of the n tokens of a text that are not special, round(mask_fraction * n), at least one, become the mask token;
    labels are -100 elsewhere. They are those with the smallest of n uniform draws from `fold_in(key, i)` for text i, so
    that they depend neither on the batches nor on other texts.
    classification: `labels` has shape (batch,); a label is a class index, or a name in the model's `label2id`. A second text
    is the other one of a pair.
    seq2seq: the first text is for the encoder, the second is scored, all of its tokens, -100 at padding.

    Raises ValueError for a length that the model does not have, a missing key, label, mask token or padding id, for
    token ids outside the embedding, and where no text is usable; TypeError for a key that is a bare seed.
    """
    check_choice("task", task, get_args(Task))
    if other := _OTHERS.get(task):
        raise ValueError(
            f"`task` is {task!r}, which takes {other[0]} and no texts: make batches of them by `{other[1]}`."
        )
    check_count("num_samples", num_samples)
    check_count("batch_size", batch_size)
    check_length("max_seq_length", max_seq_length, model, tokenizer)
    if key is not None:
        check_key(key)
    if packing and task != "causal":
        raise ValueError(f"`packing` is for the task 'causal', got {task!r}: pass `packing=False`.")
    row_of = row_maker(task, tokenizer, model, key, mask_fraction)
    length = None if packing else max_seq_length
    texts = tokenise(examples, tokenizer, embedding_rows(model), length, targets=task == "seq2seq")
    if packing:
        chosen = _blocks(texts, _separator(tokenizer, model), num_samples, max_seq_length)
    else:
        chosen = _separate(texts, row_of, num_samples)
    if not chosen.rows:
        few = {"causal": "two tokens", "masked": "a token that is not special", "seq2seq": "a token on both sides"}
        needs = few.get(task, "a token")
        raise ValueError(
            f"no text is left for the task {task!r}: {chosen.num_too_short} were too short to be scored, which takes {needs}."
        )
    types = "token_type_ids" in tokenizer.model_input_names and bool(getattr(model.config, "type_vocab_size", 0))
    pad = _padding(task, tokenizer, model, several=min(batch_size, len(chosen.rows)) > 1)
    return _collated(chosen, batch_size, pad, types)


class _Chosen(NamedTuple):
    rows: list[Row]
    num_too_short: int
    num_truncated: int


def _separate(texts: Iterable[Tokens], row_of: RowOf, num: int) -> _Chosen:
    """One row for each text that can be scored, until there are enough."""
    rows: list[Row] = []
    num_too_short = num_truncated = 0
    for tokens in texts:
        row = row_of(tokens, len(rows))
        if row is None:
            num_too_short += 1
            continue
        rows.append(row)
        num_truncated += tokens.truncated
        if len(rows) == num:
            break
    return _Chosen(rows, num_too_short, num_truncated)


def _blocks(texts: Iterable[Tokens], separator: int | None, num: int, length: int) -> _Chosen:
    """Blocks of one row of all texts, until there are enough."""
    stream: list[int] = []
    num_too_short = 0
    for tokens in texts:
        num_too_short += not tokens.ids
        if separator is not None and stream and tokens.ids and separator not in (stream[-1], tokens.ids[0]):
            stream.append(separator)
        stream += tokens.ids
        if len(stream) >= num * length:
            break
    whole = min(len(stream) // length, num)
    blocks = [stream[i * length : (i + 1) * length] for i in range(whole)]
    rest = stream[whole * length :] if whole < num else []
    if not blocks and len(rest) > 1:
        blocks, rest = [rest], []
    return _Chosen([block_row(block) for block in blocks], num_too_short + bool(rest), 0)


def _separator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int | None:
    if tokenizer.eos_token_id is not None:
        check_ids([tokenizer.eos_token_id], tokenizer, embedding_rows(model), "the end-of-text token")
    return tokenizer.eos_token_id


def _padding(task: Task, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, several: bool) -> int:
    """The id at padding. Attention does not see it, but classifiers on decoders look for the last id that is another."""
    rows, wanted = embedding_rows(model), model.config.get_text_config().pad_token_id
    ids = [wanted, tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    known = [token for token in ids if isinstance(token, int) and 0 <= token < rows]
    if task == "classification" and several and known[0] != wanted:
        raise ValueError(
            f"the model's `config.pad_token_id` is {wanted!r}, by which a classifier finds the end of a padded text: set "
            f"`model.config.pad_token_id` to an id below {rows} that ends no text, or pass `batch_size=1`."
        )
    return known[0]


def _collated(chosen: _Chosen, batch_size: int, pad: int, types: bool) -> Data:
    rows, starts = chosen.rows, range(0, len(chosen.rows), batch_size)
    return Data(
        batches=[_padded(rows[start : start + batch_size], pad, types) for start in starts],
        num_samples=len(rows),
        num_tokens=sum(len(row.ids) for row in rows),
        num_scored=sum(row.num_scored for row in rows),
        num_too_short=chosen.num_too_short,
        num_truncated=chosen.num_truncated,
    )


def _padded(rows: list[Row], pad: int, types: bool) -> dict[str, Tensor]:
    width = max(len(row.ids) for row in rows)
    batch = {
        "input_ids": rectangle([row.ids for row in rows], width, pad),
        "attention_mask": rectangle([[1] * len(row.ids) for row in rows], width, 0),
    }
    if types:
        batch["token_type_ids"] = rectangle([row.types for row in rows], width, 0)
    labels = [row.labels for row in rows]
    per_token = [entry for entry in labels if isinstance(entry, list)]
    longest = max(map(len, per_token), default=0)
    batch["labels"] = rectangle(per_token, longest, IGNORE) if per_token else torch.tensor(labels)
    return batch


def rectangle(rows: list[list[int]], width: int, fill: int) -> Int[Tensor, "b t"]:
    """Rows of any length, filled up to one."""
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
