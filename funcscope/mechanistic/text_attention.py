"""Attention patterns of all heads on one text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count
from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from .passes import pattern_at, sequence_at, traced


class TextAttention(Result):
    """What every head looks at in one text, exactly: there is no error; made by `attention_on_text`."""

    patterns: Float[Tensor, "l h t t"] = quantity("attention", per=("layer", "head", "query", "key"), shown=False)
    tokens: list[str] = internal()

    @property
    def follower(self) -> tuple[int, int]:
        """Layer and head of the largest attention to what followed the same token before; the first where none did."""
        layer, head = divmod(
            int((self.patterns * _follows(self.tokens)).sum((-2, -1)).argmax()), self.patterns.shape[1]
        )
        return layer, head

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        layers, heads, num, _ = self.patterns.shape
        return {"layer": range(layers), "head": range(heads), "query": range(num), "key": range(num)}

    @property
    def head(self) -> str:
        layers, heads, num, _ = self.patterns.shape
        return f"attention of {layers} x {heads} heads on a text of {num} tokens"


def attention_on_text(
    loss: Loss,
    params: Params,
    token_names: Callable[[list[int]], list[str]] = lambda ids: [*map(str, ids)],
    *,
    sequence: int = 0,
    num: int = 64,
) -> TextAttention:
    r"""The patterns of every head on one sequence of the data, token by token.

    $$A_{qk} = \mathrm{softmax}_k(s_{qk} + m_{qk})$$

    as the model computes it, masks included: layer, head, query, key. Padding is left out. The pass is of the whole sequence
    and the patterns are of its first `num` tokens, so that rows of a model that looks both ways may sum to less than 1.

    token_names: texts of token ids. sequence: which of the data, from 0 on.

    Raises ValueError for a sequence that is not there, for batches without `input_ids`, and for a model whose attention is
    not described.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> loss = fs.objective(fs.functional(model), [{"input_ids": torch.tensor([[1, 2, 1]])}], fs.causal_lm)
    >>> made = attention_on_text(loss, loss.net.params)
    >>> made.patterns.shape, made.tokens, made.patterns[0, 0, 0].tolist()
    (torch.Size([1, 2, 3, 3]), ['1', '2', '1'], [1.0, 0.0, 0.0])
    """
    check_count("num", num)
    inputs = sequence_at(loss, sequence)
    with torch.no_grad():
        seen = traced(loss.net, params, inputs)
        if not isinstance(inputs, Mapping) or (tokens := inputs.get("input_ids")) is None:
            raise ValueError("what the tokens are is read from `input_ids`, and the batch has none.")
        at = seen.mask[0].nonzero().flatten()[:num]
        rows = slice(0, int(at[-1]) + 1)
        patterns = [pattern_at(seen, layer, rows)[0][:, at][..., at] for layer in sorted(seen.kernels)]
    return TextAttention(torch.stack(patterns).cpu(), token_names(tokens[0, at].tolist()))


def _follows(tokens: Sequence[str]) -> Bool[Tensor, "t t"]:
    """Whether a key is behind an earlier occurrence of the query's token."""
    num = len(tokens)
    pairs = [[0 < key <= query and tokens[key - 1] == tokens[query] for key in range(num)] for query in range(num)]
    return torch.tensor(pairs)
