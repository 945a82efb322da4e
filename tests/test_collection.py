"""Fisher diagonals under three names, their accumulators and groups."""

from __future__ import annotations

import math

import pytest
import torch
from problems import loss_of, problem, relative, seeded
from torch import nn
from torch.func import jacrev

import funcscope as fs
from funcscope.core.layout import Layout
from funcscope.curvature.rows import per_sample_gradients
from funcscope.fisher import Welford, fisher_diagonal, fisher_groups, head_views

MODEL = seeded(3, lambda: nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))).double()


class Language(nn.Module):
    """Logits for every token, without a mask: seven words."""

    def __init__(self):
        super().__init__()
        self.body = MODEL

    def forward(self, input_ids):
        return self.body(input_ids)


def language(rows: list[torch.Tensor]) -> fs.Loss:
    return fs.objective(fs.functional(Language()), [{"input_ids": each} for each in rows], fs.causal_lm)


def ids(seed: int, *shape: int) -> torch.Tensor:
    return seeded(seed, lambda: torch.randint(0, 7, shape))


def dense(loss: fs.Loss, empirical: bool = False) -> list[torch.Tensor]:
    """The oracle: of every sequence the sum over its tokens, label by label, from the Jacobian of log-probabilities."""
    theta, out = loss.net.theta, []
    for inputs, targets in loss.batches:
        for row in range(len(targets.index)):
            one = {name: x[row : row + 1] for name, x in inputs.items()}
            log_p = lambda t, one=one: loss.net.apply(loss.params(t), one).log_softmax(-1)[0]  # noqa: E731
            jacobian, p = jacrev(log_p)(theta), log_p(theta).exp()
            total = torch.zeros_like(theta)
            for t in range(len(p)):
                if not targets.weight[row, t]:
                    continue
                for y in range(p.shape[1]):
                    share = float(y == targets.index[row, t]) if empirical else p[t, y]
                    total += share * jacobian[t, y] ** 2
            out.append(total)
    return out


@pytest.mark.parametrize("method", ["exact", "empirical"])
def test_entries_are_sums_over_tokens_and_labels_with_the_error_of_sequences(method):
    loss = language([ids(1, 3, 5), ids(2, 2, 4)])
    rows = torch.stack(dense(loss, method == "empirical"))
    lengths = torch.tensor([4.0, 4, 4, 3, 3]).double()
    found = fisher_diagonal(loss, loss.net.theta, method=method, chunk_size=3)
    value = rows.sum(0) / 18
    assert relative(found.value, value) < 1e-10
    residual = rows - value * lengths[:, None]
    stderr = (5 / 4 * residual.square().sum(0)).sqrt() / 18
    torch.testing.assert_close(found.stderr, stderr, rtol=1e-8, atol=1e-14)
    assert float(found.trace) == pytest.approx(float(value.sum()))
    assert float(found.trace_stderr) == pytest.approx(float((5 / 4 * residual.sum(1).square().sum()).sqrt() / 18))
    assert found.num == 5


def test_per_sequence_the_three_are_three_things():
    loss = language([ids(1, 3, 5), ids(2, 2, 4)])
    theta = loss.net.theta
    exact = fisher_diagonal(loss, theta, method="exact", unit="sequence")
    assert relative(exact.value, torch.stack(dense(loss)).sum(0) / 5) < 1e-10
    empirical = fisher_diagonal(loss, theta, method="empirical", unit="sequence", chunk_size=2)
    rows = per_sample_gradients(loss, theta).square()
    torch.testing.assert_close(empirical.value, rows.mean(0))
    torch.testing.assert_close(empirical.stderr, rows.std(0) / 5**0.5)
    assert relative(empirical.value, exact.value) > 0.2
    assert relative(fisher_diagonal(loss, theta, method="empirical").value, exact.value * 5 / 18) > 0.1


def test_draws_agree_with_the_exact_one_within_their_errors():
    loss = language([ids(1, 3, 5), ids(2, 2, 4)])
    theta = loss.net.theta
    for unit, num in (("token", 40), ("sequence", 15)):
        exact = fisher_diagonal(loss, theta, method="exact", unit=unit)
        drawn = fisher_diagonal(loss, theta, unit=unit, key=fs.key(0), num=num)
        assert abs(float(drawn.trace - exact.trace)) < 4 * float(drawn.trace_stderr)
        used = exact.value > 0
        z = ((drawn.value - exact.value) / drawn.stderr)[used]
        assert float(z.square().mean().sqrt()) < 1.6
    assert drawn.num == 15


def halves(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(rows.split(size))


@pytest.mark.parametrize(("method", "unit"), [("exact", "token"), ("empirical", "token"), ("empirical", "sequence")])
def test_batches_do_not_matter_and_copies_of_the_data_do_not(method, unit):
    rows = ids(4, 8, 4)
    whole = fisher_diagonal(language([rows]), language([rows]).net.theta, method=method, unit=unit).value
    for batches in (halves(rows, 1), halves(rows, 4), [rows, rows]):
        loss = language(batches)
        assert relative(fisher_diagonal(loss, loss.net.theta, method=method, unit=unit).value, whole) < 1e-10


def test_the_documented_square_of_a_mean_falls_with_the_batch():
    """E18: gbar^2 / T over batches of 1, 2, 4, 8 of the same data; and per token nothing falls with the length."""
    rows = ids(4, 8, 4)
    documented = []
    for size in (1, 2, 4, 8):
        squares = []
        for batch in halves(rows, size):
            loss = language([batch])
            squares.append(torch.func.grad(loss)(loss.net.theta).square() / (3 * size))
        documented.append(float(torch.stack(squares).mean(0).sum()))
    assert documented[0] > 5 * documented[3]
    assert documented == sorted(documented, reverse=True)
    short, long = (language([ids(5, 12, length)]) for length in (3, 9))
    a, b = (fisher_diagonal(loss, loss.net.theta, method="exact") for loss in (short, long))
    assert abs(float(a.trace - b.trace)) < 4 * float((a.trace_stderr**2 + b.trace_stderr**2).sqrt())


def test_a_model_of_transformers_has_the_diagonal_of_its_gradients():
    loss = loss_of("gpt2")
    found = fisher_diagonal(loss, loss.net.theta, method="empirical", unit="sequence")
    assert relative(found.value, per_sample_gradients(loss, loss.net.theta).square().mean(0)) < 1e-10
    drawn = fisher_diagonal(loss, loss.net.theta, key=fs.key(1), num=3)
    assert drawn.value.shape == drawn.stderr.shape == (loss.layout.num,)


def test_errors_count_batches_not_tokens():
    """E20: with the number of tokens for that of samples, the error is too small by the root of a batch's tokens."""
    means = seeded(6, lambda: torch.randn(400, 10, dtype=torch.float64))
    total = Welford.start(means[0])
    for each in means:
        total = total.update(each, 64.0)
    assert float(total.stderr.mean()) == pytest.approx(1 / 20, rel=0.1)
    documented = (total.scatter / (total.weight - 1) / total.weight).sqrt()
    assert float(total.stderr.mean() / documented.mean()) == pytest.approx(8, rel=0.01)


def test_groups_have_sums_and_means_of_their_entries():
    layout = Layout.of(seeded(0, lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(4, 2))))
    fisher = torch.arange(1, layout.num + 1).double()
    rows = fisher_groups(fisher, layout, by="row")
    linear = fisher[27:35].view(2, 4)
    assert [float(rows.total[rows.blocks.index(f"1.weight[{i}]")]) for i in range(2)] == linear.sum(1).tolist()
    assert [float(rows.mean[rows.blocks.index(f"1.weight[{i}]")]) for i in range(2)] == linear.mean(1).tolist()
    channels = fisher_groups(fisher, layout, by="channel")
    conv = fisher[:24].view(3, 8)
    assert [float(channels.total[channels.blocks.index(f"0.weight[{i}]")]) for i in range(3)] == conv.sum(1).tolist()
    for groups in (rows, channels, fisher_groups(fisher, layout), fisher_groups(fisher, layout, by="none")):
        assert float(groups.total.sum()) == float(fisher.sum())
        assert float(groups.sizes.sum()) == layout.num
    model = problem("llama").model
    net = fs.functional(model)
    diagonal = net.theta.square()
    heads = fisher_groups(diagonal, net.layout, by=head_views(net, model.config))
    weight = net.layout.unravel(diagonal)["model.layers.0.self_attn.k_proj.weight"]
    assert float(heads.total[heads.blocks.index("model.layers.0.self_attn.K.0")]) == pytest.approx(float(weight.sum()))


def test_what_has_no_such_diagonal_is_refused():
    loss = loss_of("mlp")
    theta = loss.net.theta
    with pytest.raises(ValueError, match="`key` must be given"):
        fisher_diagonal(loss, theta)
    custom = fs.objective(
        loss.net, [(torch.ones(2, 4).double(), torch.zeros(2, 3).double())], fs.custom(lambda o, y: (o - y)[:, 0] ** 2)
    )
    with pytest.raises(ValueError, match="needs a criterion over labels"):
        fisher_diagonal(custom, theta, method="exact")
    assert fisher_diagonal(custom, theta, method="empirical", unit="sequence").value.shape == theta.shape


@pytest.mark.parametrize(("method", "unit"), [("exact", "token"), ("empirical", "token"), ("empirical", "sequence")])
def test_a_gradient_that_is_not_finite_is_named_with_its_sequence_and_parameter(method, unit):
    rows = torch.tensor([[1, 2, 3], [1, 6, 2], [3, 2, 1]])
    loss = language([rows])
    params = loss.layout.unravel(loss.net.theta)
    params["body.0.weight"] = params["body.0.weight"].clone()
    params["body.0.weight"][6] = math.nan
    with pytest.raises(ValueError, match=r"sequence 1 in `body.0.weight` is not finite"):
        fisher_diagonal(loss, loss.layout.ravel(params), method=method, unit=unit)


def test_sequences_that_are_not_scored_count_nowhere():
    rows = ids(8, 3, 4)
    labels = rows.clone()
    labels[1] = -100
    net = fs.functional(Language())
    some, two = (
        fs.objective(net, [batch], fs.causal_lm)
        for batch in ({"input_ids": rows, "labels": labels}, {"input_ids": rows[[0, 2]]})
    )
    for method, unit in (("exact", "token"), ("empirical", "sequence"), ("exact", "sequence")):
        one, other = (fisher_diagonal(loss, net.theta, method=method, unit=unit) for loss in (some, two))
        torch.testing.assert_close(one.value, other.value)
        torch.testing.assert_close(one.stderr, other.stderr)
        assert one.num == 2


def test_labels_drawn_one_position_away_are_no_labels_of_the_model():
    """E17: y_t ~ p(. | x_<=t) at labels[t] is scored by the logits of t - 1, so that scores have a mean and F is another."""
    loss = language([ids(7, 1, 7)])
    theta = 3 * loss.net.theta
    ((inputs, _),) = loss.batches

    def log_p(t):
        return loss.net.apply(loss.params(t), inputs).log_softmax(-1)[0]

    scores, p = jacrev(log_p)(theta), log_p(theta).exp()

    def expected(scores, p):
        """E of T times the square of the mean score, over independent labels of all T positions; and the means."""
        means = torch.einsum("ty,typ->tp", p, scores)
        squares = torch.einsum("ty,typ->p", p, scores.square())
        return (squares + means.sum(0).square() - means.square().sum(0)) / len(p), means

    aligned, means = expected(scores[:6], p[:6])
    assert float(means.abs().max()) < 1e-12
    moved, moved_means = expected(scores[:6], p[1:])
    assert float(moved_means.norm()) > 0.5
    assert relative(moved, aligned) > 0.2
    found = fisher_diagonal(loss, theta, method="monte_carlo", key=fs.key(0), num=200)
    seen = found.stderr > 0
    one, other = (((found.value - value) / found.stderr)[seen].square().mean() for value in (aligned, moved))
    assert float(one) < 2
    assert float(other) > 20
