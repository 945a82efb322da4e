"""What linear probes say of rows that they were not fitted on, with folds that keep sequences whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_count, check_positive
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.standard_errors import means
from ..core.tables import counted
from .groups import check_labels, unit_columns

STEPS = 1000
"""Of the solver, at most."""
ONE_LABEL = "all labels are one class, whose entropy is 0: there is nothing to tell, and information is undefined."


class HeldOut(NamedTuple):
    """Of each row, by the probe that has not seen its sequence."""

    log_prob: Float[Tensor, " n"]
    """Of the row's label, nats."""
    correct: Float[Tensor, " n"]
    num_absent: int
    """Rows with a label that was not among those that their probe was fitted on."""
    num_unconverged: int
    """Folds whose solver did not converge."""


def held_out(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    key: Key,
    folds: int = 5,
    pca: int | None = None,
    regularisation: float = 1.0,
) -> HeldOut:
    r"""Predictions of labels by multinomial logistic regression, out of fold.

    Columns are standardised and, with `pca`, replaced by so many principal components, by the training rows alone. Each
    fit minimises $\tfrac12 \lVert w \rVert^2 + C \sum_i \ell_i$, C the `regularisation` (scikit-learn's: a large one
    penalises little), with every row of weight 1, whatever its class. The probabilities are mixed with one row's worth of the
    uniform distribution over all K labels,

    $$q(y \mid x) = \frac{m\, q_{\mathrm{probe}}(y \mid x) + 1 / K}{m + 1},$$

    m the training rows: a label that is absent among these has a probability, and costs about $\log m K$ nats.

    Which groups go to which fold is by the key. Raises ValueError where there are fewer groups than folds.
    """
    labels = labels.cpu().unique(return_inverse=True)[1]
    num_labels = int(labels.max()) + 1
    values, label = unit_columns(x.detach().cpu().double()).numpy(), labels.numpy()
    log_prob, correct = torch.empty(len(x), dtype=torch.float64), torch.empty(len(x), dtype=torch.float64)
    absent, unconverged = 0, 0
    for train, test in folds_of(groups, folds, key):
        shares, converged = _fitted(values[train], label[train], values[test], num_labels, pca, regularisation)
        mixed = (len(train) * shares + 1 / num_labels) / (len(train) + 1)
        log_prob[test] = torch.from_numpy(np.log(mixed[np.arange(len(test)), label[test]]))
        correct[test] = torch.from_numpy((mixed.argmax(1) == label[test]).astype(np.float64))
        absent += int((~np.isin(label[test], label[train])).sum())
        unconverged += not converged
    return HeldOut(log_prob, correct, absent, unconverged)


def told(x: Tensor, labels: Tensor, groups: Tensor, **options: Any) -> HeldOut:
    """`held_out`; nan for labels that are one class."""
    if len(labels.unique()) == 1:
        nothing = torch.full((len(x),), math.nan, dtype=torch.float64)
        return HeldOut(nothing, nothing, 0, 0)
    return held_out(x, labels, groups, **options)


def folds_of(groups: Int[Tensor, " n"], folds: int, key: Key) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training and test rows of each fold: groups stay whole, and folds have about equally many rows."""
    from sklearn.model_selection import GroupKFold

    index = groups.cpu().unique(return_inverse=True)[1]
    order = uniform(fold_in(key, "folds"), torch.zeros(int(index.max()) + 1, dtype=torch.float64)).argsort()
    yield from GroupKFold(folds).split(np.zeros(len(index)), groups=order[index].numpy())


def check_rows(
    x: Tensor, labels: Tensor | None, groups: Tensor | None, folds: int, key: Key, name: str = "x"
) -> Tensor:
    """The groups of the rows; raises ValueError where arrays do not fit, are not finite, or folds have no group each."""
    check_key(key)
    check_count("folds", folds, 2)
    if x.ndim != 2 or not x.numel():
        raise ValueError(f"`{name}` must have the shape (row, unit), a row and a unit at least, got {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, got nan or infinity: leave such rows out.")
    if labels is not None and (labels.shape != x.shape[:1] or labels.is_floating_point() or labels.is_complex()):
        raise ValueError(
            f"`labels` must be {len(x)} integers, one per row of `{name}`, got {labels.dtype} {tuple(labels.shape)}."
        )
    groups = torch.arange(len(x)) if groups is None else groups
    if groups.shape != x.shape[:1]:
        raise ValueError(
            f"`groups` must say of each of {len(x)} rows which sequence it is of, got {tuple(groups.shape)}."
        )
    check_labels("groups", groups)
    if (num := len(groups.unique())) < folds:
        raise ValueError(
            f"`folds` must be at most the number of groups, {num}, got {folds}: a fold has whole sequences; give more of "
            "these, or fewer folds (two at least)."
        )
    return groups


def check_probe(x: Tensor, pca: int | None, regularisation: float) -> None:
    """Settings of `held_out`."""
    check_positive("regularisation", regularisation)
    if pca is not None:
        check_count("pca", pca)
        if pca > x.shape[1]:
            raise ValueError(f"`pca` must be at most the number of units, {x.shape[1]}, got {pca}.")


def frequencies(labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Of each row's label among the rows."""
    _, index, counts = labels.cpu().unique(return_inverse=True, return_counts=True)
    return (counts.double() / len(labels))[index]


def over_groups(rows: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Estimate:
    """The mean of the rows, with its error over groups."""
    return ratio_over_groups(rows, torch.ones_like(rows), groups)


def ratio_over_groups(
    numerator: Float[Tensor, " n"], denominator: Float[Tensor, " n"], groups: Int[Tensor, " n"]
) -> Estimate:
    """The ratio of sums over rows, with its error over groups."""
    index = groups.cpu().unique(return_inverse=True)[1]
    both = torch.zeros(2, int(index.max()) + 1, dtype=torch.float64)
    sums = both.index_add(1, index, torch.stack([numerator, denominator]))
    value, stderr = means(sums[:1], sums[1])
    return Estimate(value[0], stderr[0], sums.shape[1])


def notes_of(num_absent: int, num_unconverged: int) -> list[str]:
    """What a reader must know of probes."""
    made = ["Errors are over groups and take the fitted probes as they are: folds share their training rows."]
    if num_absent:
        text = "has a label that is" if num_absent == 1 else "have labels that are"
        made.append(
            f"{counted(num_absent, 'row')} {text} absent from the training folds, and cost about log(m K) nats."
        )
    if num_unconverged:
        made.append(f"{counted(num_unconverged, 'fit')} did not converge: information is less than a probe could use.")
    return made


def _fitted(
    x: np.ndarray, label: np.ndarray, test: np.ndarray, num_labels: int, pca: int | None, regularisation: float
) -> tuple[np.ndarray, bool]:
    """Probabilities of all labels, 0 for those that are not in the training rows; whether the solver converged."""
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shares = np.zeros((len(test), num_labels))
    known = np.unique(label)
    if len(known) == 1:
        shares[:, known] = 1.0
        return shares, True
    parts = [] if pca is None else [PCA(min(pca, *x.shape), svd_solver="full")]
    probe = make_pipeline(StandardScaler(), *parts, LogisticRegression(C=regularisation, max_iter=STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(x, label)
    shares[:, known] = probe.predict_proba(test)
    return shares, bool(probe[-1].n_iter_.max() < STEPS)
