"""Doors: wrong inputs get one line with a remedy, unusual ones that can be right are right."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import wrong_inputs
from problems import dense_hessian, loss_of, problem, seeded
from torch import nn
from torch.func import grad
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from wrong_inputs import Around, X, Y, mlp

import funcscope as fs
from funcscope.curvature import gradient_chunks


@pytest.fixture(scope="module")
def complaints():
    """What every case raises, called without the type checks of the tests."""
    done = subprocess.run([sys.executable, wrong_inputs.__file__], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", wrong_inputs.CASES)
def test_wrong_inputs_get_one_line_with_the_remedy(case, complaints):
    kind, text = complaints[case]
    assert kind in ("ValueError", "TypeError", "ForwardError", "FileNotFoundError")
    assert wrong_inputs.CASES[case][1] in text
    assert "\n" not in text
    assert len(text) < 500


def test_right_inputs_pass_the_same_doors():
    """Negative control of the doors: nothing of the usual is refused."""
    loss = wrong_inputs.loss_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrong_inputs.hessian_of().isfinite().all()
        assert wrong_inputs.sampled().losses.isfinite().all()
    assert fs.objective(loss.net, {"x": X, "labels": Y}, fs.classification).batches[0][0].keys() == {"x"}


# --- data ------------------------------------------------------------------------------------------------------------


def test_loaders_lists_and_arrays_are_batches():
    net = fs.functional(mlp())
    right = F.cross_entropy(mlp()(X), Y).detach()
    order = torch.Generator().manual_seed(0)  # a loader draws a seed, in whatever order it goes
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, generator=order)
    for batches in (loader, [[X, Y]], [(X.numpy(), Y.numpy())], (X.numpy(), Y.numpy()), ((x, y) for x, y in loader)):
        loss = fs.objective(net, batches, fs.classification)
        assert_close(float(loss(net.theta)), float(right), rtol=1e-6, atol=0)
    dicts = [{"input": x, "labels": y} for x, y in zip(X, Y, strict=True)]  # the default collate stacks their entries
    loss = fs.objective(net, DataLoader(dicts, batch_size=5, generator=order), fs.classification)
    assert_close(float(loss(net.theta)), float(right), rtol=1e-6, atol=0)


def test_a_batch_without_sequences_changes_nothing():
    net = fs.functional(mlp().double())
    x = X.double()
    one = fs.objective(net, [(x, Y)], fs.classification)
    more = fs.objective(net, [(x[:0], Y[:0]), (x, Y), (x[:0], Y[:0])], fs.classification)
    theta, v = net.theta, fs.normal(fs.key(0), net.theta)
    for operator in (fs.hessian, fs.ggn, fs.empirical_fisher):
        assert torch.equal(operator(one, theta)(v), operator(more, theta)(v))
    assert torch.equal(fs.per_sample_gradients(one, theta), fs.per_sample_gradients(more, theta))
    assert torch.equal(fs.fisher_mc(one, theta, key=fs.key(1))(v), fs.fisher_mc(more, theta, key=fs.key(1))(v))


# --- models that `vmap` refuses ---------------------------------------------------------------------------------------

EVALUATED = {
    "directional_losses": lambda loss, t, **plan: (
        fs.directional_losses(loss, t, key=fs.key(0), n_samples=3, span=0.1, **plan).losses
    ),
    "flatness": lambda loss, t, **plan: fs.flatness(loss, t, key=fs.key(0), n_directions=3, **plan).delta_losses,
    "loss_plane": lambda loss, t, **plan: (
        fs.loss_plane(loss, t, fs.stack(fs.directions(loss.net, key=fs.key(1), num=2)), num=3, **plan).grid_losses
    ),
    "linear_path": lambda loss, t, **plan: fs.linear_path(loss, t, 1.1 * t, num=4, **plan).losses,
}


@pytest.mark.slow
@pytest.mark.parametrize("function", EVALUATED)
@pytest.mark.parametrize("model", ["mask", "nonzero", "unique", "list", "item", "branch", "numpy"])
def test_where_vmap_is_a_matter_of_speed_a_loop_takes_its_place(model, function):
    """The same numbers, bit for bit, as those of the loop that is asked for."""
    made = {"item": wrong_inputs.Item, "branch": wrong_inputs.Branching, "numpy": wrong_inputs.Numpy}
    model = made[model]() if model in made else wrong_inputs.Routed(way=model)
    loss, loop = wrong_inputs.loss_of(model), wrong_inputs.loss_of(model)
    with pytest.warns(UserWarning, match="one at a time"):
        values = EVALUATED[function](loss, loss.net.theta, chunk=2)
    assert values.isfinite().all()
    assert torch.equal(values, EVALUATED[function](loop, loop.net.theta, chunk=1))


def test_a_bare_epsilon_is_a_profile_of_one():
    loss = wrong_inputs.loss_of(mlp())
    profile = fs.flatness_profile(loss, loss.net.theta, key=fs.key(0), epsilons=0.1, n_directions=2)
    assert [result.epsilon for result in profile] == [0.1]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrappers_are_opened(wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, where its compiler is imported
        net = fs.functional(wrap(mlp()))
    plain = fs.functional(mlp())
    assert net.layout.names == plain.layout.names
    assert torch.equal(net.apply(net.params, X), plain.apply(plain.params, X))


def test_a_compiled_part_runs_as_it_was_written():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = fs.functional(nn.Sequential(torch.compile(mlp(), backend="eager")).double())
    loss = fs.objective(net, [(X.double(), Y)], fs.classification)
    plain = fs.objective(fs.functional(mlp().double()), [(X.double(), Y)], fs.classification)
    v = fs.normal(fs.key(0), net.theta)
    assert_close(fs.hessian(loss, net.theta)(v), fs.hessian(plain, net.theta)(v))


def test_backward_hooks_stay_with_the_caller():
    model, seen = mlp().double(), []
    model[0].register_full_backward_hook(lambda *_: seen.append(1))
    model[2].register_full_backward_pre_hook(lambda *_: seen.append(1))
    loss = fs.objective(fs.functional(model), [(X.double(), Y)], fs.classification)
    plain = fs.objective(fs.functional(mlp().double()), [(X.double(), Y)], fs.classification)
    assert_close(grad(loss)(loss.net.theta), grad(plain)(plain.net.theta))
    assert seen == []
    model(X.double().requires_grad_()).sum().backward()
    assert len(seen) == 2


@pytest.mark.slow
def test_checkpointing_of_transformers_is_one_of_training():
    model, batches, criterion = problem("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its name is about to change
        model.gradient_checkpointing_enable()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    loss, plain = fs.objective(fs.functional(model), batches, criterion), loss_of("gpt2")
    v = fs.normal(fs.key(0), loss.net.theta)
    assert_close(fs.hessian(loss, loss.net.theta)(v), fs.hessian(plain, plain.net.theta)(v))
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks


# --- weights that do not move ----------------------------------------------------------------------------------------


def scripted(part):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(part)


class Tied(nn.Module):
    """One weight, used by a scripted module and by Python."""

    def __init__(self):
        super().__init__()
        self.script = scripted(nn.Linear(4, 4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.script(x) @ self.script.weight))


class ByScript(nn.Module):
    """A weight that is handed to a scripted function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return LINEAR(x, self.weight)


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


LINEAR = scripted(_linear)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(scripted(mlp())), Tied, ByScript])
def test_weights_that_cannot_be_made_leaf_by_leaf_move_densely_or_not_at_all(make):
    model = seeded(0, make).double()
    loss = fs.objective(fs.functional(model), [(X.double(), Y)], fs.classification)
    d = fs.directions(loss.net, key=fs.key(0), num=1)[0]
    dense = fs.restrict(loss, loss.net.theta, d, lazy=False)
    assert_close(dense(1e-4) - dense(-1e-4), 2e-4 * (grad(loss)(loss.net.theta) @ d.dense()), rtol=1e-5, atol=1e-12)
    moved = seeded(0, make).double()
    with torch.no_grad():
        for name, param in moved.named_parameters():
            param += 0.5 * d.leaf(name)
        assert_close(dense(0.5), F.cross_entropy(moved(X.double()), Y))
    with pytest.raises(ValueError, match=r"`lazy=False`") as caught:
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=2, lazy=True)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_never_used_is_none_of_those():
    model = Around(
        spare=seeded(0, lambda: nn.Linear(2, 2)), names=nn.ParameterList([nn.Parameter(torch.ones(2))])
    ).double()
    loss = fs.objective(fs.functional(model), [(X.double(), Y)], fs.classification)
    settings = {"key": fs.key(0), "n_samples": 3}
    lazily, densely = (
        fs.directional_losses(loss, loss.net.theta, lazy=lazy, chunk=1, **settings) for lazy in (True, False)
    )
    assert_close(lazily.losses, densely.losses)
    assert lazily.losses.std() > 0


# --- functions of theta ----------------------------------------------------------------------------------------------

USES = {
    "hessian": lambda loss: fs.hessian(loss, loss.net.theta),
    "hessian, rebuilt": lambda loss: fs.hessian(loss, loss.net.theta, keep=False),
    "difference": lambda loss: fs.hessian_difference(loss, loss.net.theta),
    "ggn": lambda loss: fs.ggn(loss, loss.net.theta),
    "fisher": lambda loss: fs.empirical_fisher(loss, loss.net.theta),
    "per sample": lambda loss: fs.per_sample_gradients(loss, loss.net.theta),
    "sam": lambda loss: fs.sam_sharpness(loss, loss.net.theta),
    "asam": lambda loss: fs.asam_sharpness(loss, loss.net.theta),
    "average": lambda loss: fs.average_sharpness(loss, loss.net.theta, key=fs.key(0)),
    "critical": lambda loss: fs.critical_sharpness(loss, loss.net.theta),
    "summary": lambda loss: fs.hessian_summary(loss, loss.net.theta, key=fs.key(0)),
    "restrict": lambda loss: fs.restrict(loss, loss.net.theta, loss.net.theta),
    "directional": lambda loss: fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=2),
    "flatness": lambda loss: fs.flatness(loss, loss.net.theta, key=fs.key(0)),
    "path": lambda loss: fs.linear_path(loss, loss.net.theta, 2 * loss.net.theta),
}


@pytest.mark.parametrize("make", [wrong_inputs.Noisy, wrong_inputs.Remembering])
@pytest.mark.parametrize("use", USES)
def test_no_door_is_open_to_what_is_no_function_of_theta(use, make):
    loss = wrong_inputs.loss_of(make())
    for _ in range(2):  # the first call and later ones
        with pytest.raises(ValueError, match="no function of theta"):
            USES[use](loss)


class Positions(Around):
    """Grows a table of positions at the first call, which holds nothing of the parameters; its last bits change."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        self.table = torch.arange(4.0).to(x)
        return self.inner(x + self.table / 10) * (1 + 1e-7 * (self.calls % 2))


def test_tables_of_constants_and_rounding_are_functions_of_theta():
    loss = wrong_inputs.loss_of(Positions())
    assert fs.hessian(loss, loss.net.theta)(loss.net.theta).isfinite().all()


def test_a_loss_is_checked_once(monkeypatch):
    loss = loss_of("mlp")
    calls = []
    apply = type(loss.net).apply
    monkeypatch.setattr(type(loss.net), "apply", lambda *args: calls.append(1) or apply(*args))
    fs.restrict(loss, loss.net.theta, loss.net.theta)
    assert len(calls) == 3
    fs.restrict(loss, loss.net.theta, loss.net.theta)
    assert len(calls) == 3


# --- weights and samples ---------------------------------------------------------------------------------------------


def missing(kind):
    """A linear model, targets of which some are missing, the criterion, and the loss of what is there."""
    x, t = seeded(1, lambda: (torch.randn(6, 4).double(), torch.randn(6, 3).double()))
    t[0, 1] = t[3] = torch.nan
    t[4, 2] = torch.inf
    if kind == "entries":
        ok = t.isfinite()
        custom = fs.custom(lambda out, t: ((out - t).square(), t.isfinite().to(out)))
        return x, t, custom, lambda out: (out - t)[ok].square().mean()
    if kind == "rows":
        ok = t.isfinite().all(1)
        custom = fs.custom(lambda out, t: ((out - t).square().sum(1), t.isfinite().all(1).to(out)))
        return x, t, custom, lambda out: (out - t)[ok].square().sum(1).mean()
    ok = t.isfinite()
    custom = fs.custom(lambda out, t: ((out.tanh() - t["y"]).abs() ** 3, t["mask"].to(out)))
    return x, {"y": t, "mask": ok}, custom, lambda out: ((out.tanh()[ok] - t[ok]).abs() ** 3).mean()


@pytest.mark.parametrize("kind", ["entries", "rows", "a mapping"])
def test_missing_targets_of_weight_zero_have_no_part_in_any_derivative(kind):
    x, targets, criterion, right = missing(kind)
    model = seeded(2, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    loss = fs.objective(fs.functional(model), [(x, targets)], criterion)
    theta, net = loss.net.theta, loss.net

    def of_theta(t):
        return right(net.apply(net.layout.unravel(t), x))

    assert_close(loss(theta), of_theta(theta))
    assert_close(grad(loss)(theta), grad(of_theta)(theta))
    v, hessian = fs.normal(fs.key(0), theta), dense_hessian(of_theta, theta)
    for keep in (True, False):
        assert_close(fs.hessian(loss, theta, keep=keep)(v), hessian @ v)
    out = net.apply(net.params, x).detach()
    jacobian = torch.func.jacrev(lambda t: net.apply(net.layout.unravel(t), x).flatten())(theta)
    middle = dense_hessian(lambda z: right(z.view(6, 3)), out.flatten())
    assert_close(fs.ggn(loss, theta)(v), jacobian.T @ (middle @ (jacobian @ v)))
    rows = fs.per_sample_gradients(loss, theta)
    assert_close(rows.sum(0), float(loss.terms(theta)[1].sum()) * grad(of_theta)(theta))


def test_a_missing_target_that_reaches_other_losses_is_refused():
    x, t = seeded(1, lambda: (torch.randn(6, 4).double(), torch.randn(6, 3).double()))
    t[0, 1] = torch.nan
    crossed = fs.custom(lambda out, t: ((out - t.isnan().sum()).square(), t.isfinite().to(out)))
    loss = fs.objective(fs.functional(seeded(0, lambda: nn.Linear(4, 3)).double()), [(x, t)], crossed)
    with pytest.raises(ValueError, match="changes other losses"):
        fs.hessian(loss, loss.net.theta)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale):
        return self.linear(x) * scale.mean(0)


def test_rows_that_do_not_add_up_are_refused():
    shared = seeded(1, lambda: torch.rand(6, 3).double() + 1)
    x = X.double()
    net = fs.functional(seeded(0, Scaled).double())
    for num, right in ((5, True), (6, False)):
        loss = fs.objective(net, [({"x": x, "scale": shared[:num], "labels": Y})], fs.classification)
        if right:
            assert_close(fs.per_sample_gradients(loss, net.theta).sum(0), 6 * grad(loss)(net.theta))
        else:
            with pytest.raises(ValueError, match="6 rows by chance"):
                fs.per_sample_gradients(loss, net.theta)
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = seeded(0, lambda: nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 3)))
    loss = fs.objective(fs.functional(model.double()), [(x, Y)], fs.classification)
    with pytest.raises(ValueError, match="sequences see each other"):
        list(gradient_chunks(loss, loss.net.theta, chunk_size=2))
    with pytest.raises(ValueError, match="sequences see each other"):
        fs.m_sharpness(loss, loss.net.theta, m=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_gradients_of_sequences_through_recurrent_models(kind, dtype):
    """Oracle: reverse mode on batches of one."""
    model = seeded(0, lambda: kind(4, 3, batch_first=True, bidirectional=True)).to(dtype)
    x = seeded(1, lambda: torch.randn(5, 7, 4)).to(dtype)
    net = fs.functional(model, output=lambda out: out[0][:, -1])
    loss = fs.objective(net, [(x[:3], Y[:3]), (x[3:], Y[3:5])], fs.classification)
    rows = fs.per_sample_gradients(loss, net.theta)
    for i, row in enumerate(rows):
        out = F.cross_entropy(model(x[i : i + 1])[0][:, -1], Y[i : i + 1])
        right = torch.cat([g.flatten() for g in torch.autograd.grad(out, list(model.parameters()))])
        assert_close(row, right, rtol=1e-4, atol=1e-6)
    means = fs.per_sample_gradients(loss, net.theta, reduction="mean")
    assert_close(means, rows)


def test_gradients_of_sequences_through_a_model_that_reads_a_value():
    loss = wrong_inputs.loss_of(wrong_inputs.Item().double(), [(X.double(), Y)])
    with pytest.warns(UserWarning, match=r"one sequence at a time.*\.item\(\)") as caught:
        rows = fs.per_sample_gradients(loss, loss.net.theta, chunk_size=2)
    assert sum("one sequence at a time" in str(each.message) for each in caught) == 1  # not once per chunk
    assert rows.shape == (6, loss.layout.num)


def test_an_adapter_folder_is_told_from_a_model(tmp_path: Path):
    from funcscope.study.folder import settings

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        settings(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_the_usual_models_pass_in_every_dtype(name):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, batches, criterion = problem(name, dtype)
        fs.objective(fs.functional(model), batches, criterion).check_function()
