"""The documents' own calls, as their code: their arguments, keys and pipelines, and what the wrapper adds to them."""

# ruff: noqa: T201 (the documents' code prints)

import functools
import inspect
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from problems import CATALOGUE, EVERY, bert, cnn, gpt2, llama, masked, mlp, problem, qwen2, seeded, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.func import grad
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

import funcscope as fs
from funcscope.documented import ICLRMetrics, sample_directional_losses
from funcscope.landscape import directional

ALWAYS = {
    "baseline_loss": float, "loss_mean": float, "loss_std": float, "loss_max": float, "loss_min": float,
    "delta_mean": float, "delta_std": float, "landscape_roughness": float, "n_samples": int, "actual_span": float,
    "param_norm": float, "relative_step": float, "use_filter_norm": bool, "global_renorm": bool, "seed": int,
    "homogeneous_dtype": bool, "fast_vec_path": bool, "n_nonfinite_pos": int,
}  # fmt: skip
GRADIENT = {"dir_grad_mean": float, "dir_grad_std": float, "dir_grad_delta_corr": float, "n_samples_for_corr": int}
CURVATURE = dict.fromkeys((f"curvature_{name}" for name in ("mean", "std", "p10", "p50", "p90")), float)
TWO_SIDED = {"loss_mean_negative": float, "loss_std_negative": float}
TEXTS = ["What is 2 + 2 ?", "Solve for x : 2 x = 10"]


def tokenizer():
    """Whole words; the shorter text is padded on the right."""
    words = dict.fromkeys(" ".join(TEXTS).split())
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: i for i, word in enumerate(words, 2)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", model_input_names=names)


def text_model(seed=0):
    return seeded(seed, qwen2)


def text_batch():
    return tokenizer()(TEXTS, return_tensors="pt", padding=True)


def holds(result, wanted, absent=()):
    """Every documented entry, finite and of its documented type; none of an option that is off."""
    for name, kind in wanted.items():
        assert type(result[name]) is kind, name
        assert math.isfinite(result[name]), name
    assert not set(absent) & set(result)


# The document's code


RECOMMENDED = {
    "quick start": ({"seed": 42}, {}),
    "standard": ({"n_samples": 50, "span": 0.5, "use_filter_norm": True, "global_renorm": False, "seed": 42}, {}),
    "gradient": ({"n_samples": 50, "compute_gradient": True, "seed": 42}, GRADIENT),
    "curvature": (
        {"n_samples": 50, "span": 0.1, "two_sided": True, "compute_curvature": True, "seed": 42},
        CURVATURE | TWO_SIDED,
    ),
    "memory": ({"n_samples": 25, "compute_gradient": False, "seed": 42}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECOMMENDED)
def test_recommended_configurations(name):
    options, extra = RECOMMENDED[name]
    result = ICLRMetrics().sample_directional_losses(model=text_model(), data_batch=text_batch(), **options)
    assert result["n_samples"] == options.get("n_samples", 50)
    assert result["landscape_roughness"] == pytest.approx(result["loss_std"] / result["loss_mean"])
    holds(result, ALWAYS | extra, absent=(GRADIENT | CURVATURE | TWO_SIDED).keys() - extra.keys())
    assert result["seed"] == 42
    assert result["use_filter_norm"] is True
    assert result["global_renorm"] is False


def test_the_complete_pipeline_of_the_appendix(monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: text_model())
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer())

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-Math-1.5B")
    tokenizer_ = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-Math-1.5B")
    for param in model.parameters():
        param.requires_grad = True
    batch = tokenizer_(["What is 2+2?", "Solve for x: 2x = 10"], return_tensors="pt", padding=True)
    metrics = ICLRMetrics()
    result = metrics.sample_directional_losses(
        model=model, data_batch=batch, n_samples=50, span=0.5, use_filter_norm=True, global_renorm=False,
        two_sided=True, compute_curvature=True, compute_gradient=True, seed=42,
    )  # fmt: skip
    print(f"Baseline loss: {result['baseline_loss']:.4f}")
    print(f"Landscape roughness: {result['landscape_roughness']:.4f}")
    print(f"Mean curvature: {result['curvature_mean']:.4f} ± {result['curvature_std']:.4f}")
    print(f"Gradient-delta correlation: {result['dir_grad_delta_corr']:.4f}")
    print(f"  (computed on {result['n_samples_for_corr']} valid samples)")

    assert (result["dir_grad_delta_corr"] < 0.3) == (result["note"] is not None)
    assert (result["n_samples_for_corr"], result["n_nonfinite_pos"]) == (50, 0)
    assert "(computed on 50 valid samples)" in capsys.readouterr().out
    assert batch["attention_mask"].sum(1).tolist()[0] != batch["attention_mask"].sum(1).tolist()[1]
    holds(result, ALWAYS | GRADIENT | CURVATURE | TWO_SIDED)


def test_the_signature_is_the_documented_one():
    wanted = {
        "n_samples": 50, "span": 0.5, "loss_fn": None, "use_filter_norm": True, "relative_span": False, "seed": None,
        "batch_config": None, "two_sided": False, "compute_curvature": False, "global_renorm": False,
        "compute_gradient": False,
    }  # fmt: skip
    for function in (sample_directional_losses, ICLRMetrics().sample_directional_losses):
        given = inspect.signature(inspect.unwrap(function)).parameters
        assert list(given) == ["model", "data_batch", *wanted]
        assert {name: given[name].default for name in wanted} == wanted


# The same numbers as the function underneath


def the_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name], equal_nan=isinstance(value, float)), name


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_it_is_the_direct_call(name):
    model, batches, criterion = problem(name, torch.float32)
    net = fs.functional(model)
    loss = fs.objective(net, batches[0], criterion)
    full = {"two_sided": True, "compute_curvature": True, "compute_gradient": True}
    for options, direct in [
        (full, full),
        ({"use_filter_norm": False}, {"normalize": "global"}),
        ({"use_filter_norm": False, "global_renorm": True}, {"normalize": "global", "global_renorm": True}),
        ({"relative_span": True, "span": 0.2}, {"relative_span": True, "span": 0.2}),
    ]:
        found = sample_directional_losses(model, batches[0], n_samples=3, seed=7, **options)
        the_same(found, fs.directional_losses(loss, net.params, key=fs.key(7), n_samples=3, **direct).asdict())
        assert found["use_filter_norm"] == options.get("use_filter_norm", True)
        assert found["global_renorm"] == (not found["use_filter_norm"])


def test_a_causal_lm_is_scored_on_its_own_tokens_without_padding():
    """By hand: each text alone, its next tokens, all of them weighted alike."""
    model, batch = text_model(), text_batch()
    total = count = 0.0
    for text in TEXTS:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        logits = model.eval()(input_ids=ids).logits[0, :-1].detach()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert isinstance(batch, BatchEncoding)
    assert int(batch["attention_mask"].min()) == 0
    found = sample_directional_losses(model, batch, n_samples=2, seed=0)
    assert found["baseline_loss"] == pytest.approx(total / count, rel=1e-5)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    again = sample_directional_losses(model, {**batch, "labels": labels}, n_samples=2, seed=0)
    assert again["baseline_loss"] == found["baseline_loss"]


def test_what_is_scored_follows_from_the_class_or_the_batch():
    bare = seeded(0, mlp)
    points = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    found = sample_directional_losses(bare, points, n_samples=2, seed=0)
    assert found["baseline_loss"] == pytest.approx(nn.functional.cross_entropy(bare(points[0]), points[1]).item())
    the_same(sample_directional_losses(bare, list(points), n_samples=2, seed=0), found)  # as a DataLoader gives it
    sentence = masked(tokens(1, 2, 6))
    assert sample_directional_losses(seeded(0, bert), sentence, n_samples=2, seed=0)["n_samples"] == 2
    with pytest.raises(ValueError, match=r"the class name 'Sequential' does not say how the model is scored") as caught:
        sample_directional_losses(bare, {"x": points[0]})
    assert "`loss_fn(model, data_batch)`" in str(caught.value)
    with pytest.raises(ValueError, match='holds no tensors: call the tokenizer with `return_tensors="pt"`'):
        sample_directional_losses(text_model(), tokenizer()(TEXTS))


# Seeds and generators


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result_and_no_seed_a_fresh_one():
    model, batch = text_model(), text_batch()
    call = functools.partial(sample_directional_losses, model, batch, n_samples=3, compute_gradient=True)
    the_same(call(seed=42), call(seed=42))
    assert not np.array_equal(call(seed=42)["losses"], call(seed=43)["losses"])
    fresh, other = call(), call()
    assert type(fresh["seed"]) is int
    assert fresh["seed"] != other["seed"]
    assert not np.array_equal(fresh["losses"], other["losses"])
    the_same(call(seed=fresh["seed"]), fresh)


def test_the_global_generators_are_neither_set_nor_used():
    """numpy's here; torch's by the fixture in conftest, after every test."""
    before = np.random.get_state()
    for seed in (None, 42):
        sample_directional_losses(text_model(), text_batch(), n_samples=2, seed=seed)
    after = np.random.get_state()
    assert before[1].tolist() == after[1].tolist()
    assert before[2:] == after[2:]


# The model stays as it was


def state(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [module.training for module in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    )


REFUSED = pytest.raises(TypeError, match="`loss_fn` must return a scalar tensor")


@pytest.mark.parametrize(
    ("loss_fn", "outcome"),
    [
        (None, nullcontext()),
        (lambda m, b: m(b[0]).square().mean(), nullcontext()),
        (lambda m, b: m(b[0]).mean().item(), REFUSED),
    ],
)
def test_the_model_is_not_touched_even_by_a_call_that_fails(loss_fn, outcome):
    model = seeded(0, cnn).train()
    batch = CATALOGUE["cnn"][1][0]
    next(model.parameters()).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = state(model)
    options = {"two_sided": True, "compute_curvature": True, "compute_gradient": True}
    with outcome:
        sample_directional_losses(model, batch, n_samples=2, loss_fn=loss_fn, seed=0, **options)
    after = state(model)
    assert_close(before[0], after[0], rtol=0, atol=0)
    assert before[2:] == after[2:]
    for (needs, kept), (needed, held) in zip(before[1], after[1], strict=True):
        assert needs == needed
        assert torch.equal(kept, held)


def test_parameters_without_gradients_are_not_perturbed():
    model, batch = text_model(), text_batch()
    for name, param in model.named_parameters():
        param.requires_grad = "mlp" in name
    moved = math.sqrt(sum(p.square().sum().item() for p in model.parameters() if p.requires_grad))
    for loss_fn in (None, lambda m, b: m(**b, labels=b["input_ids"]).loss):
        found = sample_directional_losses(model, batch, n_samples=3, seed=0, loss_fn=loss_fn)
        assert found["param_norm"] == pytest.approx(moved)
        assert found["loss_std"] > 0
    net = fs.functional(model, trainable=lambda name: "mlp" in name)
    direct = fs.directional_losses(
        fs.objective(net, batch, fs.causal_lm), net.params, key=fs.key(0), n_samples=3
    ).asdict()
    the_same(sample_directional_losses(model, batch, n_samples=3, seed=0), direct)
    with pytest.raises(ValueError, match=r"so none would move: `model.requires_grad_\(True\)`"):
        sample_directional_losses(model.requires_grad_(False), batch)


# A loss function of one's own


def own_loss(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels).loss


@pytest.mark.slow
@pytest.mark.parametrize(("make", "lazy"), [(gpt2, True), (llama, False), (qwen2, False)])  # llama's head is not tied
def test_a_loss_function_that_is_the_default_gives_the_same_losses_and_slopes(make, lazy, monkeypatch):
    """Same names, same directions; the fused kernels against the eager ones; in both plans."""
    model, batch = seeded(0, make).double(), BatchEncoding(tokens(1, 3, 8, pad=3))
    options = {"n_samples": 4, "seed": 3, "two_sided": True, "compute_gradient": True, "compute_curvature": True}
    default = sample_directional_losses(model, batch, **options)
    if lazy:
        monkeypatch.setattr(directional, "LAZY_FROM", 1)
    own = sample_directional_losses(model, batch, loss_fn=own_loss, **options)
    assert own["fast_vec_path"] is not lazy
    for name in ("losses", "losses_negative", "slopes", "direction_norms"):
        assert np.allclose(own[name], default[name], rtol=2e-5, atol=1e-6), name
    assert own["param_norm"] == default["param_norm"]
    assert own.keys() - default.keys() == {"sequences_note"}
    assert own["n_sequences"] == 1
    for name in ("loss_mean", "delta_mean", "curvature_mean"):  # one score has no error over sequences
        assert math.isnan(own[f"{name}_stderr_data"])
        assert default[f"{name}_stderr_data"] > 0


def test_a_loss_function_of_a_model_in_half_precision():
    """Its copy in float32, for the error of the loss, scores with the same function, which is not copied."""
    reference = seeded(5, gpt2).eval()(**tokens(1, 3, 8)).logits  # a computed tensor, which `deepcopy` refuses
    model, batch = seeded(0, gpt2).to(torch.bfloat16), tokens(1, 3, 8)

    class Distance:
        def __init__(self):
            self.reference = reference

        def __call__(self, model, batch):
            return (model(**batch).logits.float() - self.reference.detach()).square().mean()

    options = {"n_samples": 3, "seed": 1, "two_sided": True, "compute_gradient": True, "compute_curvature": True}
    found = sample_directional_losses(model, batch, loss_fn=Distance(), **options)
    full = sample_directional_losses(model.float(), batch, loss_fn=Distance(), **options)
    assert np.allclose(found["losses"], full["losses"], rtol=0.02)
    assert np.allclose(found["slopes"], full["slopes"], rtol=0.2, atol=0.02)
    assert found["homogeneous_dtype"]


def test_a_loss_function_sees_the_model_at_its_own_place():
    """Parameters, buffers and switches of the module on top itself, of its children, and its own methods."""

    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
            self.register_buffer("offset", torch.tensor([1.0, 1.0]))
            self.scored = nn.Linear(2, 2)

        def forward(self, x):
            return nn.functional.dropout(self.scored(x) * self.scale + self.offset, 0.5, training=self.training)

        def penalty(self):
            return self.scale.square().sum()

    model = seeded(0, Top).double().train()
    seen = []

    def loss_fn(model, batch):
        seen.append((type(model), model.training, sorted(dict(model.named_parameters()))))
        return model(batch).square().mean() + model.penalty()

    x = seeded(1, lambda: torch.randn(3, 2).double())
    found = sample_directional_losses(model, x, n_samples=2, seed=0, loss_fn=loss_fn, compute_gradient=True, span=0.3)
    assert set(map(str, seen)) == {str((Top, False, ["scale", "scored.bias", "scored.weight"]))}
    net = fs.functional(model)

    def by_hand(theta):
        params = net.layout.unravel(theta)
        return net.apply(params, x).square().mean() + params["scale"].square().sum()

    rows = fs.stack(fs.directions(net, key=fs.key(0), num=2))
    assert_close(found["baseline_loss"], float(by_hand(net.theta)))
    assert_close(torch.tensor(found["losses"]), torch.stack([by_hand(net.theta + 0.3 * row) for row in rows]))
    assert_close(torch.tensor(found["slopes"]), rows @ grad(by_hand)(net.theta))


def test_batches_and_loss_functions_of_any_kind():
    model = seeded(0, mlp)
    x, y = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    wanted = sample_directional_losses(model, (x, y), n_samples=2, seed=0)["losses"]
    cross_entropy = nn.functional.cross_entropy

    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))  # the scorer's, and no part of theta

        def forward(self, model, batch):
            return cross_entropy(model(batch["x"]), batch["y"], weight=self.weight)

    scorer = Scorer()
    for batch, loss_fn in [
        ((x, y), lambda m, b: cross_entropy(m(b[0]), b[1])),
        ([x, y], lambda m, b: cross_entropy(m(b[0]), b[1])),
        ({"x": x, "y": y}, lambda m, b: cross_entropy(m(b["x"]), b["y"])),
        ({"x": x, "y": y}, scorer),
        ({"x": x, "y": y}, scorer.forward),
        (SimpleNamespace(x=x, y=y), lambda m, b: cross_entropy(m(b.x), b.y)),
        (None, functools.partial(lambda m, b, data: cross_entropy(m(data[0]), data[1]), data=(x, y))),
        ((x, y), lambda m, b: cross_entropy(m(b[0]), b[1]) if bool(m(b[0]).sum() > -1e9) else None),  # vmap refuses it
        ((x, y), lambda m, b: cross_entropy(m(b[0]), b[1]).detach()),  # values need no gradient
    ]:
        found = sample_directional_losses(model, batch, n_samples=2, seed=0, loss_fn=loss_fn)
        assert np.allclose(found["losses"], wanted)


BAD = [
    (lambda m, b: m(b[0]).mean().item(), "got a float: reduce by `.mean\\(\\)`, leave out"),
    (lambda m, b: m(b[0]), r"must return a scalar tensor, got torch.float32 of shape \(5, 3\)"),
    (lambda m, b: m(b[0]).argmax(), r"got torch.int64 of shape \(\)"),
    (
        lambda m, b: SimpleNamespace(loss=m(b[0]).sum()),
        "got a SimpleNamespace: .* take `.loss` of a Hugging Face output",
    ),
    (lambda m, b: None, "got a NoneType"),
    (lambda m, b: m(b[0]).mean().detach(), "must return a scalar tensor, differentiable in the model's parameters"),
    (lambda m, b: torch.tensor(1.0), "differentiable in the model's parameters: leave out `.detach"),
]


@pytest.mark.parametrize(("loss_fn", "message"), BAD)
@pytest.mark.parametrize("n_samples", [1, 2])
def test_a_loss_function_without_a_scalar_or_a_gradient_is_refused_in_one_line(loss_fn, message, n_samples):
    batch = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    with pytest.raises(TypeError, match=message) as caught:
        sample_directional_losses(
            seeded(0, mlp), batch, n_samples=n_samples, seed=0, loss_fn=loss_fn, compute_gradient=True
        )
    assert "\n" not in str(caught.value)


MODEL = seeded(0, mlp)


def by_a_global(model, batch):
    return MODEL(batch[0]).square().mean()


class Scoring(nn.Sequential):
    def score(self, model, batch):
        return self(batch[0]).square().mean()


def test_a_loss_function_that_uses_another_handle_on_the_model_is_refused():
    """Its weights would not move, wherever it has it from, and however little of the loss is made with it."""
    batch = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    closed, bound = seeded(0, mlp), seeded(0, lambda: Scoring(nn.Linear(4, 3)))
    hidden = [closed]
    for model, loss_fn in [
        (MODEL, by_a_global),
        (bound, bound.score),
        (closed, lambda m, b: closed(b[0]).square().mean()),
        (closed, lambda m, b: hidden[0](b[0]).square().mean()),
        (closed, functools.partial(lambda m, b, n: n(b[0]).mean(), n=closed)),
        (closed, functools.partial(lambda m, b, w: w.mean(), w=closed[0].weight)),
        (closed, torch.no_grad()(lambda m, b: closed(b[0]).mean())),
        (closed, lambda m, b: m(b[0]).square().mean() + 1e-3 * sum(p.square().sum() for p in closed.parameters())),
    ]:
        with pytest.raises(ValueError, match=r"`loss_fn` uses '0.weight' of a model from outside") as caught:
            sample_directional_losses(model, batch, n_samples=2, loss_fn=loss_fn)
        assert "use its first argument" in str(caught.value)
        assert "\n" not in str(caught.value)
    reference = seeded(5, mlp)

    def distance(model, batch):  # another model is no mistake, nor is asking this one for its device
        out = model(batch[0].to(next(closed.parameters()).device))
        return (out - reference(batch[0]).detach()).square().mean() / closed[0].weight.numel()

    assert sample_directional_losses(closed, batch, n_samples=2, loss_fn=distance, seed=0)["loss_std"] > 0
    wrapped = nn.Module()
    wrapped.MODEL = MODEL
    named = lambda m, b: m.MODEL(b[0]).square().mean()  # noqa: E731  an attribute with the name of a global
    assert sample_directional_losses(wrapped, batch, n_samples=2, loss_fn=named, seed=0)["loss_std"] > 0
    with pytest.warns(UserWarning, match="equal along every direction: does `loss_fn` use the model it is given"):
        sample_directional_losses(
            closed, batch, n_samples=2, loss_fn=lambda m, b: reference(b[0]).square().mean(), seed=0
        )


# Cutting the batch


@pytest.mark.slow
def test_the_numbers_are_the_same_however_the_batch_is_cut():
    model = seeded(0, gpt2).double()
    batch = {**tokens(2, 5, 8, pad=4), "position_ids": torch.arange(8)[None]}
    options = {"n_samples": 3, "seed": 0, "two_sided": True, "compute_gradient": True}
    whole = sample_directional_losses(model, batch, **options)
    for config in (1, {"batch_size": 2}, 100):
        parts = sample_directional_losses(model, BatchEncoding(batch), batch_config=config, **options)
        for name in ("losses", "losses_negative", "slopes"):
            assert np.allclose(whole[name], parts[name], rtol=1e-9, atol=1e-11)
    points = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    whole, parts = (
        sample_directional_losses(seeded(0, mlp), points, 3, seed=0, batch_config=config)
        for config in (None, SimpleNamespace(batch_size=3))
    )
    assert np.allclose(whole["losses"], parts["losses"])


def test_it_is_really_cut():
    seen = []

    class Watched(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    batch = (torch.ones(7, 2), torch.zeros(7, dtype=torch.long))
    sample_directional_losses(seeded(0, lambda: Watched(2, 2)), batch, n_samples=1, seed=0, batch_config=3)
    assert {3, 1} <= set(seen) <= {6, 3, 1}  # six beside each other, before the cut is made


def test_cuts_that_cannot_be_made_get_one_line():
    batch = seeded(1, lambda: (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    model = seeded(0, mlp)
    for config in ("adaptive", 0, 2.5, True, {"size": 3}, {"batch_size": None}, SimpleNamespace(batch_size="all")):
        with pytest.raises(ValueError, match="`batch_config` must be None, a number of rows from 1, or have") as caught:
            sample_directional_losses(model, batch, batch_config=config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="all its tensors must have as many, or one; got 4 and 5"):
        sample_directional_losses(model, (batch[0], batch[1][:4]), batch_config=2)
    square = lambda m, b: m(b[0]).square().mean()  # noqa: E731
    with pytest.raises(ValueError, match="only `loss_fn` knows how its value on the whole follows from the parts"):
        sample_directional_losses(model, batch, batch_config=2, loss_fn=square)
    assert sample_directional_losses(model, batch, 2, loss_fn=square, batch_config=5)["n_samples"] == 2
