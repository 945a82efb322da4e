"""The peers' curvature as functions of one flat vector, for `curvature.py`.

Peers, installed by `install_peers.sh`: curvlinops (its operators are forward over reverse, made anew for each product),
hessian-eigenthings (reverse over reverse, made anew), PyHessian (reverse over reverse; with `data=` the graph of the
gradient is kept, with `dataloader=` it is made anew). All see the same weights, tokens and loss, the mean over the tokens
that have a successor; attention is eager, as the default kernel has no second derivative. One change is needed:
`jvp` of a vmapped `vjp`, which is curvlinops' Hessian, is wrong through torch's fused layer norm (pytorch issue 196700) and
missing for its fused SiLU, so that curvlinops gets both from primitives; the row "fused norms" is the untouched model.
PyHessian's density calls `torch.eig`, which torch refuses since 2.0: `torch.linalg.eigh` stands in.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from cases import Case, Scored
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from transformers import LlamaConfig

import funcscope as fs

Product = Callable[[Tensor], Tensor]
Makers = dict[str, Callable[[], Product]]
Name = tuple[str, str]
CHUNK = 64
"""Tokens whose logits exist at a time where the readout is taken in chunks."""
Pairs = tuple[Tensor, Tensor, int]
"""Eigenvalues (k), eigenvectors (k, P) and the number of products that they took."""

PACKAGES = {
    "curvlinops-for-pytorch": "curvlinops",
    "hessian-eigenthings": "hessian_eigenthings",
    "PyHessian": "pyhessian",
}


def installed() -> set[str]:
    return {name for name, module in PACKAGES.items() if find_spec(module)}


def ways_of(case: Case, names: set[str], chunked: bool = False) -> dict[Name, Callable[[], Product]]:
    """(operator, way) -> what sets that way up; ours first."""

    def ours(operator: Callable) -> Makers:
        settings = {"kept": {}, "keep=False": {"keep": False}} | (
            {f"head_chunk={CHUNK}": {"head_chunk": CHUNK}} if chunked else {}
        )
        return {
            f"funcscope, {way}": lambda how=how: operator(case.loss, case.theta, **how) for way, how in settings.items()
        }

    found = {
        "Hessian": ours(fs.hessian) | hessian_makers(case, names),
        "GGN": ours(fs.ggn) | ggn_makers(case, names),
    }
    return {(kind, way): make for kind, makers in found.items() for way, make in makers.items()}


def curvlinops_operator(case: Case, kind: str, form: str):
    import curvlinops

    net = Scored(getattr(case, form))
    make = getattr(curvlinops, f"{kind}LinearOperator")
    batch = [(case.ids, case.targets)]
    return make(net, nn.CrossEntropyLoss(), list(net.parameters()), batch, check_deterministic=False)


def eigenthings_operator(case: Case, kind: str):
    import hessian_eigenthings as he

    batch = [{"input_ids": case.ids, "labels": case.ids}]
    if kind == "GGN":
        return he.GGNOperator(case.eager, batch, he.hf_lm_forward(), he.hf_lm_loss_of_output())
    return he.HessianOperator(case.eager, batch, he.hf_lm_loss())


def pyhessian_hessian(case: Case, keep: bool):
    import pyhessian

    batch = (case.ids, case.targets)
    data = {"data": batch} if keep else {"dataloader": [batch]}
    case.eager.zero_grad()
    return pyhessian.hessian(Scored(case.eager), nn.CrossEntropyLoss(), cuda=False, **data)


def pyhessian_product(case: Case, keep: bool) -> Product:
    import pyhessian

    made = pyhessian_hessian(case, keep)

    def product(v: Tensor) -> Tensor:
        parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in made.params]), made.params, strict=True)]
        if keep:
            return flat(pyhessian.hessian_vector_product(made.gradsH, made.params, parts))
        return flat(made.dataloader_hv_product(parts)[1])

    return product


def hessian_makers(case: Case, names: set[str]) -> Makers:
    """Each call of a maker is the set-up of one way."""
    makers: Makers = {}
    if "curvlinops-for-pytorch" in names:
        makers["curvlinops"] = lambda: curvlinops_operator(case, "Hessian", "plain").__matmul__
        if not isinstance(case.config, LlamaConfig):
            makers["curvlinops, fused norms"] = lambda: curvlinops_operator(case, "Hessian", "eager").__matmul__
    if "hessian-eigenthings" in names:
        makers["hessian-eigenthings"] = lambda: eigenthings_operator(case, "Hessian").matvec
    if "PyHessian" in names:
        makers["PyHessian, data= (kept)"] = lambda: pyhessian_product(case, keep=True)
        makers["PyHessian, dataloader="] = lambda: pyhessian_product(case, keep=False)
    return makers


def ggn_makers(case: Case, names: set[str]) -> Makers:
    makers: Makers = {}
    if "curvlinops-for-pytorch" in names:
        makers["curvlinops"] = lambda: curvlinops_operator(case, "GGN", "eager").__matmul__
    if "hessian-eigenthings" in names:
        makers["hessian-eigenthings"] = lambda: eigenthings_operator(case, "GGN").matvec
    return makers


def flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.detach().flatten() for part in parts])


class Counted:
    """A product that counts."""

    def __init__(self, product: Callable):
        self.product, self.num = product, 0

    def __call__(self, *args):
        self.num += 1
        return self.product(*args)


def by_arpack(product: Callable, size: int, num: int, ncv: int, tol: float) -> Pairs:
    """SciPy's `eigsh`, which is how curvlinops' documentation takes eigenpairs; float32, as its double costs time only."""
    counted = Counted(product)
    start = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    operator = LinearOperator((size, size), matvec=counted, dtype=np.float32)
    values, vectors = eigsh(operator, k=num, which="LM", ncv=ncv, tol=tol, v0=start)
    return torch.tensor(values), torch.from_numpy(np.ascontiguousarray(vectors.T)), counted.num


def by_curvlinops(case: Case, num: int, ncv: int, tol: float) -> Pairs:
    operator = curvlinops_operator(case, "Hessian", "plain").to_scipy("float32")
    return by_arpack(operator.matvec, operator.shape[0], num, ncv, tol)


def cheapest_ncv(case: Case, product: Product, num: int, tol: float, tried: set[int]) -> int:
    """The number of Lanczos vectors, of those tried, with which `eigsh` on curvlinops' operator takes the least time.

    How many products ARPACK takes does not depend on who makes them: for the search `product` does, and its share of the
    time is replaced by theirs.
    """
    operator = curvlinops_operator(case, "Hessian", "plain")
    v = torch.randn(operator.shape[0])

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    extra = min(seconds(lambda: operator @ v) for _ in range(3)) - min(seconds(lambda: product(v)) for _ in range(3))
    found = {}
    for ncv in sorted(tried):
        own = Counted(lambda x: product(torch.from_numpy(x.ravel())).numpy())
        found[ncv] = seconds(partial(by_arpack, own, len(v), num, ncv, tol)) + own.num * extra
    return min(found, key=found.__getitem__)


def by_eigenthings(case: Case, num: int, steps: int, again: bool) -> Pairs:
    import hessian_eigenthings as he

    operator = eigenthings_operator(case, "Hessian")
    found = he.lanczos(operator, k=num, max_iter=steps, reorthogonalize=again, seed=0)
    return found.eigenvalues, found.eigenvectors, found.iterations


def eigenthings_steps(product: Product, size: int, num: int, most: int, tol: float, again: bool) -> int:
    """The least number of its Lanczos steps whose `num` largest values have residuals below `tol` times the largest."""
    import hessian_eigenthings as he

    start = torch.randn(size, generator=torch.Generator().manual_seed(0))
    run = he.lanczos_tridiagonal(he.LambdaOperator(product, size), start, most, reorthogonalize=again)
    beta = [*run.betas.tolist(), run.last_beta]
    whole = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    for steps in range(num, most + 1):
        values, vectors = torch.linalg.eigh(whole[:steps, :steps].double())
        top = values.abs().topk(num).indices
        if float(vectors[-1, top].abs().max()) * beta[steps - 1] <= tol * float(values.abs().max()):
            return steps
    return most


def by_pyhessian(case: Case, num: int, most: int, tol: float) -> Pairs:
    made = pyhessian_hessian(case, keep=True)
    torch.manual_seed(0)
    with _counting_pyhessian() as counted:
        values, vectors = made.eigenvalues(maxIter=most, tol=tol, top_n=num)
    return torch.tensor(values), torch.stack([flat(v) / flat(v).norm() for v in vectors]), counted.num


@contextmanager
def _counting_pyhessian():
    module = sys.modules["pyhessian.hessian"]
    kept = module.hessian_vector_product
    counted = module.hessian_vector_product = Counted(kept)
    try:
        yield counted
    finally:
        module.hessian_vector_product = kept


def density_by_curvlinops(case: Case, probes: int, steps: int, ends: tuple[float, float]) -> float:
    """The trace that its density implies; the ends of the spectrum are given, which would cost it further products."""
    import curvlinops

    operator = curvlinops_operator(case, "Hessian", "plain")
    grid, density = curvlinops.lanczos_approximate_spectrum(operator, steps, num_repeats=probes, boundaries=ends)
    return float(torch.trapezoid(grid.double() * density.double(), grid.double())) * operator.shape[0]


def density_by_eigenthings(case: Case, probes: int, steps: int) -> float:
    import hessian_eigenthings as he

    operator = eigenthings_operator(case, "Hessian")
    found = he.spectral_density(operator, num_runs=probes, lanczos_steps=steps, seed=0)
    return float((found.raw_eigenvalues * found.raw_weights).sum()) / probes * operator.size


def density_by_pyhessian(case: Case, probes: int, steps: int) -> float:
    made = pyhessian_hessian(case, keep=True)
    with _eig():
        nodes, weights = made.density(iter=steps, n_v=probes)
    return float((np.array(nodes) * np.array(weights)).sum()) / probes * sum(p.numel() for p in made.params)


@contextmanager
def _eig():
    """`torch.eig` of a symmetric matrix in its old form: values as (real, imaginary), vectors in columns."""
    kept = torch.eig

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    torch.eig = eig
    try:
        yield
    finally:
        torch.eig = kept
