"""How many classes a unit answers to: class means of its activations, against those under permuted labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.result import Result, internal, quantity
from ..core.standard_errors import FOLDS, jackknife_stderr
from ..core.tables import counted

Strength = Literal["magnitude", "positive"]
NUMBERS = ("selectivity", "class_entropy", "participation")


class ClassSums(NamedTuple):
    """Of the units of one layer by class, in folds of sequences; made by `class_sums`, and additive."""

    totals: Float[Tensor, "f c d"]
    counts: Float[Tensor, "f c"]
    """Rows."""

    def merge(self, other: ClassSums) -> ClassSums:
        """Of the rows of both."""
        return ClassSums(self.totals + other.totals, self.counts + other.counts)


class UnitNumbers(NamedTuple):
    """Of every unit; nan for one whose class means are all 0, and where a class has no row."""

    selectivity: Float[Tensor, "*f d"]
    class_entropy: Float[Tensor, "*f d"]
    participation: Float[Tensor, "*f d"]


class Selectivity(Result):
    """How selective the units of each layer are for classes: means over units, and what permuted labels give."""

    selectivity: Float[Tensor, " l"] = quantity("mean selectivity", per="layer", stderr="selectivity_stderr")
    selectivity_stderr: Float[Tensor, " l"]
    selectivity_null: Float[Tensor, " l"] = quantity("mean selectivity, labels permuted", per="layer")
    class_entropy: Float[Tensor, " l"] = quantity(
        "mean entropy over classes, by its largest", per="layer", stderr="class_entropy_stderr"
    )
    class_entropy_stderr: Float[Tensor, " l"]
    class_entropy_null: Float[Tensor, " l"] = quantity("mean entropy over classes, labels permuted", per="layer")
    participation: Float[Tensor, " l"] = quantity(
        "mean participation ratio over classes", unit="classes", per="layer", stderr="participation_stderr"
    )
    participation_stderr: Float[Tensor, " l"]
    participation_null: Float[Tensor, " l"] = quantity(
        "mean participation ratio, labels permuted", unit="classes", per="layer"
    )
    p_value: Float[Tensor, " l"] = quantity("share of permutations that are as selective", per="layer")
    num_undefined: Int[Tensor, " l"] = quantity("units without activation", per="layer")
    unit_selectivity: Float[Tensor, "l d"] = quantity("selectivity", per=("layer", "unit"), shown=False)
    unit_entropy: Float[Tensor, "l d"] = quantity("entropy over classes", per=("layer", "unit"), shown=False)
    unit_participation: Float[Tensor, "l d"] = quantity("participation ratio", per=("layer", "unit"), shown=False)
    unit_class: Int[Tensor, "l d"] = quantity("class of the largest mean", per=("layer", "unit"), shown=False)
    """-1 for a unit without activation."""
    num_classes: int
    num_rows: int
    num_sequences: int
    strength: str
    num_permutations: int
    key: Key | None
    layers: list[str] = internal()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"layer": self.layers}

    @property
    def head(self) -> str:
        over = f"{counted(self.num_rows, 'token')} of {counted(self.num_sequences, 'sequence')}"
        return f"selectivity of units for {self.num_classes} classes over {over}, by {self.strength} of activations"

    @property
    def notes(self) -> list[str]:
        made = [
            "Class means of few rows scatter, and a unit that knows no class looks selective by that: compare with what "
            "permuted labels give."
        ]
        if not self.num_permutations:
            made.append("There is no null: labels were not permuted, or differ within sequences of unlike lengths.")
        if not bool(self.selectivity_stderr.isfinite().all()):
            made.append("A class is in one fold of sequences only, and there is no error.")
        return made


def class_sums(
    x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int, *, groups: Int[Tensor, " n"] | None = None,
    strength: Strength = "magnitude", folds: int = FOLDS,
) -> ClassSums:  # fmt: skip
    """The sums of some rows. groups: which sequence each is of (None: every row its own), counted over the whole corpus.

    strength: what of an activation must not be negative: its magnitude, or its positive part. Sequences with one number
    modulo `folds` are one fold, so that the sums are of one size whatever comes.

    Raises ValueError for labels outside 0 to `num_classes` - 1.

    >>> x = torch.tensor([[1.0], [3.0], [-2.0]])
    >>> class_sums(x, torch.tensor([0, 0, 1]), 2).totals.sum(0)
    tensor([[4.],
            [2.]], dtype=torch.float64)
    """
    check_choice("strength", strength, ("magnitude", "positive"))
    check_count("num_classes", num_classes, 2)
    check_count("folds", folds, 2)
    if len(labels) != len(x) or (groups is not None and len(groups) != len(x)):
        raise ValueError(f"`labels` and `groups` must be one for each of the {len(x)} rows of `x`.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"`labels` must be 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}: leave out rows "
            "without a class."
        )
    fold = (torch.arange(len(x), device=x.device) if groups is None else groups) % folds
    a = x.to(wide(x.device))
    a = a.abs() if strength == "magnitude" else a.clamp(min=0)
    cell = fold * num_classes + labels
    totals = a.new_zeros(folds * num_classes, x.shape[1]).index_add(0, cell, a)
    counts = torch.bincount(cell, minlength=folds * num_classes).to(a)
    return ClassSums(totals.unflatten(0, (folds, num_classes)), counts.unflatten(0, (folds, num_classes)))


def unit_numbers(means: Float[Tensor, "*f c d"]) -> UnitNumbers:
    r"""From class means m that are not negative: selectivity, entropy over classes, participation ratio.

    $$\frac{\max_c m_c - \overline{m_{c'}}}{\max_c m_c + \overline{m_{c'}}} \ (c' \ne \arg\max), \qquad
      -\textstyle\sum_c p_c \log p_c / \log C, \quad p = m / \sum m, \qquad (\sum_c m_c)^2 / \sum_c m_c^2.$$

    A unit of one class alone has 1, 0, 1; one that answers to all alike 0, 1, C. Of squared weights, features by units, the
    last says with how many features a unit has to do.

    Morcos et al. (2018), arXiv:1803.06959 (selectivity).

    >>> unit_numbers(torch.tensor([[5.0, 1.0], [0.0, 1.0]]))
    UnitNumbers(selectivity=tensor([1., 0.]), class_entropy=tensor([0., 1.]), participation=tensor([1., 2.]))
    """
    num, total, largest = means.shape[-2], means.sum(-2), means.amax(-2)
    others = (total - largest) / (num - 1)
    p = means / total[..., None, :]
    entropy = torch.special.entr(p).sum(-2) / math.log(num)
    return UnitNumbers((largest - others) / (largest + others), entropy, 1 / p.square().sum(-2))


def selectivity(
    layers: Mapping[str, Float[Tensor, "n _"]], labels: Int[Tensor, " n"], *, key: Key,
    groups: Int[Tensor, " n"] | None = None, strength: Strength = "magnitude", num: int = 19,
) -> Selectivity:  # fmt: skip
    r"""Monosemantic or polysemantic: how many classes each unit answers to, for every layer, with errors and a null.

    From means of activations by class, $m_{jc}$: the numbers of `unit_numbers`, and their means over units. The classes are
    those of the labels (parts of speech, topics, tokens): a unit may be selective for what they do not name.

    layers: activations by name, rows being the same tokens (a reservoir's, say). labels: classes from 0, of every row.
    groups: which sequence each row is of (None: every row its own). Errors are by the jackknife over folds of sequences.

    Means of few rows scatter, so that no unit has a selectivity of 0 by them. `num` permutations of labels over sequences say
    what they give: where a sequence has one label, all orders of sequences; else the labels of a sequence as they are, on
    another one of the same length; none where there are no two such. The p value is of the mean selectivity: the share of
    permutations, with the labels themselves, that have as much.

    Raises ValueError for fewer than two classes, for a class without rows, and as `class_sums`.

    >>> from funcscope.core.keys import key
    >>> labels = torch.arange(40) % 2
    >>> x = torch.stack([labels.float(), torch.ones(40)], 1)
    >>> found = selectivity({"a": x}, labels, key=key(0))
    >>> found.unit_selectivity, found.p_value
    (tensor([[1., 0.]], dtype=torch.float64), tensor([0.0500], dtype=torch.float64))
    """
    check_key(key)
    check_count("num", num)
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    check_count("number of classes", num_classes, 2)
    if bool((missing := torch.bincount(labels, minlength=num_classes) == 0).any()):
        raise ValueError(f"class {int(missing.nonzero()[0])} of `labels` has no row: number those that are there.")
    groups = torch.arange(len(labels)) if groups is None else groups.cpu().unique(return_inverse=True)[1]
    orders = _orders(labels.cpu(), groups, key, num)
    sums: dict[str, ClassSums] = {}
    null: dict[str, list[UnitNumbers]] = {}
    for name, x in layers.items():
        of = groups.to(x.device)
        sums[name], *permuted = (
            class_sums(x, each.to(x.device), num_classes, groups=of, strength=strength) for each in (labels, *orders)
        )
        null[name] = [class_numbers(each) for each in permuted]
    return selectivity_of(sums, num_sequences=int(groups.max()) + 1, strength=strength, null=null, key=key)


def selectivity_of(
    sums: Mapping[str, ClassSums], *, num_sequences: int, strength: Strength = "magnitude",
    null: Mapping[str, Sequence[UnitNumbers]] | None = None, key: Key | None = None,
) -> Selectivity:  # fmt: skip
    """The result of the sums of every layer, by name.

    num_sequences, strength: of what they were made. null, key: `class_numbers` of the sums under labels that were permuted,
    and by what.

    Raises ValueError where there is no layer.

    >>> x, labels = torch.tensor([[1.0], [3.0], [-2.0], [0.0]]), torch.tensor([0, 0, 1, 1])
    >>> selectivity_of({"a": class_sums(x, labels, 2)}, num_sequences=4).unit_selectivity      # means of 2 and 1
    tensor([[0.3333]], dtype=torch.float64)
    """
    if not sums:
        raise ValueError("`sums` must be of a layer, got none.")
    columns: dict[str, list[Tensor]] = {}
    for name, each in sums.items():
        for field, value in _of_layer(each, null[name] if null else ()).items():
            columns.setdefault(field, []).append(value.cpu())
    made, first = {name: _stacked(x) for name, x in columns.items()}, next(iter(sums))
    return Selectivity(
        **made, num_classes=sums[first].counts.shape[1], num_rows=int(sums[first].counts.sum()),
        num_sequences=num_sequences, strength=strength, num_permutations=len(null[first]) if null else 0, key=key,
        layers=list(sums),
    )  # fmt: skip


def class_numbers(sums: ClassSums) -> UnitNumbers:
    """`unit_numbers` of the means over all folds together."""
    return unit_numbers(sums.totals.sum(0) / sums.counts.sum(0)[:, None])


def _stacked(x: list[Tensor]) -> Tensor:
    """Of layers; behind the shorter ones nan, or -1 for classes."""
    if not x[0].ndim:
        return torch.stack(x)
    pad = math.nan if x[0].is_floating_point() else -1
    return torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=pad)


def _of_layer(sums: ClassSums, null: Sequence[UnitNumbers]) -> dict[str, Tensor]:
    """Fields of the result."""
    whole = class_numbers(sums)
    some = sums.counts.sum(1) > 0  # folds
    totals, counts = sums.totals.sum(0), sums.counts.sum(0)
    left_out = unit_numbers((totals - sums.totals[some]) / (counts - sums.counts[some])[..., None])
    made: dict[str, Tensor] = {}
    for name in NUMBERS:
        parts = getattr(left_out, name).nanmean(-1)  # nan where a class is in one fold alone
        bad = ((counts - sums.counts[some]) == 0).any() | (some.sum() < 2)
        made[name] = getattr(whole, name).nanmean()
        made[f"{name}_stderr"] = torch.where(bad, math.nan, jackknife_stderr(parts))
        each = [getattr(x, name).nanmean() for x in null]
        made[f"{name}_null"] = torch.stack(each).mean() if each else made[name] * math.nan
        if name == "selectivity":
            above = sum((x >= made[name]).to(x) for x in each)
            made["p_value"] = (1 + above) / (1 + len(each)) if each else made[name] * math.nan
    best = (totals / counts[:, None]).argmax(0)
    silent = whole.selectivity.isnan()
    return made | {
        "num_undefined": silent.sum(), "unit_selectivity": whole.selectivity, "unit_entropy": whole.class_entropy,
        "unit_participation": whole.participation, "unit_class": torch.where(silent, -1, best),
    }  # fmt: skip


def _orders(labels: Int[Tensor, " n"], groups: Int[Tensor, " n"], key: Key, num: int) -> list[Int[Tensor, " n"]]:
    """Labels that are permuted over sequences; none where no two sequences can change places."""
    by_group = groups.argsort(stable=True)
    sizes = torch.bincount(groups)
    rows = by_group.split(sizes.tolist())
    single = all(bool((labels[each] == labels[each[0]]).all()) for each in rows)
    kinds = torch.zeros_like(sizes) if single else sizes  # sequences of one kind change places
    if len(kinds.unique()) == len(kinds):
        return []
    made = []
    for i in range(num):
        random = uniform(fold_in(key, i), torch.zeros(len(rows), dtype=torch.float64))
        permuted = labels.clone()
        for kind in kinds.unique().tolist():
            here = (kinds == kind).nonzero()[:, 0]
            for target, source in zip(here.tolist(), here[random[here].argsort()].tolist(), strict=True):
                permuted[rows[target]] = labels[rows[source][0]] if single else labels[rows[source]]
        made.append(permuted)
    return made
