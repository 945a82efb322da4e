"""Scores of parameters, the prunable set, exact masks, and heads and neurons as units."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import gpt2, llama, seeded, tokens
from torch import nn
from torch.nn.utils import prune

import funcscope as fs
from funcscope.core.heads import head_views
from funcscope.core.layout import Layout
from funcscope.core.trace import apply_with
from funcscope.curvature import fisher_diagonal_mc
from funcscope.weights import (
    head_units,
    input_norms,
    neuron_units,
    prunable_leaves,
    saliency,
    sparse_mask,
    taylor_saliency,
    unit_mask,
    unit_saliency,
    wanda_saliency,
)


def language(make, pad=2) -> tuple[nn.Module, fs.Loss, dict]:
    model, batch = seeded(0, make).double().eval(), tokens(1, 3, 6, pad=pad)
    return model, fs.objective(fs.functional(model), [batch], fs.causal_lm), batch


def classifier() -> tuple[nn.Module, fs.Loss]:
    model = seeded(0, lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))).double()
    x = seeded(1, lambda: torch.randn(7, 5, dtype=torch.float64))
    return model, fs.objective(
        fs.functional(model), [(x[:4], x[:4, 0].gt(0).long()), (x[4:], x[4:, 1].gt(0).long() * 2)], fs.classification
    )


def sequence_gradients(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """By autograd of the untouched model, one sequence after the other: gradients of summed losses, and counts."""
    rows, counts = [], []
    for ids, there in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = ids[: int(there.sum())][None]
        out = model(input_ids=ids).logits[0, :-1]
        loss = nn.functional.cross_entropy(out, ids[0, 1:], reduction="sum")
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        counts.append(len(out))
    return torch.stack(rows), torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_first_order_scores_are_those_of_single_sequences_by_plain_autograd(make):
    model, loss, batch = language(make)
    theta, (rows, counts) = loss.net.theta, sequence_gradients(model, batch)
    moved = rows * theta
    torch.testing.assert_close(taylor_saliency(loss, theta, chunk_size=2), moved.abs().sum(0) / counts.sum())
    squares = (3 * moved / counts.sum()).square().mean(0)
    torch.testing.assert_close(saliency(loss, theta, "taylor_squared"), squares)
    torch.testing.assert_close(saliency(loss, theta, "gradient"), rows.sum(0).abs() / counts.sum())
    torch.testing.assert_close(saliency(loss, theta), theta.abs())
    assert (saliency(loss, theta, "taylor") - moved.sum(0).abs() / counts.sum() >= -1e-7).all()


def test_documented_taylor_score_vanishes_at_a_stationary_point_and_ours_does_not():
    """E32: two weights, one of which every example pulls at, both ways; the other has no say at all."""
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False)).double())
    inputs = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    loss = fs.objective(net, [(inputs, torch.tensor([[1.0], [3.0]]).double())], fs.mse)
    theta = torch.tensor([2.0, 2.0]).double()
    documented = (theta * torch.func.grad(loss)(theta)).abs()
    assert documented.tolist() == [0.0, 0.0]
    assert taylor_saliency(loss, theta).tolist() == [4.0, 0.0]
    assert taylor_saliency(loss, theta, power=2).tolist() == [16.0, 0.0]


def test_curvature_scores_are_the_fisher_diagonal_and_its_saliency():
    _, loss = classifier()
    theta, key = loss.net.theta, fs.key(3)
    fisher = fisher_diagonal_mc(loss, theta, key=key, num=4).value
    assert torch.equal(saliency(loss, theta, "fisher", key=key, num=4), fisher)
    torch.testing.assert_close(saliency(loss, theta, "obd", key=key, num=4), fisher * theta**2 / 2)
    with pytest.raises(TypeError, match="key"):
        saliency(loss, theta, "obd")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_input_norms_are_those_that_hooks_see_without_padding(make):
    model, loss, batch = language(make)
    there, squares, handles = batch["attention_mask"].bool(), {}, []
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):

            def hook(_, args, name=name):
                squares[name] = args[0][there].square().sum(0)

            handles.append(module.register_forward_pre_hook(hook))
    model(**batch)
    for handle in handles:
        handle.remove()
    found, leaves = input_norms(loss, loss.net.theta), loss.layout.by_name
    for name, expected in squares.items():
        if f"{name}.weight" not in leaves:  # a head that is tied
            continue
        norms, dim = found[f"{name}.weight"]
        torch.testing.assert_close(norms, expected.sqrt())
        assert dim == 1 - leaves[f"{name}.weight"].filter_dim
    assert len(found) >= 8


def test_wanda_scores_are_the_change_of_an_output_when_one_weight_is_deleted():
    model, loss = classifier()
    x = torch.cat([inputs for inputs, _ in loss.batches])
    weight, scores = model[0].weight.detach(), loss.layout.unravel(wanda_saliency(loss, loss.net.theta))
    for i in range(4):
        for j in range(5):
            without = weight.clone()
            without[i, j] = 0
            assert float(scores["0.weight"][i, j]) == pytest.approx(float((x @ (weight - without).T).norm()))
    assert scores["0.bias"].isnan().all()
    assert not scores["2.weight"].isnan().any()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1),
        lambda: nn.Conv2d(4, 4, (3, 1), padding="same", groups=2),
        lambda: nn.Conv2d(2, 3, 2, dilation=2, padding=1, padding_mode="circular"),
        lambda: nn.Conv3d(1, 2, 2),
    ],
)
def test_wanda_scores_of_a_filter_are_the_change_of_its_output_when_one_weight_is_deleted(layer):
    """And half of each filter is pruned by them."""
    conv = seeded(0, layer).double()
    x = seeded(1, lambda: torch.randn(3, conv.in_channels, *[5] * (conv.weight.ndim - 2)).double())
    net = fs.functional(nn.Sequential(conv, nn.Flatten()))
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in (x[:2], x[2:])]
    loss = fs.objective(net, batches, fs.classification)
    scores, whole = loss.layout.unravel(wanda_saliency(loss, net.theta)), conv(x)
    for place in itertools.product(*map(range, conv.weight.shape)):
        without = copy.deepcopy(conv)
        without.weight.data[place] = 0
        assert float(scores["0.weight"][place]) == pytest.approx(float((without(x) - whole).detach().norm()), abs=1e-12)
    rows = sparse_mask(wanda_saliency(loss, net.theta), loss.layout, sparsity=0.5, scope="row")
    left = loss.layout.unravel(rows.double())["0.weight"].flatten(1).sum(1)
    assert left.tolist() == [conv.weight[0].numel() - math.floor(conv.weight[0].numel() / 2 + 0.5)] * len(left)


def test_wanda_scores_of_a_transposed_filter_are_the_change_of_its_output():
    conv = seeded(0, lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1)).double()
    x = seeded(1, lambda: torch.randn(3, 2, 3, 3).double())
    net = fs.functional(nn.Sequential(conv, nn.Flatten()))
    loss = fs.objective(net, [(x, torch.zeros(3, dtype=torch.long))], fs.classification)
    scores, whole = loss.layout.unravel(wanda_saliency(loss, net.theta)), conv(x).detach()
    for place in itertools.product(*map(range, conv.weight.shape)):
        without = copy.deepcopy(conv)
        without.weight.data[place] = 0
        assert float(scores["0.weight"][place]) == pytest.approx(float((without(x) - whole).detach().norm()), abs=1e-12)


def test_a_matrix_used_without_a_module_has_inputs_and_an_embedding_none():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)
            self.into, self.out = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))

        def forward(self, ids):
            return self.table(ids) @ self.into @ self.out.T

    net = fs.functional(seeded(0, Raw))
    loss = fs.objective(net, [(torch.tensor([0, 1]), torch.tensor([0, 1]))], fs.classification)
    found = input_norms(loss, net.theta)
    assert {name: dim for name, (_, dim) in found.items()} == {"into": 0, "out": 1}
    x = net.params["table.weight"][:2]
    torch.testing.assert_close(found["into"].norms.float(), x.norm(dim=0).detach())
    torch.testing.assert_close(found["out"].norms.float(), (x @ net.params["into"]).norm(dim=0).detach())


# Which parameters may be pruned, and how many are


def test_prunable_are_matrices_of_linear_maps_unless_others_are_asked_for():
    of_gpt2, of_llama = (Layout.of(seeded(0, make)) for make in (gpt2, llama))
    names = {leaf.name for leaf in prunable_leaves(of_gpt2)}
    assert len(names) == 8  # four in each of two layers; the head is the embedding
    assert all("weight" in name and "ln" not in name and "wte" not in name and "wpe" not in name for name in names)
    assert "lm_head.weight" in {leaf.name for leaf in prunable_leaves(of_llama)}
    assert len(prunable_leaves(of_llama)) == 15
    assert {"transformer.wte.weight"} < {leaf.name for leaf in prunable_leaves(of_gpt2, "matrices")} - names
    assert len(prunable_leaves(of_gpt2, "all")) == len(of_gpt2.leaves)
    assert [leaf.name for leaf in prunable_leaves(of_gpt2, ["transformer.ln_f.bias"])] == ["transformer.ln_f.bias"]


@given(
    seed=st.integers(0, 99),
    scope=st.sampled_from(["global", "tensor", "row"]),
    shares=st.tuples(*[st.floats(0, 1)] * 2),
)
@settings(max_examples=40, deadline=None)
def test_masks_are_exact_nested_and_keep_the_largest(seed, scope, shares):
    layout = Layout.of(seeded(0, lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))))
    score = seeded(seed, lambda: torch.randint(0, 6, (layout.num,))).double()
    low, high = (sparse_mask(score, layout, sparsity=s, scope=scope) for s in sorted(shares))
    assert (low | ~high).all()
    parts = layout.unravel(score), layout.unravel(high.double())
    groups = {"global": [["0.weight", "1.weight"]], "tensor": [["0.weight"], ["1.weight"]]}
    rows = [(parts[0][n][i], parts[1][n][i]) for n in ("0.weight", "1.weight") for i in range(len(parts[0][n]))]
    joined = [tuple(torch.cat([p[n].flatten() for n in names]) for p in parts) for names in groups.get(scope, [])]
    for values, kept in joined or rows:
        assert int(kept.sum()) == len(values) - math.floor(max(shares) * len(values) + 0.5)
        if 0 < int(kept.sum()) < len(values):
            assert values[kept > 0].min() >= values[kept == 0].max()
    assert parts[1]["0.bias"].all()
    assert parts[1]["1.bias"].all()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_masks_of_magnitudes_are_those_of_torch_prune(scope):
    model = seeded(0, lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    net = fs.functional(model)
    mask = net.layout.unravel(sparse_mask(net.theta.abs(), net.layout, sparsity=0.4, scope=scope).double(), cast=False)
    pairs = [(model[0], "weight"), (model[1], "weight")]
    if scope == "global":
        prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=20)  # of 50
    else:
        for (module, name), amount in zip(pairs, (12, 8), strict=True):
            prune.l1_unstructured(module, name, amount)
    for i in range(2):
        assert torch.equal(mask[f"{i}.weight"], model[i].weight_mask.double())


def test_rows_are_output_units_in_either_orientation():
    layout = Layout.of(seeded(0, gpt2))
    score = seeded(1, lambda: torch.rand(layout.num))
    mask = layout.unravel(sparse_mask(score, layout, sparsity=0.25, scope="row").double(), cast=False)
    assert (mask["transformer.h.0.attn.c_attn.weight"].sum(0) == 9).all()  # (12 in, 36 out)
    assert (mask["transformer.h.1.mlp.c_proj.weight"].sum(0) == 36).all()  # (48 in, 12 out)
    assert mask["transformer.h.0.attn.c_attn.weight"].sum(1).unique().numel() > 1


def test_what_cannot_be_ranked_or_named_is_refused():
    _, loss = classifier()
    layout, theta = loss.layout, loss.net.theta
    with pytest.raises(ValueError, match=r"nan in `0\.bias`"):
        sparse_mask(wanda_saliency(loss, theta), layout, sparsity=0.5, prunable="all")
    assert sparse_mask(wanda_saliency(loss, theta), layout, sparsity=0.5).sum() == layout.num - 16
    with pytest.raises(ValueError, match="`prunable` holds names"):
        prunable_leaves(layout, ["nothing"])
    with pytest.raises(ValueError, match="of which this layout has none"):
        prunable_leaves(Layout.of(nn.LayerNorm(3)))
    with pytest.raises((ValueError, TypeError), match="power"):
        taylor_saliency(loss, theta, power=3)
    with pytest.raises(ValueError, match="multiplied from both sides"):

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(2, 2))

            def forward(self, x):
                return x @ self.w @ self.w.T

        net = fs.functional(Both())
        input_norms(fs.objective(net, [(torch.ones(1, 2), torch.tensor([0]))], fs.classification), net.theta)


# Heads and neurons


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_head_without_its_parameters_is_a_head_whose_output_is_zero(make):
    _, loss, batch = language(make)
    net, units = loss.net, head_units(loss.layout)
    share = net.layout.heads.num // net.layout.heads.num_kv
    assert len(units.names) == 2 * net.layout.heads.num_kv
    there = batch["attention_mask"].bool()
    for i, name in enumerate(units.names):
        layer, group = (int(part) for part in name.split(".") if part.isdigit())
        kept = torch.arange(len(units.names)) != i
        pruned = net.apply(net.layout.unravel(net.theta * unit_mask(kept, net.layout, units)), batch)

        def silent(z, group=group):
            z = z.clone()
            z[:, :, group * share : (group + 1) * share] = 0
            return z

        ablated, _ = apply_with(net, net.params, batch, {f"z.{layer}": silent})
        torch.testing.assert_close(pruned[there], ablated[there])
        assert not torch.allclose(pruned[there], net.apply(net.params, batch)[there])


def test_queries_that_share_keys_are_one_unit_of_all_their_parameters():
    layout = Layout.of(seeded(0, llama))
    units = head_units(layout)  # two queries, one key and value head
    assert units.names == ["model.layers.0.self_attn.0", "model.layers.1.self_attn.0"]
    mask = unit_mask(torch.tensor([False, True]), layout, units)
    gone = {name for name, x in layout.unravel(mask.double(), cast=False).items() if not x.any()}
    assert gone == {f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"}
    assert int((~mask).sum()) == sum(layout.by_name[name].numel for name in gone)
    of_views = head_views(layout, layout.heads)
    assert len(of_views) == 2 * (2 + 1 + 1 + 2)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_neuron_is_its_rows_its_bias_and_its_column(make):
    _, loss, batch = language(make)
    net, units = loss.net, neuron_units(loss.layout)
    width = 48 if make is gpt2 else 20
    assert len(units.names) == 2 * width
    kept = torch.arange(2 * width) % width != 5
    mask = unit_mask(kept, net.layout, units)
    pruned = net.apply(net.layout.unravel(net.theta * mask), batch)

    def silent(x):
        x = x.clone()
        x[..., 5] = 0
        return x

    ablated, _ = apply_with(net, net.params, batch, {"mlp_post.0": silent, "mlp_post.1": silent})
    there = batch["attention_mask"].bool()
    torch.testing.assert_close(pruned[there], ablated[there])
    assert int((~mask).sum()) == 2 * (12 + 12 + (1 if make is gpt2 else 12))


def test_scores_of_units_are_sums_over_their_parameters():
    layout = Layout.of(seeded(0, gpt2))
    score = seeded(2, lambda: torch.rand(layout.num, dtype=torch.float64))
    for units in (head_units(layout), neuron_units(layout)):
        total = unit_saliency(score, layout, units)
        for i in range(0, len(units.names), 5):
            gone = ~unit_mask(torch.arange(len(units.names)) != i, layout, units)
            assert float(total[i]) == pytest.approx(float(score[gone].sum()))
        nothing = unit_mask(torch.zeros(len(units.names), dtype=torch.bool), layout, units)
        assert float(total.sum()) == pytest.approx(float(score[~nothing].sum()))  # no parameter is in two units


def test_wanda_scores_of_a_matrix_stored_in_out_go_by_rows():
    loss = fs.objective(fs.functional(seeded(0, gpt2)), [tokens(1, 2, 6)], fs.causal_lm)
    theta, name = loss.net.theta, "transformer.h.0.mlp.c_fc.weight"
    scores = loss.layout.unravel(saliency(loss, theta, "wanda"))[name]
    norms = input_norms(loss, theta)[name].norms.to(theta.dtype)
    torch.testing.assert_close(scores, loss.layout.unravel(theta)[name].abs() * norms[:, None])


def test_scores_of_units_are_added_in_the_dtype_of_sums():
    layout = Layout.of(seeded(0, llama))
    units = neuron_units(layout)
    score = seeded(2, lambda: torch.rand(layout.num)).bfloat16()
    exact = unit_saliency(score.double(), layout, units)
    assert torch.equal(unit_saliency(score, layout, units), exact)
    assert len(exact.bfloat16().unique()) < len(exact.unique()) == len(exact)  # rounded sums have ties
    score[layout.by_name[units.parts[0].leaf].slice] = math.inf
    assert unit_saliency(score, layout, units)[units.parts[0].unit].isinf().all()


def test_units_of_models_without_them_are_refused():
    layout = Layout.of(seeded(0, lambda: nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="does not say how many heads"):
        head_units(layout)
    with pytest.raises(ValueError, match="name of an MLP's matrix"):
        neuron_units(layout)
    with pytest.raises(ValueError, match="one number of hidden units"):
        neuron_units(Layout.of(seeded(0, lambda: nn.ModuleDict({"fc1": nn.Linear(2, 6), "fc2": nn.Linear(3, 2)}))))
