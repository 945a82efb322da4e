"""The order of hidden units in which one network lies nearest to another: the same function, other weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..core.checks import check_count, check_flat, check_instance
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Layout
from ..core.objective import Theta
from ..core.result import Result, derived, internal, quantity
from ..core.vectors import dot
from .permutation_groups import PermutationGroup
from .task_vectors import flat_of

GAIN = 1e-9
"""Of the similarity, relative to the norms, that an assignment must bring to be taken: less is rounding."""


class WeightMatching(Result):
    """The second network with its units in the order of the first; made by `weight_matching`."""

    sizes: Float[Tensor, " g"] = quantity("units", per="group")
    moved: Float[Tensor, " g"] = quantity("share of units that moved", per="group")
    distance: float = quantity("distance after matching")
    distance_before: float = quantity("distance before matching")
    cosine: float = quantity("cosine after matching")
    cosine_before: float = quantity("cosine before matching")
    num_sweeps: int = quantity("sweeps over all groups")
    index: Int[Tensor, " p"] = internal()
    orders: Mapping[str, Int[Tensor, " n"]] = internal()
    """By buffer that has an entry for every unit."""
    groups: list[str] = internal()
    converged: bool
    key: Key

    @derived("distance after matching, relative to before")
    def relative_distance(self) -> float:
        return self.distance / self.distance_before if self.distance_before else math.nan

    def permuted(self, theta: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """The second network's parameters (or a gradient, a mask of it) in the order of the first's."""
        check_flat("theta", theta, len(self.index))
        return theta[self.index.to(theta.device)]

    def permuted_buffers(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The second network's buffers: statistics of its batch norms move with their channels."""
        return {name: x[self.orders[name].to(x.device)] if name in self.orders else x for name, x in buffers.items()}

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"group": self.groups}

    @property
    def head(self) -> str:
        return f"units of two networks matched in {len(self.groups)} groups"

    @property
    def notes(self) -> list[str]:
        made = [
            "a local optimum: other orders of the groups (another key) may end nearer. Weights are given, not sampled."
        ]
        return made + ["the last sweep still found nearer orders: allow more `sweeps`."] * (not self.converged)


def weight_matching(
    first: Theta,
    second: Theta,
    layout: Layout,
    groups: Sequence[PermutationGroup],
    *,
    key: Key,
    sweeps: int = 100,
) -> WeightMatching:
    r"""Permutes the units of the second network so that its weights lie nearest to the first's.

    $$\max_{P_1, \dots, P_G} \langle \theta_1, P \theta_2 \rangle, \qquad
      P_g \leftarrow \arg\max_\pi \sum_u C^g_{u \pi(u)}, \quad
      C^g_{uv} = \sum_{\text{leaves}} \langle \theta_1[u], (P \theta_2)[v] \rangle,$$

    group by group, exactly (a linear assignment), the others held, in an order drawn anew for every sweep, until a sweep
    brings nothing: a local optimum, and no further from the first than the second was. The function is the second's: where
    the two lie in one basin up to permutations, the line between them has no barrier (`landscape.linear_path`).

    groups: `permutation_groups(model)`, or your own. Heads are matched whole: what can be turned inside of them is not.

    Raises ValueError for other lengths, for a group of unknown parameters or of places that do not fit, and for one
    parameter with the same group on two dimensions, whose assignment would not be linear.

    Ainsworth, Hayase, Srinivasa (2023), arXiv:2209.04836.

    >>> from funcscope.core.keys import key
    >>> from funcscope.weights.permutation_groups import permutation_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1, bias=False))
    >>> first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 1.0, 4.0, 3.0])
    >>> found = weight_matching(first, second, Layout.of(model), permutation_groups(model), key=key(0))
    >>> found.permuted(second), found.distance
    (tensor([1., 2., 3., 4.]), 0.0)
    """
    check_key(key)
    check_count("sweeps", sweeps)
    check_instance("layout", layout, Layout, "`net.layout`")
    one, other = (flat_of(*each, layout).to(torch.float64) for each in (("first", first), ("second", second)))
    _check_groups(groups, layout)
    ours, index = layout.unravel(one, cast=False), layout.unravel(torch.arange(layout.num).double(), cast=False)
    theirs = {name: x.clone() for name, x in layout.unravel(other, cast=False).items()}
    index = {name: x.long() for name, x in index.items()}
    orders = {group.name: torch.arange(group.num) for group in groups}
    least = GAIN * math.sqrt(dot(one, one) * dot(other, other))
    taken, sweep = True, 0
    while taken and sweep < sweeps:
        taken, sweep = False, sweep + 1
        for i in uniform(fold_in(key, sweep), torch.empty(len(groups))).argsort().tolist():
            scores = _similarity(groups[i], ours, theirs)
            best = torch.from_numpy(linear_sum_assignment(scores.numpy(), maximize=True)[1])
            if float(scores.gather(1, best[:, None]).sum() - scores.trace()) > least:
                taken = True
                orders[groups[i].name] = orders[groups[i].name][best]
                for leaves in (theirs, index):
                    _permute(groups[i], leaves, best)
    places = torch.cat([index[name].flatten() for name in layout.names])
    nearest = other[places.to(other.device)]
    buffers = {axis.leaf: orders[g.name] for g in groups for axis in g.axes if axis.leaf not in layout.shapes}
    moved = [float((orders[g.name] != torch.arange(g.num)).double().mean()) for g in groups]
    return WeightMatching(
        sizes=torch.tensor([g.num for g in groups], dtype=torch.float64), moved=torch.tensor(moved, dtype=torch.float64),
        distance=math.sqrt(dot(one - nearest, one - nearest)), distance_before=math.sqrt(dot(one - other, one - other)),
        cosine=_cosine(one, nearest), cosine_before=_cosine(one, other), num_sweeps=sweep, index=places, orders=buffers,
        groups=[g.name for g in groups], converged=not taken, key=key,
    )  # fmt: skip


def permutation_index(
    layout: Layout, groups: Sequence[PermutationGroup], orders: Mapping[str, Int[Tensor, " n"]]
) -> Int[Tensor, " p"]:
    """Where every entry of a network with units in other orders comes from: `theta[index]`; groups one after the other.

    orders: by name of the group, which unit comes to each place.
    """
    _check_groups(groups, layout)
    index = {name: x.long() for name, x in layout.unravel(torch.arange(layout.num).double(), cast=False).items()}
    for group in groups:
        if group.name in orders:
            _permute(group, index, orders[group.name])
    return torch.cat([index[name].flatten() for name in layout.names])


def _similarity(
    group: PermutationGroup, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Float[Tensor, "n n"]:
    """Inner products of every unit with every other, over all that is theirs."""
    total = torch.zeros(group.num, group.num, dtype=torch.float64)
    for leaf, dim, places in group.axes:
        if leaf in ours:
            at = places.flatten().to(ours[leaf].device)
            one, other = (x[leaf].movedim(dim, 0)[at].reshape(group.num, -1) for x in (ours, theirs))
            total += (one @ other.T).cpu()
    return total


def _permute(group: PermutationGroup, leaves: dict[str, Tensor], order: Tensor) -> None:
    """Units in another order, in dicts of our own."""
    for leaf, dim, places in group.axes:
        if leaf in leaves:
            turned = leaves[leaf].movedim(dim, 0).clone()
            turned[places.flatten()] = turned[places[order].flatten()]
            leaves[leaf] = turned.movedim(0, dim)


def _check_groups(groups: Sequence[PermutationGroup], layout: Layout) -> None:
    for group in groups:
        inside = [axis.leaf for axis in group.axes if axis.leaf in layout.shapes]
        if not inside:
            raise ValueError(f"the group {group.name!r} has no parameter of the layout: take the groups of this model.")
        if len(set(inside)) < len(inside):
            raise ValueError(f"the group {group.name!r} has a parameter twice: its best order is no linear assignment.")
        for leaf, dim, places in group.axes:
            size = layout.shapes[leaf][dim] if leaf in layout.shapes else None
            if len(places) != group.num or (size is not None and int(places.max()) >= size):
                raise ValueError(
                    f"the places of {leaf!r} in the group {group.name!r} do not fit its {group.num} units."
                )


def _cosine(a: Tensor, b: Tensor) -> float:
    norms = math.sqrt(dot(a, a) * dot(b, b))
    return dot(a, b) / norms if norms else math.nan
