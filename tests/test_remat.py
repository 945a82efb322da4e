"""Oracles: the function as it is under the same transforms; closed forms; differences of values where torch is wrong."""

import itertools
import math
import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import funcscope as fs
from funcscope.core.remat import remat
from funcscope.core.skeleton import TrueDerivatives


def draw(name, *shape):
    return fs.normal(fs.fold_in(fs.key(3), name), torch.empty(shape, dtype=torch.float64))


A, X, V, W = draw("a", 3, 3), draw("x", 3), draw("v", 3), draw("w", 3)
IDS = torch.tensor([2, 0, 2, 1])


def waves(t):
    return (torch.sin(A @ t) * t.exp()).sum()


def attention(t):
    scores = torch.outer(t, t @ A).masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ t.pow(2)


def gathered(t):
    h = (t[IDS] * t.mean()).tanh()
    return h.cumsum(0).reshape(2, 2) @ h[:2]


def unused(t):
    return t[0] * t[1] + torch.ones((), dtype=t.dtype)


def quadratic(t):  # its third derivative, of which nothing depends on t
    return t @ A @ t


FUNCTIONS = {f.__name__: f for f in (waves, attention, gathered, unused, quadratic)}
TRANSFORMS = {
    "grad": lambda f: grad(lambda t: f(t).sum()),
    "jvp": lambda f: lambda t: jvp(f, (t,), (V,))[1],
    "vjp": lambda f: lambda t: _pulled(f, t),
    "vmap": lambda f: lambda t: vmap(f)(torch.stack([t, W * t])),
}


def _pulled(f, t):
    y, pull = vjp(f, t)
    return pull(y.sin())[0] + pull(torch.ones_like(y))[0]


@pytest.mark.slow
@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    order=st.lists(st.sampled_from(sorted(TRANSFORMS)), max_size=3),
    places=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_remat_changes_nothing_under_any_composition(name, order, places):
    """Around the function, and around what transforms make of it, too."""
    plain = FUNCTIONS[name]
    again = remat(plain)
    for transform, place in zip(order, places, strict=False):
        plain, again = TRANSFORMS[transform](plain), TRANSFORMS[transform](again)
        again = remat(again) if place else again
    assert_close(again(X), plain(X), rtol=1e-11, atol=1e-11)


MATRICES = {"jacrev": jacrev, "jacfwd": jacfwd}


@pytest.mark.parametrize("ways", list(itertools.product(MATRICES, repeat=3)), ids="-".join)
def test_third_derivatives_have_their_closed_form(ways):
    """f = sum_i sin(a_i . t): the k-th derivative is sum_i sin(a_i . t + k pi / 2) a_i^(k)."""
    f = remat(lambda t, a: remat(torch.sin)(a @ t).sum())

    def g(t):
        return f(t, A)

    for way in ways:
        g = MATRICES[way](g)
    assert_close(g(X), torch.einsum("r,ri,rj,rk->ijk", torch.sin(A @ X + 1.5 * math.pi), A, A, A))


def test_a_kept_pull_is_linear_and_may_be_called_mapped_and_differentiated():
    """f = sum t^4 / 12: Hv = t^2 v."""
    _, pull = vjp(grad(remat(lambda t: t.pow(4).sum() / 12)), X)
    for v in (V, W, V):
        assert_close(pull(v)[0], X**2 * v)
    assert_close(vmap(pull)(torch.stack([V, W]))[0], X**2 * torch.stack([V, W]))
    assert_close(jvp(lambda u: pull(u)[0], (V,), (W,))[1], X**2 * W)
    assert_close(grad(lambda u: u @ pull(u)[0])(V), 2 * X**2 * V)


def test_hessian_by_backward_and_at_third_order():
    def derivatives(f):
        t = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(t), t, create_graph=True)
        (h,) = torch.autograd.grad(g @ V, t, create_graph=True)
        return g, h, *torch.autograd.grad(h @ V, t)

    assert_close(derivatives(remat(waves)), derivatives(waves))
    t = X.clone().requires_grad_()
    y = remat(waves)(t)
    y.backward(retain_graph=True)
    y.backward()
    assert_close(t.grad, 2 * grad(waves)(X))


def nest(tree, ids, nothing, *, scale, other="name"):
    first, second = tree["pair"]
    h = (first[ids] * second.sum()).sin() * scale
    return {
        "h": h,
        "ids": ids + 1,
        "mask": h > 0,
        "none": nothing,
        "text": other,
        "more": (h.sum(), [first.float().exp()]),
    }


def test_arguments_and_results_of_every_kind():
    tree = {"pair": (X.clone().requires_grad_(), W)}
    again, plain = (f(tree, IDS, None, scale=2) for f in (remat(nest), nest))
    assert pytree.tree_structure(again) == pytree.tree_structure(plain)
    for a, b in zip(pytree.tree_leaves(again), pytree.tree_leaves(plain), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad if isinstance(a, torch.Tensor) else a == b

    tree = {"pair": (X, W)}

    def total(f):
        def of(tree, ids):
            out = f(tree, ids, None, scale=3)
            return out["h"] @ out["ids"].double() + out["more"][0] ** 2 + out["more"][1][0].sum()

        return of

    rows = torch.stack([IDS, IDS.flip(0)])
    for way, index in (
        (grad, IDS),
        (lambda f: jacfwd(grad(f)), IDS),
        (lambda f: vmap(jacrev(grad(f)), in_dims=(None, 0)), rows),
        (lambda f: lambda tree, ids: jvp(lambda t: f(t, ids), (tree,), (tree,)), IDS),
    ):
        assert_close(way(total(remat(nest)))(tree, index), way(total(nest))(tree, index))


def test_integers_among_results_have_tangents_of_zeros():
    def f(t):
        return nest({"pair": (t, W)}, IDS, None, scale=1)["h"], IDS + 1

    assert_close(jvp(remat(f), (X,), (V,)), jvp(f, (X,), (V,)))
    assert_close(vmap(remat(lambda i: (X[i].sin(), i + 1)))(IDS), (X[IDS].sin(), IDS + 1))


def test_unused_inputs_and_results_and_those_that_need_no_gradient():
    f = remat(lambda a, b, c: (a.sin(), (a * c).sum()))
    assert_close(grad(lambda *t: f(*t)[0].sum(), argnums=(0, 1, 2))(X, V, W), (X.cos(), 0 * V, 0 * W))
    t = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(f(t, V, W)[1], t)[0], W)
    assert not any(y.requires_grad for y in f(X, V, W))
    assert_close(jvp(lambda c: f(X, V, c)[1], (W,), (V,))[1], X @ V)
    assert_close(jvp(remat(lambda t: torch.ones(2)), (X,), (V,))[1], torch.zeros(2))
    assert remat(lambda t: (3, None))(X) == (3, None)


@pytest.mark.parametrize(
    "f",
    [
        lambda t: t,
        lambda t: t.reshape(1, 3).T,
        lambda t: (lambda s: (s, s))(t.sin()),
        lambda t: (t, t[:2]),
        lambda t: t.prod().expand(3),
    ],
    ids=["input", "view", "twice", "two views", "expanded"],
)
def test_results_that_share_memory(f):
    def cubes(f):
        return lambda t: sum((k + 1) * y.pow(3).sum() for k, y in enumerate(pytree.tree_leaves(f(t))))

    for way in (grad, hessian, lambda g: jacfwd(jacfwd(g))):
        assert_close(way(cubes(remat(f)))(X), way(cubes(f))(X))
    t = X.clone().requires_grad_()
    pytree.tree_leaves(remat(f)(t))[0].mul_(2).sum().backward()
    assert_close(t.grad, 2 * grad(lambda t: pytree.tree_leaves(f(t))[0].sum())(X))
    assert torch.equal(t.detach(), X)


def test_half_precision_and_mixed_dtypes():
    def mixed(a, b):
        return (a.bfloat16() @ b[:, None].bfloat16()).float().tanh().double().sum() + (
            a.float() * b.float()
        ).sum().exp()

    a, b = A.float(), X
    for way in (lambda f: grad(f, argnums=(0, 1)), lambda f: jacfwd(grad(f, argnums=1), argnums=1)):
        again, plain = way(remat(mixed))(a, b), way(mixed)(a, b)
        assert_close(again, plain, rtol=0, atol=0)
    assert [g.dtype for g in grad(remat(mixed), argnums=(0, 1))(a, b)] == [torch.float32, torch.float64]


def test_complex_numbers():
    def f(t):
        return torch.polar(t.exp(), t.sin()).sum().abs()

    assert_close(hessian(remat(f))(X), hessian(f)(X))


def _net():
    return seeded(2, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))).double()


class Wrapped(nn.Module):
    def __init__(self, again, pooled=True):
        super().__init__()
        self.body, self.again, self.pooled = _net(), again, pooled

    def forward(self, x):
        y = (remat(self.body) if self.again else self.body)(x)
        return y.pow(3).sum() if self.pooled else y


def test_a_module_gives_its_parameters():
    """By `backward` and under `functional_call`, where they are what takes their place."""
    grads = []
    for again in (True, False):
        net = Wrapped(again)
        net(A).backward()
        grads.append([p.grad for p in net.parameters()])
    assert_close(*grads)
    params = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: draw(name, *p.shape) for name, p in params.items()}

    def product(net):
        return jvp(grad(lambda p: functional_call(net, p, (A,))), (params,), (tangents,))[1]

    assert_close(product(Wrapped(True)), product(net))


CAPTURED = {
    "grad": lambda f: grad(f)(W),
    "jvp": lambda f: jvp(f, (W,), (V,)),
    "vmap": lambda f: vmap(f)(A),
    "hessian": lambda f: hessian(f)(W),
    "vmap of grad": lambda f: vmap(grad(f))(A),
    "backward": lambda f: f(nn.Parameter(W.clone())),
}
CAPTURES = {
    "used": lambda w: remat(lambda t: (w * t).sum())(X),
    "returned": lambda w: remat(lambda t: (t, w))(X)[0].sum(),
    "in a list": lambda w: remat(lambda t: torch.stack([w, t]).sum())(X),
    "inside a transform": lambda w: remat(lambda t: grad(lambda s: (w * s).sin().sum())(t).sum())(X),
    "inside two": lambda w: remat(lambda t: hessian(lambda s: (w * s).sin().sum())(t).sum())(X),
    "mapped inside": lambda w: remat(lambda t: vmap(lambda s: (w * s).sum())(t[:, None]).sum())(X),
    "given to another remat": lambda w: remat(lambda t: remat(lambda a, b: (a * b).sum())(t, w))(X),
    "by another remat": lambda w: remat(lambda t: remat(lambda a: (a * w).sum())(t))(X),
    "differentiated outside": lambda w: grad(remat(lambda t: (w * t).sin().sum()))(X).sum(),
    "a default": lambda w: remat(lambda t, w=w: (w * t).sum())(X),
}


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("way", CAPTURED)
def test_a_captured_tensor_that_is_differentiated_is_refused(way, capture):
    with pytest.raises(ValueError, match="pass it as an argument"):
        CAPTURED[way](CAPTURES[capture])


def test_what_is_computed_inside_and_captured_by_an_inner_remat_is_refused():
    def outer(t):
        h = t.sin()
        return remat(lambda s: (s * h).sum())(t)

    with pytest.raises(ValueError, match="pass it as an argument"):
        grad(remat(outer))(X)
    with pytest.raises(ValueError, match="pass it as an argument"):
        remat(outer)(X.clone().requires_grad_()).backward()


def test_captured_constants_metadata_and_transforms_inside_are_taken():
    """A guard that refuses everything would pass the tests above."""

    def inner(t):
        return grad(lambda s: (W * s).sin().sum() * len(s))(t).pow(2).sum()

    def buffer(t):
        return torch.zeros(3, dtype=t.dtype).add_(t).sin_().sum()

    weight = nn.Parameter(W.clone())
    with torch.no_grad():
        assert_close(remat(lambda t: weight @ t)(X), W @ X)
    assert_close(hessian(remat(inner))(X), hessian(inner)(X))
    assert_close(grad(lambda w: remat(lambda t: t.sum() * w.shape[0] * w.ndim)(w))(X), torch.full_like(X, 3))
    assert_close(vmap(hessian(remat(inner)))(A), vmap(hessian(inner))(A))
    assert_close(hessian(remat(buffer))(X), (-X.sin()).diag())


def test_parameters_of_a_scripted_module_do_not_slip_through():
    module = torch.jit.script(_net())
    with pytest.raises(ValueError, match="pass it as an argument"):
        remat(lambda t: module(t).sum())(X)
    with pytest.raises(ValueError, match="written in Python"):
        remat(module)


class Noisy(nn.Module):
    """Dropout by its module, which ends in eval mode, or for ever."""

    def __init__(self, always):
        super().__init__()
        self.first, self.drop, self.always = nn.Linear(3, 3), nn.Dropout(0.5), always

    def forward(self, x):
        return F.dropout(self.first(x), 0.5) if self.always else self.drop(self.first(x))


def test_a_model_in_training_mode_is_its_function_and_one_that_draws_for_ever_is_refused():
    def loss_of(always, remat):
        model = seeded(0, lambda: nn.Sequential(Noisy(always), nn.Linear(3, 1)).double().train())
        loss = fs.objective(fs.functional(model, remat=remat), [(A, A[:, :1])], fs.mse)
        return loss(loss.net.theta)

    assert_close(loss_of(False, ["0"]), loss_of(False, "none"))
    refused = pytest.raises(ValueError, match=r"draws random numbers, and would draw others .*switch dropout off")
    with torch.random.fork_rng(), refused:
        loss_of(True, ["0"])


def test_random_numbers_writes_and_plain_dual_levels_are_refused():
    with torch.random.fork_rng():
        for call in (
            lambda f: f(X),
            lambda f: grad(lambda t: f(t).sum())(X),
            lambda f: vmap(f, randomness="different")(A),
        ):
            with pytest.raises(ValueError, match="draw before"):
                call(remat(lambda t: F.dropout(t, 0.5)))
    assert_close(grad(remat(lambda t: F.dropout(t, 0.5, training=False).sum()))(X), torch.ones_like(X))
    with pytest.raises(ValueError, match="write to a clone"):
        remat(lambda t: t.mul_(2))(X.clone())
    with pytest.raises(ValueError, match="write to a clone"):
        remat(nn.BatchNorm1d(3).double())(A)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"torch\.func\.jvp"):
        remat(torch.sin)(forward_ad.make_dual(X, V))


def test_modes_of_the_call_are_those_of_later_evaluations():
    """Torch takes the saved mean of a layer norm for a constant; `TrueDerivatives` does not."""

    def norm(t):
        return F.layer_norm(t, (3,)).pow(3).sum()

    def inside(t):
        with TrueDerivatives():
            return remat(norm)(t)

    eye, h = torch.eye(3, dtype=torch.float64), 1e-4
    shifts = [
        [norm(X + h * (a + b)) - norm(X + h * (a - b)) - norm(X - h * (a - b)) + norm(X - h * (a + b)) for b in eye]
        for a in eye
    ]
    true = torch.stack([torch.stack(row) for row in shifts]) / (4 * h * h)
    pull = vjp(grad(inside), X)[1]
    for H in (jacfwd(jacfwd(inside))(X), jacrev(jacfwd(inside))(X), torch.stack([pull(e)[0] for e in eye])):
        assert_close(H, true, rtol=1e-5, atol=1e-5)
    assert (jacrev(jacfwd(norm))(X) - true).abs().max() > 1e-2  # the control: without the mode


def test_what_a_mode_puts_in_the_place_of_an_argument_is_differentiated():
    place, value = torch.empty(3, device="meta"), W.clone().requires_grad_()

    class Swap(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*(value if x is place else x for x in args), **(kwargs or {}))

    with Swap():
        y = remat(lambda t: t.pow(3).sum())(place)
    y.backward()
    assert_close(value.grad, 3 * W**2)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_that_uses_remat_is_measured_as_the_one_that_does_not(lazy):
    measured = []
    for again in (True, False):
        net = fs.functional(nn.Sequential(Wrapped(again, pooled=False), nn.Tanh()))
        loss = fs.objective(net, [(A, torch.tensor([0, 1, 0]))], fs.classification)
        lines = fs.directional_losses(
            loss, net.theta, key=fs.key(0), n_samples=2, compute_gradient=True, slope="jvp", lazy=lazy
        )
        measured.append(
            (lines.losses, lines.slopes, fs.hessian(loss, net.theta)(net.theta), fs.ggn(loss, net.theta)(net.theta))
        )
    assert_close(*measured)


SMOOTH = {
    "silu": F.silu, "mish": F.mish, "gelu": F.gelu, "softplus": F.softplus, "logsigmoid": F.logsigmoid,
    "group norm": lambda t: F.group_norm(t, 2),
    "attention": lambda t: F.scaled_dot_product_attention(*[t[None, None]] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_operations_that_choose_their_kernel_by_what_is_differentiated(name):
    x, v = draw("rows", 4, 6), draw("tangent", 4, 6)

    def second(f):
        def loss(t):
            return f(t).square().sum()

        forward = jvp(grad(loss), (x,), (v,))[1]
        backward = vjp(grad(loss), x)[1](v)[0]
        return (
            forward,
            backward,
            grad(lambda t: jvp(loss, (t,), (v,))[1])(x),
            jvp(lambda t: jvp(loss, (t,), (v,))[1], (x,), (v,)),
        )

    with sdpa_kernel(SDPBackend.MATH):
        assert_close(second(remat(SMOOTH[name])), second(SMOOTH[name]), rtol=1e-12, atol=1e-12)


def test_attention_in_remat_in_a_model_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.mix = nn.Linear(3, 3)
            self.attend = remat(F.scaled_dot_product_attention) if again else F.scaled_dot_product_attention

        def forward(self, x):
            q = self.mix(x)[:, None]
            return self.attend(q, q, q)[:, 0].mean(1)

    products = []
    for again in (True, False):
        net = fs.functional(seeded(0, partial(Attention, again)).double())
        loss = fs.objective(net, [(draw("texts", 4, 5, 3), torch.tensor([0, 1, 2, 1]))], fs.classification)
        products.append((fs.hessian(loss, net.theta)(net.theta), fs.ggn(loss, net.theta)(net.theta)))
    assert_close(*products)


def test_autocast_of_the_call_is_that_of_its_backward():
    grads = []
    for f in (remat(torch.matmul), torch.matmul):
        a = A.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            y = f(a, A.float())
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        grads.append(a.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("again", [True, False])
def test_nothing_between_is_kept(again):
    between = []

    def f(t):
        h = t.exp()
        if not between:
            between.append(StorageWeakRef(h.untyped_storage()))
        return h.sin().sum()

    y = (remat(f) if again else f)(X.clone().requires_grad_())
    assert y.requires_grad
    assert between[0].expired() == again
    y.backward()


MEMORY = textwrap.dedent("""
    import sys
    import torch
    from torch.func import grad, jvp, vjp
    from funcscope.core.remat import remat

    def block(x, w):
        for _ in range(6):
            x = (x * w).tanh()
        return x

    def loss(w):
        x = torch.ones(2**18)
        for _ in range(8):
            x = layer(x, w)
        return x.mean()

    def high_water():  # of this process alone: `ru_maxrss` would start with its parent's
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    layer, w = block, torch.ones(2**4)
    small = lambda w: block(torch.ones(2**4), w).sum()
    jvp(grad(small), (w,), (w,)), vjp(grad(small), w)[1](w)  # what torch loads at its first use
    layer, w = (remat(block) if sys.argv[1] == "remat" else block), torch.full((2**18,), 0.9)
    before = high_water()
    if sys.argv[2] == "vjp":
        product = vjp(grad(loss), w)[1](w)[0]
    else:
        product = jvp(grad(loss), (w,), (w,))[1]
    print(high_water() - before, float(product.double().norm()))
""")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["vjp", "jvp"])
def test_peak_memory_of_a_hessian_product(way):
    """Eight blocks of six products and as many tanh, 1 MiB a tensor: a graph of the whole against that of one block."""

    def measured(how):
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back: no peak of fragments
        command = [sys.executable, "-c", MEMORY, how, way]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        return [float(x) for x in done.stdout.split()]

    (less, product), (more, same) = measured("remat"), measured("plain")
    assert product == pytest.approx(same, rel=1e-5)
    assert more > 96  # the control: two tensors of each of 48 steps
    assert less < more / 2
