"""Oracle: the loss of the whole batch, which a loss cut in parts equals or refuses, with the name of what must stay whole."""

import warnings

import pytest
import torch
from problems import EVERY, loss_of, seeded
from torch import nn
from torch.nn import functional as F

import funcscope as fs
from funcscope.core.apart import check_apart
from funcscope.curvature import gradient_norms, gram, m_sharpness
from funcscope.curvature.kfac_factors import kfac_factors
from funcscope.curvature.rows import micro_batches
from funcscope.curvature.scored_sequences import chosen, first
from funcscope.documented.scoring import loss_of as documented_loss
from funcscope.landscape.langevin import langevin_chains
from funcscope.weights.masked_training import drawn_batch
from funcscope.weights.winning_tickets import split

LABELS = torch.tensor([0, 1, 1])


class Scaled(nn.Module):
    """An input that all sequences share beside one that each has: `function` makes features of them."""

    def __init__(self, function=torch.mul):
        super().__init__()
        self.layer, self.function = nn.Linear(3, 2), function

    def forward(self, x, scale):
        return self.layer(torch.tanh(self.function(x, scale)))


def inputs_of(num=3, *, front=False):
    x, scale = seeded(1, lambda: (torch.randn(num, 3).double(), torch.tensor([1.0, 2.0, 30.0]).double()))
    return {"x": x, "scale": scale[None] if front else scale}


def scaled(*, front=False, function=torch.mul, **other):
    net = fs.functional(seeded(0, lambda: Scaled(function)).double())
    return fs.objective(net, [(inputs_of(front=front) | other, LABELS)], fs.classification)


CUTS = {
    "split": lambda loss, theta: loss.split(2),
    "gram": lambda loss, theta: gram(loss, theta, chunk_size=1),
    "tokens": lambda loss, theta: gram(loss, theta, unit="token", chunk_size=1),
    "lengths": lambda loss, theta: gradient_norms(loss, theta, chunk_size=2),
    "factors": lambda loss, theta: kfac_factors(loss, theta, key=fs.key(0), chunk_size=1),
    "micro-batches": lambda loss, theta: micro_batches(loss, 1),
    "sharpness": lambda loss, theta: m_sharpness(loss, theta, m=1),
    "errors": lambda loss, theta: fs.trace_errors(loss, theta, key=fs.key(0), num=4, chunk_size=1),
    "the first": lambda loss, theta: first(loss, 2),
    "some": lambda loss, theta: chosen(loss, torch.tensor([True, False, True])),
    "training": lambda loss, theta: drawn_batch(loss, fs.key(0), 1),
    "held out": lambda loss, theta: split(loss, fs.key(0), 0.3),
    "chains": lambda loss, theta: langevin_chains(
        loss, theta, key=fs.key(0), num_chains=1, num_steps=2, step_size=1e-3, strength=1.0, localization=0.0,
        batch_size=1, chunk_size=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUTS)
def test_a_tensor_that_all_share_is_refused_by_name_and_taken_with_a_dimension_in_front(name):
    loss = scaled()
    with pytest.raises(ValueError, match=r"`inputs\['scale'\]` has 3 rows.*Give it a dimension of 1 in front"):
        CUTS[name](loss, loss.net.theta)
    right = scaled(front=True)
    CUTS[name](right, right.net.theta)


def test_parts_of_the_remedy_are_the_whole():
    loss, whole = scaled(front=True), scaled()
    theta = loss.net.theta
    for size in (1, 2):
        torch.testing.assert_close(loss.split(size)(theta), whole(theta))
    torch.testing.assert_close(gram(loss, theta, chunk_size=1).total, gram(loss, theta).total)


def test_the_documented_cut_of_a_batch_is_refused_as_well():
    model, batch = seeded(0, Scaled).double(), (tuple(inputs_of().values()), LABELS)
    with pytest.raises(ValueError, match="has 3 rows"):
        documented_loss(model, batch, batch_config=1)


def reference(x, scale):
    """Of the mean over a set that has as many rows as the batch."""
    return x - scale.mean(0)


def looked_up(x, scale):
    return x + scale[(x[:, :1] > 0).long()[:, 0]]


def masked(x, scale):
    """(t, t), for as many positions as sequences."""
    return (x[:, :, None] * scale).sum(1)


SHARED = {
    "a set": (reference, torch.randn),
    "a table": (looked_up, torch.randn),
    "a matrix": (masked, torch.randn),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", SHARED)
def test_it_is_told_by_what_fails_and_by_what_scores_differently(name, size):
    function, make = SHARED[name]
    loss = scaled(function=function, scale=seeded(2, lambda: make(3, 3)).double())
    with pytest.raises(ValueError, match=r"`inputs\['scale'\]` has 3 rows"):
        loss.split(size)


def test_a_target_that_all_share_is_named():
    criterion = fs.custom(lambda out, targets: ((out - targets[0]) * targets[1]).square().sum(1))
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 4)).double())
    targets = torch.zeros(4, 4).double(), torch.arange(1.0, 5.0).double()
    loss = fs.objective(net, [(torch.ones(4, 3).double(), targets)], criterion)
    with pytest.raises(ValueError, match=r"`targets\[1\]` has 4 rows"):
        loss.split(2)


def test_a_target_of_one_row_does_not_say_how_many_sequences_there_are():
    criterion = fs.custom(lambda out, targets: ((out - targets[1]) * targets[0]).square().sum(1))
    net = fs.functional(seeded(0, lambda: nn.Linear(3, 4)).double())
    x, y = inputs_of()["x"], torch.arange(12.0).double().reshape(3, 4)
    loss = fs.objective(net, [(x, (torch.arange(1.0, 5.0).double()[None], y))], criterion)
    alone = [fs.objective(net, [(x[i : i + 1], (loss.batches[0][1][0], y[i : i + 1]))], criterion) for i in range(3)]
    rows = torch.stack([torch.func.grad(lambda t, one=one: one.terms(t)[0].sum())(net.theta) for one in alone])
    assert loss.batch_size == 3
    for chunk_size in (1, 8):
        torch.testing.assert_close(fs.per_sample_gradients(loss, net.theta, chunk_size=chunk_size), rows)
        torch.testing.assert_close(gram(loss, net.theta, chunk_size=chunk_size).total, rows @ rows.T)


def test_sequences_that_see_each_other_are_not_cut():
    model = seeded(0, lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))).double()
    loss = fs.objective(
        fs.functional(model), [(inputs_of(7)["x"], torch.zeros(7, dtype=torch.long))], fs.classification
    )
    with pytest.raises(ValueError, match=r"a batch of 7 sequences cannot be cut, .*see each other"):
        loss.split(4)
    assert float(loss.split(7)(loss.net.theta)) == float(loss(loss.net.theta))


@pytest.mark.parametrize("name", EVERY)
def test_every_problem_may_be_cut(name):
    loss = loss_of(name)
    torch.testing.assert_close(loss.split(1)(loss.net.theta), loss(loss.net.theta), rtol=1e-9, atol=1e-12)


def test_a_model_that_fails_with_the_whole_batch_or_draws_says_so_itself():
    net = fs.functional(seeded(0, lambda: nn.Linear(4, 2)).double())
    loss = fs.objective(net, [(torch.ones(3, 3).double(), LABELS)], fs.classification)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as err:
        loss.split(1)
    assert not isinstance(err.value, ValueError)
    noisy = scaled(function=lambda x, scale: x + torch.randn_like(x), front=True)
    with pytest.raises(ValueError, match="draws random numbers"):
        noisy.split(1)


def test_it_is_looked_at_once_for_every_shape_and_not_where_nothing_is_cut():
    calls = []

    def counted(x, scale):
        calls.append(len(x))
        return x * scale

    net = fs.functional(seeded(0, lambda: Scaled(counted)).double())
    batches = [(inputs_of(num, front=True), torch.zeros(num, dtype=torch.long)) for num in (5, 5, 2, 5)]
    loss = fs.objective(net, batches, fs.classification)
    check_apart(loss, 5)
    assert calls == []
    loss.split(4)
    assert calls == [5, 4, 1]
    loss.split(4)
    assert calls == [5, 4, 1]
    calls.clear()
    check_apart(loss, 4)
    assert calls == []


def test_batches_are_joined_only_where_sequences_score_the_same():
    """A scale for its batch of one, which the model takes as a vector of three."""
    net = fs.functional(seeded(0, lambda: Scaled(lambda x, scale: x * scale.view(3))).double())
    singles = [({"x": x[None], "scale": torch.arange(1.0, 4.0).double()[None]}, LABELS[:1]) for x in inputs_of(3)["x"]]
    loss = fs.objective(net, singles, fs.classification)
    apart = torch.stack(
        [fs.per_sample_gradients(fs.objective(net, [one], fs.classification), net.theta)[0] for one in singles]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(gram(loss, net.theta).total, apart @ apart.T)


def test_torch_itself_takes_the_part_that_fits_and_makes_another_loss():
    """The negative control: one row of a shared tensor is broadcast, and nothing is said."""
    inputs = inputs_of()
    layer = seeded(0, Scaled).double()
    whole = F.cross_entropy(layer(**inputs), LABELS)
    parts = [
        F.cross_entropy(layer(inputs["x"][i : i + 1], inputs["scale"][i : i + 1]), LABELS[i : i + 1]) for i in range(3)
    ]
    assert abs(float((whole - torch.stack(parts).mean()).detach())) > 1e-2


class Prior(nn.Module):
    """A prior for the whole data set, which has as many rows as a batch."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 2), function

    def forward(self, x, prior):
        return self.layer(x) * self.function(prior)


INSIDE = {
    "its largest": (9, torch.tensor([1.0, 1, 1, 1, 3, 1, 1, 1, 1]), lambda s: s.max()),
    "its middle": (9, torch.tensor([1.0, 1, 1, 1, 3, 1, 1, 1, 1]), lambda s: s[len(s) // 2]),
    "its ends": (9, torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 1, 2]), lambda s: s[0] * s[-1]),
    "a window's mean": (9, torch.arange(9.0), lambda s: (s * torch.hann_window(len(s), periodic=False)).sum() / 4),
    "a long one": (200, torch.eye(200)[77] + 1, lambda s: s.max()),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", INSIDE)
def test_what_differs_inside_a_batch_only_is_seen(name, size):
    num, prior, function = INSIDE[name]
    x, y = seeded(1, lambda: (torch.randn(num, 6).double(), torch.randn(num, 2).double()))
    square = fs.custom(lambda out, target: ((out - target) ** 2).sum(1))
    net = fs.functional(seeded(0, lambda: Prior(function)).double())
    with pytest.raises(ValueError, match=rf"`inputs\[1\]` has {num} rows"):
        fs.objective(net, [((x, prior.double()), y)], square).split(size)
    whole = fs.objective(net, [((x, prior.double()[None]), y)], square) if name == "its largest" else None
    if whole is not None:
        torch.testing.assert_close(whole.split(size)(net.theta), whole(net.theta))


def test_batches_that_would_take_much_are_compared_in_as_many_sequences_as_do_not(monkeypatch):
    monkeypatch.setattr("funcscope.core.apart.MOST", 20_000)
    seen = []

    def mean(prior):
        seen.append(len(prior))
        return prior.mean()

    net = fs.functional(seeded(0, lambda: Prior(mean)).double())
    x, y = seeded(1, lambda: (torch.randn(5000, 6).double(), torch.randn(5000, 2).double()))
    square = fs.custom(lambda out, target: ((out - target) ** 2).sum(1))
    one = torch.ones(5000).double()
    fs.objective(net, [((x, one), y)], square).split(50)
    assert 100 < max(seen) < 500
    with pytest.raises(ValueError, match="has 5000 rows"):
        fs.objective(net, [((x, one + torch.linspace(-1, 1, 5000) ** 2), y)], square).split(50)


def test_pairs_of_which_nothing_can_be_shared_are_compared_at_their_ends():
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            calls.append(len(x))
            return self.layer(x)

    net = fs.functional(seeded(0, Counting))
    loss = fs.objective(net, [(torch.ones(100, 3), torch.zeros(100).long())], fs.classification)
    loss.check_function()
    calls.clear()
    loss.split(10)
    assert sum(calls) == 80


def its_own_outputs(model, criterion):
    """A loss that is 0 where it is looked at: the model makes the targets."""
    x = seeded(1, lambda: torch.randn(16, 3).double())
    model = seeded(0, model).double()
    return fs.objective(fs.functional(model), [(x, model(x).detach())], criterion)


@pytest.mark.parametrize("name", ["per_sample_gradients", "gram", "gram_matvec"])
def test_gradients_that_are_rounding_are_taken_and_those_of_coupled_sequences_refused(name):
    function = {
        "per_sample_gradients": fs.per_sample_gradients,
        "gram": lambda loss, theta: gram(loss, theta, by="none", chunk_size=4).total,
        "gram_matvec": lambda loss, theta: fs.gram_matvec(loss, theta)(torch.ones(16).double()),
    }[name]
    square = fs.custom(lambda out, target: (out - target).square().sum(1))
    loss = its_own_outputs(lambda: nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1)), square)
    assert float(function(loss, loss.net.theta).abs().max()) < 1e-14
    norm = its_own_outputs(lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1)), square)
    with pytest.raises(ValueError, match="see each other"):
        function(norm, norm.net.theta)


def test_dimension_0_is_that_of_sequences():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells, self.layer = nn.RNN(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.layer(self.cells(x)[0][-1])

    x, y = torch.ones(7, 2, 4), torch.zeros(2).long()
    loss = fs.objective(fs.functional(seeded(0, Recurrent)), [(x, y)], fs.classification)
    with pytest.raises(ValueError, match="one of 2 sequences, which dimension 0 must number"):
        fs.per_sample_gradients(loss, loss.net.theta)


class Centred(nn.Module):
    """Features without the mean of their group, which the last column numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        features, group = self.layer(x[:, :3]), x[:, 3]
        alike = (group[:, None] == group).to(x.dtype)
        return features - alike @ features / alike.sum(1, keepdim=True)


def grouped(size=8, num=64):
    x = seeded(1, lambda: torch.cat([torch.randn(num, 3), (torch.arange(num) // size)[:, None].float()], 1)).double()
    net = fs.functional(seeded(0, Centred).double())
    return fs.objective(net, [(x, torch.arange(num) % 2)], fs.classification)


@pytest.mark.parametrize("size", [1, 2, 4, 12])
def test_neighbours_that_see_each_other_are_not_parted(size):
    with pytest.raises(ValueError, match="see each other"):
        grouped().split(size)


def test_whole_groups_are_parts():
    whole = grouped()
    for size in (8, 16):
        torch.testing.assert_close(whole.split(size)(whole.net.theta), whole(whole.net.theta))


COUPLED = {
    "a mean": lambda: nn.Sequential(nn.Linear(3, 4), Minus(), nn.Linear(4, 2)),
    "a norm at the end": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)),
    "a softmax": lambda: nn.Sequential(nn.Linear(3, 2), nn.Softmax(0)),
}


class Minus(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("name", COUPLED)
def test_grams_lengths_and_fishers_of_coupled_sequences_are_refused(name):
    x = inputs_of(12)["x"]
    net = fs.functional(seeded(0, COUPLED[name]).double())
    loss = fs.objective(net, [(x, torch.arange(12) % 2)], fs.classification)
    for function in (gram, gradient_norms, fs.empirical_fisher, fs.per_sample_gradients):
        with pytest.raises(ValueError, match="see each other"):
            function(loss, net.theta)


def test_every_batch_of_what_may_be_shared_is_looked_at():
    """The prior of the first batch is constant, and that of the second is not."""
    square = fs.custom(lambda out, target: ((out - target) ** 2).sum(1))
    net = fs.functional(seeded(0, lambda: Prior(lambda s: s.mean())).double())
    x, y = seeded(1, lambda: (torch.randn(2, 9, 6).double(), torch.randn(2, 9, 2).double()))
    priors = torch.stack([torch.ones(9), torch.arange(9.0)]).double()
    for order in ([0, 1], [1, 0]):
        batches = [((x[i], priors[i]), y[i]) for i in order]
        with pytest.raises(ValueError, match="has 9 rows"):
            fs.objective(net, batches, square).split(3)


def test_small_losses_are_no_sign_of_coupling():
    """p - 1 of a confident classifier is a few units of rounding, which no factor may round again."""
    for seed in range(6):
        model = seeded(seed, lambda: nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 4)))
        x = seeded(seed, lambda: torch.randn(16, 20))
        with torch.no_grad():
            y = model(x).argmax(1)
            margin = model(x).topk(2).values.diff(dim=1).abs().min()
            model[2].weight.mul_(12 / margin)
            model[2].bias.mul_(12 / margin)
        loss = fs.objective(fs.functional(model), [(x, y)], fs.classification)
        fs.per_sample_gradients(loss, loss.net.theta)
