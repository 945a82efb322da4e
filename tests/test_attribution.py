"""Integrated gradients and ablation. Oracles: closed forms, a loop by hand, captum, the formulas of the documents failing."""

from inspect import unwrap

import pytest
import results as made
import torch
from problems import loss_of, tokens
from test_architectures import model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic import ablation_effects, integrated_gradients, token_attribution
from funcscope.mechanistic.integrated_gradients import last_positions
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.sources import InMemory
from funcscope.view.quantities import figures

WIDE = torch.float64


def points(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=WIDE))


def net_of(line):
    return fs.functional(model_of(line, WIDE))


# integrated gradients


def test_of_a_linear_function_they_are_weight_times_step_with_one_node():
    w, x, start = points(1, 3, 2), points(2, 4, 3, 2), points(3, 3, 2)
    found = integrated_gradients(lambda z: (z * w).sum((1, 2)), x, start, num=1)
    assert_close(found.attributions, ((x - start) * w).flatten(1))
    assert found.num_nodes == 1
    assert found.resolved.all()


def test_nodes_double_until_every_row_adds_up_and_what_does_not_is_not_resolved():
    x = points(1, 5, 3)

    def f(z):
        return torch.sin(9 * z + 1).sum(1)

    found = integrated_gradients(f, x, tol=1e-9)
    assert_close(
        found.attributions, torch.sin(9 * x + 1) - torch.sin(torch.ones(())).double(), rtol=1e-6, atol=1e-7
    )  # the entries do not meet
    assert found.num_nodes > 8
    assert found.num_forwards == 2 + 2 * found.num_nodes - 8
    few = integrated_gradients(f, 5 * x, tol=1e-9, num=2, most=4)
    assert (few.num_nodes, bool(few.resolved.all())) == (4, False)
    assert "not resolved" in few.notes[0]
    assert not found.notes


def test_a_mean_of_logits_is_no_scalar_that_matters():
    """As a document takes it: position 0 sees the first token alone, and softmax does not see the mean of logits."""
    net = net_of("gpt2")
    batch = tokens(7, 3, 6)
    ours = token_attribution(net, net.params, batch, tol=1e-6)
    assert (ours.attributions[:, 1:].abs() > 1e-9).all()
    x = fs.trace(net, net.params, batch, ["tok_embed"])["tok_embed"]

    def documented(embedded):
        return fs.apply_with(net, net.params, batch, {"tok_embed": embedded})[0][:, 0].mean(-1)

    theirs = integrated_gradients(documented, x).attributions.view(x.shape).sum(-1)
    assert not theirs[:, 1:].any()


@pytest.mark.slow
@pytest.mark.parametrize("line", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("left", [False, True])
def test_tokens_add_up_to_the_log_probability_of_the_last_one_whatever_side_is_padded(line, left):
    net, batch = net_of(line), tokens(7, 3, 9, pad=4, left=left)
    targets = torch.tensor([3, 5, 7])
    found = token_attribution(net, net.params, batch, targets=targets, num=16, most=16)
    rows, last = range(3), [8, 8, 8 if left else 4]
    logits = net.apply(net.params, batch)[rows, last]
    assert_close(found.output, logits.log_softmax(-1)[rows, targets].detach())
    real = batch["attention_mask"].bool()
    assert torch.equal(found.attributions.isnan(), ~real)
    assert_close((found.attributions.nansum(1) - found.output + found.baseline_output).abs(), found.completeness_error)
    assert (found.completeness_error < 0.05 * (found.output - found.baseline_output).abs()).all()
    alone = {name: x[2:, 4:] if left else x[2:, :5] for name, x in batch.items()}
    if line != "gpt2" or not left:  # whose positions are absolute
        given = torch.cat([fs.trace(net, net.params, batch, ["tok_embed"])["tok_embed"][real]]).mean(0)
        one = token_attribution(net, net.params, alone, targets=targets[2:], baseline=given, num=16, most=16)
        assert_close(one.attributions[0], found.attributions[2][real[2]], rtol=1e-4, atol=1e-6)


def test_a_difference_of_logits_and_the_models_own_token():
    net, batch = net_of("llama"), tokens(7, 2, 5)
    logits = net.apply(net.params, batch)[:, -1].detach()
    own = token_attribution(net, net.params, batch, baseline="zero", num=4, most=4)
    assert "not resolved" in own.notes[0]  # norm(a x) is norm(x) until a is tiny
    assert_close(own.output, logits.log_softmax(-1).amax(-1))
    apart = token_attribution(
        net, net.params, batch, targets=torch.tensor([1, 2]), against=torch.tensor([3, 4]), most=8
    )
    assert_close(apart.output, torch.stack([logits[0, 1] - logits[0, 3], logits[1, 2] - logits[1, 4]]))


def test_bad_requests_of_attributions_get_one_clear_line():
    x = points(0, 2, 3)
    for f, message in (
        (lambda z: z.mean(), r"one number for each of the 2 rows, got \(\)"),
        (lambda z: 1.0, "a float"),
    ):
        with pytest.raises(ValueError, match=message):
            unwrap(integrated_gradients)(f, x)
    total = lambda z: z.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"`baseline` must .* \(2, 3\), got \(4,\)"):
        integrated_gradients(total, x, torch.zeros(4))
    with pytest.raises(ValueError, match="`tol` must be above 0"):
        integrated_gradients(total, x, tol=0.0)
    with pytest.raises(ValueError, match="`num` must be an integer of at least 1"):
        integrated_gradients(total, x, num=0)
    with pytest.raises(ValueError, match="`most` must be an integer of at least 8"):
        integrated_gradients(total, x, most=7)
    with pytest.raises(ValueError, match="`x` must hold floating-point numbers"):
        unwrap(integrated_gradients)(total, x.long(), 0.5)
    net, batch = net_of("gpt2"), tokens(7, 2, 5)
    with pytest.raises(ValueError, match="`targets` must hold one token for each of the 2 sequences"):
        unwrap(token_attribution)(net, net.params, batch, targets=torch.tensor([1]))
    with pytest.raises(ValueError, match="`against` must be tokens from 0 to 39"):
        token_attribution(net, net.params, batch, against=torch.tensor([1, 40]))
    with pytest.raises(ValueError, match="`baseline` must be 'zero'"):
        unwrap(token_attribution)(net, net.params, batch, baseline="ones")
    with pytest.raises(ValueError, match="`token_type_ids` of 'gpt2'"):
        token_attribution(net, net.params, {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])})
    with pytest.raises(ValueError, match="`inputs` must have `input_ids`"):
        token_attribution(net, net.params, {"inputs_embeds": torch.zeros(1, 3, 16, dtype=torch.float64)})
    with pytest.raises(ValueError, match="sequence 1 has no token"):
        last_positions(torch.tensor([[True, False], [False, False]]))


@pytest.mark.outsider
@pytest.mark.filterwarnings("ignore")
def test_attributions_are_those_of_captum():
    captum = pytest.importorskip("captum.attr")
    net, batch = net_of("gpt2"), tokens(7, 3, 6)
    x = fs.trace(net, net.params, batch, ["tok_embed"])["tok_embed"]

    def f(embedded):
        return fs.apply_with(net, net.params, batch, {"tok_embed": embedded})[0][:, -1].log_softmax(-1)[:, 5]

    ours = token_attribution(net, net.params, batch, targets=torch.tensor([5, 5, 5]), baseline="zero", num=16, most=16)
    theirs = captum.IntegratedGradients(f).attribute(
        x, torch.zeros_like(x), n_steps=16, method="gausslegendre", internal_batch_size=3
    )
    assert_close(ours.attributions, theirs.sum(-1), rtol=1e-6, atol=1e-9)  # its weights are float32


# ablation


def by_hand(loss, edit_of):
    """Changes of each sequence's summed loss, and weights, with one forward pass per batch."""
    changes, weights = [], []
    for inputs, targets in loss.batches:
        new = loss.scored(
            lambda x, inputs=inputs: fs.apply_with(loss.net, loss.net.params, x, edit_of(inputs))[0], inputs, targets
        )
        old = loss.scored(lambda x: fs.apply_with(loss.net, loss.net.params, x, {})[0], inputs, targets)
        changes.append(new[0] - old[0])
        weights.append(old[1])
    return torch.cat(changes).detach(), torch.cat(weights)


def check(changes, weights, effect, stderr):
    mean, n = changes.sum() / weights.sum(), len(weights)
    assert_close(effect, mean, rtol=1e-9, atol=1e-12)
    assert_close(
        stderr, (n / (n - 1) * (changes - mean * weights).square().sum()).sqrt() / weights.sum(), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ablated_heads_are_those_of_a_loop_by_hand_with_paired_errors(name):
    loss = loss_of(name)
    found = ablation_effects(loss, loss.net.params, mode="zero")
    assert found.effects.shape == (2, 2)
    for layer, head in ((0, 1), (1, 0)):
        patch = fs.Patch(torch.zeros((), dtype=WIDE), heads=head)
        parts = by_hand(loss, lambda _, layer=layer, patch=patch: {f"z.{layer}": patch})
        check(*parts, found.effects[layer, head], found.effects_stderr[layer, head])
    one = ablation_effects(loss, loss.net.params, mode="zero", chunk=1)
    assert_close(one.changes, found.changes, rtol=1e-9, atol=1e-13)
    assert found.asdict()["effects"].shape == (2, 2)


@pytest.mark.parametrize(
    ("sites", "kind"), [("mlps", "mlp_out"), ("attention", "attn_out"), ("residual", "resid_post")]
)
def test_means_are_over_all_tokens_of_all_batches(sites, kind):
    loss = loss_of("gpt2")
    real = [fs.trace(loss.net, loss.net.params, x, [f"{kind}.1"]) for x, _ in loss.batches]
    mean = torch.cat([seen[f"{kind}.1"][seen.mask] for seen in real]).mean(0)
    found = ablation_effects(loss, loss.net.params, sites=sites, mode="mean")
    parts = by_hand(loss, lambda inputs: {f"{kind}.1": fs.Patch(mean)})
    check(*parts, found.effects[1], found.effects_stderr[1])


def test_neurons_by_list():
    loss = loss_of("llama")
    found = ablation_effects(loss, loss.net.params, sites="neurons", units=[(1, 3), (0, 19)], mode="zero")
    zero = torch.zeros((), dtype=WIDE)
    for row, (layer, unit) in enumerate([(1, 3), (0, 19)]):
        patch = fs.Patch(zero, units=unit)
        parts = by_hand(loss, lambda _, layer=layer, patch=patch: {f"mlp_post.{layer}": patch})
        check(*parts, found.effects[row], found.effects_stderr[row])
    assert list(found.frame()["neuron"].dropna()) == ["1.3", "0.19"]


def test_resampled_values_are_those_of_another_sequence_at_the_same_place():
    loss = loss_of("gpt2")
    found = ablation_effects(loss, loss.net.params, mode="resample", key=fs.key(3))
    donors = found.donors.long().tolist()
    assert sorted(donors) == list(range(5))
    assert all(i != donor and (i < 3) == (donor < 3) for i, donor in enumerate(donors))
    begun = iter((0, 3))

    def edit(inputs):
        first = next(begun)
        seen = fs.trace(loss.net, loss.net.params, inputs, ["z.0"])
        z, mask = seen["z.0"], seen.mask
        new = z.clone()
        for row in range(len(z)):
            other = z[donors[first + row] - first][mask[donors[first + row] - first]]
            for k, t in enumerate(mask[row].nonzero()[:, 0].tolist()):
                new[row, t] = other[k % len(other)]
        return {"z.0": fs.Patch(new, heads=1)}

    changes, weights = by_hand(loss, edit)
    assert_close(found.effects[0, 1], changes.sum() / weights.sum())
    rest = changes - changes.sum() / weights.sum() * weights
    square = rest.square().sum() + 2 * (rest * rest[donors]).sum().clamp(min=0)
    assert_close(found.effects_stderr[0, 1], (5 / 4 * square).sqrt() / weights.sum())
    again = ablation_effects(loss, loss.net.params, mode="resample", key=fs.key(3))
    assert found == again


def test_where_ablation_does_nothing_the_effect_is_0_and_the_documented_necessity_is_largest():
    loss = loss_of("gpt2")
    params = dict(loss.net.params)
    weight = params["transformer.h.1.attn.c_proj.weight"].clone()
    weight[:6] = 0  # head 0 writes nothing
    params["transformer.h.1.attn.c_proj.weight"] = weight
    effects = ablation_effects(loss, params, mode="zero").effects
    assert effects[1, 0] == 0
    assert effects.abs().argmin() == 2
    assert (1 / (1 + effects.abs())).argmax() == 2  # as documented: the most necessary head


def test_bad_requests_of_ablations_get_one_clear_line():
    loss = loss_of("gpt2")
    for options, message in (
        ({"sites": "head"}, "`sites` must be one of 'heads', 'attention'"),
        ({"mode": "noise"}, "`mode` must be one of 'zero', 'mean', 'resample'"),
        ({"units": [(0, 1)]}, "`units` must be a list of"),
        ({"sites": "neurons"}, "`units` must be a list of"),
        ({"sites": "neurons", "units": [(2, 0)]}, r"2 layers with 48 units each, got \(2, 0\)"),
        ({"chunk": 0}, "`chunk` must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            unwrap(ablation_effects)(loss, loss.net.params, **options)
    with pytest.raises(TypeError, match="`key` must be a key"):
        ablation_effects(loss, loss.net.params, mode="resample")
    with pytest.raises(ValueError, match="batch 0 has one sequence"):
        ablation_effects(loss.split(1), loss.net.params, mode="resample", key=fs.key(0))
    other = loss_of("mlp")
    with pytest.raises(ValueError, match="not described"):
        ablation_effects(other, other.net.params)


def test_ablation_is_a_metric_of_studies():
    loss = made.language_loss()
    source = InMemory({"data": loss}, "model", theta=loss.net.theta, content="1")
    (outcome,) = run([metric("ablation_effects").configured(mode="zero")], [source])
    assert outcome.ok, outcome.traceback
    ours = ablation_effects(loss, loss.net.params, mode="zero")
    assert torch.equal(outcome.result.effects, ours.effects)
    assert [each.figure is not None for each in figures([outcome], ["effects"])] == [True]
