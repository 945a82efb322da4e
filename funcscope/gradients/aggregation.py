"""One direction for several tasks: the weights that methods of multi-task learning give them, and what still conflicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_number
from ..core.keys import Key, as_global_generator, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.tables import counted
from ..curvature.scored_sequences import all_apart
from ..curvature.task_pairs import relative_weights, task_grams
from .alignment import check_several

METHODS = ("mean", "pcgrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "dualproj", "cagrad")
BY_METHOD = ("method", "task")


class Aggregation(Result):
    """Weights of tasks by several methods, and what a step along the weighted gradient does for each task."""

    weights: Float[Tensor, "m k"] = quantity("weight of the task", per=BY_METHOD, stderr="weights_stderr")
    inner: Float[Tensor, "m k"] = quantity(
        "inner product with the task's gradient", per=BY_METHOD, stderr="inner_stderr"
    )
    norm: Float[Tensor, " m"] = quantity("length of the direction", per="method", stderr="norm_stderr")
    lengths: Float[Tensor, " k"] = quantity("length of the gradient", per="task")
    num_sequences: dict[str, int]
    num_left_out: int
    folds: int
    c: float
    key: Key
    weights_stderr: Float[Tensor, "m k"] = internal()
    inner_stderr: Float[Tensor, "m k"] = internal()
    norm_stderr: Float[Tensor, " m"] = internal()
    methods: list[str] = internal()

    @derived("tasks that the direction is against", per="method")
    def num_conflicts(self) -> Float[Tensor, " m"]:
        """Whose loss a small step along it raises, on these data: a cosine below 0, by more than solvers' rounding."""
        return (self.inner < -1e-6 * self.norm[:, None] * self.lengths).sum(1).double()

    @derived("least cosine with a task's gradient", per="method")
    def least_cosine(self) -> Float[Tensor, " m"]:
        return (self.inner / (self.norm[:, None] * self.lengths)).amin(1)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"method": self.methods, "task": list(self.num_sequences)}

    @property
    def head(self) -> str:
        return f"one direction for {len(self.num_sequences)} tasks, by {counted(len(self.methods), 'method')}"

    @property
    def notes(self) -> list[str]:
        lost = self.num_left_out
        notes = [f"{counted(lost, 'sequence')} left out: not scored, shared, or a copy."] if lost else []
        if bool(self.norm_stderr.isnan().any()):
            notes.append("no errors: without one of the folds a task has no gradient.")
        return notes


def gradient_aggregation(
    losses: Mapping[str, Loss],
    theta: Theta,
    *,
    key: Key,
    methods: Sequence[str] = ("mean", "pcgrad", "mgda", "imtl_g"),
    c: float = 0.4,
    folds: int = 16,
    chunk_size: int = 64,
) -> Aggregation:
    r"""The direction $d = \sum_k w_k g_k$ that each method makes of the tasks' gradients, and whom it is against.

    Weights from the Gram matrix of the gradients of the losses on these data (`aggregation_weights`); `inner` is
    $\langle d, g_k \rangle$: a small step along -d changes task k's loss by minus that, so that where it is below 0 the
    loss rises. PCGrad has no conflict left between two tasks; between three it may have (proofs/pcgrad_conflict.py).
    Errors are over sequences: a jackknife over `folds` folds, one of every task left out at a time, and the method done
    again. The gradients are those of the samples: what an optimiser would see, whose lengths hold noise.

    Compare: `mean` is what plain training on all tasks does. key: the order of PCGrad, the same for every fold.
    c: of CAGrad. chunk_size: of `gram`. Sequences of several tasks, copies, and what is not scored are left out.

    Raises ImportError without torchjd, ValueError for fewer than two tasks, an unknown method, tasks of different
    parameters, a gradient that is 0, and as `gram` does.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> targets = {"up": torch.tensor([[1.0], [2.0]]), "down": torch.tensor([[-4.0], [-2.0]])}         # -1.5 and 3
    >>> losses = {name: fs.objective(net, [(torch.ones(2, 1), y)], half_square) for name, y in targets.items()}
    >>> gradient_aggregation(losses, torch.zeros(1), key=fs.key(0), methods=["mean"]).inner.round(decimals=4)
    tensor([[-1.1250,  2.2500]], dtype=torch.float64)
    """
    check_key(key)
    check_several(losses)
    check_count("folds", folds, 2)
    tasks, lost = all_apart(losses, theta)
    made = task_grams(tasks, theta, by="none", chunk_size=chunk_size)
    sizes = {name: made[name, name].values.shape[1] for name in tasks}
    weights_of = relative_weights(tasks, theta)
    parts = min(folds, *sizes.values())

    def gram_of(fold: int) -> Float[Tensor, "k k"]:
        """Of the means, without a fold; of all for -1."""
        rows = {name: torch.arange(num) % parts != fold for name, num in sizes.items()}
        mean = {name: weights_of[name][there].mean() for name, there in rows.items()}
        out = torch.zeros(len(sizes), len(sizes), dtype=torch.float64)
        for i, a in enumerate(sizes):
            for j, b in enumerate(list(sizes)[i:], i):
                values = made[a, b].values.sum(0).cpu()[rows[a]][:, rows[b]]
                out[i, j] = out[j, i] = values.mean() / (mean[a] * mean[b])
        return out

    def numbers(gram: Float[Tensor, "k k"]) -> Float[Tensor, "m e"]:
        weights = torch.stack([aggregation_weights(gram, method=each, key=key, c=c) for each in methods])
        inner = weights @ gram
        return torch.cat([weights, inner, (weights * inner).sum(1, keepdim=True).clamp(min=0).sqrt()], 1)

    whole = gram_of(-1)
    values, rest = numbers(whole), [gram_of(i) for i in range(parts)]
    nan = torch.full_like(values, math.nan)  # a task may be all there is of one fold
    error = jackknife_stderr(torch.stack([numbers(x) if bool((x.diagonal() > 0).all()) else nan for x in rest], -1))
    num = len(sizes)
    (weights, inner, norm), errors = ([x[:, :num], x[:, num:-1], x[:, -1]] for x in (values, error))
    return Aggregation(
        weights.clone(), inner.clone(), norm.clone(), whole.diagonal().sqrt(), sizes, sum(lost), parts, float(c), key,
        errors[0].clone(), errors[1].clone(), errors[2].clone(), list(methods),
    )  # fmt: skip


def aggregation_weights(
    gram: Float[Tensor, "k k"], *, method: str = "mean", key: Key | None = None, c: float = 0.4
) -> Float[Tensor, " k"]:
    r"""The weights of k tasks by a method of torchjd, from the inner products of their gradients.

    `mean`: 1/k. `pcgrad`: every gradient without what is against another one, in random order, and added up
    (proofs/pcgrad_conflict.py). `mgda`: the
    shortest vector of the convex hull; for two, $w_1 = (K_{22} - K_{12}) / (K_{11} - 2 K_{12} + K_{22})$ in [0, 1]. `imtl_g`:
    equal projections on all unit gradients. `aligned_mtl`: their span with equal singular values. `upgrad`, `dualproj`: each,
    or their mean, projected on the cone of directions against nobody. `cagrad`: the direction within c of the mean's length
    around the mean that serves the worst task best; the mean for c = 0.

    The matrix is divided by its trace, as some solvers have absolute thresholds; no weight depends on it. `upgrad` and
    `dualproj` need torchjd's extra `quadprog-projector`, `cagrad` the extra `cagrad`. NashMTL takes no Gram matrix.
    key: of the order of `pcgrad`, which needs it.

    Raises ImportError with what to install (`mean` needs nothing), ValueError for an unknown method and a matrix that is no
    Gram matrix of gradients other than 0, and TypeError for `pcgrad` without a key.

    Yu et al. (2020), arXiv:2001.06782; Sener, Koltun (2018), arXiv:1810.04650; Liu et al. (2021), arXiv:2110.14048; Quinton,
    Rey (2024), arXiv:2406.16232.

    >>> two = torch.tensor([[1.0, -0.5], [-0.5, 2.0]])
    >>> aggregation_weights(two).tolist()
    [0.5, 0.5]
    >>> aggregation_weights(two, method="pcgrad", key=fs.key(0)).tolist()   # doctest: +SKIP
    [1.5, 1.25]
    """
    check_choice("method", method, METHODS)
    check_number("c", c, 0.0)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not bool((gram.diagonal() > 0).all()):
        raise ValueError(
            f"`gram` must be the square matrix of inner products of gradients that are not 0, got {tuple(gram.shape)} with "
            f"the squares {gram.diagonal().tolist() if gram.ndim == 2 else []}: leave out tasks without a gradient."
        )
    if method == "mean":
        return torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    try:
        from torchjd import aggregation
        from torchjd.linalg import QuadprogProjector
    except ImportError as err:
        raise ImportError("aggregation of gradients needs torchjd 0.8 or later: pip install 'torchjd>=0.8'.") from err
    scaled = gram.double().cpu() / gram.double().cpu().trace()
    if method == "pcgrad":
        check_key(key)
        assert key is not None
        with as_global_generator(fold_in(key, "order")):
            return aggregation.PCGradWeighting()(scaled)
    made: dict[str, Any] = {
        "mgda": lambda: aggregation.MGDAWeighting(epsilon=1e-7, max_iters=1000),
        "imtl_g": lambda: aggregation.IMTLGWeighting(),
        "aligned_mtl": lambda: aggregation.AlignedMTLWeighting(),
        "upgrad": lambda: aggregation.UPGradWeighting(projector=QuadprogProjector(reg_eps=1e-9)),
        "dualproj": lambda: aggregation.DualProjWeighting(projector=QuadprogProjector(reg_eps=1e-9)),
        "cagrad": lambda: aggregation.CAGradWeighting(c=c),
    }
    return made[method]()(scaled)
