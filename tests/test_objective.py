"""What is scored, and the exact mean over batches."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CATALOGUE, VOCAB, cast, gpt2, loss_of, masked, problem, seeded, tokens
from torch import nn
from torch.func import grad, jvp
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.criterion import Labels

DATA = (torch.ones(4, 3), torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_causal_lm_is_the_models_own_loss_on_right_padded_text(name):
    """Oracle: the loss inside the Hugging Face model."""
    model, batches, criterion = problem(name)
    net = fs.functional(model)
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        theirs = model.eval()(**batch, labels=labels).loss
        assert_close(fs.objective(net, batch, criterion)(net.theta), theirs.double(), rtol=1e-5, atol=1e-6)
        assert_close(
            fs.objective(net, {**batch, "labels": labels}, criterion)(net.theta), theirs.double(), rtol=1e-5, atol=1e-6
        )


def test_masked_lm_is_the_models_own_loss():
    model, batches, criterion = problem("bert")
    net = fs.functional(model)
    theirs = model.eval()(**batches[0]).loss
    assert_close(fs.objective(net, batches[0], criterion)(net.theta), theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@given(cuts=st.lists(st.integers(1, 5), max_size=3), seed=st.integers(0, 99))
def test_the_mean_is_the_same_however_the_data_are_batched(cuts, seed):
    model, _, _ = problem("gpt2")
    net = fs.functional(model)
    whole = tokens(seed, 6, 7, pad=4)
    edges = [0, *sorted(set(cuts)), 6]
    parts = [{name: value[a:b] for name, value in whole.items()} for a, b in itertools.pairwise(edges)]
    one, many = (fs.objective(net, batches, fs.causal_lm) for batches in ([whole], parts))
    assert_close(one(net.theta), many(net.theta))
    sums, weights = many.terms(net.theta)
    assert sums.shape == (6,)
    assert weights[-1] == 2  # 7 tokens, 4 of them padding: two scored positions
    assert_close(sums.sum() / weights.sum(), one(net.theta))
    assert_close(one.terms(net.theta)[0], sums)
    naive = sum(fs.objective(net, [part], fs.causal_lm)(net.theta) for part in parts) / len(parts)
    if len(parts) > 1 and len({len(part["input_ids"]) for part in parts}) > 1:
        assert abs(naive - one(net.theta)) > 1e-9  # the mean of batch means is another number


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_padding_changes_nothing(name, left):
    model, _, criterion = problem(name)
    net = fs.functional(model)
    ids = tokens(5, 2, 6)
    columns = torch.zeros(2, 3, dtype=torch.long)
    order = (lambda a, b: (b, a)) if left else (lambda a, b: (a, b))
    padded = {key: torch.cat(order(value, columns), dim=1) for key, value in ids.items()}
    if name == "bert" and left:
        padded["position_ids"] = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    prepare = masked if name == "bert" else (lambda batch: batch)
    short, long = prepare(ids), prepare(padded)
    if name == "bert":
        short = masked(ids, 1)
        long = {**masked(padded, 1)}
    a, b = (fs.objective(net, batch, criterion)(net.theta) for batch in (short, long))
    assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_model_that_copies_its_input_is_not_rewarded():
    """The unshifted pairing, with each token scored at its own position, gives the copy a loss of 0."""
    ids = tokens(1, 2, 6)["input_ids"]
    copy = 100.0 * torch.nn.functional.one_hot(ids, VOCAB).double()
    _, targets = fs.causal_lm.prepare(ids)
    loss, weight = fs.causal_lm.token_loss(copy, targets)
    assert (weight == torch.tensor([1.0] * 5 + [0.0])).all()
    assert (loss * weight).sum() > 100
    assert cross_entropy(copy.flatten(0, 1), ids.flatten()) < 1e-6


@pytest.mark.parametrize("name", CATALOGUE)
def test_theta_may_be_flat_or_a_dict_or_made_leaf_by_leaf(name):
    loss = loss_of(name)
    flat = loss(loss.net.theta)
    assert torch.equal(flat, loss(loss.net.params))
    assert torch.equal(flat, loss.at_leaves(lambda _, value: value))
    assert flat.dtype == torch.float64


@given(seed=st.integers(0, 99), classes=st.integers(2, 6))
def test_output_hessian_is_the_second_derivative_of_the_weighted_sum(seed, classes):
    out, v = (fs.normal(fs.fold_in(fs.key(seed), i), torch.zeros(2, 3, classes, dtype=torch.float64)) for i in range(2))
    index = seeded(seed, lambda: torch.randint(0, classes, (2, 3)))
    targets = Labels(index, torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]]))

    def total(o):
        loss, weight = fs.causal_lm.token_loss(o, targets)
        return (loss * weight).sum()

    assert_close(fs.causal_lm.output_hessian(out, targets, v), jvp(grad(total), (out,), (v,))[1])


def test_sampled_labels_follow_the_models_distribution():
    out = torch.tensor([[2.0, 0.0, 1.0]]).expand(60_000, 3)
    targets = Labels(torch.zeros(60_000, dtype=torch.long), torch.ones(60_000))
    drawn = fs.classification.sample(out, targets, fs.key(0))
    share = torch.bincount(drawn.index, minlength=3) / 60_000
    p = out[0].softmax(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 60_000).sqrt()).all()
    assert torch.equal(drawn.index, fs.classification.sample(out, targets, fs.key(0)).index)
    assert not torch.equal(drawn.index, fs.classification.sample(out, targets, fs.key(1)).index)


def test_float64_losses_resolve_what_float32_cannot():
    out, targets = torch.tensor([[30.0, 0.0]]), Labels(torch.tensor([0]), torch.ones(1))
    exact = torch.log1p(torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    assert float(fs.classification.token_loss(out, targets)[0]) == 0.0
    fine = fs.classification.in_dtype(torch.float64)
    assert_close(fine.token_loss(out, targets)[0][0], exact, rtol=5e-2, atol=0)
    v = torch.tensor([[1.0, 0.0]])
    p = 1 - exact
    assert_close(fine.output_hessian(out, targets, v)[0, 0], p * (1 - p), rtol=1e-2, atol=0)
    assert float(fs.classification.output_hessian(out, targets, v)[0, 0]) == 0


def test_a_custom_criterion_keeps_one_loss_per_sequence():
    model = seeded(0, lambda: nn.Linear(2, 1)).double()
    x, y = seeded(1, lambda: (torch.randn(4, 2).double(), torch.randn(4, 1).double()))
    net = fs.functional(model)
    square = fs.objective(net, [(x, y)], fs.custom(lambda out, t: (out - t) ** 2))
    assert_close(square(net.theta), nn.functional.mse_loss(model(x), y))
    weighted = fs.objective(
        net, [(x, y)], fs.custom(lambda out, t: ((out - t) ** 2, torch.tensor([[1.0], [0], [0], [0]])))
    )
    assert_close(weighted(net.theta), (model(x) - y)[0, 0] ** 2)
    with pytest.raises(ValueError, match="reduction='none'"):
        fs.objective(net, [(x, y)], fs.custom(nn.functional.mse_loss))(net.theta)


def test_a_loss_of_weight_zero_is_never_looked_at():
    model = seeded(0, lambda: nn.Linear(1, 1)).double()
    net = fs.functional(model)
    criterion = fs.custom(lambda out, t: (torch.where(t > 0, out.log(), out), (t <= 0).double()))
    x = torch.tensor([[1.0], [-1.0]]).double()
    loss = fs.objective(net, [(x, torch.tensor([[0.0], [1.0]]).double())], criterion)
    assert torch.isfinite(loss(torch.tensor([1.0, 0.0]).double()))


def test_negative_weights_count_on_both_sides_of_the_mean():
    criterion = fs.custom(lambda out, t: (out[:, 0], t))
    net = fs.functional(seeded(0, lambda: nn.Linear(1, 1, bias=False)))
    loss = fs.objective(net, [(torch.tensor([[1.0], [4.0]]), torch.tensor([1.0, -0.5]))], criterion)
    assert_close(float(loss(torch.ones(1))), (1 - 0.5 * 4) / 0.5)


def test_sampled_labels_of_a_bf16_model_are_not_rounded_to_the_last_class():
    out = torch.zeros(100_000, 3, dtype=torch.bfloat16)
    out[:, 2] = -8.0
    drawn = fs.classification.sample(
        out, Labels(torch.zeros(100_000, dtype=torch.long), torch.ones(100_000)), fs.key(0)
    )
    p = float(out[0].double().softmax(0)[2])
    assert abs(float((drawn.index == 2).double().mean()) - p) < 5 * (p / 100_000) ** 0.5


def test_labels_of_eight_bits_are_not_taken_for_ignored_ones():
    _, targets = fs.classification.prepare((torch.ones(2, 1), torch.tensor([156, 3], dtype=torch.uint8)))
    assert targets.weight.tolist() == [1, 1]
    assert targets.index.tolist() == [156, 3]


def test_a_tuple_of_batches_is_a_list_of_batches():
    net = fs.functional(seeded(0, gpt2))
    batches = tokens(1, 2, 4), tokens(2, 3, 5)
    assert_close(
        fs.objective(net, batches, fs.causal_lm)(net.theta), fs.objective(net, list(batches), fs.causal_lm)(net.theta)
    )


BAD = {
    "one-token sequences": (lambda: fs.causal_lm.prepare(tokens(1, 2, 1)), ValueError, "at least 2 tokens"),
    "no ids": (lambda: fs.causal_lm.prepare({"x": torch.ones(1)}), ValueError, "an entry `input_ids`"),
    "a 4-D mask without labels": (
        lambda: fs.causal_lm.prepare({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)}),
        ValueError,
        "does not say which tokens are padding",
    ),
    "float ids": (lambda: fs.causal_lm.prepare(torch.ones(2, 3)), ValueError, "integers of shape"),
    "no labels for masked lm": (
        lambda: fs.masked_lm.prepare(tokens(1, 2, 3)),
        ValueError,
        "needs a batch with `labels`",
    ),
    "no pair": (lambda: fs.classification.prepare(torch.ones(2)), ValueError, r"tuple `\(inputs, targets\)`"),
    "real labels": (lambda: fs.classification.prepare((torch.ones(2), torch.ones(2))), ValueError, "use `custom`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_get_one_clear_line(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_objectives_get_one_clear_line():
    net = fs.functional(seeded(0, gpt2))
    with pytest.raises(ValueError, match="`batches` is empty"):
        fs.objective(net, [], fs.causal_lm)
    batch = tokens(1, 2, 4)
    with pytest.raises(ValueError, match="no position is scored: every label is -100 or masked"):
        fs.objective(net, [{**batch, "labels": torch.full_like(batch["input_ids"], -100)}], fs.causal_lm)
    with pytest.raises(ValueError, match=r"the batch is on meta, the model on cpu.*\.to\('cpu'\)"):
        fs.objective(net, [cast(batch, torch.float32) | {"input_ids": batch["input_ids"].to("meta")}], fs.causal_lm)
    with pytest.raises(ValueError, match="must be labels of shape"):
        loss = fs.objective(net, [({"input_ids": batch["input_ids"]}, torch.tensor([0, 1]))], fs.classification)
        loss(net.theta)


def test_softmax_hessian_is_the_same_in_parts():
    """More entries than are worked on at a time, classes that do not divide them, and weights of 0."""
    out, v = seeded(1, lambda: (torch.randn(3, 7, 10007), torch.randn(3, 7, 10007)))
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 1.0, 0.5]).expand(3, 7)
    found = fs.causal_lm.output_hessian(out, Labels(torch.zeros(3, 7, dtype=torch.long), weight), v)
    p = out.double().softmax(-1)
    wanted = weight[..., None] * (p * v - p * (p * v).sum(-1, keepdim=True))
    assert_close(found.double(), wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_theta_comes_in_by_one_door_as_a_wide_constant(dtype):
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 2).to(dtype)))
    loss = fs.objective(net, [cast(DATA, dtype)], fs.classification)
    wide = torch.promote_types(dtype, torch.float32)
    params = {name: value + 2.0**-12 for name, value in {k: v.to(wide) for k, v in loss.net.params.items()}.items()}
    flat = torch.cat([params[name].flatten() for name in loss.layout.names])
    for theta in (flat.requires_grad_(), dict(reversed(params.items()))):
        vector, leaves = loss.vector(theta), loss.wide_leaves(theta)
        assert torch.equal(vector, flat)  # not rounded to what the model computes in
        assert not vector.requires_grad
        assert list(leaves) == list(loss.layout.names)
        assert all(
            torch.equal(leaves[name], value) and not leaves[name].requires_grad for name, value in params.items()
        )
        assert loss.baseline(theta) == float(loss(theta).detach())
    assert loss.vector(loss.net.params).dtype == wide


@pytest.mark.parametrize("door", ["vector", "wide_leaves", "baseline"])
def test_what_is_no_point_is_refused_at_the_door(door):
    loss = fs.objective(fs.functional(seeded(0, lambda: nn.Linear(3, 2))), [DATA], fs.classification)
    enter = inspect.unwrap(getattr(fs.Loss, door))
    for theta, message in (
        (torch.zeros(7), r"`theta` must be a flat vector of shape \(8,\), got \(7,\).*layout.ravel"),
        ({"weight": torch.zeros(2, 3)}, "`theta` must have the 2 names.*missing: .'bias'"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"must have shape \(2, 3\), got \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            enter(loss, theta)
    with pytest.raises(TypeError, match="`theta` must be a flat tensor or a dict of parameters, got a list"):
        enter(loss, [0.0] * 8)
    with pytest.raises(TypeError, match="`loss` must be what `objective` returns"):
        enter(abs, loss.net.theta)


def test_a_loss_that_is_not_finite_is_no_baseline():
    loss = fs.objective(fs.functional(seeded(0, lambda: nn.Linear(3, 2))), [DATA], fs.classification)
    with pytest.raises(ValueError, match=r"the loss at theta is nan.*Check the weights"):
        loss.baseline(torch.full((8,), torch.nan))
