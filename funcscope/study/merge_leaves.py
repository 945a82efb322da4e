"""Rules of merging on stored tensors: a part of a leaf of every model at a time, or a whole matrix where a rule needs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..core.keys import fold_in, key
from ..weights import merge_rules as rules
from ..weights.elementwise import all_finite
from .fisher_files import TRANSPOSED
from .merge_checks import FROM_BASE
from .stored_model import StoredModel, parts
from .tensor_file import Shape, TensorFile

Piece = tuple[int, Tensor]
"""A first entry, and merged entries from there on."""


@dataclass(eq=False)
class Merger:
    """One merge: what its rule needs beside the entries themselves, found out before the first leaf."""

    models: Sequence[StoredModel]
    base: StoredModel | None
    method: str
    settings: dict[str, Any]
    files: Sequence[TensorFile] = ()
    """Fisher diagonals or Grams, one per model."""
    same: dict[str, str] = field(default_factory=dict)
    """Second names of tensors, and the first, under which they are merged."""
    cuts: list[rules.Cut] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """Names in the files by those in the folders."""

    def __post_init__(self) -> None:
        if self.method in ("fisher", "regmean"):
            self.known = self._matched()
        if self.method == "fisher":
            self.means = [self._mean(file) for file in self.files]
        if self.method == "ties" and self.settings["scope"] == "model":
            self.cuts = self._cuts(self.names())

    def names(self) -> list[str]:
        """The leaves that are merged, in their order."""
        floating = (name for name, what in self.models[0].tensors.items() if what.dtype.is_floating_point)
        return [name for name in floating if name not in self.same]

    def shape(self, name: str) -> Shape:
        """Of the merged tensor: the widest dtype of the models, or the one that is asked for."""
        dtypes = [model.tensors[name].dtype for model in self.models]
        if not dtypes[0].is_floating_point:
            return self.models[0].tensors[name]
        asked = self.settings["dtype"]
        dtype = reduce(torch.promote_types, dtypes) if asked == "auto" else getattr(torch, asked)
        return Shape(dtype, self.models[0].tensors[name].shape)

    def merged(self, name: str) -> Iterator[Piece]:
        """The merged leaf, a part at a time; for RegMean in one."""
        if self.method == "regmean" and name in self.known:
            yield 0, self._regmean(name)
            return
        if self.method == "fisher" and name not in self.known:
            yield from self.copied(name)
            return
        rule = self._rule(name)
        for at in parts(self.shape(name)):
            leaves = [model.read(name, *at) for model in self.models]
            leaves[0] = leaves[0].to(reduce(torch.promote_types, [self.shape(name).dtype, *(x.dtype for x in leaves)]))
            yield at[0], rule(at, leaves)

    def copied(self, name: str) -> Iterator[Piece]:
        """A tensor of whole numbers, or a buffer, which all models have in common. Raises ValueError where they have not."""
        if (other := self._differing(name)) is not None:
            what = "is no parameter" if name in self.names() else "is no floating-point tensor"
            raise ValueError(f"`{name}` {what}, and differs in {other.given}: it cannot be merged.")
        for at in parts(self.shape(name)):
            yield at[0], self.models[0].read(name, *at)

    def _differing(self, name: str) -> StoredModel | None:
        """The first model whose entries are not those of the first of all, whatever their dtypes."""
        for at in parts(self.models[0].tensors[name]):
            value = self.models[0].read(name, *at)
            for model in self.models[1:]:
                own = model.read(name, *at)
                dtype = torch.promote_types(own.dtype, value.dtype)
                if not torch.equal(own.to(dtype), value.to(dtype)):
                    return model
        return None

    def _rule(self, name: str) -> Callable[[tuple[int, int], list[Tensor]], Tensor]:
        weights = self.settings["weights"]
        if self.method in FROM_BASE:
            return self._from_base(name)
        if self.method == "fisher":
            own = self.known[name]
            return lambda at, leaves: rules.fisher(
                leaves, [file.read(own, *at) for file in self.files], weights, means=self.means
            )
        if self.method == "slerp":
            t = 0.5 if weights is None else weights[1] / sum(weights)
            if (shares := rules.great_circle(lambda: self._pairs(name), t)) is not None:
                return lambda _, leaves: (shares[0] * leaves[0].double() + shares[1] * leaves[1].double()).to(
                    leaves[0].dtype
                )
            return lambda _, leaves: rules.linear(leaves, [1 - t, t])
        return lambda _, leaves: rules.linear(leaves, weights)

    def _from_base(self, name: str) -> Callable[[tuple[int, int], list[Tensor]], Tensor]:
        base, given = self.base, self.settings
        assert base is not None
        scale, weights = given["scale"], given["weights"]
        if self.method == "task_arithmetic":
            scales = [scale * weight for weight in weights or [1.0] * len(self.models)]
            return lambda at, leaves: rules.task_arithmetic(base.read(name, *at), leaves, scales)
        if self.method == "dare":
            draws = fold_in(key(given["seed"]), "dare")

            def thinned(at: tuple[int, int], leaves: list[Tensor]) -> Tensor:
                own = name if at[0] == 0 else f"{name} from {at[0]}"
                return rules.dare(
                    base.read(name, *at), leaves, drop=given["drop"], key=draws, name=own, scale=scale, weights=weights
                )

            return thinned
        cuts = self.cuts if given["scope"] == "model" else self._cuts([name])

        def trimmed(at: tuple[int, int], leaves: list[Tensor]) -> Tensor:
            zero = base.read(name, *at)
            out = rules.ties(zero, leaves, cuts=cuts, scale=scale, weights=weights)
            cuts[:] = [
                cut.behind(rules.task_vector(zero, leaf)) if cut.num_equal else cut
                for cut, leaf in zip(cuts, leaves, strict=True)
            ]
            return out

        return trimmed

    def _cuts(self, names: list[str]) -> list[rules.Cut]:
        """What is kept of each model's task vector, over these leaves together."""
        base = self.base
        assert base is not None

        dtypes = (each.tensors[name].dtype for name in names for each in (base, *self.models))
        dtype = reduce(torch.promote_types, dtypes, torch.float32)

        def vectors(model: StoredModel) -> Iterator[Tensor]:
            for name in names:
                for at in parts(model.tensors[name]):
                    yield rules.task_vector(base.read(name, *at), model.read(name, *at)).to(dtype)

        return [rules.global_cut(lambda model=model: vectors(model), self.settings["density"]) for model in self.models]

    def _pairs(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        one, other = self.models
        for at in parts(one.tensors[name]):
            yield one.read(name, *at), other.read(name, *at)

    def _mean(self, file: TensorFile) -> float:
        """Of a whole diagonal, over the parameters. Raises ValueError, by name, for an entry that none can have."""
        total, num = 0.0, 0
        for name in self.known.values():
            for at in parts(file.tensors[name]):
                value = _finite(file, name, *at)
                if bool((value < 0).any()):
                    raise ValueError(f"`{name}` of {file.path.name} has an entry below 0: it is no Fisher diagonal.")
                total += float(value.double().sum())
            num += file.tensors[name].numel
        return total / max(num, 1)

    def _matched(self) -> dict[str, str]:
        """Names in the files of what is known of each model, by the names in the folders.

        A tensor without a diagonal that all models have in common is a buffer, as the masks in old checkpoints, or was never
        trained: every mean of it is what it is. One that differs is a parameter, and the file is that of another model.
        """
        what, tensors = "a diagonal" if self.method == "fisher" else "a Gram", self.models[0].tensors
        names = self.names()
        known = matched(names, self.files[0].tensors)
        for other, name in self.same.items():  # the file may have a tied weight by its second name
            if name not in known and (own := matched([other], self.files[0].tensors).get(other)):
                known[name] = own
        for name in names if self.method == "fisher" else ():
            if name not in known and (differing := self._differing(name)) is not None:
                raise ValueError(
                    f"{self.files[0].path.name} has no diagonal for `{name}`, which differs in {differing.given}: it is that "
                    "of another model. Make it with `funcscope fisher`."
                )
        for file, model in zip(self.files, self.models, strict=True):
            for name, own in known.items():
                shape = tensors[name].shape
                if self.method == "regmean":
                    shape = 2 * (shape[0 if own in self._turned() else 1],)
                if own not in file.tensors or file.tensors[own].shape != shape:
                    got = file.tensors[own].shape if own in file.tensors else "none"
                    raise ValueError(
                        f"{file.path.name} must have {what} of {shape} for `{name}` of {model.given}, got {got}: it is that "
                        "of another model. Files are given in the order of the models."
                    )
        return known

    def _turned(self) -> set[str]:
        return set(json.loads(self.files[0].metadata.get(TRANSPOSED, "[]")))

    def _regmean(self, name: str) -> Tensor:
        own, turned = self.known[name], self.known[name] in self._turned()
        leaves = [model.read(name) for model in self.models]
        leaves[0] = leaves[0].to(self.shape(name).dtype)
        matrices = [leaf if turned else leaf.T for leaf in leaves]
        grams = [_finite(file, own) for file in self.files]
        made = rules.regmean(matrices, grams, shrink=self.settings["shrink"], weights=self.settings["weights"])
        return made if turned else made.T


def _finite(file: TensorFile, name: str, *at: int) -> Tensor:
    """What a file of Fishers or Grams holds. Raises ValueError, by name, where an entry is nan or infinite."""
    value = file.read(name, *at)
    if not all_finite(value):
        bad = int((~value.isfinite()).sum())
        raise ValueError(
            f"`{name}` of {file.path.name} has {bad} entries that are nan or infinite: a merge would spread them. Make that "
            "file anew with `funcscope fisher`."
        )
    return value


def matched(names: Sequence[str], others: Sequence[str] | dict[str, Any]) -> dict[str, str]:
    """Each name with the other that is equal to it, or that is it with a prefix more or less, where there is just one.

    >>> matched(["wte.weight", "h.0.bias"], ["transformer.wte.weight", "transformer.h.0.bias", "lm_head.weight"])
    {'wte.weight': 'transformer.wte.weight', 'h.0.bias': 'transformer.h.0.bias'}
    """
    by_tail: dict[str, list[str]] = {}
    for other in others:
        tail = other
        while tail:
            by_tail.setdefault(tail, []).append(other)
            tail = tail.partition(".")[2]
    known: dict[str, str] = {}
    for name in names:
        if name in others:
            known[name] = name
            continue
        longer = by_tail.get(name, []) if "." in name else []
        tail = name.partition(".")[2]
        shorter: list[str] = []
        while "." in tail and not shorter:
            shorter, tail = ([tail] if tail in others else []), tail.partition(".")[2]
        if len(choice := longer or shorter) == 1:
            known[name] = choice[0]
    return known
