"""Which units of a network can change places without changing the function: hidden units, channels, attention heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..core.anatomy import Body, body_of
from ..core.architectures import Heads, has_alibi
from ..core.heads import head_part, head_views
from ..core.layout import Layout, View
from ..core.pack import storable


@storable
class Axis(NamedTuple):
    """Where the units lie in one parameter or buffer."""

    leaf: str
    dim: int
    places: Int[Tensor, "n w"]
    """The entries along the dimension that belong to each unit."""


@storable
class PermutationGroup(NamedTuple):
    """Units that can change places with each other, and every parameter and buffer that has an entry for each."""

    name: str
    axes: tuple[Axis, ...]

    @property
    def num(self) -> int:
        """Units."""
        return len(self.axes[0].places)


def permutation_groups(model: nn.Module) -> list[PermutationGroup]:
    """The groups of a chain of layers, or of a transformer, from its modules.

    A `nn.Sequential` (nested ones, too): the outputs of each linear or convolutional layer are units, with what follows them
    up to the next one: elementwise functions, batch norm with its statistics, layer norm, pooling, `Flatten`. Layers must be
    used once, in order. A transformer of a family in `core.anatomy` (GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma 2, BERT):
    the hidden units of every MLP, with gates; the heads of keys and values with their heads of queries, and the heads of
    queries that share one. The residual stream stays as it is, and so does what can be turned inside a head.

    Raises ValueError for another model: give groups of your own.

    >>> (group,) = permutation_groups(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    >>> group.num, [(axis.leaf, axis.dim) for axis in group.axes]
    (3, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """
    body = body_of(model)  # type: ignore[arg-type]
    if body is not None:
        prefix = next(name for name, each in model.named_modules() if each is body.blocks)
        groups = [group for i in range(len(body.blocks)) for group in _mlp(body, f"{prefix}.{i}", body.blocks[i])]
        return groups + list(_heads(model))
    if isinstance(model, nn.Sequential):
        return list(_chain(list(_flat(model))))
    raise ValueError(
        f"the units of a {type(model).__name__} are not known: groups follow from a `nn.Sequential`, or a transformer of a "
        "known family; list `PermutationGroup`s for others."
    )


_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def _flat(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, each in model.named_children():
        if isinstance(each, nn.Sequential):
            yield from _flat(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", each


def _chain(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[PermutationGroup]:
    """A group opens at a layer and closes at the next; the outputs of the last stay where they are."""
    opened: list[Axis] = []
    name, is_flat = "", True
    for each, module in layers:
        if isinstance(module, _LAYERS):
            if getattr(module, "groups", 1) != 1:
                raise ValueError(f"`{each}` is a convolution in groups, whose channels cannot change places freely.")
            if opened:
                num, inputs = len(opened[0].places), module.weight.shape[1]
                if inputs % num or (inputs != num and not is_flat):
                    raise ValueError(
                        f"`{each}` takes {inputs} inputs from the {num} units of `{name}` without `nn.Flatten`."
                    )
                yield PermutationGroup(name, (*opened, Axis(f"{each}.weight", 1, _even(num, inputs // num))))
            name, is_flat = each, False
            opened = [Axis(f"{each}.{what}", 0, _even(len(x))) for what, x in module.named_parameters()]
        elif isinstance(module, _NORMS) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
            own = [*module.named_parameters(), *(x for x in module.named_buffers() if x[1].ndim)]
            opened += [Axis(f"{each}.{what}", 0, _even(len(x))) for what, x in own] if opened else []
        elif isinstance(module, nn.Flatten) and module.start_dim == 1:
            is_flat = True
        elif not isinstance(module, _ELEMENTWISE):
            raise ValueError(
                f"`{each}` is a {type(module).__name__}, of which it is not known whether units can change places."
            )


def _even(num: int, width: int = 1, start: int = 0) -> Tensor:
    return start + torch.arange(num * width).view(num, width)


def _mlp(body: Body, prefix: str, block: nn.Module) -> Iterator[PermutationGroup]:
    """The units between the matrices before and behind the nonlinearity; a gate is a third matrix beside the first."""
    last = block.get_submodule(body.anatomy.mlp_post)
    parent, _, _ = body.anatomy.mlp_pre.rpartition(".")
    beside = [
        each for name, each in block.get_submodule(parent).named_children() if getattr(each, "weight", None) is not None
    ]
    into = [each for each in beside if each is not last]
    names = {id(each): name for name, each in block.named_modules()}
    num = _matrix(last)[1]
    axes = []
    for each in into:
        axes += [Axis(f"{prefix}.{names[id(each)]}.weight", _matrix(each)[2], _even(num))]
        if getattr(each, "bias", None) is not None:
            axes += [Axis(f"{prefix}.{names[id(each)]}.bias", 0, _even(num))]
    axes += [Axis(f"{prefix}.{names[id(last)]}.weight", 1 - _matrix(last)[2], _even(num))]
    yield PermutationGroup(f"{prefix}.mlp", tuple(axes))


def _matrix(module: nn.Module) -> tuple[int, int, int]:
    """Outputs, inputs, and the dimension of outputs: Hugging Face's Conv1D stores (in, out)."""
    rows, cols = module.weight.shape  # type: ignore[misc, union-attr]
    return (cols, rows, 1) if type(module).__name__ == "Conv1D" else (rows, cols, 0)


def _heads(model: nn.Module) -> Iterator[PermutationGroup]:
    """Heads of keys and values with their queries, then queries within each; biases by distance tell heads apart."""
    layout, config = Layout.of(model), model.config
    if layout.heads is None or has_alibi(config):  # type: ignore[arg-type]
        return
    heads: Heads = layout.heads
    by_module: dict[str, dict[tuple[str, int], tuple[View, ...]]] = {}
    for name, views in head_views(layout, heads).items():
        attention, kind, head = head_part(name)
        by_module.setdefault(attention, {})[kind, head] = views
    each = heads.num // heads.num_kv
    for attention, parts in by_module.items():
        queries = [range(g * each, (g + 1) * each) for g in range(heads.num_kv)]
        units = [
            [parts[kind, g] for kind in "KV"] + [parts[kind, h] for kind in "QO" for h in own]
            for g, own in enumerate(queries)
        ]
        if heads.num_kv > 1:
            yield PermutationGroup(f"{attention}.heads", _axes(layout, units))
        if each > 1:
            for g, own in enumerate(queries):
                inside = [[parts["Q", h], parts["O", h]] for h in own]
                yield PermutationGroup(f"{attention}.queries.{g}", _axes(layout, inside))


def _axes(layout: Layout, units: Sequence[Sequence[tuple[View, ...]]]) -> tuple[Axis, ...]:
    """By parameter and dimension, the places of every unit in the order of its views."""
    places: dict[tuple[str, int], list[list[int]]] = {}
    for u, members in enumerate(units):
        for view in (view for views in members for view in views):
            rows = places.setdefault((view.leaf, view.dim), [[] for _ in units])
            rows[u] += range(*view.slice.indices(layout.shapes[view.leaf][view.dim]))
    return tuple(Axis(leaf, dim, torch.tensor(rows)) for (leaf, dim), rows in places.items())
