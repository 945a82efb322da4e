"""Gradients in files and sharpness along them. Oracles: `torch.func.grad`, and the same metrics with all in memory."""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from problems import loss_of, seeded, tokens
from test_architectures import labelled, model_of
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import substitute
from funcscope.curvature.stored_gradient import _Leaf, stored_gradient


def text(line="gpt2", stored=torch.float64, **options):
    """Two batches of padded texts; the embedding and the head are one parameter."""
    net = fs.functional(copy.deepcopy(model_of(line, torch.float64)).to(stored), **options)
    return fs.objective(net, [labelled(line, tokens(1, 3, 9, pad=3)), labelled(line, tokens(2, 2, 5))], fs.causal_lm)


def some_frozen(name):
    return "attn" not in name


CASES = {
    "gpt2": lambda dtype: text("gpt2", dtype),
    "llama": lambda dtype: text("llama", dtype),
    "frozen": lambda dtype: text("gpt2", dtype, trainable=some_frozen),
    "layers": lambda dtype: text("llama", dtype, remat="layer"),
    "blocks": lambda dtype: text("llama", dtype, attention="blocks"),
    "own kernels": lambda dtype: text("gpt2", dtype, attention="keep"),
    "cnn": lambda dtype: loss_of("cnn", dtype),
}
NORMS_IN_FLOAT32 = ("llama", "layers", "blocks")
"""Whatever the dtype of the weights."""


def numbers(result, names):
    return {name: torch.as_tensor(getattr(result, name)) for name in names}


SAM = ("absolute", "stderr", "relative", "differences", "sums", "weights", "displacement", "gradient_norm", "first_order",
       "second_order", "curvature", "rounding", "epsilon", "num_forwards", "num_gradients")  # fmt: skip
CRITICAL = ("value", "interval", "stderr", "learning_rate", "slope", "loss", "rounding", "num_forwards")


@pytest.fixture(params=["whole", "rows"])
def matrices(request, monkeypatch):
    """Matrices of linear layers and embeddings as a whole, or some rows at a time, as large ones are."""
    if request.param == "rows":
        monkeypatch.setattr("funcscope.core.substitute.LARGE", 1)
        monkeypatch.setattr("funcscope.core.directions.PART", 100)
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("matrices")
def test_the_stored_gradient_and_both_metrics_are_those_in_memory(name, dtype, tmp_path):
    loss = CASES[name](dtype)
    theta = loss.net.params
    fine = dtype == torch.float64 and name not in NORMS_IN_FLOAT32
    near = {"rtol": 1e-11, "atol": 1e-12} if fine else {"rtol": 1e-6, "atol": 1e-6}
    before = {k: x.clone() for k, x in theta.items()}
    g = stored_gradient(loss, theta, tmp_path)
    dense = loss.layout.unravel(grad(loss)(loss.net.theta))
    for leaf, x in dense.items():
        assert g.leaf(leaf).dtype == dtype
        assert_close(g.leaf(leaf), x, **near)
    assert_close(g.norm, float(loss.layout.ravel(dense).norm()), rtol=near["rtol"], atol=0)
    curvature = loss.net.attention != "keep"
    for options in ({"epsilon": 0.03}, {"epsilon": 0.01, "adaptive_epsilon": True}):
        whole, leafwise = (
            fs.sam_sharpness(loss, theta, curvature=curvature, gradient=each, **options) for each in (None, g)
        )
        assert_close(
            numbers(leafwise, SAM), numbers(whole, SAM), equal_nan=True, rtol=near["rtol"] * 3, atol=near["atol"]
        )
    whole, leafwise = (fs.critical_sharpness(loss, theta, each) for each in (None, g))
    assert leafwise.status == whole.status == "found"
    assert_close(numbers(leafwise, CRITICAL), numbers(whole, CRITICAL), rtol=near["rtol"] * 100, atol=near["atol"])
    assert all(torch.equal(theta[k], before[k]) and theta[k].grad is None for k in theta)


def test_along_other_updates_the_slope_is_that_of_a_jvp(tmp_path):
    one, two = text(), text()
    theta = one.net.params
    g = stored_gradient(one, theta, tmp_path)
    options = {"tolerance": 0.01}
    other = fs.relative_critical_sharpness(one, two, theta, g, **options)
    assert_close(other.slope, g.norm**2, rtol=1e-9, atol=0)
    assert other.value == pytest.approx(fs.critical_sharpness(one, theta, g, **options).value, rel=1e-6)
    (d,) = fs.directions(one.net, key=fs.key(3), num=1)
    dense = d.dense() if float(grad(one)(one.net.theta) @ d.dense()) > 0 else None
    along, whole = (fs.critical_sharpness(one, theta, each) for each in (d, d.dense()))
    assert along.status == whole.status == ("found" if dense is not None else "ascent direction")
    assert_close(numbers(along, CRITICAL), numbers(whole, CRITICAL), rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_traces_are_the_same_with_matrices_some_rows_at_a_time(matrix, monkeypatch):
    loss = text("gpt2")
    before = fs.curvature.leafwise_trace(loss, loss.net.params, key=fs.key(0), num=2, matrix=matrix)
    seen = []
    original = substitute._linear_of
    monkeypatch.setattr(substitute, "_linear_of", lambda *args, **options: seen.append(1) or original(*args, **options))
    monkeypatch.setattr(substitute, "LARGE", 1)
    monkeypatch.setattr("funcscope.core.directions.PART", 100)
    after = fs.curvature.leafwise_trace(loss, loss.net.params, key=fs.key(0), num=2, matrix=matrix)
    assert_close(after.forms.terms, before.forms.terms, rtol=1e-9, atol=1e-10)
    assert seen


def test_a_line_along_it_is_one_of_restrict(tmp_path):
    loss = text("gpt2")
    g = stored_gradient(loss, loss.net.params, tmp_path)
    phi = fs.restrict(loss, loss.net.params, g, lazy=True)
    dense = fs.restrict(loss, loss.net.theta, grad(loss)(loss.net.theta))
    assert_close(phi(0.1), dense(0.1), rtol=1e-11, atol=0)
    assert_close(float(grad(phi)(torch.zeros((), dtype=torch.float64))), g.norm**2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("line", ["gpt2", "llama"])
@pytest.mark.usefixtures("matrices")
def test_weights_that_are_cast_are_not_kept_in_the_graph(line, tmp_path, monkeypatch):
    """bfloat16 weights computed in float32: the gradient has float32's accuracy, and no cast outlives its use."""
    loss = text(line, torch.bfloat16, dtype=torch.float32)
    theta, alive, made = loss.net.params, [], []
    apply = _Leaf.apply

    def watched(anchor, value, give):
        made.append(value.untyped_storage()._weak_ref())
        return apply(anchor, value, lambda x: alive.append(living(made)) or give(x))

    def living(refs):
        return sum(not torch.UntypedStorage._expired(ref) for ref in refs)

    monkeypatch.setattr(_Leaf, "apply", watched)
    g = stored_gradient(loss, theta, tmp_path)
    assert max(alive) <= 3 < len(made) / 4
    wide = grad(loss)(loss.net.theta)
    for leaf, x in loss.layout.unravel(wide).items():
        assert_close(g.leaf(leaf), x, rtol=1e-4, atol=1e-6)
    whole, leafwise = (fs.sam_sharpness(loss, theta, epsilon=0.05, gradient=each) for each in (None, g))
    assert_close(leafwise.absolute, whole.absolute, rtol=1e-4, atol=0)
    assert_close(leafwise.curvature, whole.curvature, rtol=1e-3, atol=0)


def test_a_step_that_half_precision_loses_is_not_resolved(tmp_path):
    loss = text("gpt2", torch.bfloat16)
    g = stored_gradient(loss, loss.net.params, tmp_path)
    small = fs.sam_sharpness(loss, loss.net.params, epsilon=1e-4, gradient=g, curvature=False)
    assert small.unresolved
    assert small.displacement != pytest.approx(1e-4, rel=0.05)


def test_what_does_not_belong_together_is_refused(tmp_path):
    loss = text()
    g = stored_gradient(loss, loss.net.params, tmp_path)
    with pytest.raises(ValueError, match="another loss, or at another theta"):
        fs.sam_sharpness(loss, dict(loss.net.params), gradient=g)
    with pytest.raises(ValueError, match="leave `steps` at 1"):
        fs.sam_sharpness(loss, loss.net.params, gradient=g, steps=2)
    with pytest.raises(ValueError, match="must be a folder"):
        stored_gradient(loss, loss.net.params, tmp_path / "none")
    nan = {k: torch.full_like(x, math.nan) for k, x in loss.net.params.items()}
    with pytest.raises(ValueError, match="the loss at theta is nan"):
        stored_gradient(loss, nan, tmp_path)
    with pytest.raises(ValueError, match="another disk"):
        import shutil

        original, shutil.disk_usage = shutil.disk_usage, lambda _: type("", (), {"free": 10})
        try:
            stored_gradient(loss, loss.net.params, tmp_path)
        finally:
            shutil.disk_usage = original


def test_the_file_has_no_name_and_goes_with_the_gradient(tmp_path):
    loss = text()
    g = stored_gradient(loss, loss.net.params, tmp_path)
    assert g.norm > 0
    assert not list(tmp_path.iterdir())
    number = g._file.file.fileno()
    del g
    gc.collect()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)


def test_parameters_that_the_loss_does_not_see_have_a_gradient_of_zero(tmp_path):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare, self.one = nn.Linear(2, 1), nn.Linear(3, 2), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.used(x) * self.one

    net = fs.functional(seeded(0, Spare))
    loss = fs.objective(net, [(torch.ones(2, 2), torch.zeros(2, 1))], fs.mse)
    g = stored_gradient(loss, net.theta, tmp_path)
    dense = loss.layout.unravel(grad(loss)(net.theta))
    assert not g.leaf("spare.weight").any()
    for name, x in dense.items():
        assert_close(g.leaf(name), x)


MEMORY = textwrap.dedent("""
    import sys, tempfile
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    import funcscope as fs
    from funcscope.core.memory import peak_growth

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = dict(num_hidden_layers=16, hidden_size=512, intermediate_size=1536, num_attention_heads=4, vocab_size=8000,
                  max_position_embeddings=32, tie_word_embeddings=True)
    stored, dtype = getattr(torch, sys.argv[2]), getattr(torch, sys.argv[3])
    model = LlamaForCausalLM(LlamaConfig(**config)).to(stored).eval()
    net = fs.functional(model, dtype=dtype)
    loss = fs.objective(net, {"input_ids": torch.randint(0, 1000, (1, 16))}, fs.causal_lm)
    fs.curvature.leafwise_trace(loss, net.params, key=fs.key(0), num=1)  # what is made once

    def whole():
        return fs.critical_sharpness(loss, net.params), fs.sam_sharpness(loss, net.params)

    def leafwise():
        g = fs.curvature.stored_gradient(loss, net.params, tempfile.gettempdir())
        return fs.critical_sharpness(loss, net.params, g), fs.sam_sharpness(loss, net.params, gradient=g)

    (critical, sam), growth = peak_growth({"whole": whole, "leafwise": leafwise}[sys.argv[1]])
    print(growth, net.layout.num * 4 / 2**20, critical.value, sam.absolute)
""")


def growth(*arguments):
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()[-4:]]


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_nothing_of_the_size_of_theta_is_in_memory(stored):
    """theta has 224 MiB in float32, its largest leaf 16; the values are those of metrics with all in memory."""
    grown, theta, *values = growth("leafwise", stored, "float32")
    if math.isnan(grown):
        pytest.skip("the system does not tell the peak of a process")
    assert grown < 0.9 * theta
    whole, _, *oracle = growth("whole", stored, "float32")
    assert whole > 4 * theta  # negative control
    assert values == pytest.approx(oracle, rel=1e-2)
