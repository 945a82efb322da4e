"""`functional`: the same function as the caller's model, which nothing touches."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from problems import (
    EVERY,
    IN_FLOAT32,
    LANGUAGE,
    dense_hessian,
    gpt2,
    loss_of,
    problem,
    qwen2,
    seeded,
    seen,
    tokens,
    translated,
)
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import funcscope as fs


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that a careless tool might change."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors},
        "identities": [(name, id(tensor), tensor.data_ptr(), tensor._version) for name, tensor in tensors],
        "grads": [(name, tensor.requires_grad, tensor.grad) for name, tensor in tensors],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            {k: dict(v) for k, v in vars(module).items() if k.endswith("hooks") and hasattr(v, "items")}
            for module in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": getattr(model, "config", None) and model.config.to_dict(),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


def same(before: dict, after: dict) -> bool:
    values = all(torch.equal(before["values"][name], value) for name, value in after["values"].items())
    return values and all(before[part] == after[part] for part in before if part != "values")


@pytest.mark.parametrize("name", EVERY)
def test_no_public_function_touches_the_callers_model(name):
    model, batches, criterion = problem(name)
    model.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    net = fs.functional(model)
    loss = fs.objective(net, batches, criterion)
    theta, key = net.theta, fs.key(0)
    with torch.no_grad():
        loss(theta), loss(net.params), loss.terms(theta), net.layout.blocks("layer"), net.layout.blocks("filter")
    dirs = fs.directions(net, key=key, num=2)
    fs.stack(dirs), dirs[0].leaf(net.layout.names[0])
    for lazy in (True, False):
        phi = fs.restrict(loss, theta, dirs, lazy=lazy)
        grad(phi)(torch.zeros(2, dtype=theta.dtype))
        fs.directional_losses(
            loss, net.params, key=key, n_samples=2, two_sided=True, compute_gradient=True, compute_curvature=True,
            curvature="exact", lazy=lazy,
        )  # fmt: skip
    assert same(before, snapshot(model))


def test_the_snapshot_notices_what_a_tool_might_do():
    for harm in (
        lambda m: m.eval(),
        lambda m: m.transformer.wte.weight.data.add_(1e-12),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.transformer.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.config, "use_cache", False),
    ):
        model = problem("gpt2").model
        before = snapshot(model)
        harm(model)
        assert not same(before, snapshot(model))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("attention", ["eager", "math", "keep"])
def test_apply_gives_the_untouched_models_output_in_eval_mode(name, attention):
    model, batches, criterion = problem(name, torch.float32)
    net = fs.functional(model, attention=attention)
    model.eval()
    for batch in batches:
        inputs, _ = criterion.prepare(batch)
        with torch.no_grad():
            out = model(**inputs).logits if isinstance(inputs, dict) else model(inputs)
            ours = net.apply(net.params, inputs)
            lazily = net.apply_leaves(lambda name, value: value, inputs)
        assert_close(ours[seen(inputs)], out[seen(inputs)], rtol=1e-5, atol=2e-6)
        assert torch.equal(ours, lazily)


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("left", [True, False])
def test_masks_do_what_the_models_own_do(name, left):
    model, _, _ = problem(name, torch.float32)
    batch = tokens(7, 3, 9, pad=4, left=left)
    if name == "t5":
        batch = translated(batch, 8, 5)
    net = fs.functional(model)
    model.eval()
    with torch.no_grad():
        ours, theirs = net.apply(net.params, batch), model(**batch).logits
        assert_close(ours[seen(batch)], theirs[seen(batch)], rtol=1e-5, atol=2e-6)
        bare = {key: value for key, value in batch.items() if key != "attention_mask"}
        assert_close(net.apply(net.params, bare), model(**bare).logits, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window_layers", [1, 2])
def test_sliding_windows_are_kept(window_layers):
    kinds = ["full_attention"] * (2 - window_layers) + ["sliding_attention"] * window_layers
    model = seeded(0, lambda: qwen2(use_sliding_window=True, sliding_window=3, layer_types=kinds)).eval()
    full = seeded(0, qwen2).eval()
    batch = tokens(7, 2, 9)
    net = fs.functional(model)
    with torch.no_grad():
        assert_close(net.apply(net.params, batch), model(**batch).logits, rtol=1e-5, atol=2e-6)
        assert (model(**batch).logits - full(**batch).logits).abs().max() > 1e-3  # the window matters here


def test_a_boolean_4d_mask_is_applied_and_not_added():
    model, _, _ = problem("gpt2", torch.float32)
    ids = tokens(7, 2, 6)["input_ids"]
    boolean = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    net = fs.functional(model)
    with torch.no_grad():
        plain = net.apply(net.params, {"input_ids": ids})
        assert_close(net.apply(net.params, {"input_ids": ids, "attention_mask": boolean}), plain)
        eager = model.eval()
        eager.set_attn_implementation("eager")
        added = eager(input_ids=ids, attention_mask=boolean).logits  # what eager attention does with it on its own
    assert (added - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_transforms_agree_with_each_other_and_with_differences(name):
    loss = loss_of(name)
    theta = loss.net.theta
    d = fs.normal(fs.key(1), theta)
    d /= d.norm()
    step, rtol, atol = (3e-2, 1e-2, 1e-4) if name in IN_FLOAT32 else (1e-4, 1e-6, 1e-8)
    difference = (loss(theta + step * d) - loss(theta - step * d)) / (2 * step)
    slope = jvp(loss, (theta,), (d,))[1]
    assert_close(slope, difference, rtol=rtol, atol=atol)
    assert_close(grad(loss)(theta) @ d, slope, rtol=1e-5, atol=1e-8)
    rows = torch.stack([theta, theta + 0.1 * d])
    assert_close(vmap(loss)(rows), torch.stack([loss(row) for row in rows]), rtol=1e-6, atol=1e-8)
    curvature = jvp(lambda t: jvp(loss, (t,), (d,))[1], (theta,), (d,))[1]
    hd = jvp(grad(loss), (theta,), (d,))[1]
    assert_close(hd @ d, curvature, rtol=1e-4, atol=1e-7)
    difference = (grad(loss)(theta + step * d) - grad(loss)(theta - step * d)) / (2 * step)
    assert (hd - difference).norm() < rtol * hd.norm()


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "bert"])
def test_tied_weights_are_one_block_of_theta_and_move_together(name):
    model, batches, criterion = problem(name)
    net = fs.functional(model)
    head = model.get_output_embeddings().weight
    assert head is model.get_input_embeddings().weight
    assert net.layout.num == sum(p.numel() for p in model.parameters())
    inputs, _ = criterion.prepare(batches[0])
    embedding = next(name for name, p in model.named_parameters() if p is head)
    moved = {**net.params, embedding: net.params[embedding] * 1.5}
    with torch.no_grad():
        ours = net.apply(moved, inputs)
        lazily = net.apply_leaves(lambda name, value: moved[name], inputs)
        head.mul_(1.5)
        theirs = model.eval()(**inputs).logits
    assert_close(ours[seen(inputs)], theirs[seen(inputs)])
    assert torch.equal(ours, lazily)


def test_a_tied_leaf_is_made_once_per_call():
    net = fs.functional(problem("gpt2").model)
    made = []
    net.apply_leaves(lambda name, value: (made.append(name), value)[1], tokens(7, 2, 6))
    assert sorted(made) == sorted(net.layout.names)


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = nn.Parameter(self.a.weight.data)


class OneStorage(nn.Module):
    """Two parameters side by side in one memory, as flattened optimisers make them: allowed."""

    def __init__(self):
        super().__init__()
        memory = torch.arange(8.0)
        self.a, self.b = nn.Parameter(memory[:4].view(2, 2)), nn.Parameter(memory[4:])

    def forward(self, x):
        return x @ self.a + self.b[:2]


def test_parameters_that_share_memory_without_being_one_are_refused():
    with pytest.raises(ValueError, match=r"`a.weight` and `b.weight` share memory.*same `nn.Parameter` object"):
        fs.functional(seeded(0, Aliased))
    net = fs.functional(OneStorage())
    assert_close(net.apply(net.params, torch.ones(1, 2)), torch.tensor([[6.0, 9.0]]))


def test_unknown_and_missing_names_are_refused_where_functional_call_is_silent():
    model, batches, _ = problem("mlp")
    net = fs.functional(model)
    silent = functional_call(model, {"nonsense": torch.ones(1)}, (batches[0][0],))
    assert torch.equal(silent, model(batches[0][0]))
    with pytest.raises(ValueError, match=r"unknown: \['nonsense'\]"):
        net.apply({**net.params, "nonsense": torch.ones(1)}, batches[0][0])
    with pytest.raises(ValueError, match=r"missing: \['0.bias'\]"):
        net.apply({name: value for name, value in net.params.items() if name != "0.bias"}, batches[0][0])


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_frozen_parameters_are_constants_outside_theta(name):
    model, batches, criterion = problem(name)
    names = [n for n, _ in model.named_parameters()]
    frozen = names[1]
    dict(model.named_parameters())[frozen].requires_grad_(False)
    net, whole = fs.functional(model), fs.functional(model, trainable="all")
    assert frozen not in net.layout.names
    assert whole.layout.names == tuple(names)
    assert fs.functional(model, trainable=[frozen]).layout.names == (frozen,)
    assert fs.functional(model, trainable=lambda n: n == frozen).layout.names == (frozen,)
    some, every = (fs.objective(n, batches, criterion) for n in (net, whole))
    assert_close(some(net.theta), every(whole.theta))
    assert_close(some.at_leaves(lambda name, value: value), every(whole.theta))
    g = whole.layout.unravel(grad(every)(whole.theta))
    assert_close(net.layout.unravel(grad(some)(net.theta)), {n: g[n] for n in net.layout.names})


class Mixed(nn.Module):
    """Half-precision body, float32 head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8).to(torch.bfloat16), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x.to(self.body.weight.dtype))).float())


def test_several_dtypes_in_one_model():
    model = seeded(0, Mixed)
    net = fs.functional(model)
    x, y = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    loss = fs.objective(net, [(x, y)], fs.classification)
    assert net.theta.dtype == torch.float32
    back = net.layout.unravel(net.theta)
    assert {name: value.dtype for name, value in back.items()} == {n: p.dtype for n, p in model.named_parameters()}
    assert all(torch.equal(back[name], value) for name, value in net.params.items())
    assert torch.equal(net.apply(net.params, x), model(x))
    g = grad(loss)(net.theta)
    nn.functional.cross_entropy(model(x), y).backward()
    assert_close(g, torch.cat([p.grad.float().flatten() for p in model.parameters()]), rtol=1e-2, atol=1e-4)
    result = fs.directional_losses(loss, net.theta, key=fs.key(0), n_samples=3)
    lazily = fs.directional_losses(loss, net.theta, key=fs.key(0), n_samples=3, lazy=True)
    assert_close(result.losses, lazily.losses, rtol=1e-2, atol=1e-3)
    assert not result.asdict()["homogeneous_dtype"]


def test_batch_norm_and_dropout_are_in_eval_mode():
    model, batches, criterion = problem("cnn")
    seeded(0, lambda: [model(batches[0][0]) for _ in range(3)])  # running statistics move
    net = fs.functional(model)
    loss = fs.objective(net, batches, criterion)
    with torch.no_grad():
        assert_close(loss(net.theta), nn.functional.cross_entropy(model.eval()(batches[0][0]), batches[0][1]))
        assert float(loss(net.theta)) == float(loss(net.theta))


class Metadata(nn.Module):
    """Reads its weight's device, dtype, shape and transpose while it runs, and uses it through several calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        offset = torch.ones(self.weight.shape[0], device=self.weight.device, dtype=self.weight.dtype)
        stacked = torch.stack([self.weight, self.weight * 2])
        return x @ self.weight.T + offset + stacked.sum(0).mean() + next(self.parameters()).size(1)


def test_leaf_by_leaf_also_where_the_model_looks_at_its_weights():
    net = fs.functional(seeded(0, Metadata))
    x = torch.ones(4, 2)
    half = {name: value / 2 for name, value in net.params.items()}
    assert_close(net.apply_leaves(lambda name, value: value / 2, x), net.apply(half, x), rtol=0, atol=0)


@dataclass
class Odd:
    scores: torch.Tensor


class Strange(nn.Linear):
    def forward(self, x):
        return Odd(super().forward(x))


def test_output_says_which_tensor_is_scored():
    model = seeded(0, lambda: Strange(2, 3))
    with pytest.raises(TypeError, match=r"returned a Odd without `.logits`; pass `output="):
        net = fs.functional(model)
        net.apply(net.params, torch.ones(1, 2))
    net = fs.functional(model, output=lambda out: out.scores)
    assert net.apply(net.params, torch.ones(1, 2)).shape == (1, 3)


def test_parameters_that_cannot_be_coordinates_are_refused():
    model = seeded(0, lambda: nn.Linear(2, 2))
    model.table = nn.Parameter(torch.arange(3), requires_grad=False)
    with pytest.raises(TypeError, match=r"`table` is a parameter of dtype torch.int64.*register it as a buffer"):
        fs.functional(model)
    assert fs.functional(model, trainable=["weight", "bias"]).layout.num == 6
    with pytest.raises(TypeError, match="`table`"):
        fs.functional(model, trainable="all")
    with pytest.raises(ValueError, match="meta device"):
        fs.functional(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"selects none.*trainable=\"all\""):
        fs.functional(seeded(0, lambda: nn.Linear(2, 2)).requires_grad_(False))
    with pytest.raises(ValueError, match=r"does not have: \['wieght'\]"):
        fs.functional(seeded(0, lambda: nn.Linear(2, 2)), trainable=["wieght"])
    with pytest.raises(
        ValueError, match=r"`attention` must be one of 'auto', 'blocks', 'eager', 'math', 'keep', got 'flash'"
    ):
        inspect.unwrap(fs.functional)(seeded(0, lambda: nn.Linear(2, 2)), attention="flash")


@pytest.mark.slow
def test_the_dense_hessian_of_a_small_gpt2_is_the_difference_of_its_gradient():
    model = seeded(0, gpt2).double()
    net = fs.functional(model, trainable=lambda name: "h.0.ln" in name or "ln_f" in name)
    loss = fs.objective(net, [tokens(1, 2, 5, pad=2)], fs.causal_lm)
    step = 1e-4
    rows = [
        (grad(loss)(net.theta + step * e) - grad(loss)(net.theta - step * e)) / (2 * step)
        for e in torch.eye(net.layout.num, dtype=torch.float64)
    ]
    assert_close(dense_hessian(loss, net.theta), torch.stack(rows), rtol=1e-6, atol=1e-10)


class Normalised(nn.Module):
    """Every norm that the skeleton computes from primitives, on inputs that depend on theta."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 4, 1), norm

    def forward(self, x):
        return self.norm(torch.sin(self.first(x))).flatten(1)


class Called(nn.Module):
    """A function of torch that is no module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


NORMS = {
    "layer": lambda: nn.LayerNorm(5),
    "layer of two dimensions, no bias": lambda: nn.LayerNorm((4, 5), bias=False),
    "layer without weights": lambda: nn.LayerNorm(5, elementwise_affine=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "batch without running statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "batch with running statistics": lambda: nn.BatchNorm1d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(5),
    "layer, called as a function": lambda: Called(lambda x: nn.functional.layer_norm(x, (5,))),
    "instance, called as a function": lambda: Called(nn.functional.instance_norm),
}


def nested(loss, theta, d):
    """The second derivative along d by every nesting of transforms."""

    def rate(t):
        return jvp(loss, (t,), (d,))[1]

    return {
        "jvp of jvp": jvp(rate, (theta,), (d,))[1],
        "grad of jvp": grad(rate)(theta) @ d,
        "jvp of grad": jvp(grad(loss), (theta,), (d,))[1] @ d,
        "vjp of grad": vjp(grad(loss), theta)[1](d)[0] @ d,
        "hessian": hessian(loss)(theta) @ d @ d,
    }


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_through_every_norm_agree_with_the_difference(norm):
    model = seeded(0, lambda: Normalised(NORMS[norm]())).double()
    x, y = seeded(1, lambda: (torch.randn(3, 2, 5).double(), torch.randint(0, 20, (3,))))
    net = fs.functional(model)
    assert_close(net.apply(net.params, x), model.eval()(x))
    loss = fs.objective(net, [(x, y)], fs.classification)
    d = fs.normal(fs.key(2), net.theta)
    d /= d.norm()
    step = 1e-3
    difference = (loss(net.theta + step * d) + loss(net.theta - step * d) - 2 * loss(net.theta)) / step**2
    for way, value in nested(loss, net.theta, d).items():
        assert_close(value, difference, rtol=1e-4, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")


def test_the_fused_layer_norm_is_why():
    model = seeded(0, lambda: Normalised(nn.LayerNorm(5))).double()
    x, y = seeded(1, lambda: (torch.randn(3, 2, 5).double(), torch.randint(0, 20, (3,))))
    net = fs.functional(model, attention="keep")
    values = nested(fs.objective(net, [(x, y)], fs.classification), net.theta, fs.normal(fs.key(2), net.theta))
    assert abs(values["vjp of grad"] - values["jvp of grad"]) < 1e-9 * abs(values["jvp of grad"])
    assert abs(values["jvp of jvp"] - values["jvp of grad"]) > 1e-2 * abs(values["jvp of grad"])


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embeddings_have_the_gradient_of_their_values(options):
    model = seeded(0, lambda: nn.Sequential(nn.Embedding(3, 3, **options))).double()
    net = fs.functional(model)
    loss = fs.objective(net, [(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))], fs.classification)
    rows = [jvp(loss, (net.theta,), (e,))[1] for e in torch.eye(9, dtype=torch.float64)]
    assert_close(grad(loss)(net.theta), torch.stack(rows))
    assert grad(loss)(net.theta).view(3, 3)[1].abs().sum() > 0


def test_an_embedding_that_rewrites_its_weights_is_refused():
    with pytest.raises(ValueError, match=r"`0` is an embedding with `max_norm`.*set `max_norm=None`"):
        fs.functional(seeded(0, lambda: nn.Sequential(nn.Embedding(3, 3, max_norm=1.0))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_from_primitives_neither_overflow_nor_lose_digits_in_half_precision(dtype):
    model = nn.LayerNorm(8).to(dtype)
    x = seeded(0, lambda: torch.randn(4, 8)).to(dtype)
    x[:, 0] = 500
    net = fs.functional(model)
    assert_close(net.apply(net.params, x), model(x), rtol=0, atol=2 * float(torch.finfo(dtype).eps) * 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LANGUAGE)
def test_half_precision_logits_are_the_untouched_models(name, dtype):
    model, batches, criterion = problem(name, dtype)
    inputs, _ = criterion.prepare(batches[0])
    net = fs.functional(model)
    read = seen(inputs)
    with torch.no_grad():
        ours, theirs = net.apply(net.params, inputs)[read], model.eval()(**inputs).logits[read]
    assert_close(ours, theirs, rtol=0, atol=8 * float(torch.finfo(dtype).eps) * float(theirs.abs().max()))


def test_torchs_own_attention_modules_have_all_derivatives_in_every_plan():
    make = lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.3), nn.Linear(4, 3))  # noqa: E731
    model = seeded(0, make).double()
    x, y = seeded(1, lambda: (torch.randn(2, 5, 4).double(), torch.randint(0, 3, (2, 5))))
    net = fs.functional(model)
    assert_close(net.apply(net.params, x), model.eval()(x))
    assert torch.equal(net.apply(net.params, x), net.apply_leaves(lambda _, value: value, x))
    loss = fs.objective(net, [(x, y)], fs.classification)
    d = fs.normal(fs.key(2), net.theta)
    d /= d.norm()
    ways = nested(loss, net.theta, d)
    for way, value in ways.items():
        assert_close(value, ways["jvp of grad"], msg=lambda text, way=way: f"{way}: {text}")


def test_functions_that_hold_the_callers_model_are_refused():
    model = seeded(0, lambda: nn.Linear(2, 2))
    old = model.forward
    model.forward = lambda x: 2 * old(x)
    with pytest.raises(ValueError, match=r"`.forward` is a function that holds a part of the model in its closure"):
        fs.functional(model)


def test_a_model_that_cannot_be_copied_says_why():
    model = seeded(0, lambda: nn.Linear(2, 2))
    model.last = model(torch.ones(1, 2))
    with pytest.raises(ValueError, match="such as a stored activation") as caught:
        fs.functional(model)
    assert "\n" not in str(caught.value)


def test_wrong_shapes_do_not_broadcast():
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"`params\['bias'\]` must have shape \(2,\), got \(1,\)"):
        net.apply({**net.params, "bias": torch.zeros(1)}, torch.ones(1, 3))


@pytest.mark.parametrize("name", LANGUAGE)
def test_output_is_the_readout_of_the_hidden_states_where_a_head_is_known(name):
    loss = loss_of(name)
    net, params = loss.net, loss.net.params
    assert (net.head is not None) == (name not in ("bert", "t5"))
    if net.head is None:
        with pytest.raises(ValueError, match="its output exists as a whole only"):
            net.hidden(params, loss.batches[0][0])
        return
    other = {key: value + 0.1 for key, value in params.items()}
    for inputs, _ in loss.batches:
        hidden = net.hidden(other, inputs)
        assert hidden.shape[-1] == 12
        torch.testing.assert_close(net.readout(other, hidden), net.apply(other, inputs), rtol=1e-12, atol=1e-12)


def test_a_frozen_head_is_a_head_and_an_output_of_ones_own_has_none():
    model, _, _ = problem("llama")
    frozen = fs.functional(model, trainable=lambda name: "lm_head" not in name)
    ids = tokens(1, 2, 5)
    assert frozen.head.weight == "lm_head.weight"
    torch.testing.assert_close(
        frozen.readout(frozen.params, frozen.hidden(frozen.params, ids)), frozen.apply(frozen.params, ids)
    )
    assert fs.functional(model, output=lambda out: out.logits * 2).head is None


def test_two_threads_at_different_parameters_do_not_see_each_other():
    net = fs.functional(seeded(1, lambda: nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).double()))
    inputs = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(10, 6)
    places = [{name: scale * value for name, value in net.params.items()} for scale in (0.5, 2.0)]
    alone = [net.apply(params, inputs) for params in places]
    with ThreadPoolExecutor(2) as workers:
        for _ in range(200):
            for made, expected in zip(workers.map(lambda p: net.apply(p, inputs), places), alone, strict=True):
                assert torch.equal(made, expected)


class Attending(nn.Module):
    """Attention, and what the whole process has switched on while it runs."""

    def __init__(self):
        super().__init__()
        self.project, self.seen = nn.Linear(6, 6), []

    def forward(self, x):
        cuda = torch.backends.cuda
        self.seen.append((cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), torch.get_default_dtype()))
        query = self.project(x)
        return nn.functional.scaled_dot_product_attention(query, x, query.sin(), is_causal=True)


@pytest.mark.parametrize(
    "run", [lambda net, x: net.apply(net.params, x), lambda net, x: fs.remat(net.apply)(net.params, x)]
)
def test_attention_is_chosen_for_one_thread_and_not_for_the_process(run):
    model = seeded(1, Attending)
    net, x = fs.functional(model), seeded(2, lambda: torch.randn(2, 1, 5, 6))
    out = run(net, x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = model(x)
    assert torch.equal(out, expected)
    assert all(seen == (True, True, torch.float32) for seen in net._skeleton.seen)
