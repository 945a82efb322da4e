"""A model whose parameters are spread over the ranks of a process group: each is whole only while an operation uses it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_instance
from .content import of_tensors
from .doors import check_whole, running, unwrapped
from .forward import Inputs, arguments
from .gathering import Gathering, Plan, rematerialise
from .imported import is_dtensor
from .layout import Params
from .model import Functional, Head, functional
from .processes import Processes
from .shares import Rows, Shares
from .substitute import LeafFn, RowsFn, immovable, uses_of


@dataclass(frozen=True, eq=False, repr=False)
class ShardedFunctional(Functional):
    """A `Functional` of this rank's rows of every parameter; made by `sharded_functional`.

    `params`, `frozen`, `layout` and `theta` are those of the rows; `apply(params, inputs)` is called by all ranks
    together, each with inputs of its own.
    """

    shares: Shares = None  # type: ignore[assignment]
    """The space of theta and of vectors like it."""
    rows: dict[str, Rows] = None  # type: ignore[assignment]
    """Of every parameter, frozen ones included."""

    def __repr__(self) -> str:
        return f"ShardedFunctional({type(self._skeleton).__name__}, {self.shares!r})"

    @property
    def ranks(self) -> Processes:
        return self.shares.ranks

    @property
    def head(self) -> Head | None:  # type: ignore[override]
        """None: the weight of the last layer is never whole outside of it."""
        return None

    @property
    def num_gathered(self) -> int:
        """Entries that a forward pass gathers: each parameter once per module that has it, and padding."""
        uses = uses_of(self._skeleton)
        return sum(uses[name] * self.ranks.num * cut.most * prod(cut.shape[1:]) for name, cut in self.rows.items())

    @property
    def num_uses(self) -> int:
        """Gatherings of a forward pass: each parameter once per module that has it."""
        return sum(uses_of(self._skeleton)[name] for name in self.rows)

    @cached_property
    def _plan(self) -> Plan:
        names = {id(param): name for name, param in self._skeleton.named_parameters()}
        return Plan(names, self.rows, self._dtypes, self.attention == "keep")

    @cached_property
    def _copies(self) -> dict[int, nn.Module]:
        module = running(self._skeleton, self.buffers)
        for name in self.remat:
            rematerialise(module.get_submodule(name), self._plan)
        return {0: module}

    @property
    def _running(self) -> nn.Module:
        return self._copies[0]

    def apply(self, params: Params, inputs: Inputs) -> Tensor:
        """This rank's output for its own inputs; called by all ranks together. Differentiable, not mappable."""
        args, kwargs = arguments(self.prepare(inputs))
        with self._named(inputs), Gathering(self._plan, self._values(params)):
            return self._output(self._running(*args, **kwargs))

    def apply_leaves(self, leaf: LeafFn, inputs: Inputs, rows: RowsFn | None = None) -> Tensor:  # noqa: ARG002  (no leaf is whole)
        return self.apply({name: leaf(name, value) for name, value in self.params.items()}, inputs)


def sharded_functional(
    model: nn.Module,
    ranks: Processes,
    *,
    state: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> ShardedFunctional:
    r"""`functional(model, **settings)` of which every rank holds its rows only, for models larger than one device.

    Of each parameter, frozen ones included, rank r holds the rows that `torch.chunk` (DTensor's `Shard(0)`, FSDP2) gives it.
    The whole exists while the operation that uses it runs, and is gathered again wherever a derivative needs it: no graph
    keeps it (core/gathering.py). theta, directions, gradients, products and Lanczos vectors are this rank's
    shares, plain vectors of some P / n entries; `net.shares` is the space of them, in the place of `like`.

    model: whole on every rank, with the same weights (in host memory: the rows are copies, on `device`, and the model may
    be deleted), or on the meta device beside a `state`.
    state: name -> value of every parameter and buffer, in the place of the model's own: whole tensors, or DTensors in
    `Shard(0)` over these ranks, of which nothing is gathered; read one after the other, so that a mapping may load each
    when it is asked for. For a model under FSDP2's `fully_shard`: the same model made on the meta device, and
    `state={**dict(sharded.named_parameters()), **dict(sharded.named_buffers())}`.
    device: of the rows and the buffers; that of the values by default.
    settings: of `functional`. `remat="layer"` keeps the inputs of layers alone, too.

    Memory of a rank: (P / n) s for each of theta, the vectors and what a product makes, the activations of its own
    sequences, and some five times the largest parameter. Time: an operation that uses a parameter runs once more in each
    derivative. Bytes: `curvature.parameter_shards.bytes_per_product`.

    Raises ValueError on all ranks where names, shapes, dtypes or values differ between them, or dtypes from the model's; for
    a DTensor of another placement or other ranks, for a model that holds DTensors itself, and for scripted modules.
    Whether a forward pass is a function of its inputs is seen by its first operator, `sharded(operator, loss, theta, ranks)`.
    An error of one rank within a product is one of all others at their next collective.

    Rajbhandari et al. (2020), arXiv:1910.02054, stage 3.

    >>> import torch.distributed as dist, funcscope as fs
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> sharded_functional(nn.Linear(3, 2), fs.processes())
    ShardedFunctional(Linear, Shares(8 of 8 parameters, rank 0 of 1))
    >>> dist.destroy_process_group()
    """
    check_instance("ranks", ranks, Processes, "`fs.processes()`")
    made: list[tuple[Functional, Mapping[str, Tensor]]] = []

    def make() -> None:
        whole = functional(_with_state(model, state), **settings)
        if (name := immovable(whole._skeleton, {**whole.params, **whole.frozen})) is not None:
            raise ValueError(
                f"`{name}` belongs to a scripted module, and cannot be whole for a moment: pass a Python module."
            )
        made.append((whole, dict(unwrapped(model).named_parameters()) if state is None else state))

    ranks.together("making the functional", make)
    ((whole, values),) = made
    rows = {name: Rows(name, tuple(p.shape), ranks) for name, p in whole._skeleton.named_parameters()}
    held: dict[str, Tensor] = {}
    facts: dict[str, str] = {}

    def cut() -> None:
        for name, one in rows.items():
            value = values[name]
            held[name] = _own_rows(one, value, device)
            _check_dtype(name, held[name], whole.params[name] if name in whole.params else whole.frozen[name])
            facts[name] = f"{value.dtype} {tuple(value.shape)} {'' if is_dtensor(value) else of_tensors([value])}"
        facts["buffers"] = of_tensors(x for _, x in sorted(whole.buffers.items()))
        facts["the settings"] = str(sorted((name, repr(value)) for name, value in settings.items()))

    ranks.together("cutting the parameters", cut)
    ranks.check_same(lambda: facts)
    return _of_rows(whole, rows, held, device)


def _of_rows(whole: Functional, rows: dict[str, Rows], held: Params, device: Any) -> ShardedFunctional:
    leaves, offset = [], 0
    for leaf in whole.layout.leaves:
        leaves.append(leaf._replace(shape=rows[leaf.name].own_shape, offset=offset))
        offset += leaves[-1].numel
    layout = replace(whole.layout, leaves=tuple(leaves))
    some = held[layout.names[0]]
    like = torch.empty(0, dtype=torch.promote_types(layout.dtype, torch.float32), device=some.device)
    ranks = rows[layout.names[0]].ranks
    return ShardedFunctional(
        params={name: held[name] for name in layout.names},
        buffers={name: x.to(device or x.device) for name, x in whole.buffers.items()},
        layout=layout,
        attention=whole.attention,
        frozen={name: held[name] for name in whole.frozen},
        _skeleton=whole._skeleton,
        _output=whole._output,
        remat=whole.remat,
        shares=Shares(whole.layout, rows, like.new_empty(layout.num), ranks),
        rows=rows,
    )


def _with_state(model: Any, state: Mapping[str, Tensor] | None) -> Any:
    """The model itself; or a copy of the module tree of the right shapes, which takes no memory, and the state's buffers."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return model  # refused by `functional`
    check_whole(model)
    if state is None:
        return model
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"`state` has no {missing[:3]}, {len(missing)} of {len(names)} names in all: every parameter and buffer of the "
            "model needs a value."
        )
    for name, x in model.named_buffers():
        check_instance(f"state[{name!r}]", state[name], Tensor, "a tensor")
        if state[name].shape != x.shape:
            raise ValueError(
                f"the value of `{name}` must be a tensor of shape {tuple(x.shape)}, got shape {tuple(state[name].shape)}."
            )
        _check_dtype(name, state[name], x)
    memo: dict[int, Any] = {id(x): state[name].detach().clone() for name, x in model.named_buffers()}
    for param in model.parameters():
        shape_only = torch.zeros((), dtype=param.dtype).expand(param.shape)
        memo[id(param)] = nn.Parameter(shape_only, requires_grad=param.requires_grad)
    return copy.deepcopy(model, memo)


def _check_dtype(name: str, value: Tensor, own: Tensor) -> None:
    if value.dtype != own.dtype:
        raise ValueError(
            f"the value of `{name}` must have the dtype of the model, {own.dtype}, got {value.dtype}: cast it, or make the "
            f"model of the meta device in it, `model.to({value.dtype})`."
        )


def _own_rows(cut: Rows, value: Any, device: Any) -> Tensor:
    """A copy of this rank's rows, in memory of their own."""
    if not isinstance(value, Tensor) or tuple(value.shape) != cut.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the value of `{cut.name}` must be a tensor of shape {cut.shape}, got {got}.")
    if value.is_meta:
        raise ValueError(f"`{cut.name}` is on the meta device and has no values: pass them by `state`.")
    if not is_dtensor(value):
        rows = value.detach().reshape(cut.num, *cut.shape[1:])[cut.own]
        return rows.to(device or rows.device, copy=True)
    placed: Any = value
    same = placed.device_mesh.ndim == 1 and placed.device_mesh.get_group().size() == cut.ranks.num
    if not same or not placed.placements[0].is_shard(0) or placed.device_mesh.get_local_rank() != cut.ranks.rank:
        raise ValueError(
            f"`{cut.name}` is a DTensor placed {placed.placements} on {placed.device_mesh}: it must be `Shard(0)` on the "
            f"{cut.ranks.num} ranks of `ranks`, in their order; `redistribute` it, or pass `full_tensor()`."
        )
    rows = placed.to_local().detach()
    return rows.to(device or rows.device, copy=True)
