"""The audit of derivatives and the check of one product: models whose faults are known, and models that have none."""

import math
import warnings

import pytest
import torch
from problems import loss_of, seeded
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import funcscope as fs
from funcscope.curvature.derivatives import along_line

SECOND = ("jvp of grad", "vjp of grad", "jvp of jvp", "hessian", "hessian, keep=False")


class SavedForTheNext(torch.autograd.Function):
    """x^3 that saves x^2: a constant to `jvp` of `jvp`, and to reverse mode where `WRONG` says so."""

    @staticmethod
    def forward(x):
        return x * x * x, x * x

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*inputs, outputs[1])
        ctx.save_for_forward(outputs[1])

    @staticmethod
    def backward(ctx, upstream, _):
        x, square = ctx.saved_tensors
        return 3 * upstream * (square if WRONG["reverse"] else x * x)

    @staticmethod
    def jvp(ctx, tangent):
        (square,) = ctx.saved_tensors
        return 3 * square * tangent, None


WRONG = {"reverse": False}


class Cube(nn.Module):
    def forward(self, x):
        return SavedForTheNext.apply(x)[0]


@pytest.fixture(params=[False, True], ids=["forward", "both"])
def reverse_is_wrong(request):
    WRONG["reverse"] = request.param
    yield request.param
    WRONG["reverse"] = False


def model_of(middle, dtype=torch.float64, units=6, rows=40, criterion=fs.classification, **options):
    model = seeded(3, lambda: nn.Sequential(nn.Linear(4, units), middle, nn.Linear(units, 3))).to(dtype)
    x, y = seeded(4, lambda: (torch.randn(rows, 4), torch.randint(0, 3, (rows,))))
    return fs.objective(fs.functional(model, **options), [(x.to(dtype), y)], criterion)


def audited(loss, **options):
    return fs.audit(loss, loss.net.theta, key=fs.key(5), **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", [nn.Tanh(), nn.ReLU(), nn.LayerNorm(6)])
def test_ordinary_models_have_every_derivative(middle, dtype):
    result = audited(model_of(middle, dtype))
    assert result.right
    assert result.named("wrong") == ()
    assert set(SECOND) <= set(result.named("right", order=2))
    assert result.culprits == ()
    assert result.has_kinks == isinstance(middle, nn.ReLU)


@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama")), "cnn"])
def test_models_of_the_catalogue_have_them(name):
    result = fs.audit(loss_of(name), loss_of(name).net.theta, key=fs.key(5), num=2)
    assert result.right, str(result)
    assert "hessian" in result.named("right", order=2)


def test_a_function_with_wrong_derivatives_is_named(reverse_is_wrong):
    result = audited(model_of(Cube()))
    assert "jvp of jvp" in result.named("wrong", order=2)
    assert result.named("right", order=1) == ("gradient", "jvp")
    assert ("hessian" in result.named("wrong", order=2)) == reverse_is_wrong
    assert "hessian_difference" in result.named("right", order=2)
    (culprit,) = result.culprits
    assert culprit.module == "1"
    assert culprit.kind == "Cube"
    assert culprit.operations == ("autograd.Function SavedForTheNext",)
    assert "jvp of jvp" in culprit.wrong
    assert ("vjp of grad" in culprit.wrong) == reverse_is_wrong
    advice = str(result).splitlines()[-1]
    assert "hessian_difference" in advice
    assert ("hessian," in advice) != reverse_is_wrong


@pytest.mark.slow
def test_an_operation_of_torch_is_named_with_its_module():
    """weight_norm without what takes its place."""
    loss = model_of(weight_norm(seeded(1, lambda: nn.Linear(6, 6))), attention="keep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = audited(loss)
    assert {"vjp of grad", "hessian", "symmetry"} <= set(result.named("wrong"))
    (culprit,) = result.culprits
    assert culprit.module == "1.parametrizations.weight.0"
    assert culprit.operations == ("_weight_norm",)
    assert audited(model_of(weight_norm(seeded(1, lambda: nn.Linear(6, 6))))).named("wrong") == ()


def test_a_wrong_criterion_is_named():
    own = fs.custom(lambda out, y: SavedForTheNext.apply(out)[0].square().sum(-1))
    (culprit,) = audited(model_of(nn.Tanh(), criterion=own)).culprits
    assert culprit.module == "the criterion"


def test_batches_whose_rows_depend_on_each_other_are_said():
    result = audited(model_of(nn.BatchNorm1d(6, track_running_stats=False)))
    assert result.named("wrong") == ("a sequence alone",)


class Routed(nn.Module):
    """The larger of two maps, by a choice that jumps."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.where(x.sum(-1, keepdim=True) > 0, self.one(x).tanh(), self.two(x).tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", [nn.ReLU(), nn.Hardtanh(), nn.LeakyReLU(), Routed()])
@pytest.mark.parametrize("units", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_models_with_kinks_are_not_called_wrong(middle, dtype, units):
    if isinstance(middle, Routed) and units != 6:
        pytest.skip("of one width")
    result = audited(model_of(middle, dtype, units=units, rows=100))
    assert result.has_kinks
    assert not {"gradient", *SECOND} & set(result.named("wrong"))
    loss = model_of(middle, dtype, units=units, rows=100)
    for keep in (True, False):
        fs.hessian(loss, loss.net.theta, keep=keep)


def test_nothing_is_decided_in_half_precision():
    loss = model_of(nn.Tanh(), torch.bfloat16)
    fs.hessian(loss, loss.net.theta)
    result = audited(loss)
    assert not set(SECOND) & set(result.named("wrong"))
    assert not set(SECOND) & set(result.named("right"))


class Narrow(nn.Module):
    """A norm and a softmax that are taken in float32, as T5, Llama, GPT-Neo and others have them, on the first columns."""

    def forward(self, x):
        first = torch.arange(x.shape[-1]).clamp(max=99)  # no kink: of integers
        rstd = (x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        weights = nn.functional.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)
        return (x * rstd).float().to(x.dtype)[:, first] + weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", ["auto", "keep"])
def test_what_a_model_takes_in_float32_is_judged_in_float64(attention, dtype):
    result = audited(model_of(Narrow(), dtype, attention=attention))
    assert set(SECOND) <= set(result.named("right", order=2))
    assert not result.has_kinks
    assert result.culprits == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "gpt_neo", "mpt", "ministral3", "cohere"])
def test_no_family_that_casts_is_called_wrong(name):
    from test_architectures import studied

    loss = studied(name)[1]
    assert set(SECOND) <= set(audited(loss, num=2).named("right", order=2))


class Tabled(nn.Module):
    """A matrix that is no parameter, in float32, which the inputs become or have to be."""

    def __init__(self, cast):
        super().__init__()
        self.cast, self.table = cast, [torch.eye(6)]

    def forward(self, x):
        return ((x.float() if self.cast else x) @ self.table[0]).to(x.dtype)


@pytest.mark.parametrize("cast", [True, False])
def test_a_part_that_takes_float32_alone_is_judged_as_it_is(cast):
    loss = model_of(nn.Sequential(Tabled(cast), Cube()), torch.float32)
    result = audited(loss)
    assert result.values_dtype == (torch.float64 if cast else torch.float32)
    assert result.named("wrong", order=1) == ()
    assert "jvp of jvp" in result.named("wrong", order=2)
    assert [each.kind for each in result.culprits] == ["Cube"]


def test_the_first_product_of_a_wrong_operator_is_refused(reverse_is_wrong):
    loss = model_of(Cube(), torch.float32)
    theta = loss.net.theta
    fs.hessian(loss, theta, check=False)
    if not reverse_is_wrong:
        fs.hessian(loss, theta)
        return
    for keep in (True, False, True):
        with pytest.raises(ValueError, match=r"hessian_difference.*audit"):
            fs.hessian(loss, theta, keep=keep)


def test_the_check_names_the_way_that_is_right():
    """A kernel that only reverse mode has wrong."""
    loss = model_of(weight_norm(seeded(1, lambda: nn.Linear(6, 6))), attention="keep")
    with pytest.raises(ValueError, match="hessian_difference"):
        fs.hessian(loss, loss.net.theta)


def test_the_check_costs_three_forward_passes_and_a_product_once():
    calls = []

    def counted(out, y):
        calls.append(1)
        return nn.functional.cross_entropy(out, y, reduction="none")

    loss = model_of(nn.Tanh(), criterion=fs.custom(counted))
    theta = loss.net.theta
    loss.check_function()
    calls.clear()
    fs.hessian(loss, theta, check=False)
    unchecked = len(calls)
    fs.hessian(loss, theta, check=False)(theta)
    product = len(calls) - 2 * unchecked
    before = len(calls)
    fs.hessian(loss, theta)
    assert len(calls) - before == unchecked + product + 3
    before = len(calls)
    fs.hessian(loss, theta)
    assert len(calls) - before == unchecked


def test_differences_along_a_line_have_an_error_that_covers():
    cases = [
        (lambda a: math.exp(a), 1, 1),
        (lambda a: math.sin(3 * a + 1), 3 * math.cos(1), -9 * math.sin(1)),
        (lambda a: 5 + a + a**4, 1, 0),
        (lambda a: 1 / (1 + 25 * a * a), 0, -50),
        (lambda a: max(a + 1e-2, 0) ** 2 + a, 1 + 2e-2, 2),
    ]
    for f, first, second in cases:
        slope, curvature = along_line(f)
        assert abs(slope.value - first) <= 10 * slope.error
        assert abs(curvature.value - second) <= 10 * curvature.error
        assert curvature.error < 1e-3 * (1 + abs(second))
    assert along_line(abs)[1].error > 1  # the control: no second derivative


@pytest.mark.slow
def test_the_result_is_plain_and_the_same_twice():
    loss = model_of(nn.Tanh())
    assert audited(loss).asdict() == audited(loss).asdict()
    assert all(isinstance(way["deviation"], float) for way in audited(loss).asdict()["ways"])


@pytest.mark.slow
def test_the_command_says_what_the_function_says(tmp_path, capsys):
    from folders import folder, texts

    from funcscope import cli

    model, data = folder(tmp_path / "gpt2"), texts(tmp_path / "texts.jsonl")
    args = f"check {model} --data {data} --num-samples 2 --max-seq-length 6 --directions 2".split()
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert "jvp of grad" in out
    assert "wrong" not in out
    assert cli.main([*args[:-1], "1"]) == 2
    assert "at least 2" in capsys.readouterr().err


def test_a_command_says_every_way_once():
    from funcscope.cli.check import _listing

    loss = loss_of("mlp")
    result = fs.audit(loss, loss.net.theta, key=fs.key(0), num=2)
    lines = _listing(result, 3).text().split("\n")
    for way in result.ways:
        assert sum(line.startswith(f"{way.name}  ") for line in lines) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_a_confident_classifier_are_rounding_and_pass(dtype):
    """All losses are 0, or units of rounding, and so is the curvature: no kernel is wrong."""
    for seed in range(4):
        model = seeded(seed, lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))).to(dtype)
        x = seeded(seed, lambda: torch.randn(12, 5, dtype=dtype))
        with torch.no_grad():
            y = model(x).argmax(1)
            factor = (34 if dtype == torch.float64 else 15) / model(x).topk(2).values.diff(dim=1).abs().min()
            model[2].weight.mul_(factor)
            model[2].bias.mul_(factor)
        loss = fs.objective(fs.functional(model), [(x, y)], fs.classification)
        for keep in (True, False):
            product = fs.hessian(loss, loss.net.theta, keep=keep)(loss.net.theta)
            assert product.isfinite().all()
