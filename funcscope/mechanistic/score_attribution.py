"""Which parts of what a query's and a key's token hold make their attention score: a sum that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.layout import Params
from ..core.model import Functional, Inputs
from ..core.result import Result, internal, quantity
from ..core.trace import Trace, trace
from .passes import attributed_ids
from .weights import Norm, Weights


class ScoreAttribution(Result):
    """Which parts of what a query's and a key's token hold make their attention score."""

    values: Float[Tensor, "m n"] = quantity("part of the score", per=("query_part", "key_part"))
    """Exact; `bias` is that of the norm and of the matrices."""
    score: float = quantity("score")
    """Before mask and cap, scaled: what the parts sum to."""
    names: list[str] = internal()
    layer: int
    head_index: int
    query: int
    key_position: int

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"query_part": self.names, "key_part": self.names}

    @property
    def head(self) -> str:
        return f"the score of head {self.layer}.{self.head_index}, query {self.query} and key {self.key_position}"


def qk_attribution(
    net: Functional, params: Params, inputs: Inputs, *, layer: int, head: int, query: int, key: int, row: int = 0
) -> ScoreAttribution:
    r"""Which earlier heads, MLPs and embeddings of a query's and of a key's position make their attention score.

    With the norm before attention (and those of queries and keys, where there are any) at the scale that it has, what it
    reads is a sum over parts c, and the score a sum over pairs of these:

    $$s = \sum_{c, c'} s_h\, (R_q W_Q N c_q)^\top (R_k W_K N c'_k) ,$$

    before mask and cap. Parts are the embeddings, every head (`layer.head`), the bias of attention (`layer bias`) and the MLP
    (`layer mlp`) of earlier layers, and `bias`, that of the norm and of the matrices.

    row: of the batch. query, key: positions, counted as in the inputs.

    Raises ValueError for a family that is not described, or with norms behind its parts (BERT), and for places that are
    not there or hold no token, and for inputs without `input_ids` or with `token_type_ids`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    >>> qk_attribution(net, net.params, ids, layer=1, head=0, query=2, key=1).names
    ['embedding', 'positions', '0.0', '0.1', '0 bias', '0 mlp', 'bias']
    """
    w = Weights(net, params)
    if w.body.norm == "post":
        raise ValueError("norms stand behind the parts of this model: what attention reads is no sum of them.")
    attributed_ids(w.body, inputs)
    weights = w.heads(layer)
    _check_place("head", head, len(weights.q))
    names = ["tok_embed", "z", "mlp_out", f"resid_pre.{layer}", *(["pos_embed"] if w.positions is not None else [])]
    with torch.no_grad():
        seen = trace(net, params, inputs, names)
        _check_tokens(seen, row, query, key)
        parts = _written(w, seen, layer, row, [query, key])
        k = weights.shared(weights.k), weights.biases.get("k")
        sides = (weights.q, weights.biases.get("q")), (k[0], None if k[1] is None else weights.shared(k[1]))
        read = [
            _projected(w, part, stream, layer, matrix[head], None if bias is None else bias[head])
            for part, stream, (matrix, bias) in zip(
                parts.values.unbind(1), seen[f"resid_pre.{layer}"][row, [query, key]], sides, strict=True
            )
        ]
        turned = []
        for made, of_head, at in zip(read, w.head_norms(layer), (query, key), strict=True):
            normed = made if of_head is None else of_head.linear(made) / of_head.scale(made.sum(0))
            position = _position(inputs, row, at, made.device)
            turned.append(w.rotated(normed, position.expand(len(made))).double())
        values = weights.scaling * turned[0] @ turned[1].T
    return ScoreAttribution(values.cpu(), float(values.sum()), [*parts.names, "bias"], layer, head, query, key)


class Parts(NamedTuple):
    """What is in the residual stream at some positions of one sequence, by what wrote it."""

    names: list[str]
    values: Float[Tensor, "c n D"]


def _projected(
    w: Weights,
    parts: Float[Tensor, "c D"],
    stream: Float[Tensor, " D"],
    layer: int,
    matrix: Float[Tensor, "d D"],
    bias: Float[Tensor, " d"] | None,
) -> Float[Tensor, "m d"]:
    """Through the norm at its own scale and a head's matrix; the last row is of their biases."""
    norm = w.norm(w.body.anatomy.attn_in, layer)
    own = matrix.new_zeros(len(matrix)) if bias is None else bias
    own = own if norm.bias is None else own + matrix @ norm.bias
    return torch.cat([norm.linear(parts) / norm.scale(stream) @ matrix.T, own[None]])


def _check_tokens(seen: Trace, row: int, query: int, key: int) -> None:
    rows, length = seen.mask.shape
    for name, value, size in (("row", row, rows), ("query", query, length), ("key", key, length)):
        _check_place(name, value, size)
    if not bool(seen.mask[row, [query, key]].all()):
        raise ValueError(f"`query` and `key` must be tokens, and one of {query} and {key} in row {row} is padding.")


def _check_place(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise ValueError(f"`{name}` must be one of 0 to {size - 1}, got {value}.")


def _written(w: Weights, seen: Trace, layer: int, row: int, positions: list[int]) -> Parts:
    """What earlier parts wrote into the residual stream at some positions of one sequence."""
    names, parts = ["embedding"], [seen["tok_embed"][row, positions][None]]
    if w.positions is not None:
        table = seen["pos_embed"]
        names.append("positions")
        parts.append((table if table.ndim == 2 else table[row % len(table)])[positions][None])
    for i in range(layer):
        heads, z = w.heads(i), seen[f"z.{i}"][row, positions]
        made = torch.einsum("nhe,hDe->hnD", z.to(heads.o), heads.o)
        own = heads.biases.get("o", torch.zeros_like(made[0, 0])).expand_as(made[:1])
        both = torch.cat([made, own])
        if (behind := w.write_norms(i)[0]) is not None:
            both = _frozen(behind, both)
        names += [*(f"{i}.{head}" for head in range(len(made))), f"{i} bias", f"{i} mlp"]
        parts += [both, seen[f"mlp_out.{i}"][row, positions][None]]
    return Parts(names, torch.cat(parts))


def _frozen(norm: Norm, parts: Float[Tensor, "c n D"]) -> Float[Tensor, "c n D"]:
    """What each part becomes by a norm of their sum."""
    return norm.linear(parts) / norm.scale(parts.sum(0))[..., None]


def _position(inputs: Inputs, row: int, at: int, device: torch.device) -> Int[Tensor, " 1"]:
    """The number that a family turns by: given, or counted from the first column, padding or not."""
    given = inputs.get("position_ids") if isinstance(inputs, Mapping) else None
    value = at if given is None else int(given[row % len(given), at])
    return torch.tensor([value], device=device)
