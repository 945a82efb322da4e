"""Whole models merged in memory: a rule of `merge_rules`, leaf by leaf, over flat vectors or dicts of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_instance
from ..core.keys import Key, check_key
from ..core.layout import Layout
from ..core.objective import Theta
from . import merge_rules as rules
from .magnitude_cuts import Cut, global_cut
from .task_vectors import flat_of

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties", "fisher", "regmean"]
METHODS: tuple[Method, ...] = get_args(Method)
NEED_BASE = ("task_arithmetic", "ties", "dare", "dare_ties")

Rule = Callable[[str, list[Tensor]], Tensor]
"""Of a name and the leaves of all models, in the order of the layout."""
Grams = Mapping[str, Float[Tensor, "i i"]]
"""By weight: the second moments of its inputs."""


def merge(
    thetas: Sequence[Theta],
    method: Method,
    layout: Layout,
    *,
    base: Theta | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    density: float = 0.2,
    drop: float = 0.5,
    key: Key | None = None,
    t: float = 0.5,
    fishers: Sequence[Theta] | None = None,
    grams: Sequence[Grams] | None = None,
    shrink: float = 0.9,
    per_leaf: bool = False,
) -> Float[Tensor, " p"]:
    r"""One vector of parameters made of several by a rule of `merge_rules`, leaf by leaf.

    thetas: vectors, or dicts of parameters, of one layout. method: `linear`, `slerp` (two models, at t), and, from the
    `base`: `task_arithmetic` ($\theta_0 + s \sum_k w_k \tau_k$, w = 1 unless given), `ties`, `dare`, `dare_ties` (drop, then
    elect), and with what a model needs beside its weights: `fisher` (`fishers`: diagonals) and `regmean` (`grams`: by name of
    weight, second moments of the inputs; other parameters, and those without a Gram, are averaged).
    density: kept by TIES, of the whole vector as in the paper, or `per_leaf`, as in mergekit.
    scale: of what is added to the base, for the methods that start there. key: of DARE's masks.

    Raises ValueError as the rule does, for a method that lacks its base, key, Fishers or Grams, and for other than two
    models in `slerp`.

    >>> layout = Layout.of(torch.nn.Linear(2, 1, bias=False))
    >>> merge([torch.tensor([0.0, 2.0]), torch.tensor([4.0, 2.0])], "linear", layout)
    tensor([2., 2.])
    """
    check_choice("method", method, METHODS)
    check_instance("layout", layout, Layout, "`net.layout`")
    flat = [flat_of(f"thetas[{k}]", each, layout) for k, each in enumerate(thetas)]
    if not flat:
        raise ValueError("`thetas` must be one model at least, got none.")
    models = [layout.unravel(each, cast=False) for each in flat]
    start = None if base is None else layout.unravel(flat_of("base", base, layout), cast=False)
    missing = {"`base`": method in NEED_BASE and start is None, "`fishers`": method == "fisher" and fishers is None}
    missing |= {"`grams`": method == "regmean" and grams is None, "`key`": method.startswith("dare") and key is None}
    if any(missing.values()):
        raise ValueError(f"`{method}` needs {', '.join(name for name, is_missing in missing.items() if is_missing)}.")
    if key is not None:
        check_key(key)
    makers: dict[str, Callable[[], Rule]] = {
        "linear": lambda: lambda _, leaves: rules.linear(leaves, weights), "slerp": lambda: _arc(len(flat), t),
        "task_arithmetic": lambda: _moved(start, scale, weights),  # type: ignore[arg-type]
        "ties": lambda: _elected(start, models, density, scale, weights, per_leaf),  # type: ignore[arg-type]
        "dare": lambda: _thinned(start, "linear", drop, key, scale, weights),  # type: ignore[arg-type]
        "dare_ties": lambda: _thinned(start, "ties", drop, key, scale, weights),  # type: ignore[arg-type]
        "fisher": lambda: _precise(layout, fishers, weights),  # type: ignore[arg-type]
        "regmean": lambda: _regressed(layout, grams, weights, shrink),  # type: ignore[arg-type]
    }  # fmt: skip
    rule = makers[method]()
    return torch.cat([rule(name, [model[name] for model in models]).flatten() for name in layout.names])


def _moved(base: Mapping[str, Tensor], scale: float, weights: Sequence[float] | None) -> Rule:
    scales = scale if weights is None else [scale * w for w in weights]
    return lambda name, leaves: rules.task_arithmetic(base[name], leaves, scales)


def _thinned(
    base: Mapping[str, Tensor],
    then: Literal["linear", "ties"],
    drop: float,
    key: Key,
    scale: float,
    weights: Sequence[float] | None,
) -> Rule:
    def rule(name: str, leaves: list[Tensor]) -> Tensor:
        return rules.dare(base[name], leaves, drop=drop, key=key, name=name, scale=scale, then=then, weights=weights)

    return rule


def _arc(num: int, t: float) -> Rule:
    if num != 2:
        raise ValueError(f"`slerp` is between two models, got {num}: take `linear`.")
    return lambda _, leaves: rules.slerp(leaves[0], leaves[1], t)


def _elected(
    base: Mapping[str, Tensor],
    models: list[dict[str, Tensor]],
    density: float,
    scale: float,
    weights: Sequence[float] | None,
    per_leaf: bool,
) -> Rule:
    """TIES with the cut of every model over all leaves, which are asked for in the order of the layout."""
    if per_leaf:
        return lambda name, leaves: rules.ties(base[name], leaves, density=density, scale=scale, weights=weights)

    def taus(model: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [rules.task_vector(base[name], leaf) for name, leaf in model.items()]

    cuts: list[Cut] = [global_cut(taus(model), density) for model in models]

    def rule(name: str, leaves: list[Tensor]) -> Tensor:
        merged = rules.ties(base[name], leaves, cuts=cuts, scale=scale, weights=weights)
        cuts[:] = [cut.behind(rules.task_vector(base[name], leaf)) for cut, leaf in zip(cuts, leaves, strict=True)]
        return merged

    return rule


def _precise(layout: Layout, fishers: Sequence[Theta], weights: Sequence[float] | None) -> Rule:
    """Fisher merging with the floor of the whole diagonal."""
    flat = [flat_of(f"fishers[{k}]", each, layout) for k, each in enumerate(fishers)]
    means = [float(each.double().mean()) for each in flat]
    diagonals = [layout.unravel(each, cast=False) for each in flat]
    return lambda name, leaves: rules.fisher(leaves, [each[name] for each in diagonals], weights, means=means)


def _regressed(layout: Layout, grams: Sequence[Grams], weights: Sequence[float] | None, shrink: float) -> Rule:
    """RegMean where there are Grams, the mean elsewhere."""
    known = set.intersection(*(set(each) for each in grams)) if grams else set()
    if unknown := sorted(known - set(layout.names)):
        raise ValueError(f"`grams` must be by names of `layout.names`, and {unknown[0]!r} is none.")

    def rule(name: str, leaves: list[Tensor]) -> Tensor:
        if name not in known:
            return rules.linear(leaves, weights)
        is_rows = layout.by_name[name].filter_dim == 0  # (out, in), as torch's linear layers
        oriented = [leaf.T if is_rows else leaf for leaf in leaves]
        merged = rules.regmean(oriented, [each[name] for each in grams], shrink=shrink, weights=weights)
        return merged.T if is_rows else merged

    return rule
