"""Oracle: gradients of single sequences from a loop of `torch.func.grad`, and their products in a matrix."""

from dataclasses import replace

import pytest
import torch
from problems import EVERY, loss_of, problem, seeded, tokens
from torch import nn
from torch.func import grad
from torch.nn import functional as F

import funcscope as fs
from funcscope.core.batches import cut, num_rows
from funcscope.core.layout import View
from funcscope.curvature import batch_dependence, gradient_norms, gram, gram_matvec
from funcscope.curvature.leaf_gradients import LeafGradients, Lookup, Outer, Rows

WHOLE = slice(None)


def rows_by_loop(loss, theta):
    """One row per sequence: the gradient of its own weighted sum, alone."""
    rows = []
    for batch in loss.batches:
        for i in range(num_rows(batch)):
            alone = replace(loss, batches=(cut(batch, slice(i, i + 1), num_rows(batch)),))
            rows.append(grad(lambda t, alone=alone: alone.terms(t)[0].sum())(theta))
    return torch.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("chunk_size", [64, 2])
def test_the_gram_is_that_of_the_gradients_in_every_block(name, chunk_size):
    loss = loss_of(name)
    rows = rows_by_loop(loss, loss.net.theta)
    grams = gram(loss, loss.net.theta, by="tensor", chunk_size=chunk_size)
    for leaf in loss.layout.leaves:
        part = rows[:, leaf.slice]
        scale = float((part @ part.T).abs().max()) + 1e-12 * float((rows @ rows.T).abs().max())
        assert float((grams.block(leaf.name) - part @ part.T).abs().max()) <= 1e-10 * scale, leaf.name
    torch.testing.assert_close(grams.total, rows @ rows.T, rtol=1e-10, atol=1e-12)
    norms = gradient_norms(loss, loss.net.theta, by="layer", chunk_size=chunk_size)
    torch.testing.assert_close(norms.total, rows.norm(dim=1), rtol=1e-10, atol=1e-12)
    assert all("relative_attention_bias" in name for name in grams.by_rows)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "math", "keep"])
def test_float32_and_every_kernel_of_attention(attention):
    model, batches, criterion = problem("gpt2", torch.float32)
    loss = fs.objective(fs.functional(model, attention=attention), batches, criterion)
    rows = rows_by_loop(loss_of("gpt2"), loss_of("gpt2").net.theta)
    total = gram(loss, loss.net.theta).total
    assert float((total - rows @ rows.T).norm() / (rows @ rows.T).norm()) < 1e-5


@pytest.mark.slow
def test_chunks_and_batches_change_nothing_but_the_passes():
    loss = loss_of("gpt2")
    whole, cut_up = (gram(loss, loss.net.theta, by="layer", chunk_size=size) for size in (64, 1))
    torch.testing.assert_close(whole.values, cut_up.values, rtol=1e-12, atol=1e-14)
    assert whole.num_passes < cut_up.num_passes
    singles = fs.objective(
        loss.net, [{k: x[i : i + 1] for k, x in tokens(2, 2, 5).items()} for i in (0, 1)], fs.causal_lm
    )
    assert gram(singles, loss.net.theta).num_passes == 3  # one batch of two, and a row alone


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_every_scored_position_is_a_sample_of_its_own(name):
    loss = loss_of(name)
    rows = []
    for inputs, labels in loss.batches:
        for place in labels.weight.nonzero():
            weight = torch.zeros_like(labels.weight)
            weight[tuple(place)] = labels.weight[tuple(place)]
            one = replace(loss, batches=((inputs, labels._replace(weight=weight)),))
            rows.append(grad(lambda t, one=one: one.terms(t)[0].sum())(loss.net.theta))
    rows = torch.stack(rows)
    torch.testing.assert_close(gram(loss, loss.net.theta, unit="token").total, rows @ rows.T, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_two_data_sets_and_the_product_with_a_vector():
    loss = loss_of("gpt2")
    other = fs.objective(loss.net, [tokens(7, 2, 6)], fs.causal_lm)
    a, b = rows_by_loop(loss, loss.net.theta), rows_by_loop(other, loss.net.theta)
    for size in (64, 2):
        across = gram(loss, loss.net.theta, other=other, chunk_size=size)
        torch.testing.assert_close(across.total, a @ b.T, rtol=1e-10, atol=1e-12)
    u = fs.normal(fs.key(0), torch.zeros(len(a), dtype=torch.float64))
    torch.testing.assert_close(gram_matvec(loss, loss.net.theta)(u), a @ (a.T @ u), rtol=1e-10, atol=1e-12)


def test_views_of_rows_and_columns_are_blocks():
    loss = loss_of("mlp")
    views = {
        "upper": [View("0.weight", 0, slice(0, 2)), View("0.bias", 0, slice(0, 2))],
        "left": [View("2.weight", 1, slice(0, 4))],
    }
    grams = gram(loss, loss.net.theta, by=views)
    rows = {name: x.flatten(1) for name, x in _by_leaf(loss).items()}
    upper = torch.cat([rows["0.weight"].unflatten(1, (6, 4))[:, :2].flatten(1), rows["0.bias"][:, :2]], 1)
    left = rows["2.weight"].unflatten(1, (3, 6))[:, :, :4].flatten(1)
    torch.testing.assert_close(grams.block("upper"), upper @ upper.T)
    torch.testing.assert_close(grams.block("left"), left @ left.T)


def _by_leaf(loss):
    rows = rows_by_loop(loss, loss.net.theta)
    return {leaf.name: rows[:, leaf.slice] for leaf in loss.layout.leaves}


class Strange(nn.Module):
    """A weight used twice, by hand and transposed, a table that all rows share, a product of weights, and one unused."""

    def __init__(self):
        super().__init__()
        self.twice, self.hand = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.scale, self.place = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(1, 3, 4))
        self.left, self.right = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        x = torch.tanh(self.twice(self.twice(x) + self.place)) @ self.hand.T
        x = torch.einsum("btd,de->bte", x, self.hand) * self.scale
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x += self.scale
        return F.linear(x, self.left @ self.right).mean(1)


class Across(nn.Module):
    """Sequences in the second dimension, as torch's recurrent and attention modules take them."""

    def __init__(self):
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.out(self.attend(x, x, x)[0].mean(0))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


MODULES = {
    "strange": Strange, "across": Across, "recurrent": Recurrent,
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 2, groups=1), nn.GroupNorm(2, 4), nn.PReLU(), nn.ConvTranspose1d(4, 2, 2),
        nn.Flatten(), nn.Linear(8, 3)
    ),
    "in place": lambda: nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(3), nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)
    ),
    "encoder": lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.RMSNorm(4), nn.Flatten(), nn.Linear(12, 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("num", [3, 5])  # as many sequences as positions, which tells nobody which is which; and not
def test_every_module_works_and_what_is_not_known_is_named(name, num):
    model = seeded(3, MODULES[name]).double()
    x, y = seeded(4, lambda: (torch.randn(num, 3, 4).double(), torch.randint(0, 3, (num,))))
    loss = fs.objective(fs.functional(model), [(x, y)], fs.classification)
    rows = rows_by_loop(loss, loss.net.theta)
    grams = gram(loss, loss.net.theta, by="tensor")
    torch.testing.assert_close(grams.total, rows @ rows.T, rtol=1e-9, atol=1e-11)
    known = {"strange": {"left", "right"}, "weight norm": {"0.parametrizations.weight.original0"}}
    assert known.get(name, set()) <= set(grams.by_rows)
    assert bool(grams.by_rows) == (name in ("strange", "weight norm", "recurrent"))


def test_tied_weights_add_up_before_they_are_multiplied():
    """Without the term between table and head the Gram of GPT-2's one table is off by a lot."""
    loss = loss_of("gpt2")
    part = _by_leaf(loss)["transformer.wte.weight"]
    tied = gram(loss, loss.net.theta, by="tensor").block("transformer.wte.weight")
    untied = loss_of("gpt2").net
    values = {**untied.params, "head": untied.params["transformer.wte.weight"]}

    def sums(p, batch):
        hidden = untied.hidden({k: v for k, v in p.items() if k != "head"}, batch[0])
        return loss.criterion.scored(hidden @ p["head"].T, batch[1])[0].sum()

    apart = [
        grad(sums)(values, cut(batch, slice(i, i + 1), num_rows(batch)))
        for batch in loss.batches for i in range(num_rows(batch))
    ]  # fmt: skip
    table, head = (torch.stack([g[k].flatten() for g in apart]) for k in ("transformer.wte.weight", "head"))
    torch.testing.assert_close(tied, part @ part.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tied, (table + head) @ (table + head).T, rtol=1e-9, atol=1e-12)
    assert float((tied - table @ table.T - head @ head.T).norm()) > 1e-2 * float(tied.norm())


@pytest.mark.parametrize("kinds", ["outer", "lookup", "rows", "outer lookup", "lookup rows", "outer outer rows"])
def test_a_leaf_in_every_form_is_its_dense_gradient(kinds):
    def parts(seed, n, t):
        draw = lambda *shape: torch.randn(*shape).double()  # noqa: E731
        make = {
            "outer": lambda: Outer(draw(n, t, 7), draw(n, t, 3)),
            "lookup": lambda: Lookup(torch.randint(0, 7, (n, t)), draw(n, t, 3)),
            "rows": lambda: Rows(draw(n, 21)),
        }
        return seeded(seed, lambda: LeafGradients.of([make[kind]() for kind in kinds.split()], (7, 3)))

    def dense(leaf):
        out = torch.zeros(leaf.num, 7, 3, dtype=torch.float64)
        for part in leaf.parts:
            for b in range(leaf.num):
                if isinstance(part, Rows):
                    out[b] += part.value[b].view(7, 3)
                    continue
                for t in range(part.right.shape[1]):
                    u = part.left[b, t] if isinstance(part, Outer) else torch.eye(7).double()[part.ids[b, t]]
                    out[b] += torch.outer(u, part.right[b, t])
        return out

    for t in (1, 9):
        a, b = parts(0, 4, t), parts(1, 2, t + 1)
        for rows, cols in ((WHOLE, WHOLE), (slice(2, 5), slice(0, 2))):
            x, y = (dense(leaf)[:, rows, cols].flatten(1) for leaf in (a, b))
            torch.testing.assert_close(a.gram(b, rows, cols), x @ y.T)
            torch.testing.assert_close(a.gram(a, rows, cols), x @ x.T)
            torch.testing.assert_close(a.smaller().gram(b.smaller(), rows, cols), x @ y.T)
            torch.testing.assert_close(a.squares(rows, cols), x.square().sum(1))
        torch.testing.assert_close(a.row(1), dense(a)[1].flatten())


def test_sequences_that_see_each_other_are_refused_and_measured():
    model = seeded(0, lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))).double()
    x, y = seeded(1, lambda: (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))
    loss = fs.objective(fs.functional(model), [(x, y)], fs.classification)
    with pytest.raises(ValueError, match="see each other"):
        gram(loss, loss.net.theta)
    assert batch_dependence(loss_of("mlp"), loss_of("mlp").net.theta).largest < 1e-12


def test_a_gradient_that_is_not_finite_is_named():
    model, _, criterion = problem("mlp")
    x, y = seeded(1, lambda: (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))
    x[3, 2] = torch.nan
    loss = fs.objective(fs.functional(model), [(x, y)], criterion)
    with pytest.raises(ValueError, match=r"the gradient of sample 3 in `\d.(weight|bias)` is not finite"):
        gram(loss, loss.net.theta)


def test_inputs_that_no_gram_has():
    loss = loss_of("mlp")
    with pytest.raises(ValueError, match="'filter'"):
        gram(loss, loss.net.theta, by="filter")
    with pytest.raises(ValueError, match="chunk_size"):
        gram(loss, loss.net.theta, chunk_size=0)
    cnn = loss_of("cnn")
    with pytest.raises(ValueError, match="cuts dimension 2"):
        gram(cnn, cnn.net.theta, by={"a": [View("0.weight", 2, slice(0, 1))]})
    with pytest.raises(ValueError, match="over labels"):
        custom = fs.custom(lambda out, y: (out - y).square().sum(1))
        net = fs.functional(seeded(0, lambda: nn.Linear(2, 2)))
        gram(fs.objective(net, [(torch.ones(2, 2), torch.ones(2, 2))], custom), net.theta, unit="token")


def test_another_data_set_is_one_of_the_same_parameters():
    loss, batch = loss_of("mlp"), [(torch.ones(2, 4).double(), torch.tensor([0, 1]))]
    model = seeded(0, lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 6), nn.Linear(6, 3))).double()
    other = fs.objective(fs.functional(model), batch, fs.classification)
    with pytest.raises(ValueError, match="same parameters"):
        gram(loss, loss.net.theta, other=other)


def test_theta_the_model_and_the_generator_are_left_alone():
    loss = loss_of("gpt2")
    theta = loss.net.theta
    before, state = theta.clone(), torch.get_rng_state()
    gram(loss, theta)
    assert torch.equal(theta, before)
    assert torch.equal(torch.get_rng_state(), state)


class Turned(nn.Module):
    """A layer that sees positions first: what its rows are is told by values alone."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x.transpose(0, 1))).transpose(0, 1))


@pytest.mark.parametrize(("dtype", "tolerance", "scored"), [(torch.float64, 1e-9, False), (torch.float32, 1e-3, True)])
def test_a_small_block_whose_rows_are_others_is_found_out(dtype, tolerance, scored):
    model = seeded(0, Turned).to(dtype)
    with torch.no_grad():
        model.out.weight *= 1e-5  # the inner gradients are a small part of the whole
    x, y = seeded(1, lambda: (torch.randn(5, 5, 4).to(dtype), torch.randint(0, 3, (5, 5))))
    y[-1] = y[-1] if scored else -100
    loss = fs.objective(fs.functional(model), [(x, y)], fs.classification)
    part = _by_leaf(loss)["inner.weight"].double()
    made = gram(loss, loss.net.theta, by="tensor").block("inner.weight")
    assert float((made - part @ part.T).norm()) < tolerance * float((part @ part.T).norm())


class Made(nn.Module):
    """A layer beside what a function makes of it and x."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.w, self.layer = function, nn.Parameter(torch.randn(shape)), nn.Linear(3, 3)

    def forward(self, x):
        return self.function(self, x)


def _chosen_tokens(m, x):
    """Tokens whose first entry is positive go through the layer: there may be as many as sequences, in no order of theirs."""
    tokens = x.reshape(-1, 3)
    at = (tokens[:, 0] > 0).nonzero()[:, 0]
    return torch.zeros_like(tokens).index_add(0, at, m.layer(tokens[at]).tanh()).reshape(x.shape).sum(1) * m.w


def _turned_where_open(m, x):
    """The layer sees positions first, and no sequence of the first batch opens its gate."""
    return ((x[..., :1] > 0) * m.layer(x.transpose(0, 1)).transpose(0, 1)).tanh().sum(1) + x.sum(1) * m.w


def _one_per_sequence_and_not():
    one, other = -torch.rand(2, 4, 4, 3).double()
    one[:, 1, 0], other[0, :2, 0], other[2:, 1, 0] = 1, 1, 1
    return one, other


def _gate_closed_and_open():
    x = torch.randn(2, 4, 4, 3).double()
    x[..., 0] = x[..., 0].abs() * torch.tensor([-1, 1])[:, None, None]
    return x.unbind()


def _rows():
    return torch.randn(2, 4, 4, 3).double()


COINCIDENCES = {
    "a scalar": (lambda m, x: m.w * m.layer(x).sum(1), (), _rows),
    "a scalar added": (lambda m, x: m.layer(x).tanh().sum(1) + m.w, (), _rows),
    "a weight on the left": (lambda m, x: m.layer((m.w @ x[:, :, 0].T).T[:, :3]), (4, 4), _rows),
    "columns of the transpose": (lambda m, x: m.layer((x[:, :, 0].T * m.w).T[:, :3]), (4, 1), _rows),
    "a vector for a matrix": (lambda m, x: m.layer(F.linear(x, m.w)[:, :3]), (3,), _rows),
    "one bias for all": (lambda m, x: torch.addmm(m.w, x[:, 0], m.layer.weight), (1,), _rows),
    "one row that is no batch": (lambda m, x: m.layer(x + F.embedding(torch.arange(4)[None], m.w).view(4, 3)).tanh().sum(1),
                                 (4, 3), _rows),
    "an id without a gradient": (lambda m, x: m.layer(F.embedding((x[..., 0] > 0).long(), m.w, padding_idx=-1)).tanh().sum(1),
                                 (2, 3), _gate_closed_and_open),
    "chosen tokens": (_chosen_tokens, (), _one_per_sequence_and_not),
    "a gate that is closed at first": (_turned_where_open, (), _gate_closed_and_open),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:gradients are taken one sequence at a time")
@pytest.mark.parametrize("name", COINCIDENCES)
def test_rows_that_are_no_sequences_although_there_are_as_many(name):
    function, shape, make = COINCIDENCES[name]
    model, batches = seeded(5, lambda: (Made(function, *shape).double(), make()))
    labels = torch.tensor([0, 1, 2, 1])
    loss = fs.objective(fs.functional(model), [(x, labels) for x in batches], fs.classification)
    rows, norms = rows_by_loop(loss, loss.net.theta), gradient_norms(loss, loss.net.theta, by="none", chunk_size=4)
    grams = gram(loss, loss.net.theta, by="tensor", chunk_size=4)
    torch.testing.assert_close(grams.total, rows @ rows.T, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(norms.total, rows.norm(dim=1), rtol=1e-9, atol=1e-11)


def test_experts_that_choose_among_the_tokens_of_all_are_refused():
    def function(m, x):
        tokens = x.reshape(-1, 3)
        at = tokens[:, 0].topk(4).indices.sort().values
        return torch.zeros_like(tokens).index_add(0, at, m.layer(tokens[at]).tanh()).reshape(x.shape).sum(1) * m.w

    model, (x, _) = seeded(5, lambda: (Made(function).double(), _rows()))
    loss = fs.objective(fs.functional(model), [(x, torch.tensor([0, 1, 2, 1]))], fs.classification)
    with pytest.raises(ValueError, match="see each other"):
        gram(loss, loss.net.theta)
