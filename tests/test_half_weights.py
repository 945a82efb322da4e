"""Weights in bfloat16 with theta, tangents and directions in float32: every operator against the same weights in float32.

The oracle is a copy of the model whose (rounded) weights were cast to float32 beforehand. A product of the bfloat16 model
carries the rounding of its layers, a relative error of 2^-8 a few times; in `functional(dtype=torch.float32)` none.
"""

import copy
import warnings

import pytest
import torch
from problems import problem, relative
from torch.func import grad, jacfwd, jvp

import funcscope as fs
from funcscope.curvature.fisher import fisher_diagonal_mc
from funcscope.curvature.leafwise import curvature_along, gradient_at, slope_along
from funcscope.curvature.leafwise_trace import leafwise_trace

HALF, CAST = 3e-2, 1e-6


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def losses(request):
    """In bfloat16, cast where it is used, and cast beforehand."""
    model, batches, criterion = problem(request.param, torch.bfloat16)
    wide = copy.deepcopy(model).float()
    nets = fs.functional(model), fs.functional(model, dtype=torch.float32), fs.functional(wide)
    assert nets[0].layout.dtype == torch.bfloat16
    return [fs.objective(net, batches, criterion) for net in nets]


def tangent(loss):
    return fs.normal(fs.key(1), loss.net.theta)


def dirs(loss):
    return fs.directions(loss.net, key=fs.key(4), num=2)


def sampled(loss, **options):
    asked = {"n_samples": 4, "span": 0.2, "two_sided": True, "compute_gradient": True, "compute_curvature": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of directions that bfloat16 rounds
        return fs.directional_losses(loss, loss.net.params, key=fs.key(5), **asked, **options)


def leaves(loss):
    return loss.wide_leaves(loss.net.params), loss.layout.unravel(tangent(loss), cast=False)


PRODUCTS = {
    "hessian": lambda loss: fs.hessian(loss, loss.net.theta),
    "hessian of leaves": lambda loss: fs.hessian(loss, loss.net.params),
    "hessian, head by chunks": lambda loss: fs.hessian(loss, loss.net.theta, head_chunk=4),
    "hessian, rebuilt": lambda loss: fs.hessian(loss, loss.net.theta, keep=False),
    "ggn": lambda loss: fs.ggn(loss, loss.net.theta),
    "ggn, head by chunks": lambda loss: fs.ggn(loss, loss.net.theta, head_chunk=4),
    "ggn, rebuilt": lambda loss: fs.ggn(loss, loss.net.theta, keep=False),
    "exact Fisher": lambda loss: fs.exact_fisher(loss, loss.net.theta),
    "sampled Fisher": lambda loss: fs.fisher_mc(loss, loss.net.theta, key=fs.key(2), num=2),
    "empirical Fisher": lambda loss: fs.empirical_fisher(loss, loss.net.theta),
    "empirical Fisher of tokens": lambda loss: fs.empirical_fisher(loss, loss.net.theta, unit="token"),
}
OTHERS = {
    "gradient": lambda loss: grad(loss)(loss.net.theta),
    "slope": lambda loss: jvp(loss, (loss.net.theta,), (tangent(loss),))[1],
    "gradients of sequences": lambda loss: fs.per_sample_gradients(loss, loss.net.theta),
    "their norms": lambda loss: fs.gradient_norms(loss, loss.net.theta).values,
    "products with their Gram matrix": lambda loss: fs.gram_matvec(loss, loss.net.theta)(
        torch.ones(len(loss.terms(loss.net.theta)[0]))
    ),
    "forms of sequences": lambda loss: fs.sequence_forms(loss, loss.net.theta, tangent(loss)[None]).values,
    "Fisher diagonal": lambda loss: fisher_diagonal_mc(loss, loss.net.theta, key=fs.key(2), num=2).value,
    "traces leaf by leaf": lambda loss: leafwise_trace(loss, loss.net.params, key=fs.key(3), num=4).forms.values,
    "Gauss-Newton traces leaf by leaf": lambda loss: (
        leafwise_trace(loss, loss.net.params, key=fs.key(3), num=4, matrix="ggn").forms.values
    ),
    "gradient leaf by leaf": lambda loss: torch.cat([x.flatten() for x in gradient_at(loss, leaves(loss)[0])[0].values()]),
    "curvature leaf by leaf": lambda loss: torch.tensor([curvature_along(loss, *leaves(loss), 1.0)]),
    "slope leaf by leaf": lambda loss: torch.tensor([slope_along(loss, *leaves(loss), 1.0)]),
    "curvatures along directions": lambda loss: fs.directional_curvatures(loss, loss.net.theta, dirs(loss)).hessian,
    "slopes of a restriction": lambda loss: grad(fs.restrict(loss, loss.net.params, dirs(loss)))(torch.zeros(2)),
    "curvatures of a restriction": lambda loss: (
        jacfwd(grad(fs.restrict(loss, loss.net.params, dirs(loss))))(torch.zeros(2))
    ),
    "directional losses": lambda loss: sampled(loss).losses,
    "directional slopes": lambda loss: sampled(loss).slopes,
    "directional slopes by jvp": lambda loss: sampled(loss, lazy=True, slope="jvp").slopes,
    "directional curvatures": lambda loss: sampled(loss, curvature="exact").curvatures,
    "directional curvatures, lazy": lambda loss: sampled(loss, lazy=True, curvature="exact").curvatures,
    "flatness": lambda loss: fs.flatness(loss, loss.net.params, key=fs.key(7), n_directions=4, epsilon=0.3).delta_losses,
    "sharpness": lambda loss: torch.tensor([fs.sam_sharpness(loss, loss.net.params).absolute], dtype=torch.float64),
    "eigenvalues": lambda loss: fs.eigenpairs(fs.ggn(loss, loss.net.theta), loss.net.theta, key=fs.key(0), num=2).values,
}  # fmt: skip
SLOW = {"directional slopes by jvp", "directional curvatures, lazy"} | {x for x in OTHERS if "traces" in x}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_float32_vectors(losses, name):
    half, cast, wide = (PRODUCTS[name](loss)(tangent(loss)) for loss in losses)
    assert half.dtype == cast.dtype == torch.float32
    assert 0 < relative(half, wide) < HALF
    assert relative(cast, wide) < CAST


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in OTHERS])
def test_what_is_measured_with_float32_tangents(losses, name):
    half, cast, wide = (OTHERS[name](loss) for loss in losses)
    assert half.dtype in (torch.float32, torch.float64)
    assert 0 < relative(half, wide) < HALF
    assert relative(cast, wide) < CAST


@pytest.mark.parametrize("name", [*PRODUCTS, "differences"])
def test_a_vector_of_another_dtype_is_cast_and_the_product_is_thetas(losses, name):
    loss = losses[2]
    matvec = fs.hessian_difference(loss, loss.net.theta) if name == "differences" else PRODUCTS[name](loss)
    rounded = tangent(loss).bfloat16()
    wanted = matvec(rounded.float())
    for v in (rounded, rounded.double()):
        assert torch.equal(matvec(v), wanted)


def test_differences_of_gradients_know_their_error(losses):
    half, _, wide = (fs.hessian(loss, loss.net.theta)(tangent(loss)) for loss in losses)
    matvec, v = fs.hessian_difference(losses[0], losses[0].net.theta), tangent(losses[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the product is known to some percent
        product = matvec(v)
    assert product.dtype == torch.float32
    assert float((product - wide).norm() / v.norm()) < 3 * matvec.error()
    assert relative(half, wide) < relative(product, wide) < 0.2
