"""The decomposition of what two layers, or any two activations at the same rows, tell of labels, by held-out probes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, fold_in
from ..core.statistics import bootstrap_stderr
from .held_out import check_probe, check_rows, frequencies, notes_of, told
from .pid import ATOMS, PID, pid_min_mi


def probe_pid(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "..."],
    labels: Int[Tensor, "..."],
    *,
    key: Key,
    groups: Int[Tensor, "..."] | None = None,
    folds: int = 5,
    pca: int | None = None,
    regularisation: float = 1.0,
    num: int = 200,
) -> PID:
    r"""What two activations at the same rows tell of labels, by minimum mutual information of usable informations.

    `pid_min_mi` of $I_V(X; Z)$, $I_V(Y; Z)$ and $I_V((X, Y); Z)$ of `usable_information`, of probes on x, on y and on both
    side by side, all on the same rows, labels and folds, so that the entropy of the labels is one number. Each is a bound of
    its own from below: a difference of bounds is none. The joint probe has more to fit; where it under-fits, the synergy
    comes out negative, and says so. Amounts are in nats, between 0 and the entropy of the labels: what counts as much of it
    depends on that.

    pca: components of each of x and y, and twice as many of both. The error is the spread over `num` resamples of whole
    groups, with the probes as they are. nan for labels of one class; raises as `usable_information` does, and where x and y
    have other rows.

    >>> import torch, funcscope as fs
    >>> x, y = fs.normal(fs.key(0), torch.zeros(2, 80, 1))
    >>> made = probe_pid(x, y, (x[:, 0] > 0).long(), key=fs.key(1), num=20)
    >>> made.unique_x > 0.3, made.unique_y
    (True, 0.0)
    """
    check_count("num", num, 2)
    groups = check_rows(x, labels, groups, folds, key)
    if len(y) != len(x):
        raise ValueError(
            f"`y` must have a row for each of the {len(x)} of `x`, got {len(y)}: both are of the same tokens."
        )
    check_rows(y, labels, groups, folds, key, "y")
    for each in (x, y):
        check_probe(each, pca, regularisation)
    frequency = frequencies(labels).log()
    both = torch.cat([x.double(), y.double()], 1)
    sources = ((x, pca), (y, pca), (both, None if pca is None else 2 * pca))
    probes = [
        told(each, labels, groups, key=key, folds=folds, pca=size, regularisation=regularisation)
        for each, size in sources
    ]
    gains = torch.stack([each.log_prob - frequency for each in probes])
    index, counts = groups.cpu().unique(return_inverse=True, return_counts=True)[1:]
    sums = gains.new_zeros(3, len(counts)).index_add(1, index, gains)

    def parts(places: Tensor) -> Float[Tensor, " atoms"]:
        made = pid_min_mi(*(sums[:, places].sum(1) / counts[places].sum()).tolist())
        return torch.tensor([getattr(made, name) for name in ATOMS], dtype=torch.float64)

    errors = bootstrap_stderr(parts, len(counts), key=fold_in(key, "resamples"), num=num).tolist()
    named = {f"{name}_stderr": each for name, each in zip(ATOMS, errors, strict=True)}
    values = dict(zip(ATOMS, parts(torch.arange(len(counts))).tolist(), strict=True))
    remarks = notes_of(probes[0].num_absent, sum(each.num_unconverged for each in probes))
    return PID(
        **values, method="min_mi", terms="probes", **named, num_groups=len(counts), num=num, key=key, remarks=tuple(remarks)
    )  # fmt: skip
