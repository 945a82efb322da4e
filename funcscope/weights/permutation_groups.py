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
    up to the next one: elementwise functions, batch norm with its statistics, layer norm, pooling, `Flatten`. Units are the
    last dimension of a linear layer's outputs, the second of a convolution's; a batch norm behind a linear layer is taken to
    see (samples, features). Parameters must be used once, in order.

    A transformer of a family in `core.anatomy` (GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma 2, BERT): the hidden units of
    every MLP, with gates; the heads of keys and values with their heads of queries, and the heads of queries that share one.
    The residual stream stays as it is, and so does what can be turned inside a head.

    Raises ValueError for another model, and for modules whose dimension of units is another one: give groups of your own.

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
)  # fmt: skip
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class _Open(NamedTuple):
    """Units of a layer on their way to the next: where they lie in what is passed on."""

    name: str
    num: int
    axes: tuple[Axis, ...]
    is_last: bool
    """The units of a linear layer are the last dimension, those of a convolution the second."""
    is_flat: bool = False
    """All dimensions behind the first are one."""

    def inputs(self, leaf: str, size: int) -> Axis:
        """The places of every unit among the inputs of the next layer."""
        if size % self.num or (size != self.num and not self.is_flat):
            raise ValueError(
                f"`{leaf}` takes {size} inputs from the {self.num} units of `{self.name}` without `nn.Flatten`."
            )
        width = size // self.num
        return Axis(leaf, 1, _even(width, self.num).T.contiguous() if self.is_last else _even(self.num, width))

    def takes(self, module: nn.Module) -> bool:
        """Whether the module works on the dimension of the units, or leaves each alone."""
        if _is(module, _CONVOLUTIONS) or _is(module, (*_POOLS, nn.BatchNorm2d)):
            return not self.is_last and not self.is_flat
        if _is(module, (nn.Linear, nn.LayerNorm)):
            return self.is_last or self.is_flat
        return True


def _flat(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What is called, in order; `named_children` would leave out what is called again."""
    if type(model).forward is not nn.Sequential.forward:
        raise ValueError(f"a {type(model).__name__} has a forward pass of its own: list `PermutationGroup`s.")
    for name, each in model._modules.items():
        if isinstance(each, nn.Sequential):
            yield from _flat(each, f"{prefix}{name}.")
        elif each is not None:
            yield f"{prefix}{name}", each


def _chain(layers: Sequence[tuple[str, nn.Module]]) -> Iterator[PermutationGroup]:
    """A group opens at a layer and closes at the next; the outputs of the last stay where they are."""
    _check_used_once(layers)
    units: _Open | None = None
    for name, module in layers:
        if units is not None and not units.takes(module):
            raise ValueError(
                f"`{name}`, a {type(module).__name__}, works on another dimension than the units of `{units.name}`."
            )
        if _is(module, (nn.Linear, *_CONVOLUTIONS)):
            if getattr(module, "groups", 1) != 1:
                raise ValueError(f"`{name}` is a convolution in groups, whose channels cannot change places freely.")
            if units is not None:
                last = units.inputs(f"{name}.weight", module.weight.shape[1])  # type: ignore[arg-type, index, union-attr]
                yield PermutationGroup(units.name, (*units.axes, last))
            num = len(module.weight)  # type: ignore[arg-type]
            own = tuple(Axis(f"{name}.{what}", 0, _even(num)) for what, _ in module.named_parameters())
            units = _Open(name, num, own, _is(module, (nn.Linear,)))
        elif _is(module, _NORMS) and len(getattr(module, "normalized_shape", (1,))) == 1:
            if units is not None:
                leaves = [*module.named_parameters(), *(x for x in module.named_buffers() if x[1].ndim)]
                if any(len(x) != units.num for _, x in leaves):
                    raise ValueError(
                        f"`{name}` must have one place for each of the {units.num} units of `{units.name}`."
                    )
                behind = tuple(Axis(f"{name}.{what}", 0, _even(units.num)) for what, _ in leaves)
                units = units._replace(axes=(*units.axes, *behind))
        elif _is(module, (nn.Flatten,)) and (module.start_dim, module.end_dim) == (1, -1):
            units = None if units is None else units._replace(is_flat=True)
        elif not _is(module, (*_ELEMENTWISE, *_POOLS)):
            raise ValueError(
                f"`{name}` is a {type(module).__name__}, of which it is not known whether units can change places."
            )


def _check_used_once(layers: Sequence[tuple[str, nn.Module]]) -> None:
    seen: dict[int, str] = {}
    for name, module in layers:
        for what, x in [*module.named_parameters(), *module.named_buffers()]:
            if id(x) in seen:
                raise ValueError(
                    f"`{name}.{what}` is `{seen[id(x)]}` again: units of parameters that are used twice are tied."
                )
            seen[id(x)] = f"{name}.{what}"


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Of these, and called as they are."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


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
