"""Usable information: what a linear probe that has not seen a sequence can tell of its labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice
from ..core.estimate import Estimate
from ..core.keys import Key, fold_in, uniform
from ..core.result import Result, quantity
from ..core.tables import counted
from .held_out import ONE_LABEL, check_probe, check_rows, frequencies, notes_of, over_groups, told

Correction = Literal["none", "miller_madow"]


class UsableInformation(Result):
    """What a linear probe can tell of labels, out of fold: `usable_information`."""

    information: Estimate = quantity("usable information", unit="nats")
    entropy: float = quantity("entropy of the labels", unit="nats")
    cross_entropy: Estimate = quantity("held-out cross-entropy", unit="nats")
    accuracy: Estimate = quantity("held-out accuracy")
    majority: float = quantity("share of the most frequent label")
    num_labels: int = quantity("labels")
    num_absent: int
    num_unconverged: int
    num_rows: int
    folds: int
    pca: int | None
    regularisation: float
    correction: str
    key: Key

    @property
    def head(self) -> str:
        return (
            f"usable information of {counted(self.num_rows, 'row')} of {counted(self.information.num, 'group')}, "
            f"{self.folds} folds"
        )

    @property
    def notes(self) -> list[str]:
        return [ONE_LABEL] if self.num_labels == 1 else notes_of(self.num_absent, self.num_unconverged)


class ProbeSelectivity(Result):
    """How much better a probe does than on labels that mean nothing: `probe_selectivity`."""

    selectivity: Estimate = quantity("selectivity")
    """Accuracy less that of the control task."""
    information_selectivity: Estimate = quantity("selectivity in information", unit="nats")
    accuracy: Estimate = quantity("held-out accuracy")
    control_accuracy: Estimate = quantity("held-out accuracy of the control task")
    information: Estimate = quantity("usable information", unit="nats")
    control_information: Estimate = quantity("usable information of the control task", unit="nats")
    control: str
    """What keeps its label in the control task: "types" or "groups"."""
    num_absent: int
    num_unconverged: int
    key: Key

    @property
    def head(self) -> str:
        return f"a linear probe beside a control task over {self.control}, {counted(self.accuracy.num, 'group')}"

    @property
    def notes(self) -> list[str]:
        if math.isnan(float(self.information.value)):
            return [ONE_LABEL]
        if math.isnan(float(self.control_information.value)):
            return ["The control task drew one label for all rows, which tells nothing: another key draws others.",
                    *notes_of(self.num_absent, self.num_unconverged)]  # fmt: skip
        return ["One draw of the control task; its own scatter is not in the errors.",
                *notes_of(self.num_absent, self.num_unconverged)]  # fmt: skip


def usable_information(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, "..."],
    *,
    key: Key,
    groups: Int[Tensor, "..."] | None = None,
    folds: int = 5,
    pca: int | None = None,
    regularisation: float = 1.0,
    correction: Correction = "none",
) -> UsableInformation:
    r"""How many nats of labels a linear probe can use: predictive V-information with V the logistic regressions.

    $$I_V = \hat H(Y) - \frac1n \sum_i -\log q_{-g(i)}(y_i \mid x_i), \qquad \hat H(Y) = -\sum_y \hat p(y) \log \hat p(y),$$

    q fitted without the fold of row i's sequence g(i) (`held_out`: folds of whole sequences, classes as they are, a label
    that is absent from training costs a finite amount), and $\hat H$ of these very labels. Below 0, the probe does worse than
    the labels' own frequencies. In the mean at most I(X; Y): the cross-entropy is out of sample, and the plug-in entropy is
    biased downward, by about $(K - 1) / 2n$ of K labels for independent rows; `correction="miller_madow"` adds that.

    The error is over groups, of the rows' own differences $\log q(y_i \mid x_i) - \log \hat p(y_i)$, and takes the probes as
    they are: folds share training rows, and no estimate of the variance over all that is unbiased. Labels of one class
    have nan.

    x: rows, padding left out. labels: integers. groups: the sequence of each row (None: every row its own).

    Raises ValueError where arrays do not fit, for values that are not finite, and for fewer groups than folds.

    Xu, Zhao, Song, Stewart, Ermon (2020), arXiv:2002.10689; Bengio, Grandvalet (2004), No unbiased estimator of the
    variance of K-fold cross-validation; Miller (1955), Note on the bias of information estimates.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(60, 2))
    >>> found = usable_information(x, (x[:, 0] > 0).long(), key=fs.key(1))
    >>> 0.4 < float(found.information.value) < found.entropy
    True
    """
    groups = check_rows(x, labels, groups, folds, key)
    check_probe(x, pca, regularisation)
    check_choice("correction", correction, ("none", "miller_madow"))
    num_labels = len(labels.unique())
    made = told(x, labels, groups, key=key, folds=folds, pca=pca, regularisation=regularisation)
    frequency = frequencies(labels)
    added = (num_labels - 1) / (2 * len(labels)) if correction == "miller_madow" else 0.0
    return UsableInformation(
        over_groups(made.log_prob - frequency.log() + added, groups), added - float(frequency.log().mean()),
        over_groups(-made.log_prob, groups), over_groups(made.correct, groups), float(frequency.max()), num_labels,
        made.num_absent, made.num_unconverged, len(x), folds, pca, regularisation, correction, key,
    )  # fmt: skip


def probe_selectivity(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, "..."],
    *,
    key: Key,
    types: Int[Tensor, "..."] | None = None,
    groups: Int[Tensor, "..."] | None = None,
    folds: int = 5,
    pca: int | None = None,
    regularisation: float = 1.0,
) -> ProbeSelectivity:
    r"""How much of a probe's success is of the labels and not of the probe: its accuracy less that of a control task.

    With `types` (the token of each row, say), each type has one label, of a row that is drawn at random, wherever it occurs:
    a probe that memorises types does as well there as on labels that follow from types. Without, the labels of the rows are
    dealt to the rows of another order of groups, with their order within a group: what is left is chance and the bias of the
    procedure. Both probes see the same rows in the same folds, and the errors, over groups, are of the rows' differences.

    The rest is as for `usable_information`; so are the errors raised.

    Hewitt, Liang (2019), arXiv:1909.03368.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(60, 2))
    >>> found = probe_selectivity(x, (x[:, 0] > 0).long(), key=fs.key(1))
    >>> found.control, float(found.selectivity.value) > 0.2
    ('groups', True)
    """
    groups = check_rows(x, labels, groups, folds, key)
    check_probe(x, pca, regularisation)
    if types is not None and types.shape != labels.shape:
        raise ValueError(f"`types` must say of each of {len(x)} rows which token it is, got {tuple(types.shape)}.")
    other = control_labels(labels, groups, types, fold_in(key, "control"))
    both = [
        told(x, each, groups, key=key, folds=folds, pca=pca, regularisation=regularisation) for each in (labels, other)
    ]
    gains = [made.log_prob - frequencies(y).log() for made, y in zip(both, (labels, other), strict=True)]
    correct = [made.correct for made in both]
    return ProbeSelectivity(
        over_groups(correct[0] - correct[1], groups), over_groups(gains[0] - gains[1], groups),
        over_groups(correct[0], groups), over_groups(correct[1], groups),
        over_groups(gains[0], groups), over_groups(gains[1], groups),
        "groups" if types is None else "types",
        sum(made.num_absent for made in both), sum(made.num_unconverged for made in both), key,
    )  # fmt: skip


def control_labels(
    labels: Int[Tensor, " n"], groups: Int[Tensor, " n"], types: Int[Tensor, " n"] | None, key: Key
) -> Int[Tensor, " n"]:
    """Labels of a control task, drawn by `types` or dealt out anew over groups: see `probe_selectivity`."""
    labels = labels.cpu()
    if types is not None:
        index = types.cpu().unique(return_inverse=True)[1]
        drawn = uniform(key, torch.zeros(int(index.max()) + 1, dtype=torch.float64)) * len(labels)
        return labels[drawn.long()][index]
    index = groups.cpu().unique(return_inverse=True)[1]
    order = uniform(key, torch.zeros(int(index.max()) + 1, dtype=torch.float64)).argsort()
    made = torch.empty_like(labels)
    made[index.argsort(stable=True)] = labels[order[index].argsort(stable=True)]
    return made
