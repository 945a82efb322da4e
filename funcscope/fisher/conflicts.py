"""Whether two tasks pull parameters in opposite directions, block by block, from inner products of per-sample gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.statistics import q_values
from ..core.tables import counted
from ..curvature.gram import Blocks, Grams, gram
from ..curvature.label_permutation import label_test
from ..curvature.scored_sequences import LeftOut, apart
from ..curvature.task_pairs import check_grams, pair_statistics, pooled, unit_lengths
from ..curvature.whitening import check_tasks, whitened_grams

Values = Float[Tensor, " b"]


class TaskConflicts(Result):
    """Mean gradients of two tasks, block by block: how long, how aligned, whether they differ and whether they oppose."""

    inner: Values = quantity("inner product of mean gradients", per="block", stderr="inner_stderr")
    square_first: Values = quantity("squared mean gradient, first task", per="block", stderr="square_first_stderr")
    square_second: Values = quantity("squared mean gradient, second task", per="block", stderr="square_second_stderr")
    cosine: Values = quantity("cosine of mean gradients", per="block", stderr="cosine_stderr")
    cosine_low: Values = quantity("2.5 % bound of the cosine", per="block")
    cosine_high: Values = quantity("97.5 % bound of the cosine", per="block")
    undefined: Values = quantity("resamples without a cosine", per="block")
    difference: Values = quantity("mean between minus within tasks", per="block")
    p_differ: Values = quantity("p value of difference", per="block")
    p_conflict: Values = quantity("p value of conflict", per="block")
    num_first: int
    num_second: int
    num: int
    num_unscored: int
    num_shared: int
    num_copies: int
    unit_length: bool
    key: Key
    inner_stderr: Values = internal()
    square_first_stderr: Values = internal()
    square_second_stderr: Values = internal()
    cosine_stderr: Values = internal()
    blocks: list[str] = internal()

    @derived("q value of difference", per="block")
    def q_differ(self) -> Values:
        return torch.tensor(q_values(self.p_differ.tolist()), dtype=torch.float64)

    @derived("q value of conflict", per="block")
    def q_conflict(self) -> Values:
        return torch.tensor(q_values(self.p_conflict.tolist()), dtype=torch.float64)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return (
            f"gradients of {self.num_first} and {self.num_second} sequences of two tasks in "
            f"{counted(len(self.blocks), 'block')}, {self.num} resamples"
        )

    @property
    def notes(self) -> list[str]:
        notes = LeftOut(self.num_unscored, self.num_shared, self.num_copies).notes
        if none := [name for name, x in zip(self.blocks, self.cosine, strict=True) if x.isnan()]:
            notes.append(f"no cosine, as a mean gradient is not told from 0: {', '.join(none)}.")
        if 20 * len(self.blocks) > self.num + 1:
            notes.append(
                f"one block alone among {len(self.blocks)} cannot have q <= 0.05 with {self.num} resamples: take "
                f"{20 * len(self.blocks) - 1}."
            )
        return notes


def task_conflicts(
    first: Loss,
    second: Loss,
    theta: Theta,
    *,
    key: Key,
    by: Blocks = "layer",
    whitened: bool = False,
    unit_length: bool = False,
    num: int = 999,
    chunk_size: int = 64,
) -> TaskConflicts:
    r"""Whether two data sets pull the parameters of every block in opposite directions, from their per-sequence gradients.

    `gram_conflicts` of the Grams at one theta. Sequences are the samples; tokens are none, as those of one sequence go
    together; sequences of which nothing is scored, and those that both tasks have, are left out.
    whitened: gradients over the root of the mean of their squares over the samples of both tasks (`whitened_grams`). They are
    multiplied out for that, block by block. Other arguments: those of `gram` and `gram_conflicts`.

    Raises ValueError for tasks of different parameters, and as `gram` and `gram_conflicts` do.
    """
    check_tasks(first, second)
    first, second, lost = apart(first, second, theta)
    if whitened:
        three = whitened_grams(first, second, theta, by=by, chunk_size=min(chunk_size, 8))
    else:
        own = [gram(loss, theta, by=by, chunk_size=chunk_size) for loss in (first, second)]
        three = own[0], gram(first, theta, other=second, by=by, chunk_size=chunk_size), own[1]
    result = gram_conflicts(*three, key=key, unit_length=unit_length, num=num)
    return replace(result, num_unscored=lost.unscored, num_shared=lost.shared, num_copies=lost.copies)


def gram_conflicts(
    first: Grams, between: Grams, second: Grams, *, key: Key, unit_length: bool = False, num: int = 999
) -> TaskConflicts:
    r"""Unbiased inner products and lengths of the mean gradients of tasks A and B, and two tests with samples as replicates.

    $$\widehat{\langle \mu_A, \mu_B \rangle} = \frac{1}{nm} \sum_{ij} K^{AB}_{ij}, \qquad
      \widehat{\lVert \mu_A \rVert^2} = \frac{\sum_{i \ne j} K^{AA}_{ij}}{n (n-1)}, \qquad
      \cos = \frac{\widehat{\langle \mu_A, \mu_B \rangle}}
      {(\widehat{\lVert \mu_A \rVert^2}\,\widehat{\lVert \mu_B \rVert^2})^{1/2}}.$$

    The cosine is disattenuated: that of the sample means is nearer to 0, as their lengths hold noise. It may lie outside
    [-1, 1]. Where a squared length is not two of its own errors above 0, and of fewer than three samples of a task, it is
    not resolved: it, its error and its bounds are nan. Standard errors are over samples of both tasks: unbiased variances of
    means over pairs (`crossed_stderr`, `pair_stderr`), and the jackknife's for the cosine (nan where it has none without one
    of the samples). Bounds are quantiles of a bootstrap of both tasks (`bounds`), in which pairs of copies of one sample are
    left out, over the resamples that have a cosine; the share of the others is `undefined`.

    Of 1000 repetitions in 30 parameters, those with a resolved cosine, and how often their bounds had the truth between them:

    | samples | 15, strong means | 15, weak | 40, strong | 40, weak |
    | - | - | - | - | - |
    | normal: resolved | .99 | .05 | 1.00 | .56 |
    | covered | .96 | 1.00 | .95 | .96 |
    | lognormal sizes: resolved | .77 | .02 | 1.00 | .27 |
    | covered | .95 | 1.00 | .93 | .94 |

    for a cosine of .67 (.98 for .9 of weak means): strong means are as long as the noise in each of three directions, weak
    ones .4 of that. Errors of the cosine were 1.0 to 1.3 times the deviation of the resolved ones.

    `p_differ`: `label_test`, exact. It sees differences of size, too: a task of longer sequences has longer sums.
    `p_conflict`: $(1 + \#\{\langle \bar g_A^*, \bar g_B^* \rangle \ge 0\}) / (1 + R)$ over the bootstrap, one-sided, of
    $\langle \mu_A, \mu_B \rangle \ge 0$: to first order of the samples' number, and conservative where both means are 0.
    `q_*`: Benjamini and Hochberg's over blocks.

    unit_length: of every gradient's direction, so that K holds the cosines of samples and long sequences count no more.

    A document permutes the coordinates of two gradients: pairs of more than some fifty coordinates have p near 0 then, of one
    task with itself, too. That coordinates are exchangeable is not the hypothesis that tasks do not conflict.

    Raises ValueError for Grams that do not belong together or are of tokens, fewer than two samples of a task, and with
    `unit_length` for a sample without a gradient. nan where a block has a value that is not finite.

    >>> import funcscope as fs
    >>> a, b = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0]]), torch.tensor([[-2.0, 0.3], [-2.0, -0.3]])
    >>> three = [Grams((x @ y.T)[None], "sequence", 0, [], ["all"]) for x, y in ((a, a), (a, b), (b, b))]
    >>> result = gram_conflicts(*three, key=fs.key(0))
    >>> float(result.inner), float(result.p_conflict)
    (-2.0, 0.001)
    """
    check_key(key)
    check_count("num", num)
    check_grams(first, between, second)
    three = tuple(each.values.double() for each in (first, between, second))
    aa, ab, bb = unit_lengths(*three) if unit_length else three
    labels = label_test(pooled(aa, ab, bb), ab.shape[1], key=fold_in(key, "labels"), num=num)
    of = pair_statistics(aa, ab, bb, key=fold_in(key, "samples"), num=num)
    n, m = ab.shape[1:]
    return TaskConflicts(
        *of.value, of.cosine, of.low, of.high, of.undefined, labels.statistic, labels.p_value, of.p_conflict, n, m, num, 0, 0,
        0, unit_length, key, *of.errors[:3], of.cosine_stderr, list(between.blocks),
    )  # fmt: skip
