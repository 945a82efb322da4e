"""Heads and neurons as sets of parameters, their scores, and masks that keep whole ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_flat, check_instance
from ..core.estimate import wide
from ..core.heads import head_part, head_views
from ..core.layout import Layout, Leaf

_IN = "c_fc|fc1|fc_in|up_proj|gate_proj|dense_h_to_4h|lin1|w1|w3|wi|wi_0|wi_1|mlp_in|intermediate\\.dense"
_OUT = "c_proj|fc2|fc_out|down_proj|dense_4h_to_h|lin2|w2|wo|mlp_out|output\\.dense"
_MATRIX = re.compile(rf"^(?P<parent>(?:.*\.)?)(?:(?P<into>{_IN})|(?P<out>{_OUT}))\.(?P<kind>weight|bias)$")


class UnitPart(NamedTuple):
    """What units have of one parameter."""

    leaf: str
    dim: int
    unit: Int[Tensor, " n"]
    """For each place along the dimension, the number of its unit; -1 where it is of none."""


class Units(NamedTuple):
    """Sets of parameters, one of which is removed as a whole or not at all."""

    names: list[str]
    kind: str
    parts: tuple[UnitPart, ...]


def head_units(layout: Layout) -> Units:
    """Attention heads: all of a head's q, k, v with their biases, and what of o its output is multiplied by.

    Query heads that share keys and values are one unit with them, `<attention module>.<key and value head>`: none of them
    can go while the others need what they share. The bias of o is of no head.

    Raises ValueError where the model's configuration does not say how many heads there are, and as `head_views`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 8}
    >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=9, **sizes))
    >>> head_units(Layout.of(model)).names
    ['model.layers.0.self_attn.0', 'model.layers.0.self_attn.1']
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    if layout.heads is None:
        raise ValueError(
            "`layout` does not say how many heads there are: it is of a model without such a configuration."
        )
    share = layout.heads.num // layout.heads.num_kv
    names: dict[str, int] = {}
    parts: dict[tuple[str, int], Tensor] = {}
    for block, views in head_views(layout, layout.heads).items():
        attention, kind, head = head_part(block)
        group = head // share if kind in "QO" else head
        unit = names.setdefault(f"{attention}.{group}", len(names))
        for view in views:
            size = layout.by_name[view.leaf].shape[view.dim]
            parts.setdefault((view.leaf, view.dim), torch.full((size,), -1))[view.slice] = unit
    return Units(list(names), "heads", tuple(UnitPart(*at, unit) for at, unit in parts.items()))


def neuron_units(layout: Layout) -> Units:
    """Neurons of MLPs: a row of every matrix into the hidden layer (two where it is gated), its bias, a column out of it.

    Matrices are known by their names (`c_fc` and `c_proj`, `gate_proj`, `up_proj` and `down_proj`, `fc1` and `fc2`, ...).

    Raises ValueError where no MLP has a known name, and where sizes of a hidden layer differ (gate and input in one matrix).

    >>> mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(3, 4), "fc2": torch.nn.Linear(4, 3)})
    >>> units = neuron_units(Layout.of(mlp))
    >>> units.names, [(part.leaf, part.dim) for part in units.parts]
    (['0', '1', '2', '3'], [('fc1.weight', 0), ('fc1.bias', 0), ('fc2.weight', 1)])
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    layers: dict[str, list[tuple[Leaf, bool]]] = {}
    for leaf in layout.leaves:
        if named := _MATRIX.match(leaf.name):
            layers.setdefault(named["parent"], []).append((leaf, named["out"] is not None))
    names: list[str] = []
    parts: list[UnitPart] = []
    for parent, leaves in layers.items():
        cuts = list(_cuts(leaves))
        if len({is_out for _, _, is_out in cuts}) < 2:
            continue  # a matrix of attention whose name is that of an MLP's in another family
        sizes = {leaf.shape[dim] for leaf, dim, _ in cuts}
        if len(sizes) > 1:
            raise ValueError(f"the matrices of `{parent}` must have one number of hidden units, got {sorted(sizes)}.")
        unit = len(names) + torch.arange(sizes.pop())
        names += [f"{parent}{i}" for i in range(len(unit))]
        parts += [UnitPart(leaf.name, dim, unit) for leaf, dim, _ in cuts]
    if not names:
        raise ValueError(f"no parameter has the name of an MLP's matrix that is known, as {layout.names[0]!r} has not.")
    return Units(names, "neurons", tuple(parts))


def unit_saliency(score: Float[Tensor, " p"], layout: Layout, units: Units) -> Float[Tensor, " u"]:
    """The sum of the scores of a unit's parameters, in the dtype of sums; what has no score (nan) adds nothing."""
    check_flat("score", score, layout.num)
    score = score.to(wide(score.device))
    total = score.new_zeros(len(units.names))
    for leaf, dim, unit in units.parts:
        at = layout.by_name[leaf]
        sums = (
            score[at.slice]
            .nan_to_num(0.0, math.inf, -math.inf)
            .view(at.shape)
            .movedim(dim, 0)
            .reshape(len(unit), -1)
            .sum(1)
        )
        inside = (unit >= 0).to(sums.device)
        total = total.index_add(0, unit.to(sums.device)[inside], sums[inside])
    return total


def unit_mask(kept: Bool[Tensor, " u"], layout: Layout, units: Units) -> Bool[Tensor, " p"]:
    """False for the parameters of the units that are not kept."""
    mask = torch.ones(layout.num, dtype=torch.bool, device=kept.device)
    for leaf, dim, unit in units.parts:
        at = layout.by_name[leaf]
        places = unit.to(kept.device)
        along = torch.where(places >= 0, kept[places.clamp(min=0)], True)
        shape = [-1 if i == dim else 1 for i in range(len(at.shape))]
        mask[at.slice] &= along.view(shape).expand(at.shape).flatten()
    return mask


def _cuts(leaves: list[tuple[Leaf, bool]]) -> Iterator[tuple[Leaf, int, bool]]:
    """(parameter, its dimension of hidden units, whether it leads out of them); a bias out of them has none."""
    for leaf, is_out in leaves:
        if len(leaf.shape) == 2:
            rows = leaf.filter_dim or 0
            yield leaf, 1 - rows if is_out else rows, is_out
        elif not is_out:
            yield leaf, 0, False
