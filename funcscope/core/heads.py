"""Which rows and columns of which parameters are one attention head's query, key, value and output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .architectures import Heads
from .checks import check_instance
from .layout import Layout, Leaf, View
from .model import Functional

_NAMES = {
    "Q": "q_proj query q_lin q",
    "K": "k_proj key k_lin k",
    "V": "v_proj value v_lin v",
    "O": "o_proj out_proj c_proj out_lin dense o",
    "QKV": "c_attn query_key_value qkv_proj Wqkv",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_ATTENTION = re.compile(r"^(.*?[^.]*(?:attn|attention)[^.]*)\.(?:.*\.)?([^.]+)\.(weight|bias)$", re.IGNORECASE)
_IN_BLOCKS = ("gpt2", "phi3", "mpt")
"""Model types with one matrix for all queries, then all keys, then all values."""
_BY_HEAD = ("gpt_neox", "bloom", "falcon", "gpt_bigcode", "persimmon")
"""Model types in which the queries of one key and value head are followed by that key and that value."""


class HeadPart(NamedTuple):
    """What a block of `head_views` is."""

    attention: str
    """Name of the attention module."""
    kind: str
    """Q, K, V or O."""
    head: int
    """Of queries for Q and O, of keys and values for K and V."""


def head_views(model: Functional | Layout, config: Any) -> dict[str, tuple[View, ...]]:
    r"""The parameters of every attention head, as `gram(by=...)` takes them: `<attention module>.<Q, K, V or O>.<head>`.

    Q, K, V are the output units of a head with their biases, O is what its output is multiplied by (the bias of O is of no
    head). With $n_q$ heads of queries and $n_{kv}$ of keys and values, head h is h hd ... (h + 1) hd of its matrix, where
    hd is rows / n_q for Q and rows / n_kv for K and V: rows of a linear layer, columns of a Hugging Face Conv1D, the other
    way round for O. Query head h reads key and value head floor(h n_kv / n_q). One matrix for all three is cut in blocks
    (GPT-2, Phi-3, MPT) or head by head (GPT-NeoX, BLOOM, Falcon, GPT-BigCode, Persimmon).

    config: the model's (`num_attention_heads`, `num_key_value_heads`, `model_type`), or `Heads`.

    Raises ValueError for a layout without attention parameters of a known name, for a fused matrix of another model type
    (CodeGen), and for shapes that the heads do not divide.

    >>> import types, torch
    >>> attn = torch.nn.ModuleDict({name: torch.nn.Linear(4, 2 if name in "kv" else 4, bias=False) for name in "qkvo"})
    >>> layout = Layout.of(torch.nn.ModuleDict({"attn": attn}))
    >>> views = head_views(layout, types.SimpleNamespace(num_attention_heads=2, num_key_value_heads=1))
    >>> list(views)
    ['attn.Q.0', 'attn.Q.1', 'attn.K.0', 'attn.V.0', 'attn.O.0', 'attn.O.1']
    >>> views["attn.O.1"]
    (View(leaf='attn.o.weight', dim=1, slice=slice(2, 4, None)),)
    """
    layout = model.layout if isinstance(model, Functional) else model
    check_instance("model", layout, Layout, "`functional(model)`, or its `layout`")
    heads = config if isinstance(config, Heads) else Heads.of(config)
    views: dict[str, list[View]] = {}
    for leaf in layout.leaves:
        named = _ATTENTION.match(leaf.name)
        kind = _KINDS.get(named[2]) if named else None
        if named is None or kind is None:
            continue
        for part, head, view in _cuts(leaf, kind, heads):
            views.setdefault(f"{named[1]}.{part}.{head}", []).append(view)
    if not views:
        raise ValueError(
            f"no parameter has the name of an attention matrix that is known, as {layout.names[0]!r} has not: take "
            "`by='layer'`, or views of your own."
        )
    _check_dims(views, heads)
    return {name: tuple(each) for name, each in views.items()}


def head_part(block: str) -> HeadPart:
    """What the name of a block of `head_views` says. Raises ValueError for another name.

    >>> head_part("transformer.h.0.attn.K.1")
    HeadPart(attention='transformer.h.0.attn', kind='K', head=1)
    """
    parts = str(block).rsplit(".", 2)
    if len(parts) != 3 or parts[1] not in ("Q", "K", "V", "O") or not parts[2].isdigit():
        raise ValueError(f"blocks must be named `<module>.<Q, K, V or O>.<head>`, got {block!r}: take `head_views`.")
    return HeadPart(parts[0], parts[1], int(parts[2]))


def _cuts(leaf: Leaf, kind: str, heads: Heads) -> Iterator[tuple[str, int, View]]:
    """(Q, K, V or O, head, view) of everything in one parameter."""
    out = leaf.filter_dim or 0
    if kind == "O":
        if len(leaf.shape) == 2:
            yield from _even(leaf, "O", 1 - out, heads.num)
    elif kind == "QKV":
        yield from _fused(leaf, out, heads)
    else:
        yield from _even(leaf, kind, out, heads.num if kind == "Q" else heads.num_kv)


def _even(leaf: Leaf, kind: str, dim: int, num: int) -> Iterator[tuple[str, int, View]]:
    size = _divided(leaf, dim, num)
    return ((kind, head, View(leaf.name, dim, slice(head * size, (head + 1) * size))) for head in range(num))


def _fused(leaf: Leaf, dim: int, heads: Heads) -> Iterator[tuple[str, int, View]]:
    """Groups, each of them its queries, then its keys, then its values."""
    if heads.model_type not in (*_IN_BLOCKS, *_BY_HEAD):
        raise ValueError(
            f"`{leaf.name}` holds queries, keys and values in an order that is not known for the model type "
            f"{heads.model_type!r}: take `by='layer'`, or views of your own."
        )
    groups = 1 if heads.model_type in _IN_BLOCKS else heads.num_kv
    size = _divided(leaf, dim, heads.num + 2 * heads.num_kv)
    at = 0
    for group in range(groups):
        for kind, num in (("Q", heads.num // groups), ("K", heads.num_kv // groups), ("V", heads.num_kv // groups)):
            for head in range(num):
                yield kind, group * num + head, View(leaf.name, dim, slice(at, at + size))
                at += size


def _divided(leaf: Leaf, dim: int, num: int) -> int:
    if leaf.shape[dim] % num:
        raise ValueError(
            f"`{leaf.name}` of shape {leaf.shape} must have dimension {dim} a multiple of its {num} heads."
        )
    return leaf.shape[dim] // num


def _check_dims(views: dict[str, list[View]], heads: Heads) -> None:
    """Queries and keys of one module are as wide as each other: what was cut by the wrong number of heads is not."""
    widths: dict[tuple[str, bool], set[int]] = {}
    for name, (first, *_) in views.items():
        attention, kind, _ = head_part(name)
        widths.setdefault((attention, kind in "VO"), set()).add(first.slice.stop - first.slice.start)
    for (attention, _), sizes in widths.items():
        if len(sizes) > 1:
            raise ValueError(
                f"the heads of `{attention}` must be equally wide, got {sorted(sizes)} with {heads.num} heads of queries and "
                f"{heads.num_kv} of keys: give the configuration of this model."
            )
