"""Whether two tasks use the same directions of the parameters: how alike the second moments of their gradients are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flag
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.statistics import q_values
from ..core.tables import counted
from ..curvature.gram import Blocks, Grams
from ..curvature.gram_statistics import with_total
from ..curvature.label_permutation import label_test
from ..curvature.scored_sequences import LeftOut, apart
from ..curvature.task_pairs import check_grams, pair_statistics, pooled, task_grams, unit_lengths
from ..curvature.whitening import check_tasks

Values = Float[Tensor, " b"]


class Separability(Result):
    """How alike the second moments of two tasks' gradients are, block by block, and whether they differ."""

    alignment: Values = quantity("alignment of second moments", per="block", stderr="alignment_stderr")
    alignment_low: Values = quantity("2.5 % bound of the alignment", per="block")
    alignment_high: Values = quantity("97.5 % bound of the alignment", per="block")
    p_differ: Values = quantity("p value of difference", per="block")
    alignment_of_all: Estimate = quantity("alignment of second moments of all")
    p_differ_of_all: float = quantity("p value of difference of all")
    num_first: int
    num_second: int
    num: int
    num_unscored: int
    num_shared: int
    num_copies: int
    unit_length: bool
    key: Key
    alignment_stderr: Values = internal()
    blocks: list[str] = internal()

    @derived("separability", per="block", stderr="alignment_stderr")
    def separability(self) -> Values:
        """1 - alignment: 0 for tasks that use the same directions alike, 1 for tasks that share none."""
        return 1 - self.alignment

    @derived("separability of all")
    def separability_of_all(self) -> Estimate:
        whole = self.alignment_of_all
        return Estimate(1 - whole.value, whole.stderr, whole.num)

    @derived("q value of difference", per="block")
    def q_differ(self) -> Values:
        return torch.tensor(q_values(self.p_differ.tolist()), dtype=torch.float64)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def unresolved(self) -> list[str]:
        names = ["alignment_of_all", "separability_of_all"]
        return names if bool(self.alignment_of_all.value.isnan()) else []

    @property
    def head(self) -> str:
        return (
            f"second moments of the gradients of {self.num_first} and {self.num_second} sequences of two tasks in "
            f"{counted(len(self.blocks), 'block')}"
        )

    @property
    def notes(self) -> list[str]:
        notes = LeftOut(self.num_unscored, self.num_shared, self.num_copies).notes
        if none := [name for name, x in zip(self.blocks, self.alignment, strict=True) if x.isnan()]:
            notes.append(f"no alignment, as the size of a second moment is not told from 0: {', '.join(none)}.")
        return notes


def separability(
    first_loss: Loss,
    second_loss: Loss,
    theta: Theta,
    *,
    key: Key,
    by: Blocks = "layer",
    unit_length: bool = False,
    num: int = 999,
    chunk_size: int = 64,
) -> Separability:
    r"""Whether two tasks pull on the same directions of every block: the alignment of their gradients' second moments.

    $$S_A = \mathbb E_A[g g^\top], \qquad \text{alignment} = \frac{\mathrm{tr}(S_A S_B)}{\lVert S_A \rVert_F \lVert S_B
      \rVert_F}, \qquad \text{separability} = 1 - \text{alignment},$$

    `gram_separability` of Grams: 1 for equal second moments up to a factor, 0 for tasks in orthogonal subspaces. Signs do not
    count: tasks that pull on one direction to opposite sides are aligned here, and in conflict (`gradient_alignment`).

    A document takes the gap of CKA within and between tasks over unrelated rows instead, of activations: with
    participation ratios alone, $h = 1 / (1 + (n - 1)/\mathrm{PR})$, it is $(\sqrt{h_A} - \sqrt{h_B})^2 / 2$ to leading
    order: above 0 for any tasks of different participation ratios, 0 for equal ones, whether they share directions or not.

    by, chunk_size: of `gram`. Sequences that both tasks have, copies, and what is not scored are left out.

    Raises ValueError for tasks of different parameters, and as `gram` and `gram_separability` do.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> sizes, x = torch.tensor([[1.0], [1.1], [1.2], [1.3]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> losses = [fs.objective(net, [(sizes * each, torch.ones(4, 1))], half_square) for each in x]
    >>> found = separability(*losses, torch.zeros(2), key=fs.key(0), num=19)          # gradients of one direction each
    >>> round(float(found.alignment_of_all.value), 2), round(float(found.separability_of_all.value), 2)       # .6^2
    (0.36, 0.64)
    """
    check_tasks(first_loss, second_loss)
    first, second, lost = apart(first_loss, second_loss, theta)
    made = task_grams({"first": first, "second": second}, theta, by=by, chunk_size=chunk_size)
    three = made["first", "first"], made["first", "second"], made["second", "second"]
    result = gram_separability(*three, key=key, unit_length=unit_length, num=num)
    return replace(result, num_unscored=lost.unscored, num_shared=lost.shared, num_copies=lost.copies)


def gram_separability(
    first: Grams, between: Grams, second: Grams, *, key: Key, unit_length: bool = False, num: int = 999
) -> Separability:
    r"""`separability` of the Grams of A, of A with B, and of B, whose blocks cover every parameter once.

    $\mathrm{tr}(S_A S_B) = \mathbb E\, (K^{AB}_{ij})^2$ and $\lVert S_A \rVert_F^2 = \mathbb E\, (K^{AA}_{ij})^2$ over
    $i \ne j$: the statistics of mean gradients (`fisher.gram_conflicts`), for $g g^\top$ in the place of g. Pairs of a
    sample with itself would add $\mathbb E \lVert g \rVert^4 / n$ and make every two tasks of few samples look separable.
    The alignment may exceed 1 by chance; it is nan where a squared size is not two of its errors above 0.

    `p_differ`: `label_test` of the squared inner products, exact; it sees differences of size, too, unless `unit_length`
    takes every gradient's direction.

    Raises ValueError for Grams that do not belong together or are of tokens, fewer than two samples of a task, and with
    `unit_length` for a sample without a gradient.

    >>> import funcscope as fs
    >>> a, b = torch.eye(4)[[0, 1, 0, 1, 0, 1]].double(), torch.eye(4)[[1, 2, 1, 2, 1, 2]].double()    # one of two is shared
    >>> three = [Grams((x @ y.T)[None], "sequence", 0, [], ["all"]) for x, y in ((a, a), (a, b), (b, b))]
    >>> round(float(gram_separability(*three, key=fs.key(0), num=99).alignment), 3)         # 1/4 over 2/5
    0.625
    """
    check_key(key)
    check_count("num", num)
    check_flag("unit_length", unit_length)
    check_grams(first, between, second)
    aa, ab, bb = (with_total(each.values.double()) for each in (first, between, second))
    aa, ab, bb = unit_lengths(aa, ab, bb) if unit_length else (aa, ab, bb)
    aa, ab, bb = aa.square(), ab.square(), bb.square()
    n, m = ab.shape[1:]
    labels = label_test(pooled(aa, ab, bb), n, key=fold_in(key, "labels"), num=num).p_value
    of = pair_statistics(aa, ab, bb, key=fold_in(key, "samples"), num=num)
    parts: dict[str, Any] = {
        "alignment": of.cosine,
        "alignment_low": of.low,
        "alignment_high": of.high,
        "alignment_stderr": of.cosine_stderr,
        "p_differ": labels,
    }
    return Separability(
        **{name: each[:-1].contiguous() for name, each in parts.items()},
        alignment_of_all=Estimate(of.cosine[-1], of.cosine_stderr[-1], n + m),
        p_differ_of_all=float(labels[-1]),
        num_first=n, num_second=m, num=num, num_unscored=0, num_shared=0, num_copies=0, unit_length=unit_length, key=key,
        blocks=list(between.blocks),
    )  # fmt: skip
