"""What fine-tuning moved, task by task: lengths, angles, and where two tasks pull at the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_flat, check_instance, check_params
from ..core.estimate import wide
from ..core.layout import Layout
from ..core.objective import Theta
from ..core.result import Result, derived, internal, quantity
from ..core.vectors import dot
from ..curvature.blocks import Blocks, block_views
from ..curvature.pruning_masks import places_of
from .elementwise import by_parts, check_leaves, each_of
from .magnitude_cuts import largest, num_kept
from .merge_rules import task_vector

Pairs = Float[Tensor, "b k k"]


class TaskVectors(Result):
    """Differences of fine-tuned models to the base that they came from, by block of parameters."""

    norms: Float[Tensor, "b k"] = quantity("norm of the task vector", per=("block", "task"))
    base_norms: Float[Tensor, " b"] = quantity("norm of the base", per="block", shown=False)
    cosines: Pairs = quantity("cosine", per=("block", "task", "other task"), shown=False)
    num_kept: Float[Tensor, "b k"] = quantity("entries kept by trimming", per=("block", "task"), shown=False)
    num_shared: Pairs = quantity("entries that both keep", per=("block", "task", "other task"), shown=False)
    num_opposed: Pairs = quantity("of these, with other signs", per=("block", "task", "other task"), shown=False)
    sizes: Float[Tensor, " b"] = quantity("parameters", per="block", shown=False)
    total_norms: Float[Tensor, " k"] = quantity("norm of the whole task vector", per="task")
    total_cosines: Float[Tensor, "k k"] = quantity("cosine of the whole task vectors", per=("task", "other task"))
    density: float
    blocks: list[str] = internal()
    names: list[str] = internal()

    @derived("norm relative to the base", per=("block", "task"))
    def relative_norms(self) -> Float[Tensor, "b k"]:
        """nan where the base is 0."""
        return torch.where(self.base_norms[:, None] > 0, self.norms / self.base_norms[:, None], math.nan)

    @derived("norm relative to the whole base", per="task")
    def total_relative_norms(self) -> Float[Tensor, " k"]:
        """nan where the base is 0."""
        base = self.base_norms.square().sum().sqrt()
        return torch.where(base > 0, self.total_norms / base, math.nan)

    @derived("share of opposite signs", per=("block", "task", "other task"), shown=False)
    def sign_conflicts(self) -> Pairs:
        """Of the entries that both keep; 1/2 for independent signs; nan where none is kept by both."""
        return torch.where(self.num_shared > 0, self.num_opposed / self.num_shared, math.nan)

    @derived("share of opposite signs (independent: 0.5)", per=("task", "other task"))
    def total_sign_conflicts(self) -> Float[Tensor, "k k"]:
        shared = self.num_shared.sum(0)
        return torch.where(shared > 0, self.num_opposed.sum(0) / shared, math.nan)

    @derived("Jaccard index of what is kept", per=("task", "other task"))
    def overlap(self) -> Float[Tensor, "k k"]:
        return _jaccard(self.num_shared.sum(0), self.num_kept.sum(0))

    @derived("Jaccard index by chance", per=("task", "other task"))
    def chance_overlap(self) -> Float[Tensor, "k k"]:
        """Of random masks that keep as many in all."""
        kept = self.num_kept.sum(0)
        return _jaccard(kept[:, None] * kept / self.sizes.sum(), kept)

    @derived("overlap above chance", per=("task", "other task"))
    def kappa(self) -> Float[Tensor, "k k"]:
        """0 for random masks, 1 where one holds the other; nan where chance gives that already."""
        return _kappa(self.num_shared.sum(0), self.num_kept.sum(0), self.sizes.sum())

    @derived("overlap above chance", per=("block", "task", "other task"), shown=False)
    def block_kappa(self) -> Pairs:
        """Within each block, given how much of it every task keeps."""
        rows = zip(self.num_shared, self.num_kept, self.sizes, strict=True)
        return torch.stack([_kappa(*row) for row in rows])

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks, "task": self.names, "other task": self.names}

    @property
    def head(self) -> str:
        return f"{len(self.names)} task vectors of {int(self.sizes.sum()):,} parameters in {len(self.blocks)} blocks"

    @property
    def notes(self) -> list[str]:
        made = ["weights are given, not sampled: numbers are exact for these models, and other seeds have others."]
        if bool((self.total_norms == 0).any()):
            made.append("a model equals the base: its cosines are nan.")
        elif bool((self.norms == 0).any()):
            made.append("a model equals the base in some blocks: its cosines there are nan.")
        if bool((self.base_norms == 0).any()):
            made.append("the base is 0 in some blocks: no norm is relative to that.")
        return made


def task_vectors(
    base: Theta,
    thetas: Sequence[Theta],
    layout: Layout,
    *,
    by: Blocks = "layer",
    density: float = 0.2,
    names: Sequence[str] | None = None,
) -> TaskVectors:
    r"""Task vectors $\tau_k = \theta_k - \theta_0$: how long they are, how they lie, and where they meet after trimming.

    $$\frac{\|\tau_k\|}{\|\theta_0\|}, \qquad \cos_{jk} = \frac{\langle \tau_j, \tau_k \rangle}{\|\tau_j\| \|\tau_k\|}, \qquad
      c_{jk} = \frac{\#\{i \in S_j \cap S_k : \tau_{ji} \tau_{ki} < 0\}}{\#(S_j \cap S_k)}, \qquad
      \kappa_{jk} = \frac{o - ab}{\min(a, b) - ab},$$

    with $S_k$ the entries that trimming keeps: the share `density` of largest magnitudes of the whole vector, as TIES does,
    and no zeros. A share c of 1/2 is what independent symmetric vectors have, 0 what copies have. o is the share of
    parameters that both keep, a and b what each keeps: $\kappa$ is 0 by chance, where the Jaccard index is
    $ab / (a + b - ab)$. Everything but the share of trimming is the same for $s \tau$, s > 0; to scale each tensor of
    $\tau$ to length one turns it.

    A document counts sign conflicts before trimming, where most are noise of small entries, averages negative cosines
    alone, and divides the overlap by the number of parameters, so that identical masks of density .2 overlap by .2.

    base, thetas: vectors, or dicts of parameters. names: of the tasks; default: 0, 1, ...

    Raises ValueError for no model, other lengths, numbers that are not finite, another number of names, and a density
    outside (0, 1].

    Ilharco et al. (2023), arXiv:2212.04089; Yadav et al. (2023), arXiv:2306.01708.

    >>> layout = Layout.of(torch.nn.Linear(2, 2, bias=False))
    >>> made = task_vectors(torch.ones(4), [torch.tensor([4.0, 1, 5, 1]), torch.tensor([-3.0, 1, 4, 2])], layout, density=0.5)
    >>> made.total_norms[0].item(), float(made.total_sign_conflicts[0, 1]), round(float(made.chance_overlap[0, 1]), 3)
    (5.0, 0.5, 0.333)
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    views = block_views(layout, by)
    start = flat_of("base", base, layout)
    taus = [task_vector(start, flat_of(f"thetas[{k}]", each, layout)) for k, each in enumerate(thetas)]
    if not taus:
        raise ValueError("`thetas` must be one model at least, got none: their task vectors are measured.")
    names = [str(k) for k in range(len(taus))] if names is None else [str(name) for name in names]
    if len(names) != len(taus):
        raise ValueError(f"`names` must be one per model, {len(taus)}, got {len(names)}.")
    num_kept(layout.num, density)
    signs = [torch.where(largest(tau, density), tau.sign(), 0).to(torch.int8) for tau in taus]
    columns: dict[str, list[Tensor]] = {name: [] for name in ("products", "base", "kept", "shared", "opposed")}
    for members in views.values():
        places = places_of(layout, members).to(start.device)
        columns["products"].append(_products([tau[places] for tau in taus]))
        columns["base"].append(torch.tensor(dot(start[places], start[places]), dtype=torch.float64))
        s = torch.stack([sign[places] for sign in signs]).to(wide(start.device))
        alike, both = s @ s.T, s.abs() @ s.abs().T
        columns["shared"].append(both.cpu().double())
        columns["kept"].append(both.diagonal().cpu().double())
        columns["opposed"].append(((both - alike) / 2).cpu().double())
    made = {name: torch.stack(each) for name, each in columns.items()}
    sizes = torch.tensor([len(places_of(layout, each)) for each in views.values()], dtype=torch.float64)
    whole = _products(taus)
    return TaskVectors(
        norms=made["products"].diagonal(dim1=1, dim2=2).sqrt().contiguous(),
        base_norms=made["base"].sqrt(), cosines=_cosines(made["products"]), num_kept=made["kept"],
        num_shared=made["shared"], num_opposed=made["opposed"], sizes=sizes, total_norms=whole.diagonal().sqrt().clone(),
        total_cosines=_cosines(whole), density=float(density), blocks=list(views), names=names,
    )  # fmt: skip


def apply_task_vectors(base: Theta, taus: Sequence[Theta], scales: float | Sequence[float] = 1.0) -> Theta:
    r"""$\theta_0 + \sum_k \lambda_k \tau_k$, a vector or a dict as the base is: tasks added, or forgotten.

    Raises ValueError for vectors of other shapes, and for another number of scales.

    >>> apply_task_vectors(torch.ones(2), [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])], [1.0, -0.5])
    tensor([ 2., -1.])
    """
    if isinstance(base, Tensor):
        factors = each_of("scales", scales, len(taus))
        both = [base, *(tau for tau in taus if isinstance(tau, Tensor))]
        check_leaves("base, taus", both, least=1 + len(taus))
        return by_parts(lambda zero, *each: zero + sum(a * x for a, x in zip(factors, each, strict=True)), both)
    for k, tau in enumerate(taus):
        if not isinstance(tau, Mapping):
            raise TypeError(f"`taus[{k}]` must be a dict of tensors as `base` is, got a {type(tau).__name__}.")
        check_params(tau, {name: tuple(each.shape) for name, each in base.items()}, f"taus[{k}]")
    return {name: apply_task_vectors(each, [tau[name] for tau in taus], scales) for name, each in base.items()}  # type: ignore[index, misc]


def flat_of(name: str, theta: Theta, layout: Layout) -> Float[Tensor, " p"]:
    """As one finite vector. Raises ValueError for another length, other names, and for nan or infinity."""
    if isinstance(theta, Mapping):
        theta = layout.ravel(theta)
    check_flat(name, theta, layout.num)
    if not bool(theta.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, and has nan or infinity: look at the weights.")
    return theta.detach()


def _products(vectors: Sequence[Tensor]) -> Float[Tensor, "k k"]:
    num = len(vectors)
    out = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        for j in range(i + 1):
            out[i, j] = out[j, i] = dot(vectors[i], vectors[j])
    return out


def _cosines(products: Float[Tensor, "*b k k"]) -> Float[Tensor, "*b k k"]:
    """nan for a vector of 0."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return products / (norms[..., :, None] * norms[..., None, :])


def _jaccard(shared: Float[Tensor, "k k"], kept: Float[Tensor, " k"]) -> Float[Tensor, "k k"]:
    union = kept[:, None] + kept - shared
    return torch.where(union > 0, shared / union, math.nan)


def _kappa(shared: Float[Tensor, "k k"], kept: Float[Tensor, " k"], size: Float[Tensor, ""]) -> Float[Tensor, "k k"]:
    expected = kept[:, None] * kept / size
    room = torch.minimum(kept[:, None], kept) - expected
    return torch.where(room > 0, (shared - expected) / room, math.nan)
