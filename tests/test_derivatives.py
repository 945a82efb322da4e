"""Oracle: differences of values in float64. Every way of differentiation of every function in a table, as the net runs it."""

import itertools
import math
import warnings

import pytest
import torch
from problems import seeded
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence

import funcscope as fs
from funcscope.core.primitives import replaced
from funcscope.core.skeleton import TrueDerivatives
from funcscope.curvature.derivatives import along_line

aten, linalg = torch.ops.aten, torch.linalg


def draw(name, *shape):
    return fs.normal(fs.fold_in(fs.key(1), name), torch.empty(shape, dtype=torch.float64))


X, IMAGE, SQUARE = draw("x", 4, 5), draw("image", 2, 3, 6, 6), 0.3 * draw("square", 4, 4) + 2 * torch.eye(4).double()
W, B, Y, RIGHT = draw("w", 5), draw("b", 5), draw("y", 4, 5), draw("right", 4, 2)
IDS, CLASSES = torch.tensor([[0, 1, 2], [2, 3, 0]]), torch.tensor([0, 1, 2, 1])
SEQUENCES, THREE = draw("sequences", 2, 3, 5), draw("three", 2, 6, 3)
MASK = THREE[:, None, :3, :3] > 0
ONE, ZERO = torch.ones(5).double(), torch.zeros(5).double()


def definite(t):
    return t @ t.T + torch.eye(len(t), dtype=t.dtype)


REPLACED = {
    "layer_norm": (lambda t: F.layer_norm(t, (5,), W, B), X),
    "layer_norm in its weight": (lambda t: F.layer_norm(t * t, (5,), t[0], t[1]), X),
    "torch.layer_norm": (lambda t: torch.layer_norm(t, (5,), W, B), X),
    "native_layer_norm": (lambda t: torch.native_layer_norm(t, (5,), W, B, 1e-5)[0], X),
    "aten.layer_norm": (lambda t: aten.layer_norm.default(t, (5,), W, B), X),
    "aten.native_layer_norm": (lambda t: aten.native_layer_norm.default(t, (5,), W, B, 1e-5)[0], X),
    "batch_norm": (lambda t: F.batch_norm(t, None, None, W, B, True), X),
    "torch.batch_norm": (lambda t: torch.batch_norm(t, W, B, None, None, True, 0.1, 1e-5, False), X),
    "native_batch_norm": (lambda t: torch.native_batch_norm(t, W, B, None, None, True, 0.1, 1e-5)[0], X),
    "aten.batch_norm": (lambda t: aten.batch_norm.default(t, W, B, None, None, True, 0.1, 1e-5, False), X),
    "aten.legit_batch_norm": (lambda t: aten._native_batch_norm_legit.no_stats(t, W, B, True, 0.1, 1e-5)[0], X),
    "attention": (lambda t: F.scaled_dot_product_attention(t, t * t, t.sin(), is_causal=True), SEQUENCES[:, None]),
    "attention with a mask": (
        lambda t: F.scaled_dot_product_attention(t, t, t, MASK),
        SEQUENCES[:, None],
    ),
    "aten.attention": (lambda t: aten.scaled_dot_product_attention.default(t, t, t, scale=0.3), SEQUENCES[:, None]),
    "instance_norm": (F.instance_norm, SEQUENCES),
    "torch.instance_norm": (
        lambda t: torch.instance_norm(t, None, None, None, None, True, 0.1, 1e-5, False),
        SEQUENCES,
    ),
    "weight_norm": (lambda t: torch._weight_norm(t[:, 1:], t[:, :1], 0), X),
    "weight_norm of columns": (lambda t: torch._weight_norm(t[1:], t[:1], 1), X),
    "weight_norm of all": (lambda t: torch._weight_norm(t[1:], t[0, 0], -1), X),
    "aten.weight_norm": (lambda t: aten._weight_norm.default(t[:, 1:], t[:, :1], 0), X),
    "weight_norm_interface": (
        lambda t: torch._weight_norm_interface(t[:, 1:].contiguous(), t[:, :1].contiguous(), 0)[0],
        X,
    ),
    "det": (torch.det, SQUARE),
    "Tensor.det": (lambda t: t.det(), SQUARE),
    "linalg.det": (lambda t: linalg.det(-t), SQUARE),
    "logdet": (lambda t: torch.logdet(definite(t)), SQUARE),
    "slogdet": (lambda t: linalg.slogdet(t)[1] + torch.slogdet(t).logabsdet, SQUARE),
    "solve": (lambda t: linalg.solve(t, RIGHT), SQUARE),
    "solve, both": (lambda t: linalg.solve(t, t[:, :2] + 1), SQUARE),
    "solve, from the right": (lambda t: linalg.solve(t, RIGHT.T, left=False), SQUARE),
    "solve, a vector": (lambda t: linalg.solve(t, RIGHT[:, 0]), SQUARE),
    "solve_ex": (lambda t: linalg.solve_ex(t, RIGHT)[0], SQUARE),
    "tensorsolve": (lambda t: linalg.tensorsolve(t, RIGHT[:, 0]), SQUARE),
    "triangular_solve": (lambda t: torch.triangular_solve(RIGHT, t)[0], SQUARE),
    "cholesky_inverse": (lambda t: torch.cholesky_inverse(t.tril()), SQUARE),
    "householder_product": (lambda t: linalg.householder_product(t[:, :3], t[3, :2]), SQUARE),
    "glu": (lambda t: F.glu(t[:, :4]), X),
    "hardsigmoid": (lambda t: F.hardsigmoid(t), X),
    "embedding_bag": (lambda t: F.embedding_bag(IDS, t), X),
    "embedding_bag, max": (lambda t: F.embedding_bag(IDS, t, mode="max"), Y),
    "embedding_bag, weighted": (lambda t: F.embedding_bag(IDS, t, mode="sum", per_sample_weights=t[:2, :3]), X),
    "embedding_bag, bags": (
        lambda t: F.embedding_bag(IDS.flatten(), t, torch.tensor([0, 2, 2]), padding_idx=2, mode="mean"),
        X,
    ),
}


def over_rows(f):
    """The function along the last dimension."""
    return lambda t: f(t, dim=-1)


PLAIN = {
    **{
        name: (getattr(F, name), 1.3 * X) for name in "relu gelu silu mish elu selu celu softplus softsign tanh".split()
    },
    **{name: (getattr(F, name), 1.3 * X) for name in "sigmoid logsigmoid hardswish leaky_relu tanhshrink".split()},
    **{name: (over_rows(getattr(F, name)), X) for name in "softmax log_softmax softmin".split()},
    **{name: (over_rows(getattr(torch, name)), X) for name in "logsumexp logcumsumexp cumsum cumprod".split()},
    **{name: (over_rows(getattr(torch, name)), X) for name in "var std prod amax mean".split()},
    **{name: (getattr(linalg, name), SQUARE) for name in "inv matrix_exp pinv svdvals".split()},
    "cholesky": (lambda t: linalg.cholesky(definite(t)), SQUARE),
    "eigvalsh": (lambda t: linalg.eigvalsh(t + t.T), SQUARE),
    "qr": (lambda t: linalg.qr(t)[1], SQUARE),
    "solve_triangular": (lambda t: linalg.solve_triangular(t.tril(), RIGHT, upper=False), SQUARE),
    "lu": (lambda t: linalg.lu(t)[2], SQUARE),
    "vector_norm": (lambda t: linalg.vector_norm(t, dim=-1), X),
    "normalize": (lambda t: F.normalize(t), X),
    "rms_norm": (lambda t: F.rms_norm(t, (5,), W), X),
    "group_norm": (lambda t: F.group_norm(t, 3), THREE),
    "torch.group_norm": (lambda t: torch.group_norm(t, 3), THREE),
    "batch_norm, eval": (lambda t: F.batch_norm(t, ZERO, ONE, t[0], t[1], False), X),
    "sort": (lambda t: t.sort(-1)[0], X),
    "topk": (lambda t: t.topk(2, -1)[0], X),
    "conv2d": (lambda t: F.conv2d(t, t[:, :, :3, :3]), IMAGE),
    "conv_transpose2d": (lambda t: F.conv_transpose2d(t, t[:, :, :2, :2].mT.reshape(3, 2, 2, 2)), IMAGE),
    "max_pool2d": (lambda t: F.max_pool2d(t, 2), IMAGE),
    "avg_pool2d": (lambda t: F.avg_pool2d(t, 2), IMAGE),
    "interpolate": (lambda t: F.interpolate(t, scale_factor=2, mode="bilinear"), IMAGE),
    "embedding": (lambda t: F.embedding(IDS, t), X),
    "index_add": (lambda t: torch.zeros(4, 5).double().index_add(0, CLASSES, t) * t, X),
    "cross_entropy": (lambda t: F.cross_entropy(t, CLASSES, label_smoothing=0.1, weight=W**2), X),
    "kl_div": (lambda t: F.kl_div(Y.log_softmax(-1), t.softmax(-1), reduction="none"), X),
    "rfft": (lambda t: torch.view_as_real(torch.fft.rfft(t)), X),
    "attention": (lambda t: F.softmax(t @ t.mT, -1) @ t, SEQUENCES),
    "gru_cell": (lambda t: torch.gru_cell(Y, t[:, :2], W[:, None].repeat(1, 6).T, t[:2].repeat(3, 1)[:, :2]), X),
}
"""Right in torch as they are."""


def form(f, x, name):
    """A number made of all outputs; the same for the same shapes."""

    def phi(t):
        out = f(t)
        w, u = draw(f"{name} w", *out.shape), draw(f"{name} u", *out.shape)
        return (w * out + u * out.square() / 2).sum()

    return phi, draw(f"{name} d", *x.shape), draw(f"{name} e", *x.shape)


def differences(phi, x, d, e, h=5e-4):
    """First derivative along d, second along d, and mixed, of fourth order in h."""

    def at(v, k):
        return float(phi(x + k * h * v))

    def second(v):
        return (-at(v, 2) + 16 * at(v, 1) - 30 * at(v, 0) + 16 * at(v, -1) - at(v, -2)) / (12 * h * h)

    return (
        (-at(d, 2) + 8 * at(d, 1) - 8 * at(d, -1) + at(d, -2)) / (12 * h),
        second(d),
        (second(d + e) - second(d - e)) / 4,
    )


def ways(phi, x, d, e):
    """way -> (which of the differences it is, its value)."""
    zero, one, both = x.new_zeros(()), x.new_ones(()), torch.stack([e, d])

    def twice(v):
        return jvp(lambda a: jvp(lambda b: phi(x + b * v), (a,), (one,))[1], (zero,), (one,))[1]

    return {
        "grad": (0, lambda: (grad(phi)(x) * d).sum()),
        "jvp": (0, lambda: jvp(phi, (x,), (d,))[1]),
        "vmap of jvp": (0, lambda: vmap(lambda v: jvp(phi, (x,), (v,))[1])(both)[1]),
        "jvp of jvp": (1, lambda: twice(d)),
        "vmap of jvp of jvp": (1, lambda: vmap(twice)(both)[1]),
        "jvp of grad": (2, lambda: (jvp(grad(phi), (x,), (d,))[1] * e).sum()),
        "vjp of grad": (2, lambda: (vjp(grad(phi), x)[1](d)[0] * e).sum()),
        "grad of jvp": (2, lambda: (grad(lambda t: jvp(phi, (t,), (d,))[1])(x) * e).sum()),
        "vmap of vjp of grad": (2, lambda: (vmap(vjp(grad(phi), x)[1])(both)[0][1] * e).sum()),
    }


def wrong(f, x, name, only=None):
    phi, d, e = form(f, x, name)
    truth, bad = differences(phi, x, d, e), []
    for way, (which, take) in ways(phi, x, d, e).items():
        if only and way not in only:
            continue
        try:
            value = float(take())
        except (NotImplementedError, RuntimeError):
            value = float("nan")
        if not abs(value - truth[which]) <= 2e-5 * max(abs(truth[which]), abs(truth[0]), 1e-2):
            bad.append(way)
    return bad


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REPLACED))
def test_functions_that_torch_has_wrong_are_right_while_a_model_runs(name):
    f, x = REPLACED[name]
    with TrueDerivatives():
        assert wrong(f, x, name, only=("jvp of jvp", "vjp of grad")) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REPLACED))
def test_every_way_is_right_that_is_wrong_in_torch(name):
    f, x = REPLACED[name]
    assert wrong(f, x, name), "torch differentiates it: nothing to replace"
    with TrueDerivatives():
        assert wrong(f, x, name) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_functions_that_are_left_alone_are_right(name):
    f, x = PLAIN[name]
    with TrueDerivatives():
        assert wrong(f, x, name) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replaced_functions_have_the_values_of_torch(dtype):
    with torch.no_grad():
        for name, (f, x) in REPLACED.items():
            if dtype != torch.bfloat16 or name in ("layer_norm", "batch_norm", "instance_norm", "weight_norm", "glu"):
                cells = (
                    dict(zip(f.__code__.co_freevars, f.__closure__ or (), strict=True))
                    if hasattr(f, "__code__")
                    else {}
                )
                assert not cells
                wanted = with_dtype(f, dtype)(x.to(dtype))
                with TrueDerivatives():
                    value = with_dtype(f, dtype)(x.to(dtype))
                assert value.dtype == wanted.dtype
                tolerance = 20 * torch.finfo(dtype).eps * float(wanted.abs().max() + 1)
                torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance)


def with_dtype(f, dtype):
    """The function with the constants of this page in another dtype."""

    def g(x):
        names = ("W", "B", "RIGHT", "Y")
        before = {name: globals()[name] for name in names}
        globals().update({name: value.to(dtype) for name, value in before.items()})
        try:
            return f(x)
        finally:
            globals().update(before)

    return g


RECURRENT = list(
    itertools.product((nn.LSTM, nn.GRU, nn.RNN), ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False}))
)
RECURRENT += [(nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True, "batch_first": True})]
RECURRENT += [(nn.LSTM, {"proj_size": 2, "bias": False}), (nn.RNN, {"nonlinearity": "relu", "batch_first": True})]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers_step_by_step_are_those_of_torch(kind, options, packed):
    """Values and all states against the fused kernels, gradients against plain autograd."""
    layer = seeded(0, lambda: kind(3, 4, **options)).double()
    first = options.get("batch_first", False)
    x = draw("recurrent", *((2, 5, 3) if first else (5, 2, 3)))
    names = [name for name, _ in layer.named_parameters()]
    values = {name: value.detach() for name, value in layer.named_parameters()}

    def run(values):
        sequence = pack_padded_sequence(x, [5, 3], batch_first=first) if packed else x
        out, state = functional_call(layer, values, (sequence,))
        return [out.data if packed else out, *(state if isinstance(state, tuple) else (state,))]

    wanted = run(values)
    with TrueDerivatives():
        value, slopes = jvp(run, (values,), (values,))
        gradient = grad(lambda v: sum(out.square().sum() for out in run(v)))(values)
    assert len(value) == len(wanted)
    for a, b in zip(value, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    plain = torch.autograd.grad(
        sum(out.square().sum() for out in run(dict(layer.named_parameters()))), [*layer.parameters()]
    )
    for name, b in zip(names, plain, strict=True):
        torch.testing.assert_close(gradient[name], b, rtol=1e-10, atol=1e-12)
    h = 1e-6
    up, down = (run({k: v * (1 + s * h) for k, v in values.items()}) for s in (1, -1))
    for slope, p, m in zip(slopes, up, down, strict=True):
        torch.testing.assert_close(slope, (p - m) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_those_of_torch(cell):
    module, x = seeded(0, lambda: cell(3, 4)).double(), draw("cell", 2, 3)
    values = {name: value.detach() for name, value in module.named_parameters()}
    wanted = module(x)
    with TrueDerivatives():
        value, _ = jvp(lambda v: functional_call(module, v, (x,)), (values,), (values,))
    torch.testing.assert_close(value, wanted if isinstance(wanted, Tensor) else tuple(wanted), rtol=1e-12, atol=1e-13)


Tensor = torch.Tensor


class Reader(nn.Module):
    """A recurrent classifier."""

    def __init__(self, kind, size=4):
        super().__init__()
        self.layer, self.out = kind(3, size, batch_first=True), nn.Linear(size, 3)

    def forward(self, x):
        return self.out(self.layer(x)[0][:, -1])


def reading(kind, dtype=torch.float64, scale=1.0):
    model = seeded(0, lambda: Reader(kind)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(scale)
    return fs.objective(
        fs.functional(model),
        [(draw("texts", 7, 4, 3).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2, 0]))],
        fs.classification,
    )


def dense(loss, theta, h=1e-5):
    """Differences of gradients, which plain reverse mode gives."""
    columns = [
        (grad(loss)(theta + h * e) - grad(loss)(theta - h * e)) / (2 * h) for e in torch.eye(len(theta)).double()
    ]
    return torch.stack(columns, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_have_everything_that_others_have(kind):
    loss, single = reading(kind), reading(kind, torch.float32)
    theta = loss.net.theta
    H, v = dense(loss, theta), draw("v", loss.layout.num)
    for keep in (True, False):
        torch.testing.assert_close(fs.hessian(loss, theta, keep=keep)(v), H @ v, rtol=1e-6, atol=1e-7)
        product = fs.hessian(single, single.net.theta, keep=keep)(v.float()).double()
        assert float((product - H @ v).norm() / (H @ v).norm()) < 1e-4
    mapped, loop = (fs.directional_losses(loss, theta, key=fs.key(0), n_samples=3, span=0.1, chunk=c) for c in (3, 1))
    torch.testing.assert_close(mapped.losses, loop.losses, rtol=1e-9, atol=0)
    rows = fs.per_sample_gradients(loss, theta)
    torch.testing.assert_close(rows.mean(0), grad(loss)(theta), rtol=1e-9, atol=1e-12)
    sharpness = fs.sam_sharpness(loss, theta)
    g = grad(loss)(theta)
    assert sharpness.curvature == pytest.approx(float(g @ H @ g / g.square().sum()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_difference_hessian_is_right_where_one_step_is_not(kind):
    """Large weights: the default step leaves the range of the second derivative."""
    loss = reading(kind, torch.float32, scale=6.0)
    exact = reading(kind, scale=6.0)
    H = dense(exact, exact.net.theta, h=1e-6)
    top = torch.linalg.eigh(H)
    v = top.eigenvectors[:, -1]
    matvec = fs.hessian_difference(exact, exact.net.theta)
    assert float((matvec(v) - H @ v).norm() / (H @ v).norm()) < 1e-3
    single = fs.hessian_difference(loss, loss.net.theta)
    off = float((single(v.float()).double() - H @ v).norm())
    assert off < 0.05 * float(top.eigenvalues[-1])
    one_step = fs.hessian_difference(loss, loss.net.theta, step=3.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rough = one_step(v.float()).double()
    assert float((rough - H @ v).norm()) > 0.05 * float(top.eigenvalues[-1])  # the control: such a step is too long
    assert one_step.error() > 0.05 * float(rough.norm())
    assert "hessian" in str(caught[0].message)


@pytest.mark.slow
def test_the_error_of_a_difference_hessian_covers_it():
    """Over directions and steps: the deviation from the dense product is below the error that is said."""
    loss = reading(nn.LSTM, torch.float64, scale=3.0)
    theta = loss.net.theta
    H = dense(loss, theta)
    covered = []
    for i, step in itertools.product(range(20), (None, 1e-2, 1e-1, 1e-6)):
        v = draw(f"direction {i}", len(theta))
        matvec = fs.hessian_difference(loss, theta, step=step)
        assert matvec.error() == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            off = float((matvec(v) - H @ v).norm() / v.norm())
        covered.append(off <= matvec.error() + 1e-8 * float(H.norm()))
    assert sum(covered) >= 0.95 * len(covered)


@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        lambda m: parametrizations.weight_norm(m, dim=None),
        parametrizations.spectral_norm,
        lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"),
        lambda m: parametrizations.orthogonal(m, orthogonal_map="matrix_exp"),
    ],
)
def test_parametrized_weights_have_the_hessian_of_the_values(change):
    model = seeded(1, lambda: nn.Sequential(change(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3))).double()
    loss = fs.objective(fs.functional(model), [(draw("x", 6, 3), CLASSES[[0, 1, 2, 3, 0, 1]])], fs.classification)
    theta = loss.net.theta
    d, e = draw("d", len(theta)), draw("e", len(theta))
    _, curvature, mixed = differences(loss, theta, d, e)
    for keep in (True, False):
        H = fs.hessian(loss, theta, keep=keep)
        assert float(e @ H(d)) == pytest.approx(mixed, rel=1e-5, abs=1e-7)
        assert float(d @ H(e)) == pytest.approx(mixed, rel=1e-5, abs=1e-7)
    assert float(ways(loss, theta, d, e)["jvp of jvp"][1]()) == pytest.approx(curvature, rel=1e-5, abs=1e-7)
    lazy = fs.restrict(loss, loss.net.params, fs.directions(loss.net, key=fs.key(0), num=1), lazy=True)
    dense_phi = fs.restrict(loss, theta, fs.stack(fs.directions(loss.net, key=fs.key(0), num=1)))
    a = torch.tensor([0.1], dtype=torch.float64)
    torch.testing.assert_close(lazy(a), dense_phi(a), rtol=1e-12, atol=0)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.batch = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return self.last(self.batch(self.norm(self.first(x)).tanh()))


@pytest.mark.filterwarnings("ignore")
def test_exported_models_have_the_derivatives_of_their_values():
    """After `torch.export`, norms arrive as operations of aten."""
    model, x = seeded(0, Normed).double(), draw("x", 6, 3)
    exported = torch.export.export(model, (x,)).module()
    loss = fs.objective(fs.functional(exported), [(x, CLASSES[[0, 1, 2, 3, 0, 1]])], fs.classification)
    theta = loss.net.theta
    assert wrong(loss, theta, "exported") == []
    keep = fs.objective(
        fs.functional(exported, attention="keep"), [(x, CLASSES[[0, 1, 2, 3, 0, 1]])], fs.classification
    )
    assert "jvp of jvp" in wrong(keep, theta, "exported")  # the control: torch's own kernels are wrong


class OnlyForward(torch.autograd.Function):
    """x^3: its reverse derivatives are right, and its `jvp` takes x^2, which it saved, for a constant."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return x * x * x, x * x

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(outputs[1])

    @staticmethod
    def backward(ctx, upstream, _):
        (x,) = ctx.saved_tensors
        return 3 * upstream * x * x

    @staticmethod
    def jvp(ctx, tangent):
        (square,) = ctx.saved_tensors
        return 3 * square.detach() * tangent, None


class Cube(nn.Module):
    def forward(self, x):
        return OnlyForward.apply(x)[0]


def cubed():
    model = seeded(2, lambda: nn.Sequential(nn.Linear(3, 4), Cube(), nn.Linear(4, 3))).double()
    return fs.objective(fs.functional(model), [(draw("x", 6, 3), CLASSES[[0, 1, 2, 3, 0, 1]])], fs.classification)


def test_curvature_of_sam_is_that_of_the_kept_hessian():
    loss = cubed()
    theta = loss.net.theta
    g = grad(loss)(theta)
    d = g / g.norm()
    _, curvature, _ = differences(loss, theta, d, d)
    assert float(ways(loss, theta, d, d)["jvp of jvp"][1]()) != pytest.approx(curvature, rel=1e-2)  # the control
    assert fs.sam_sharpness(loss, theta).curvature == pytest.approx(curvature, rel=1e-5)


def test_a_model_without_batching_rule_is_looped_over_and_says_so():
    loss = cubed()
    with pytest.warns(UserWarning, match="one at a time"):
        mapped = fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=4, span=0.1, chunk=4)
    loop = fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=4, span=0.1, chunk=1)
    torch.testing.assert_close(mapped.losses, loop.losses, rtol=1e-12, atol=0)


class Distances(nn.Module):
    """`cdist` by products has no forward mode, and right reverse derivatives of both orders."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return -torch.cdist(x, self.centres, compute_mode="use_mm_for_euclid_dist")


def test_products_without_forward_mode_are_taken_in_reverse_and_say_so():
    model = seeded(0, Distances).double()
    loss = fs.objective(fs.functional(model), [(draw("x", 6, 3), CLASSES[[0, 1, 2, 3, 0, 1]])], fs.classification)
    d, e = draw("d", 9), draw("e", 9)
    with pytest.warns(UserWarning, match="keep=True"):
        H = fs.hessian(loss, loss.net.theta, keep=False)
    assert float(e @ H(d)) == pytest.approx(differences(loss, loss.net.theta, d, e)[2], rel=1e-6)
    with pytest.warns(UserWarning, match="keep=True"):
        product = fs.ggn(loss, loss.net.theta, keep=False)(d)
    torch.testing.assert_close(product, fs.ggn(loss, loss.net.theta)(d), rtol=1e-10, atol=1e-12)
    p = loss.net.apply(loss.net.params, loss.batches[0][0]).softmax(-1)
    J = torch.func.jacrev(lambda t: loss.net.apply(loss.params(t), loss.batches[0][0]))(loss.net.theta)
    M = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    torch.testing.assert_close(product, torch.einsum("bip,bij,bjq,q->p", J, M, J, d) / len(p), rtol=1e-9, atol=1e-11)


def test_a_function_that_is_not_in_the_table_is_left_alone():
    assert replaced(torch.tanh) is torch.tanh
    assert replaced(F.layer_norm) is not F.layer_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_that_are_too_long_are_halved(dtype):
    """1 - cos(w x't) has the Hessian w^2 cos(w x't) xx', and its derivatives change within 1 / w."""
    x, w = torch.tensor([[0.6, 0.8]], dtype=dtype), 1e3 if dtype == torch.float32 else 1e6
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False)).to(dtype))
    loss = fs.objective(
        net, [(x, torch.zeros(1, 1, dtype=dtype))], fs.custom(lambda out, _: (1 - torch.cos(w * out))[:, 0])
    )
    exact = w**2 * torch.cos(w * (x @ net.theta)) * x[0]
    matvec = fs.hessian_difference(loss, net.theta)
    off = float((matvec(x[0]) - exact).norm())
    assert off < 1e-3 * float(exact.norm())
    assert off <= matvec.error() < 0.05 * float(exact.norm())


@pytest.mark.parametrize("parts", [{"bias": False}, {"elementwise_affine": False}, {}])
def test_a_norm_without_some_of_its_parameters_is_that_of_torch(parts):
    model = seeded(0, lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4, **parts))).double()
    with torch.no_grad():
        for param in model[1].parameters():
            param.copy_(torch.linspace(0.5, 2, 4))
    net, x = fs.functional(model), torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    torch.testing.assert_close(net.apply(net.params, x), model(x))


@pytest.mark.parametrize("rate", [1e2, 1e3, 1e4, 3e4])
def test_differences_at_large_steps_that_agree_by_chance_do_not_hide_the_others(rate):
    slope, curvature = along_line(lambda a: math.sin(rate * a) + math.cos(rate * a))
    assert abs(slope.value - rate) <= max(10 * slope.error, 1e-6 * rate)
    assert abs(curvature.value + rate**2) <= max(10 * curvature.error, 1e-6 * rate**2)
    assert curvature.error < 0.1 * rate**2


def test_a_product_of_a_fast_net_is_not_refused():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(3, 12), nn.Linear(12, 1)

        def forward(self, x):
            return self.out(torch.sin(300 * torch.sin(30 * self.into(x))))

    for seed in range(5):
        net = fs.functional(seeded(seed, Waves).double())
        x = seeded(99, lambda: torch.randn(6, 3).double())
        loss = fs.objective(net, [(x, torch.zeros(6, 1).double())], fs.mse)
        assert bool(fs.hessian(loss, net.theta)(net.theta).isfinite().all())
